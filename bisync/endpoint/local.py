"""A tree on this machine."""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from bisync.core.declared import Declared
from bisync.core.groups import MAGIC, Together, stem
from bisync.core.node import ROOT, Attributes, Node, NodeId, Place
from bisync.core.path import display
from bisync.core.plan import Transition
from bisync.core.retention import Retention
from bisync.core.safety import HOUR_NS
from bisync.endpoint.decided import Decided
from bisync.endpoint.interface import MOVED_ON, AgreedCopy, Ending, Hello, Read
from bisync.endpoint.spots import directories_of, scope_of
from bisync.errors import BusyError, EndpointError, HaltError, PathError, StaleError
from bisync.fs.apply import Applier, Tools
from bisync.fs.archive import Archive, add_pair
from bisync.fs.claim import Claim, claim
from bisync.fs.conflicts import Choice, Quarrel
from bisync.fs.content import Chunk, ContentSource, Expected, Version
from bisync.fs.displaced import STILL_NS, Probed, edited, was_written
from bisync.fs.index import Index
from bisync.fs.oplog import OperationLog
from bisync.fs.recovery import Recovered, recover
from bisync.fs.replica import Options, Replica
from bisync.fs.result import Result
from bisync.fs.retention import DAY_NS, passing, tend
from bisync.fs.root import OPEN_DIR
from bisync.fs.sizes import Sizes
from bisync.fs.stage import refuse_torn
from bisync.fs.walk import ScanResult
from bisync.linux.boot import boot_id
from bisync.linux.rename import rename_noreplace
from bisync.watch.interface import Scope, Spot

if TYPE_CHECKING:
    from bisync.delta.changes import ChangeSink

log = logging.getLogger(__name__)


class LocalEndpoint:
    """One local root as a side of a session."""

    is_far = False

    def __init__(
        self, path: bytes, options: Options, *, dry: bool = False, machine: str = ""
    ) -> None:
        """``machine``: the name of this one, where the other side is on another."""
        self.replica = Replica(path, options)
        self._prefix = f"{machine}:" if machine else ""
        self.dry = dry
        self._buffer = bytearray(1 << 20)
        self._imagined: dict[NodeId, Place] = {}
        self._read_up_to: dict[int, int] = {}  # marks, by pair
        self._foreseen: tuple[set[Spot], ScanResult] | None = None
        # Whether the other side had a file's version: then it needs not be kept whole.
        self.may_be_written: Callable[[Node], bool] = lambda _node: True
        if dry:
            self.replica.keep_dry()
            self._refuse_torn()

    def _refuse_torn(self) -> None:
        """A dry run mends nothing, and would take what is half-written for somebody's edit."""
        folder = self.replica.folder.fd
        if folder >= 0:
            try:
                refuse_torn(self.replica.path, folder, locked=True)
            except HaltError:
                self.close()
                raise

    @property
    def view(self) -> Index:
        """Lookups in the index."""
        return self.replica.index

    def hello(self) -> Hello:
        """Say who this side is."""
        r = self.replica
        return Hello(
            path=self._prefix + display(r.path),
            known=r.known,
            replica=r.marker.replica if r.marker is not None else "",
            incarnation=r.marker.incarnation if r.marker is not None else "",
            root=r.root.identity.text(),
            recorded=r.marker.root if r.marker is not None else "",
            empty=r.is_empty(),
            pairs=tuple(r.pairs()),
            damaged=r.damaged,
            became_link=r.became_link,
        )

    def scope(self, poll_s: float) -> Scope:
        """What of this root a watcher watches."""
        return scope_of(self.replica, poll_s)

    def is_empty(self) -> bool:
        """Whether the index has no name at all."""
        return self.replica.index.count() == 0

    def looks_familiar(self) -> bool:
        """Whether the tree is the one the index knows."""
        return self.replica.looks_familiar()

    def establish(self, *, new_identity: bool = False, new_incarnation: bool = False) -> Hello:
        """Make or change the state; a dry side keeps all of that in memory."""
        if self.dry:
            if new_identity or new_incarnation:
                self.replica.detach()
            self.replica.become_ephemeral()
        elif new_identity:
            self.replica.new_identity()
        else:
            self.replica.establish()
            if new_incarnation:
                self.replica.new_incarnation()
        return self.hello()

    def archive(self, hello: Hello, *, column: int, flipped: bool) -> Archive:
        """The copy of the ancestor shared with a peer; made when first needed."""
        db = self.replica.database
        known = next((p for p in self.replica.pairs() if p.peer == hello.replica), None)
        db.begin()
        if known is None:
            pair = add_pair(
                db,
                peer=hello.replica,
                column=column,
                location=hello.path,
                identity=hello.root,
                incarnation=self.hello().incarnation,
            )
        else:
            pair = known.pair
            if (known.location, known.identity) != (hello.path, hello.root):
                db.execute(
                    "UPDATE pair SET location=?, identity=? WHERE id=?",
                    (hello.path, hello.root, pair),
                )
        db.execute("UPDATE pair SET location='' WHERE location=? AND id<>?", (hello.path, pair))
        if not self.dry:
            db.commit()
        self._read_up_to.pop(pair, None)  # who meets anew reads from the beginning
        self._foreseen = None
        return Archive(db, pair, flipped=flipped)

    def recover(self, archive: AgreedCopy) -> Recovered:
        """Settle what an earlier run left half done."""
        recovered = recover(self.replica, archive.pair)
        self._applier(0, self).harden()
        self.replica.database.commit()
        return recovered

    def drive(self, archive: AgreedCopy, who: str) -> Claim | str:
        """Claim the pair; it is not given back with the root."""
        try:
            return claim(self.replica.folder.fd, archive.state().peer, who)
        except OSError as error:
            text = f"{display(self.replica.path)}: cannot claim the pair: {error.strerror}"
            raise EndpointError(text) from error

    def scan(
        self, nodes: set[NodeId] | None = None, progress: Callable[[int], None] = lambda _n: None
    ) -> ScanResult:
        """Bring the index up to date."""
        self._foreseen = None
        return self.replica.scan(nodes, progress)

    def look(
        self, spots: set[Spot], progress: Callable[[int], None] = lambda _n: None
    ) -> ScanResult:
        """Bring some directories up to date."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen[0] == spots:
            progress(foreseen[1].entries)
            return foreseen[1]
        return self.scan(directories_of(self.replica.index, spots), progress)

    def foresee(self, archive: AgreedCopy, spots: set[Spot]) -> list[NodeId]:
        """Look at directories, as :meth:`look` then need not do again, and tell what changed.

        Returns:
            What :meth:`changed` will begin with; it was not told by that.
        """
        self._foreseen = spots, self.look(spots)
        cursor = archive.state().cursor
        if cursor is None:
            return []
        sql = "SELECT node FROM pending WHERE pair=? LIMIT 5000"
        rows = self.replica.database.execute(sql, (archive.pair,)).fetchall()
        nodes, _ = self.replica.index.marks_after(cursor, archive.pair)
        return [*(row[0] for row in rows), *nodes]

    def read(self, nodes: Iterable[NodeId]) -> list[Read]:
        """Learn the digests of files."""
        return [self._read(node) for node in nodes]

    def _read(self, node: NodeId) -> Read:
        self.replica.options.stop()
        instant = "it is being written to: one instant of it is taken"
        return self._tried(
            node,
            lambda: (
                instant if self.replica.contents.read(node, buffer=self._buffer).instant else ""
            ),
        )

    @staticmethod
    def _tried(node: NodeId, act: Callable[[], str]) -> Read:
        """What came of reading something."""
        try:
            return Read(node, "read", act())
        except StaleError as error:
            return Read(node, "stale", error.reason)
        except BusyError as error:
            return Read(node, "busy", error.reason)
        except PathError as error:
            return Read(node, "problem", error.reason)
        except OSError as error:
            return Read(node, "problem", error.strerror or str(error))

    def supply(
        self,
        node: NodeId,
        sink: Callable[[Chunk], None],
        restart: Callable[[], None],
        *,
        refuse_writer: bool,
    ) -> Version:
        """Read one whole version of a node for the other side."""
        return self.replica.contents.read(
            node, sink, restart, refuse_writer=refuse_writer, buffer=self._buffer
        )

    def expect(self, files: Sequence[Expected]) -> None:
        """Nothing is gained by reading ahead here."""

    def companions(self) -> list[Place]:
        """The places of all journals of databases."""
        return [place for place in self.replica.index.companions() if self._is_database(place)]

    def _is_database(self, place: Place) -> bool:
        """Whether a journal, or what it would be the journal of, begins as such files do."""
        base = stem(place[1])
        for end, magic in MAGIC.items():
            try:
                if self.replica.contents.begins((place[0], base + end), magic):
                    return True
            except (PathError, OSError) as error:
                log.info("not-looked-at name=%s reason=%s", base + end, error)
        return False

    def hold(self, parent: NodeId, names: list[bytes], nodes: dict[bytes, NodeId]) -> Read:
        """Let the files of one database be read at one instant."""

        def act() -> str:
            path, matcher = self.replica.index.place_path, self.replica.options.rules.matcher
            here = [n for n in names if not matcher.ignores(path((parent, n)), is_dir=False)]
            self.replica.contents.hold(parent, here, nodes)
            return ""

        return self._tried(parent, act)

    def hold_declared(
        self, top: NodeId, rule: Declared, nodes: dict[bytes, NodeId], agreed: set[NodeId]
    ) -> Read:
        """Let the files of a declared directory be read at one instant."""
        matcher = self.replica.options.rules.matcher
        hooks = rule.hooks
        if hooks is not None and hooks.root is not None:
            here = os.path.realpath(hooks.root) == os.path.realpath(self.replica.path)
            rule = rule if here else replace(rule, hooks=None)

        def ignores(path: bytes, is_dir: bool) -> bool:
            return matcher.ignores(rule.path + b"/" + path, is_dir=is_dir)

        def act() -> str:
            self.replica.contents.hold_declared(
                top, rule, nodes, agreed, ignores, self.replica.path + b"/" + rule.path
            )
            return ""

        return self._tried(top, act)

    def release(self) -> list[str]:
        """Let go of what was held."""
        return self.replica.contents.holds.release()

    def moved(self, nodes: set[NodeId]) -> bool:
        """Whether files that are to be read at one instant moved on while they were read."""
        return self.replica.contents.holds.moved(nodes)

    def supply_changes(
        self, node: NodeId, sink: "ChangeSink", *, refuse_writer: bool = False
    ) -> Version:
        """Tell the other side what its old version of a big file lacks."""
        return self.replica.contents.send_changes(node, sink, refuse_writer=refuse_writer)

    def apply(
        self,
        archive: AgreedCopy,
        steps: list[Transition],
        updates: dict[int, str],
        source: ContentSource,
        together: Sequence[Together] = (),
    ) -> list[Result]:
        """Perform transitions."""
        return self.apply_for(archive.pair, steps, updates, source, together)

    def apply_for(
        self,
        pair: int,
        steps: list[Transition],
        updates: dict[int, str],
        source: ContentSource,
        together: Sequence[Together] = (),
    ) -> list[Result]:
        """Perform transitions for a pair, or for none (0)."""
        return self._applier(pair, source).run(steps, updates, together)

    def _applier(self, pair: int, source: ContentSource) -> Applier:
        r = self.replica
        tools = Tools(
            r.root, r.index, r.database, r.stage, r.store, r.directories,
            r.options.rules.matcher, lambda: r.contents.lists, r.options.workers, r.options.fsync,
            boot_id(), r.options.stop, r.options.whole_files, r.options.apply,
            self.may_be_written, r.options.arrived,
        )  # fmt: skip
        return Applier(tools, pair, source)

    def nodes(self, ids: Iterable[NodeId]) -> dict[NodeId, Node]:
        """Nodes as the index has them."""
        return self.replica.index.nodes(ids)

    def set_directory_times(
        self, times: list[tuple[NodeId, int, bool]]
    ) -> tuple[dict[NodeId, Attributes], dict[NodeId, str]]:
        """Set directory times; what may not be set is left as it is."""
        applier = self._applier(0, self)
        applier.harden()
        found: dict[NodeId, Attributes] = {}
        failed: dict[NodeId, str] = {}
        for node, mtime_ns, ours in times:
            try:
                attributes = applier.set_directory_time(node, mtime_ns, ours=ours)
            except StaleError:
                failed[node] = MOVED_ON
                continue
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EACCES, errno.EROFS):
                    failed[node] = error.strerror or str(error)
                continue
            if attributes is not None:
                found[node] = attributes
        return found, failed

    def path(self, node: NodeId) -> bytes | None:
        """The path of a node, for output."""
        return self.replica.index.path(node)

    def place_path(self, place: Place) -> bytes:
        """The path of a place, for output."""
        names, seen = [place[1]], set[NodeId]()
        while place[0] in self._imagined and place[0] not in seen:
            seen.add(place[0])
            place = self._imagined[place[0]]
            names.append(place[1])
        above = self.replica.index.path(place[0])
        return b"/".join([*([above] if above else []), *reversed(names)])

    def imagine(self, node: NodeId, place: Place) -> None:
        """Remember where a directory of a dry run would be."""
        self._imagined[node] = place

    def numbers(self) -> Iterator[NodeId]:
        """Fresh node numbers."""
        return self.replica.index.numbers()

    # -- the run as a whole --------------------------------------------------

    def changed(self, archive: AgreedCopy) -> Iterator[NodeId]:
        """Nodes to look at: what earlier runs left, then what was marked since, or all.

        Called again, it goes on where it ended. What it gave is forgotten only by
        :meth:`finish`. Nodes that the engine makes from now on are no news.
        """
        return self._changed(archive, self.replica.index.next_number)

    def has_read(self, pair: int) -> bool:
        """Whether :meth:`changed` was called for a pair."""
        return pair in self._read_up_to

    def _changed(self, archive: AgreedCopy, limit: NodeId) -> Iterator[NodeId]:
        index = self.replica.index
        if archive.pair not in self._read_up_to:
            state = archive.state()
            if state.cursor is None:
                self._read_up_to[archive.pair] = index.last_mark()
                yield from self._everything(archive, state.column, limit)
            else:
                self._read_up_to[archive.pair] = state.cursor
                sql = "SELECT node FROM pending WHERE pair=?"
                rows = self.replica.database.execute(sql, (archive.pair,)).fetchall()
                yield from (row[0] for row in rows)
        while True:
            start = self._read_up_to[archive.pair]
            nodes, end = index.marks_after(start, archive.pair)
            self._read_up_to[archive.pair] = end
            yield from nodes
            if end == start:
                return

    def _everything(self, archive: AgreedCopy, column: int, limit: NodeId) -> Iterator[NodeId]:
        """Every node below a number, directory by directory, and what was agreed and is gone."""
        db = self.replica.database
        sql = (
            "SELECT parent, name, node FROM name WHERE (parent, name) > (?, ?) "
            "ORDER BY parent, name LIMIT 2000"
        )
        yield ROOT
        last: tuple[int, bytes] = (0, b"")
        while rows := db.execute(sql, last).fetchall():
            last = (rows[-1][0], rows[-1][1])
            yield from (row[2] for row in rows if row[2] < limit)
        gone = db.execute(
            f"SELECT node{column} FROM agreed WHERE pair=? AND node{column} IS NOT NULL AND "
            f"NOT EXISTS (SELECT 1 FROM name WHERE name.node=node{column})",
            (archive.pair,),
        )
        yield from (row[0] for row in gone.fetchall())

    def deletions_since(self, archive: AgreedCopy, side: int, time_ns: int) -> int:
        """Entries deleted for this pair on behalf of a column since a time."""
        row = self.replica.database.execute(
            "SELECT coalesce(sum(count), 0) FROM deletion WHERE pair=? AND side=? AND time_ns>?",
            (archive.pair, side, time_ns),
        ).fetchone()
        return int(row[0])

    # -- conflicts -----------------------------------------------------------

    def choices(self, archive: AgreedCopy) -> list[Choice]:
        """What a person chose for conflicts of this pair."""
        return self.replica.conflicts.choices(archive.pair)

    def carry_out(self, archive: AgreedCopy, choice: Choice) -> str:
        """Bring the chosen version to its name; the next scan carries it over."""
        self._foreseen = None
        return Decided(self.replica, archive.pair).carry_out(choice)

    def add_conflicts(self, archive: AgreedCopy, rows: list[Quarrel]) -> None:
        """Put conflicts on the list."""
        db = self.replica.database
        db.begin()
        self.replica.conflicts.add(archive.pair, rows)
        db.commit()

    def forget_conflicts(self, ids: Iterable[str]) -> None:
        """Take conflicts off the list."""
        db = self.replica.database
        db.begin()
        self.replica.conflicts.forget(ids)
        db.commit()

    # -- the end of a run ----------------------------------------------------

    def keep_pending(self, archive: AgreedCopy, pending: dict[NodeId, str]) -> None:
        """Add to what the next run must look at."""
        db = self.replica.database
        db.begin()
        db.many(
            "INSERT OR REPLACE INTO pending VALUES(?,?,?)",
            [(archive.pair, node, reason) for node, reason in pending.items()],
        )
        db.commit()

    def finish(self, archive: AgreedCopy, ending: Ending) -> list[str]:
        """Record how a run ended; drop what is old enough in the store."""
        r, pair = self.replica, archive.pair
        db = r.database
        assert r.marker is not None
        db.begin()
        db.execute("DELETE FROM pending WHERE pair=?", (pair,))
        db.many(
            "INSERT INTO pending VALUES(?,?,?)",
            [(pair, node, reason) for node, reason in ending.pending.items()],
        )
        r.conflicts.forget(
            q.id
            for q in r.conflicts.rows(pair)
            if (q.waiting and q.id not in ending.waiting)
            or (q.kept_as is not None and r.index.find(q.kept_as) is None)
        )
        db.execute("DELETE FROM deletion WHERE time_ns<?", (ending.time_ns - HOUR_NS,))
        db.many(
            "INSERT INTO deletion VALUES(?,?,?,?,?)",
            [(pair, side, ending.time_ns, n, ending.entries) for side, n in ending.deletions],
        )
        db.execute(
            "UPDATE pair SET cursor=?, incarnation=?, complete_ns=coalesce(?, complete_ns) "
            "WHERE id=?",
            (self._read_up_to[pair], r.marker.incarnation, ending.complete_ns, pair),
        )
        if ending.complete_ns is not None:
            OperationLog(db).begin(pair, ending.time_ns)
        if ending.retention is not None and ending.retention.days is not None:
            keep_ns, now = ending.retention.days * DAY_NS, passing(db, time.time_ns())
            if now is not None:
                OperationLog(db).forget_before(now.limit_ns(keep_ns, keep_ns // 3))
        (oldest,) = db.execute("SELECT min(coalesce(cursor, 0)) FROM pair").fetchone()
        r.index.trim_marks(oldest)
        r.index.save_numbers()
        db.commit()
        del self._read_up_to[pair]  # the next run begins with what is pending
        said = [] if ending.retention is None else self.tend(ending.retention)
        try:
            r.write_facts(archive.state(), ending.time_ns, ending.busy, len(ending.pending))
        except EndpointError as error:
            said.append(str(error))  # everything that the next run needs is in the database
        return said

    def tend(self, rules: Retention) -> list[str]:
        """Let the store go of what need not be kept; return what is to be said of it."""
        self.replica.tidy_big_files()
        return tend(self.replica.store, self.replica.database, rules, time.time_ns())

    # -- what was displaced --------------------------------------------------

    def probe_displaced(self, *, min_age_ns: int) -> Probed:
        """Look again at displaced files: a writer caught in ``open`` holds the kept one.

        Its edit is an edit of the live name: the kept object goes back under a name beside
        the live one, where its user finds it and the next scan carries it over.
        """
        db = self.replica.database
        back, now, waiting = list[bytes](), time.time_ns(), 0
        rows = db.execute("SELECT path, payload FROM displaced").fetchall()
        for kept, payload in rows:
            text, before, time_ns, *more = json.loads(payload)
            path, weak = text.encode("latin-1"), any(more)  # a row of an older bisync ends there
            if self._was_written(kept, before):
                back.append(self._bring_back(kept, path))
            elif 0 <= now - time_ns < max(min_age_ns, STILL_NS if weak else 0):
                waiting += weak
                continue
            db.begin()
            db.execute("DELETE FROM displaced WHERE path=?", (kept,))
        return Probed(tuple(back), waiting)

    def _was_written(self, kept: bytes, before: list[Any]) -> bool:
        try:
            fd, name = self.replica.store.open_kept(kept)
        except OSError:
            return False  # pruned or moved by a person
        try:
            return was_written(fd, name, before)
        except OSError:
            return False
        finally:
            os.close(fd)

    def _bring_back(self, kept: bytes, path: bytes) -> bytes:
        fd, name = self.replica.store.open_kept(kept)
        try:
            *parts, base = path.split(b"/")
            folder = self.replica.root.fd
            opened = []
            try:
                for number, part in enumerate(parts):
                    try:
                        folder = os.open(part, OPEN_DIR, dir_fd=folder)
                    except OSError:
                        parts = parts[:number]  # the nearest directory that is still there
                        break
                    opened.append(folder)
                beside = edited(base)
                rename_noreplace(fd, name, folder, beside)
                return b"/".join([*parts, beside])
            finally:
                for one in opened:
                    os.close(one)
        finally:
            os.close(fd)

    def sizes(self) -> Sizes:
        """How much room the engine's own files take."""
        return self.replica.sizes()

    def close(self) -> None:
        """Give everything back."""
        self.replica.close()
