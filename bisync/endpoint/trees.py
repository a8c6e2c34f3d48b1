"""The source of a mirror across a connection: walked and read there, seen here as a tree.

What the other end lists is not trusted: keys, parents and paths have to fit, each name has to be
one name, and no listing goes on for ever.
"""

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.groups import JOURNALS, stem
from bisync.core.node import ROOT, Kind
from bisync.core.wish import Seen, Wish
from bisync.endpoint.channel import Channel
from bisync.endpoint.content import ContentServer
from bisync.endpoint.interface import Tree
from bisync.endpoint.service import FarContent
from bisync.errors import PathError
from bisync.fs.source import Entries, Listed
from bisync.fs.wanted import Wanted, flattened, wanted_again
from bisync.linux.accounts import group_name, group_number, user_name, user_number
from bisync.wire.letters import Letter
from bisync.wire.mirrorvalues import FILTERS, ROOT_SEEN, SEEN, WISH
from bisync.wire.schema import (
    Bool,
    Bytes,
    Each,
    Int,
    Maybe,
    Name,
    Plain,
    Record,
    Schema,
    Several,
    Table,
    Text,
    refuse,
)
from bisync.wire.values import DIGEST, IDS, LONG_PATH, NUMBER, REASON

WALK, DIGEST_OF, DATABASE, CLOSE = 100, 101, 102, 103
MOVED = 15
_SOME = 2000  # entries in one part of a listing
_MOST = 20_000_000  # entries in all
_PATH = LONG_PATH
_ACCOUNTS = Table(Int(0, 2**32 - 1), Bytes(256, 1), 65536)


class Order(Struct, frozen=True, kw_only=True):
    """What to walk, and how."""

    sources: tuple[bytes, ...]  # as on rsync's command line
    wish: Wish
    filters: Any
    one_file_system: bool
    prune_empty: bool
    files_from: Wanted | None
    bwlimit: int
    names: bool  # of users and groups are wanted


class _WantedSchema:
    """A tree of names, as rows."""

    _rows = Several(Each((_PATH, Bool(), Bool())), 10_000_000, list)

    def pack(self, value: Wanted) -> Plain:
        """As rows."""
        return self._rows.pack(flattened(value))

    def unpack(self, plain: Plain) -> Wanted:
        """From rows."""
        return wanted_again(self._rows.unpack(plain))


ORDER = Record(
    Order,
    sources=Several(_PATH, 65536),
    wish=WISH,
    filters=FILTERS,
    one_file_system=Bool(),
    prune_empty=Bool(),
    files_from=Maybe(_WantedSchema()),
    bwlimit=Int(0),
    names=Bool(),
)


class _Some(Struct, frozen=True):
    """Part of a listing: of one directory, perhaps not all of it."""

    key: int
    path: bytes
    complete: bool
    passed: tuple[bytes, ...]
    entries: tuple[Seen, ...]
    digests: dict[int, bytes]


_PART = Record(
    _Some,
    key=NUMBER,
    path=_PATH,
    complete=Bool(),
    passed=Several(Name(), 1 << 20),
    entries=Several(SEEN, 1 << 16),
    digests=Table(NUMBER, DIGEST, 1 << 16),
)
_PARTS = Several(_PART, 1 << 16, list)


class Walked(Struct, frozen=True):
    """What else there is to say of a walk."""

    root: Seen | None
    failed: bool
    problems: tuple[tuple[bytes, str], ...]
    notes: tuple[tuple[bytes, str], ...]
    identity: str
    location: bytes
    only_named: bool
    users: dict[int, bytes] = field(default_factory=dict)
    groups: dict[int, bytes] = field(default_factory=dict)


_TOLD = Several(Each((_PATH, REASON)), 1 << 20)
_WALKED = Record(
    Walked,
    root=Maybe(ROOT_SEEN),
    failed=Bool(),
    problems=_TOLD,
    notes=_TOLD,
    identity=Text(1 << 16),
    location=Bytes(1 << 20),
    only_named=Bool(),
    users=_ACCOUNTS,
    groups=_ACCOUNTS,
)
_WALK = Each((Maybe(ORDER),))
_BELONGS: Schema = Maybe(Each((NUMBER, Name())))


class TreeService:
    """Serves a source: to who drives, one that it orders; to who is driven, the driver's own.

    Args:
        walk: walks what was ordered (``None``: what there is to be had) and gives the tree.
    """

    def __init__(self, walk: Callable[[Order | None], Tree], wish: Wish | None = None) -> None:
        self._walk = walk
        self._wish = wish  # of the tree that needs no order
        self.tree: Tree | None = None
        self._content = ContentServer(lambda: self._there)

    @property
    def _there(self) -> Tree:
        if self.tree is None:
            refuse("a call before anything was walked")
        return self.tree

    def takes(self, number: int) -> bool:
        """Whether a call is one of these."""
        return number in (WALK, DIGEST_OF, DATABASE, CLOSE) or (
            number == MOVED and self.tree is not None
        )

    def want(self, stream: Any, first: Any) -> None:
        """Give content."""
        self._content.want(stream, first)

    def told(self, letter: Letter) -> None:
        """Nothing is told here."""
        refuse(f"word {letter.about} that nobody takes here")

    def ask(self, letter: Letter, part: Callable[[Plain], None]) -> Plain:
        """Answer a call."""
        match letter.about:
            case 100:
                (order,) = _WALK.unpack(letter.body)
                return self._walked(order, part)
            case 101:
                seen = self._entry(letter.body)
                return Maybe(DIGEST).pack(self._there.digest(seen))
            case 102:
                return _BELONGS.pack(self._there.database(self._entry(letter.body).key))
            case 15:
                (nodes,) = Each((IDS,)).unpack(letter.body)
                known = self._there.by_key
                if not nodes <= known.keys():
                    refuse("an entry that is not there")
                return self._there.moved(nodes)
            case _:
                self.close()
                return None

    def _entry(self, body: Plain) -> Seen:
        found: Seen | None = self._there.by_key.get(NUMBER.unpack(body))
        if found is None:
            refuse("an entry that is not there")
        return found

    def _walked(self, order: Order | None, part: Callable[[Plain], None]) -> Plain:
        self.close()
        tree = self.tree = self._walk(order)
        wish = self._wish if order is None else order.wish
        waiting: list[_Some] = []
        count = 0
        for some in _listed(tree, wish if wish is not None and wish.checksum else None):
            waiting.append(some)
            count += 1 + len(some.entries)
            if count >= _SOME:
                part(_PARTS.pack(waiting))
                waiting, count = [], 0
        if waiting:
            part(_PARTS.pack(waiting))
        users, groups = _accounts(tree) if order is None or order.names else ({}, {})
        return _WALKED.pack(
            Walked(
                tree.root,
                tree.failed,
                tuple(tree.problems),
                tuple(tree.notes),
                tree.identity,
                tree.location,
                tree.only_named,
                users,
                groups,
            )
        )

    def close(self) -> None:
        """Give the tree back."""
        tree, self.tree = self.tree, None
        if tree is not None:
            tree.close()


def _accounts(tree: Tree) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """The names of all users and groups that own something."""
    roots = [] if tree.root is None else [tree.root]
    owned = {(s.attributes.uid, s.attributes.gid) for s in (*roots, *tree.by_key.values())}
    users = {uid: user_name(uid) for uid in {uid for uid, _ in owned}}
    groups = {gid: group_name(gid) for gid in {gid for _, gid in owned}}
    return (
        {uid: name for uid, name in users.items() if name},
        {gid: name for gid, name in groups.items() if name},
    )


def _listed(tree: Tree, read: Wish | None) -> Iterator[_Some]:
    """All entries, with the digests of files that are compared by them."""
    for each in tree.listings:
        entries = each.entries
        passed = tuple(each.passed)
        for at in range(0, max(len(entries), 1), _SOME):
            some = tuple(
                replace(seen, handle=seen.handle or tree.handle(seen))
                for seen in entries[at : at + _SOME]
            )
            digests: dict[int, bytes] = {}
            for seen in some if read is not None else ():
                wanted = seen.kind is Kind.FILE and read is not None and read.within_size(seen)
                digest = tree.digest(seen) if wanted else None
                if digest is not None:
                    digests[seen.key] = digest
            yield _Some(each.key, each.path, each.complete, passed, some, digests)
            passed = ()


class FarTree(FarContent, Entries):
    """A source at the other end, once it was walked.

    Args:
        order: what to walk; ``None``: what the other end has for us.
        wish: what is carried here.
        names: users and groups are those of the same name here, not of the same number.
        machine: the other end's name.
    """

    def __init__(
        self, channel: Channel, order: Order | None, wish: Wish, *, names: bool, machine: str
    ) -> None:
        super().__init__(channel)
        self.listings: list[Listed] = []
        self.by_key: dict[int, Seen] = {}
        self._digests: dict[int, bytes] = {}
        self._paths: dict[int, bytes] = {ROOT: b""}
        self._last: Listed | None = None
        self._children: dict[int, dict[bytes, Seen]] = {}
        answer = channel.call(WALK, _WALK.pack((order,)), self._take)
        walked: Walked = _WALKED.unpack(answer)
        self.root = walked.root
        if self.root is not None and (self.root.key != ROOT or not self.root.is_dir):
            refuse("a root that is none")
        self.failed = walked.failed
        self.problems, self.notes = list(walked.problems), list(walked.notes)
        self.identity = walked.identity
        self.location = machine.encode() + b":" + walked.location
        self.only_named = walked.only_named
        if names:
            self._map_accounts(walked)
        for listed in self.listings:
            kept = [seen for seen in listed.entries if wish.takes(seen.content)]
            if len(kept) != len(listed.entries):
                listed.passed += [s.name for s in listed.entries if not wish.takes(s.content)]
                listed.entries = kept

    def _take(self, plain: Plain) -> None:
        for some in _PARTS.unpack(plain):
            self._take_some(some)

    def _take_some(self, some: _Some) -> None:
        if self._paths.get(some.key) != some.path:
            refuse("a listing of a directory that was not listed itself")
        listed = self._last
        if listed is None or listed.key != some.key:
            if some.key in self._children:
                refuse("a directory that was listed before")
            listed = self._last = Listed(some.key, some.path, some.complete)
            self._children[some.key] = {}
            self.listings.append(listed)
        names = self._children[some.key]
        prefix = some.path + b"/" if some.path else b""
        for seen in some.entries:
            if seen.parent != some.key or seen.key in self._paths or seen.key in self.by_key:
                refuse("an entry that does not belong where it is listed")
            if seen.name in names or len(self.by_key) >= _MOST:
                refuse("a name that is listed twice, or a listing without end")
            names[seen.name] = seen
            self.by_key[seen.key] = seen
            if seen.is_dir:
                self._paths[seen.key] = prefix + seen.name
        listed.entries += some.entries
        listed.passed += some.passed
        self._digests.update(some.digests)

    def _map_accounts(self, walked: Walked) -> None:
        users = {number: user_number(name, number) for number, name in walked.users.items()}
        groups = {number: group_number(name, number) for number, name in walked.groups.items()}
        if all(a == b for table in (users, groups) for a, b in table.items()):
            return
        roots = [] if self.root is None else [self.root]
        for seen in (*roots, *self.by_key.values()):
            a = seen.attributes
            uid, gid = users.get(a.uid, a.uid), groups.get(a.gid, a.gid)
            seen.attributes = replace(a, uid=uid, gid=gid)

    # -- what a run asks -----------------------------------------------------

    def handle(self, seen: Seen) -> bytes:
        """The identity of an entry's object."""
        return seen.handle

    def digest(self, seen: Seen) -> bytes | None:
        """The digest of a file; ``None`` if it cannot be read now."""
        if seen.key in self._digests:
            return self._digests[seen.key]
        try:
            found = Maybe(DIGEST).unpack(self._far.call(DIGEST_OF, seen.key))
        except PathError:
            return None
        if found is None:
            return None
        self._digests[seen.key] = found
        return self._digests[seen.key]

    def database(self, key: int) -> tuple[int, bytes] | None:
        """Which database a file belongs to: the key of the directory, and the name."""
        seen = self.by_key[key]
        beside = self._children[seen.parent]
        if not any(
            base + end in beside for base in (seen.name, stem(seen.name)) for end in JOURNALS
        ):
            return None
        found: tuple[int, bytes] | None = _BELONGS.unpack(self._far.call(DATABASE, key))
        return found

    def close(self) -> None:
        """Give everything back."""
        super().close()
        if not self._far.broken:
            self._far.call(CLOSE, None)
