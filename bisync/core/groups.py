"""Files that are one thing together: a database and what its engine keeps beside it.

SQLite keeps what is not yet in the database file, or no longer, in ``NAME-wal`` or
``NAME-journal``; neither file says anything without the other of the same instant. Such files are
read at one instant, decided on together and applied together. So are the files of a declared
directory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from bisync.core.conflict import Conflict, ConflictKind
from bisync.core.declared import Declared
from bisync.core.diff import Join, Joined, same_version
from bisync.core.node import SIDES, Kind, NodeId, Place, Side
from bisync.core.plan import (
    Exchange,
    Link,
    Make,
    Move,
    Remove,
    Replace,
    SetAttributes,
    Transition,
    Unlink,
    keys_of,
)
from bisync.core.reconcile import Outcome

MAGIC = {b"": b"SQLite format 3\0", b"-wal": b"\x37\x7f\x06", b"-journal": b"\xd9\xd5\x05\xf9"}
"""What the files of a database begin with, by the end of their names (SQLite, "Database File
Format", 2024, sections 1.3, 3 and 4.1)."""
JOURNALS = (b"-wal", b"-journal")
SHARED = b"-shm"  # an index of the log in shared memory; made anew by the first who opens it


def stem(name: bytes) -> bytes:
    """The name of the database that a file belongs to, if it does; else its own."""
    for end in (*JOURNALS, SHARED):
        if name.endswith(end):
            return name[: -len(end)]
    return name


def names_of_group(name: bytes) -> list[bytes]:
    """All names that a database's files may have."""
    return [name, *(name + end for end in JOURNALS), name + SHARED]


class Group(Struct, frozen=True):
    """The files of one database: its place in keys, and its members as each side has them.

    Members are named; those of a declared directory by their paths below it.
    """

    place: Place
    keys: frozenset[int]
    members: tuple[dict[bytes, NodeId], dict[bytes, NodeId]]
    declared: Declared | None = None
    directories: frozenset[int] = frozenset()  # keys, of a declared one
    own: frozenset[int] = frozenset()  # keys of what is there as long as the database is
    top: int = 0  # key of a declared one


class Together(Struct, frozen=True):
    """Steps for these keys are done together or not; their content is one instant there."""

    keys: frozenset[int]
    source: tuple[NodeId, ...]  # the members on the side that has the content
    there: tuple[NodeId, ...] = ()  # and on the side where the steps are done
    top: NodeId | None = None  # a declared directory, there


def databases_in(
    steps: Sequence[Transition], database: Callable[[int], tuple[int, bytes] | None]
) -> list[Together]:
    """What of a mirror's steps belongs together.

    Args:
        database: which one a file of the source belongs to, by its key; ``None``: none.
    """
    found: dict[Place, tuple[set[int], list[int]]] = {}
    for step in steps:
        if isinstance(step, Make | Replace) and step.source is not None:
            place = step.place if isinstance(step, Make) else step.places[0]
            of = database(step.source) if step.content.kind is Kind.FILE else None
            if of is not None:
                keys, sources = found.setdefault((place[0], of[1]), (set(), []))
                keys.add(step.key)
                sources.append(step.source)
    for step in steps:
        if isinstance(step, Remove):
            parent, name = step.place
            for base in (name, stem(name)):
                if (parent, base) in found:
                    found[parent, base][0].add(step.key)
                    break
    return [Together(frozenset(keys), tuple(sources)) for keys, sources in found.values()]


Stems = tuple[set[Place], set[Place]]
"""Where on each side databases are that have a journal: (parent, name) in the side's numbers."""


Inside = dict[NodeId, bytes]
"""The directories of a declared one, itself included: their paths below it."""


def groups_in(
    j: Join, stems: Stems, declared: Sequence[tuple[Declared, tuple[Inside, Inside]]] = ()
) -> list[Group]:
    """The databases that a closure has files of."""
    directories = [_declared(j, rule, inside) for rule, inside in declared]
    groups = [group for group in directories if group is not None]
    taken = frozenset[int]().union(*(group.keys for group in groups))
    found: dict[Place, set[int]] = {}
    for key, joined in j.nodes.items():
        if joined.is_dir or key in taken:
            continue
        for parent, name in joined.base.union(*joined.names):
            for base in (name, stem(name)):  # a database may be called like a journal itself
                if any((j.local_of[s].get(parent), base) in stems[s] for s in SIDES):
                    found.setdefault((parent, base), set()).add(key)
                    break
    for place, keys in sorted(found.items()):
        own = {k for k in keys if place in j.nodes[k].base.union(*j.nodes[k].names)}
        group = Group(place, frozenset(keys), ({}, {}), own=frozenset(own))
        for key, side, (_, name), node in _files(j, group):
            del key
            group.members[side][name] = node
        groups.append(group)
    return groups


def _declared(j: Join, rule: Declared, inside: tuple[Inside, Inside]) -> Group | None:
    """A declared directory with all that is below it, if the closure has anything of it."""
    tops = {
        j.key_of[side][node]
        for side in SIDES
        for node, path in inside[side].items()
        if not path and node in j.key_of[side]
    }
    if not tops:
        return None
    found: set[int] = set()
    directories: set[int] = set()
    new = set(tops)
    while new:
        directories |= new
        below = {
            key
            for key, joined in j.nodes.items()
            if key not in tops
            and any(parent in new for parent, _ in joined.base.union(*joined.names))
        }
        found |= below
        new = {key for key in below if j.nodes[key].is_dir} - directories
    top = min(tops)
    (place, *_) = sorted(j.nodes[top].base.union(*j.nodes[top].names)) or [(top, b"")]
    keys = frozenset(key for key in found if any(node is not None for node in j.nodes[key].seen))
    group = Group(place, keys, ({}, {}), rule, frozenset(directories), keys, top)
    own = set()
    for key, side, spot, node in _files(j, group):
        path = _path_below(j, side, spot, tops)
        if path is not None:
            group.members[side][path] = node
            if path == rule.stamp:
                own.add(key)
    return group if rule.stamp is None else replace(group, own=frozenset(own))


def _path_below(j: Join, side: Side, place: Place, tops: set[int]) -> bytes | None:
    """The path of a place below a declared directory; ``None`` if it is not there on a side."""
    parts = [place[1]]
    key = place[0]
    while key not in tops:
        names = j.nodes[key].names[side] if key in j.nodes else frozenset()
        if len(names) != 1 or len(parts) > len(j.nodes):
            return None
        ((key, name),) = names
        parts.append(name)
    return b"/".join(reversed(parts))


def _files(j: Join, group: Group) -> Iterator[tuple[int, Side, Place, NodeId]]:
    """The files of a database with their names: key, side, place, and number there."""
    for key in group.keys:
        joined = j.nodes[key]
        for side in SIDES:
            node = joined.seen[side]
            if node is not None and node.kind is Kind.FILE:
                for place in _here(joined.names[side], group):
                    yield key, side, place, node.id


def _here(names: Iterable[Place], group: Group) -> set[Place]:
    """Those of some names that are a database's."""
    if group.declared is not None:
        return {(parent, name) for parent, name in names if parent in group.directories}
    mine = names_of_group(group.place[1])
    return {(p, name) for p, name in names if p == group.place[0] and name in mine}


def changed(j: Join, group: Group, side: Side) -> bool:
    """Whether a side's user changed any of a database's files.

    Not the shared memory, and not by a journal that is empty: a reader leaves one.
    """
    return any(_is_changed(j.nodes[key], group, side) for key in group.keys)


def _is_changed(joined: Joined, group: Group, side: Side) -> bool:
    node = joined.seen[side]
    if _says_nothing(joined, group, side):
        return False
    if joined.agreed is None:
        return node is not None
    if node is None or not joined.names[side]:
        return not joined.halfway[side] and not joined.forgotten[side]
    return not same_version(node, joined.agreed, side) or joined.claims(side) != joined.base


def _says_nothing(joined: Joined, group: Group, side: Side) -> bool:
    if group.declared is not None:
        return False
    names = _here(joined.base.union(*joined.names), group)
    ends = [name[len(group.place[1]) :] for _, name in names]
    if all(end == SHARED for end in ends):
        return True
    node = joined.seen[side]
    empty = node is not None and node.kind is Kind.FILE and node.content.size == 0
    return empty and all(end in JOURNALS for end in ends)


def latest(j: Join, group: Group) -> Side:
    """The side on which a database was written to last."""
    times = [0, 0]
    for joined in (j.nodes[key] for key in group.keys):
        for side in SIDES:
            node = joined.seen[side]
            if node is not None and not joined.is_dir and not _says_nothing(joined, group, side):
                times[side] = max(times[side], node.attributes.mtime_ns)
    return Side.ALPHA if times[0] >= times[1] else Side.BETA


def only_side(group: Group) -> Side | None:
    """The only side that has the database's own file: an edit beats a deletion."""
    if group.declared is None:
        there = [side for side in SIDES if group.place[1] in group.members[side]]
    elif group.declared.stamp is not None:
        there = [side for side in SIDES if group.declared.stamp in group.members[side]]
    else:
        there = [side for side in SIDES if group.members[side]]
    return there[0] if len(there) == 1 else None


def is_whole(j: Join, outcome: Outcome, group: Group) -> bool:
    """Whether a database becomes, or stays, that of one side."""
    keys = [k for k in group.keys if not all(_says_nothing(j.nodes[k], group, s) for s in SIDES)]
    moving = [k for k in keys if any(_is_changed(j.nodes[k], group, s) for s in SIDES)]
    held = [key for key in moving if outcome.verdicts[key].held]
    if held:
        return len(held) == len(moving)  # then nothing is done
    return any(all(_is_from(j, outcome, group, key, side) for key in keys) for side in SIDES)


def _is_from(j: Join, outcome: Outcome, group: Group, key: int, side: Side) -> bool:
    joined, verdict = j.nodes[key], outcome.verdicts[key]
    names = _here(verdict.names if verdict.alive else (), group)
    if joined.seen[side] is None or not names:
        return not names and not _here(joined.names[side], group)
    same = names == _here(joined.names[side], group)
    return same and verdict.source in (None, side)


def choose(j: Join, outcome: Outcome, group: Group, winner: Side) -> None:
    """Let a database be that of one side; what goes of the other's is kept as the loser."""
    for key in group.keys:
        joined, verdict = j.nodes[key], outcome.verdicts[key]
        if verdict.held or all(_says_nothing(joined, group, side) for side in SIDES):
            continue
        theirs, other = joined.seen[winner], joined.seen[winner.other]
        if theirs is None:
            if not verdict.alive or other is None:
                continue
            verdict.names -= _here(verdict.names, group)  # a link elsewhere is its own
            verdict.alive = bool(verdict.names)
        elif _is_from(j, outcome, group, key, winner):
            continue
        else:
            verdict.alive, verdict.forget = True, False
            verdict.names = (verdict.names - _here(verdict.names, group)) | _here(
                joined.names[winner], group
            )
            verdict.content, verdict.source = theirs.content, winner
            verdict.attributes = [theirs.attributes, theirs.attributes]
        verdict.conflict = True
        verdict.reason = "conflict: it goes with its database"
        if other is None or joined.is_dir:
            continue
        if not any(c.key == key for c in outcome.conflicts):
            names = joined.names[winner.other]
            place = min(_here(names, group) or names, key=lambda p: (p[1], p[0]))
            outcome.conflicts.append(
                Conflict(
                    ConflictKind.CONTENT,
                    key,
                    j.path(winner.other, place),
                    winner,
                    "both sides wrote to one database",
                    other.content,
                    other.attributes.mtime_ns,
                )
            )


def goes_with(outcome: Outcome, group: Group) -> set[int]:
    """The keys of what goes without being a deletion: logs of a database that stays."""
    if not any(outcome.verdicts[key].alive for key in group.own):
        return set()
    return set(group.keys - group.own if group.declared is None else group.keys)


def gone_from(j: Join, outcome: Outcome, group: Group) -> int:
    """How much of what a declared directory had would go, while it stays."""
    if group.declared is None or not goes_with(outcome, group):
        return 0
    gone = (k for k in group.keys if not outcome.verdicts[k].alive and not outcome.verdicts[k].held)
    return sum(any(j.nodes[key].names) for key in gone)


def not_at_once(
    steps: Iterable[Transition], keys: set[int], directories: set[int]
) -> Transition | None:
    """A step of what belongs together that a crash could not be made good for; ``None`` if none.

    What is brought, linked, replaced, renamed, swapped or taken away was at one place before and is
    at one after: that can be finished. Files that are replaced under several names, and renamed
    directories, cannot.
    """
    for step in steps:
        if keys.isdisjoint(keys_of(step)):
            continue
        match step:
            case Make():
                good = step.displaces is None or step.displaces.key not in directories
            case Move():
                over = step.displaces is not None and step.displaces.key in directories
                good = step.old is not None and step.key not in directories and not over
            case Exchange():
                good = directories.isdisjoint((step.key, step.other_key))
            case Link():
                good = step.displaces is None
            case Replace():
                good = len(step.places) == 1
            case Remove() | Unlink() | SetAttributes():
                good = True
            case _:
                good = False
        if not good:
            return step
    return None
