"""Files that are one thing together: a database and what its engine keeps beside it.

SQLite keeps what is not yet in the database file, or no longer, in ``NAME-wal`` or
``NAME-journal``; neither file says anything without the other of the same instant. Such files are
read at one instant, decided on together and applied together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bisync.core.conflict import Conflict, ConflictKind
from bisync.core.diff import Join, Joined, same_version
from bisync.core.node import SIDES, Kind, NodeId, Place, Side
from bisync.core.plan import Make, Remove, Replace, Transition
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


@dataclass(frozen=True, slots=True)
class Group:
    """The files of one database: its place in keys, and its members as each side has them."""

    place: Place
    keys: frozenset[int]
    members: tuple[dict[bytes, NodeId], dict[bytes, NodeId]]


@dataclass(frozen=True, slots=True)
class Together:
    """Steps for these keys are done together or not; their content is one instant there."""

    keys: frozenset[int]
    source: tuple[NodeId, ...]  # the members on the side that has the content


def databases_in(
    steps: Sequence[Transition], database: Callable[[int], tuple[int, bytes] | None]
) -> list[Together]:
    """What of a mirror's steps belongs together.

    Args:
        database: which one a file of the source belongs to, by its key; ``None``: none.
    """
    places: dict[Place, list[tuple[int, int | None]]] = {}
    for step in steps:
        match step:
            case Make() | Remove():
                place = step.place
            case Replace():
                place = step.places[0]
            case _:
                continue
        source = None if isinstance(step, Remove) else step.source
        places.setdefault((place[0], stem(place[1])), []).append((step.key, source))
    found = []
    for members in places.values():
        sources = tuple(source for _, source in members if source is not None)
        if any(database(source) is not None for source in sources):
            found.append(Together(frozenset(key for key, _ in members), sources))
    return found


Stems = tuple[set[Place], set[Place]]
"""Where on each side databases are that have a journal: (parent, name) in the side's numbers."""


def groups_in(j: Join, stems: Stems) -> list[Group]:
    """The databases that a closure has files of."""
    found: dict[Place, set[int]] = {}
    for key, joined in j.nodes.items():
        if not _is_file(joined):
            continue
        for parent, name in joined.base.union(*joined.names):
            base = stem(name)
            if any((j.local_of[s].get(parent), base) in stems[s] for s in SIDES):
                found.setdefault((parent, base), set()).add(key)
    return [
        Group(place, frozenset(keys), (_members(j, place, keys, 0), _members(j, place, keys, 1)))
        for place, keys in sorted(found.items())
    ]


def _is_file(joined: Joined) -> bool:
    nodes = [node for node in (*joined.seen, joined.agreed) if node is not None]
    return all(node.content.kind is Kind.FILE for node in nodes)


def _members(j: Join, place: Place, keys: Iterable[int], side: int) -> dict[bytes, NodeId]:
    found = {}
    for key in keys:
        joined = j.nodes[key]
        node = joined.seen[side]
        for parent, name in joined.names[side]:
            if node is not None and parent == place[0] and stem(name) == place[1]:
                found[name] = node.id
    return found


def changed(j: Join, group: Group, side: Side) -> bool:
    """Whether a side's user changed any of a database's files.

    Not the shared memory, and not by a journal that is empty: a reader leaves one.
    """
    return any(_is_changed(j.nodes[key], side) for key in group.keys)


def _is_changed(joined: Joined, side: Side) -> bool:
    node = joined.seen[side]
    if _says_nothing(joined, side):
        return False
    if joined.agreed is None:
        return node is not None
    if node is None or not joined.names[side]:
        return not joined.halfway[side] and not joined.forgotten[side]
    return not same_version(node, joined.agreed, side)


def _says_nothing(joined: Joined, side: Side) -> bool:
    names = [name for _, name in joined.base.union(*joined.names)]
    if all(name.endswith(SHARED) for name in names):
        return True
    node = joined.seen[side]
    empty = node is not None and node.content.size == 0
    return empty and all(name.endswith(JOURNALS) for name in names)


def newest(j: Join, group: Group) -> Side:
    """The side on which a database was written to last."""
    times = [0, 0]
    for joined in (j.nodes[key] for key in group.keys):
        for side in SIDES:
            node = joined.seen[side]
            if node is not None and not _says_nothing(joined, side):
                times[side] = max(times[side], node.attributes.mtime_ns)
    return Side.ALPHA if times[0] >= times[1] else Side.BETA


def is_whole(j: Join, outcome: Outcome, group: Group) -> bool:
    """Whether a database becomes, or stays, that of one side."""
    keys = [key for key in group.keys if not all(_says_nothing(j.nodes[key], s) for s in SIDES)]
    changed_keys = [key for key in keys if any(_is_changed(j.nodes[key], s) for s in SIDES)]
    held = [key for key in changed_keys if outcome.verdicts[key].held]
    if held:
        return len(held) == len(changed_keys)  # then nothing is done
    return any(all(_is_from(j, outcome, key, side) for key in keys) for side in SIDES)


def _is_from(j: Join, outcome: Outcome, key: int, side: Side) -> bool:
    verdict = outcome.verdicts[key]
    if verdict.alive:
        return verdict.source in (None, side)
    return j.nodes[key].seen[side] is None


def choose(j: Join, outcome: Outcome, group: Group, winner: Side) -> None:
    """Let a database be that of one side: what that side has not goes, and is kept."""
    for key in group.keys:
        joined, verdict = j.nodes[key], outcome.verdicts[key]
        theirs = joined.seen[winner]
        only_theirs = joined.names[winner] == joined.base and not joined.names[winner.other]
        if theirs is not None and only_theirs and not verdict.alive and not verdict.held:
            verdict.alive, verdict.names, verdict.forget = True, joined.base, False
            verdict.content, verdict.source = theirs.content, winner
            verdict.attributes = [theirs.attributes, theirs.attributes]
            verdict.reason = "conflict: it goes with its database"
        if theirs is not None or not verdict.alive or verdict.held:
            continue
        loser = joined.node(winner.other)
        place = min(joined.names[winner.other], key=lambda p: (p[1], p[0]))
        verdict.alive, verdict.names, verdict.conflict = False, frozenset(), True
        verdict.reason = "conflict: it goes with its database"
        outcome.conflicts.append(
            Conflict(
                ConflictKind.CONTENT,
                key,
                j.path(winner.other, place),
                winner,
                "both sides wrote to one database",
                loser.content,
                loser.attributes.mtime_ns,
            )
        )
