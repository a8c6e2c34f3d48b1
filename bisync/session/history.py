"""Look back: what became of a path, and a file or folder as it was at a time.

The operation log says what there was; the contents are found by digest: live, in the store,
or with the peer and in its store, as far as they can be reached from here.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from msgspec import Struct, field

from bisync.core.filters import Filters
from bisync.core.ignore import Matcher
from bisync.core.method import Apply
from bisync.core.node import ROOT, Content, Kind
from bisync.core.past import Past, State, find, path_of, paths, rewind
from bisync.core.path import STORE_DIR, display
from bisync.core.wish import Wish
from bisync.errors import PathError, UsageError
from bisync.fs.archive import pair_states
from bisync.fs.materialise import Builder, Origin, chain_among
from bisync.fs.oplog import MIRRORS, OperationLog, agreed_now, observed_now
from bisync.fs.replica import Options, Replica
from bisync.fs.rewind import Kept
from bisync.fs.store import Version
from bisync.fs.walk import ScanRules
from bisync.session.mirror import mirror_at
from bisync.session.mirrorconfig import MirrorConfig
from bisync.session.mirrorplace import MirrorPlace
from bisync.session.report import Listener, Report


class Moment(Struct, frozen=True):
    """One thing that happened to a path's node."""

    time_ns: int
    action: str  # created | moved | modified | attributes | deleted | kept
    path: bytes  # where it was then
    old_path: bytes | None = None
    size: int | None = None
    digest: str | None = None
    kept: bytes | None = None  # path below the root that the version lies in
    complete: bool = True  # the version before this can be put back from here
    needs_peer: bool = False  # but not without the other side

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "type": "version",
            "time_ns": self.time_ns,
            "action": self.action,
            "path": display(self.path),
            "old_path": None if self.old_path is None else display(self.old_path),
            "size": self.size,
            "digest": self.digest,
            "kept": None if self.kept is None else display(self.kept),
            "complete": self.complete,
            "needs_peer": self.needs_peer,
        }


class Restored(Struct):
    """What a restore did."""

    entries: int = 0
    incomplete: list[bytes] = field(default_factory=list)  # paths whose content is nowhere
    report: Report = field(default_factory=Report)


class Retrospect:
    """One root, opened to look back. Use :func:`looking_back`."""

    def __init__(self, replica: Replica, store_name: bytes) -> None:
        self.replica = replica
        self.log = OperationLog(replica.database)
        self.path = replica.path
        self.pair, self.column = self._pair()
        self.present = self._present()
        self.places = self._places(store_name)
        self._live: dict[bytes, int] | None = None

    def _pair(self) -> tuple[int, int]:
        """The log that reaches furthest back, pairs before mirrors."""
        known = [
            (began, state.pair, state.column)
            for state in pair_states(self.replica.database)
            if (began := self.log.began(state.pair)) is not None
        ]
        if known:
            _, pair, column = min(known)
            return pair, column
        return MIRRORS, 0

    def _present(self) -> State:
        if self.pair == MIRRORS:
            return observed_now(self.replica.index)
        return agreed_now(self.replica.database, self.pair, self.column)

    def _places(self, store_name: bytes) -> list[Origin]:
        """Where contents may be: this root first, then the peers that can be reached."""
        found = [Origin(self.path, store_name)]
        for state in pair_states(self.replica.database):
            location = os.fsencode(state.location)
            if os.path.isdir(location):
                found.append(Origin(location, store_name))
        return found

    # -- time ----------------------------------------------------------------

    def at(self, time_ns: int) -> State:
        """The tree at a time.

        Raises:
            UsageError: the log does not reach back that far.
        """
        began = self.log.began(self.pair)
        if began is None:
            raise UsageError(
                f"{os.fsdecode(self.path)}: nothing is logged yet; sync or mirror first"
            )
        if time_ns < began:
            raise UsageError(
                f"{os.fsdecode(self.path)}: the log begins at {_shown(began)}; give a later time"
            )
        return rewind(self.present, self.log.since(self.pair, time_ns))

    def _lost_at(self, time_ns: int) -> dict[bytes, list[bytes]]:
        """Digest -> the paths of the versions with it that went since a time, as they went."""
        found: dict[bytes, list[bytes]] = {}
        state = dict(self.present)
        together: list[tuple[int, bytes]] = []  # of one commit, in any order

        def settle() -> None:
            for key, digest in together:
                path = path_of(state, key)
                if path is not None:
                    found.setdefault(digest, []).append(path)
            together.clear()

        last = 0
        for operation in self.log.backwards(self.pair):
            if operation.time_ns <= time_ns:
                break
            if operation.time_ns != last:
                settle()
                last = operation.time_ns
            key, before, after = operation.key, operation.before, state.get(operation.key)
            if before is None:
                state.pop(key, None)
                continue
            state[key] = before
            digest = before.content.digest
            if digest is not None and (after is None or after.content.digest != digest):
                together.append((key, digest))
        settle()
        return found

    # -- history -------------------------------------------------------------

    def history(self, path: bytes) -> list[Moment]:
        """All that is known of a path and of the nodes at it, the oldest first."""
        key = find(self.present, path)
        keys = set(self.log.ever_named(self.pair, path.rpartition(b"/")[2]))
        keys |= set() if key is None else {key}
        moments: list[Moment] = []
        for node, found in self._sweep(keys).items():
            if node == key or any(path in (m.path, m.old_path) for m in found):
                moments += found
        seen = {(m.digest, m.size) for m in moments}
        moments += [
            Moment(v.time_ns, "kept", path, None, v.size, v.digest, self._shown(v))
            for v in self._versions(path)
            if (v.digest, v.size) not in seen
        ]
        return sorted(moments, key=lambda m: m.time_ns)

    def _shown(self, version: Version) -> bytes:
        return self.places[0].store_name + b"/" + version.kept

    def _sweep(self, keys: set[int]) -> dict[int, list[Moment]]:
        """What happened to some nodes: one pass over the log, from now backwards."""
        found: dict[int, list[Moment]] = {key: [] for key in keys}
        state = dict(self.present)
        for operation in self.log.backwards(self.pair):
            key, before = operation.key, operation.before
            after = state.get(key) if key in keys else None
            new = path_of(state, key) if after is not None else None
            if before is None:
                state.pop(key, None)
            else:
                state[key] = before
            if key in keys:
                old = path_of(state, key) if before is not None else None
                found[key] += self._moments(operation.time_ns, (old, before), (new, after))
        return found

    def _moments(
        self,
        time_ns: int,
        was: tuple[bytes | None, Past | None],
        now: tuple[bytes | None, Past | None],
    ) -> Iterator[Moment]:
        (old, before), (new, after) = was, now
        if before is None or old is None:
            if after is not None and new is not None:
                size = after.content.size
                yield Moment(time_ns, "created", new, None, size, _hex(after.content))
            return
        size, digest = before.content.size, _hex(before.content)
        kept, complete, needs_peer = self._kept(old, before)
        complete = before.content.kind is not Kind.FILE or complete or self._is_live(before)
        needs_peer = needs_peer and complete
        if after is None or new is None:
            yield Moment(time_ns, "deleted", old, None, size, digest, kept, complete, needs_peer)
            return
        if new != old:
            yield Moment(time_ns, "moved", new, old, after.content.size, _hex(after.content))
        if before.content != after.content:
            yield Moment(time_ns, "modified", new, None, size, digest, kept, complete, needs_peer)
        elif before.attributes != after.attributes and new == old:
            yield Moment(time_ns, "attributes", old, None, size, digest)

    def _versions(self, path: bytes) -> list[Version]:
        store = self.places[0].store()
        return [] if store is None else [v for v in store.versions() if v.path == path]

    def _kept(self, path: bytes, past: Past) -> tuple[bytes | None, bool, bool]:
        """Where a version is kept, whether it can be put back, and whether that needs the peer."""
        best: tuple[bytes | None, bool, bool] = None, False, False
        for number, place in enumerate(self.places):
            for version in place.candidates(past, path):
                complete, needs_peer = (
                    self._can_be_made(place, version) if version.delta else (True, number > 0)
                )
                found = place.store_name + b"/" + version.kept, complete, needs_peer
                if complete and not needs_peer:
                    return found
                if best[0] is None or (complete and not best[1]):
                    best = found
        return best

    def _can_be_made(self, place: Origin, version: Version) -> tuple[bool, bool]:
        """Of a version of which only what was written over was kept; see :meth:`_kept`."""
        if self._live is None:
            self._live = {
                past.content.digest: key
                for key, past in self.present.items()
                if past.content.digest is not None
            }
        store = place.store()
        if store is None:
            return False, False
        chain = chain_among(self.places, Kept(version, store), self._live)
        if not chain.found or chain.base is None:
            return False, False
        stores = {each.store for each in (*chain.deltas, *([chain.kept] if chain.kept else []))}
        elsewhere = stores != {self.places[0].store()}
        if chain.kept is not None:
            return True, elsewhere
        peer = len(self.places) > 1
        key = self._live.get(bytes.fromhex(chain.base))
        past = None if key is None else self.present.get(key)
        where = None if key is None else path_of(self.present, key)
        if past is None or where is None:
            return peer, True
        fd = self.places[0].open(where)
        if fd < 0:
            return peer, True
        try:
            info = os.fstat(fd)
        finally:
            os.close(fd)
        time_ns = None if past.attributes is None else past.attributes.mtime_ns
        as_agreed = (info.st_size, info.st_mtime_ns) == (past.content.size, time_ns)
        return (True, elsewhere) if as_agreed else (peer, True)

    def _is_live(self, past: Past) -> bool:
        if past.content.digest is None:
            return False
        row = self.replica.database.execute(
            "SELECT 1 FROM node WHERE digest=? LIMIT 1", (past.content.digest,)
        ).fetchone()
        return row is not None

    # -- restore -------------------------------------------------------------

    def nearest_directory(self, path: bytes) -> bytes:
        """The directory at a path as the index knows it, or the nearest one above it."""
        index = self.replica.index
        return index.path(index.nearest_directory(path)) or b""

    def last_change(self, path: bytes) -> int:
        """The moment before the last thing that happened to a path.

        Raises:
            UsageError: nothing is known of it.
        """
        moments = [m for m in self.history(path) if m.action in ("modified", "deleted", "kept")]
        if not moments:
            raise UsageError(f"{display(path)}: no earlier version is known; see 'bisync history'")
        return moments[-1].time_ns - 1

    def build(self, path: bytes, time_ns: int, target: bytes) -> Restored:
        """Make a path as it was at a time, at a new place that must not exist.

        Raises:
            UsageError: it did not exist then, or the log does not reach back that far.
        """
        state = self.at(time_ns)
        key = find(state, path)
        if key is None:
            raise UsageError(f"{display(path)}: it did not exist at {_shown(time_ns)}")
        live = {
            past.content.digest: where
            for where, node in paths(self.present).items()
            if (past := self.present[node]).content.digest is not None
        }
        lost = self._lost_at(time_ns)

        def names(full: bytes, past: Past) -> list[bytes]:
            return [full, *lost.get(past.content.digest or b"", [])]

        builder = Builder(self.places, live)
        out = Restored()
        top = state[key] if key != ROOT else Past(frozenset(), Content(Kind.DIR), None)
        builder.make(names(path, top), top, target)
        out.entries += 1
        if top.content.kind is Kind.DIR:
            made: dict[int, bytes] = {}
            for below, each in paths(state, key).items():
                place = target + b"/" + below
                if each in made and state[each].content.kind is not Kind.DIR:
                    os.link(made[each], place, follow_symlinks=False)
                else:
                    full = path + b"/" + below if path else below
                    builder.make(names(full, state[each]), state[each], place)
                    if os.path.lexists(place):
                        made[each] = place
                out.entries += 1
        builder.finish()
        out.incomplete = builder.incomplete
        return out


def _hex(content: Content) -> str | None:
    return None if content.digest is None else content.digest.hex()


def _shown(time_ns: int) -> str:

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns / 1e9))


@contextlib.contextmanager
def looking_back(
    root: str | bytes | os.PathLike[str],
    *,
    state_dir: str | None = None,
    store: bytes = STORE_DIR,
) -> Iterator[Retrospect]:
    """Open a root to look back; nothing is written.

    Raises:
        UsageError: it is no root, or it was never synchronised.
        RootLockedError: an engine works on it just now.
    """
    options = Options(rules=ScanRules(Matcher(()), store), store=store, state_dir=state_dir)
    replica = Replica(os.fsencode(root), options)
    try:
        if replica.db is None:
            raise UsageError(f"{os.fsdecode(replica.path)}: it was never synchronised")
        yield Retrospect(replica, store)
    finally:
        replica.close()


def history(
    root: str | bytes | os.PathLike[str],
    path: str | bytes | os.PathLike[str],
    *,
    state_dir: str | None = None,
) -> list[Moment]:
    """What became of a path below a root, the oldest first."""
    with looking_back(root, state_dir=state_dir) as past:
        return past.history(os.fsencode(path))


def restore(
    root: str | bytes | os.PathLike[str],
    path: str | bytes | os.PathLike[str],
    time_ns: int | None = None,
    to: str | bytes | os.PathLike[str] | None = None,
    *,
    state_dir: str | None = None,
    listener: Listener = lambda _event: None,
) -> Restored:
    """Put a file or folder back as it was at a time.

    Args:
        root: the root.
        path: below it; "" is all of it.
        time_ns: when, since 1970 UTC; ``None``: before its last change.
        to: a place that does not exist yet; ``None``: where it was, and what is there now goes
            to the store.

    Raises:
        UsageError: nothing is known of that path or time, or ``to`` exists.
        PathError: some of its content is nowhere to be found; nothing was changed in the root.
    """
    path = os.fsencode(path)
    with contextlib.ExitStack() as stack:
        past = stack.enter_context(looking_back(root, state_dir=state_dir))
        when = past.last_change(path) if time_ns is None else time_ns
        if to is not None:
            if os.path.lexists(to):
                raise UsageError(f"{os.fsdecode(to)}: it exists; give a new place")
            return past.build(path, when, os.path.abspath(os.fsencode(to)))
        folder = os.fsencode(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bisync-restore-"))
        )
        above = past.nearest_directory(path.rpartition(b"/")[0]) if path else b""
        rest = path[len(above) + 1 if above else 0 :]  # what is missing on the way is made, too
        place = folder + b"/tree"
        os.makedirs(os.path.dirname(place + b"/" + rest) if rest else folder, exist_ok=True)
        done = past.build(path, when, place + b"/" + rest if rest else place)
        if done.incomplete:
            raise PathError(
                f"{display(done.incomplete[0])}: its content of that time is nowhere to be found "
                f"({len(done.incomplete)} in all); nothing was changed; see --to"
            )
        root_path = past.path
        past.replica.close()
        wish = Wish(
            recursive=True,
            links=True,
            perms=True,
            times=True,
            owner=os.geteuid() == 0,
            group=os.geteuid() == 0,
            acls=True,
            xattrs=True,
            devices=os.geteuid() == 0,
            specials=True,
            hard_links=True,
            checksum=True,
            delete=True,
            force=True,
            umask=0,
            user=os.geteuid(),
            user_group=os.getegid(),
        )
        # What is there now may be nowhere else: it is kept whole.
        config = MirrorConfig(
            wish=wish, filters=Filters(), yes=True, state_dir=state_dir, apply=Apply.REPLACE
        )
        first = rest.split(b"/")[0] if rest else b""
        source = place + b"/" + first
        done.report = mirror_at([source], MirrorPlace(root_path, above), config, listener)
        return done
