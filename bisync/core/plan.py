"""Plan: what each side must do, as transitions in an order that is safe to stop after any.

A transition is valid only while its places still hold what was observed. Node numbers and
places are the side's own, so a side can perform its list without knowing the other's.
"""

from collections.abc import Container, Mapping
from typing import TypeAlias

from msgspec import Struct, field

from bisync.core.conflict import Conflict
from bisync.core.node import ROOT, Attributes, Content, NodeId, Place, Side


class _Step(Struct, frozen=True, kw_only=True):
    key: int  # archive number, for grouping results
    node: NodeId  # the side's own number
    reason: str = ""


class Remove(_Step, frozen=True, kw_only=True):
    """Displace a node into the rollback store, a directory with all its ``members``."""

    place: Place
    members: tuple[tuple[int, NodeId], ...] = ()  # (key, node) of everything below
    conflict: bool = False


class Make(_Step, frozen=True, kw_only=True):
    """A new node. ``source`` is the other side's node that has a file's content."""

    place: Place
    content: Content
    attributes: Attributes
    source: NodeId | None = None
    displaces: Remove | None = None


class Link(_Step, frozen=True, kw_only=True):
    """One more name for a node that has one."""

    place: Place
    displaces: Remove | None = None


class Move(_Step, frozen=True, kw_only=True):
    """One rename. ``old`` is ``None`` for a node that was parked before.

    ``displaces`` sits at the new name: the two are exchanged, so that the name is never
    missing, and it is removed from the old one.
    """

    old: Place | None
    new: Place
    displaces: Remove | None = None


class Exchange(_Step, frozen=True, kw_only=True):
    """Two nodes swap their places in one step: neither name is ever missing."""

    old: Place
    new: Place
    other: NodeId
    other_key: int


class Park(_Step, frozen=True, kw_only=True):
    """Take a node out of the way, where an exchange cannot break a knot of names."""

    old: Place


class Replace(_Step, frozen=True, kw_only=True):
    """New content for a node under all its names; what it displaces is kept.

    ``keep`` gives the displaced object a name of its own in the tree instead (a save by
    backup): ``keep_node`` and ``keep_key`` say which node that is.
    """

    places: tuple[Place, ...]
    content: Content
    attributes: Attributes
    source: NodeId | None = None
    conflict: bool = False
    keep: Place | None = None
    keep_node: NodeId = 0
    keep_key: int = 0


class Unlink(_Step, frozen=True, kw_only=True):
    """One name less for a node that keeps another."""

    place: Place


class SetAttributes(_Step, frozen=True, kw_only=True):
    """Change attributes in place.

    ``successor`` is the node whose old object this one is (a save by backup): agreed on alone,
    that one would leave an object that nobody knows any more.
    """

    attributes: Attributes
    successor: int | None = None


Transition: TypeAlias = (
    Make | Link | Move | Exchange | Park | Replace | Unlink | Remove | SetAttributes
)


def keys_of(step: Transition) -> tuple[int, ...]:
    """The archive numbers whose agreement depends on a transition."""
    keys = [step.key]
    match step:
        case Exchange():
            keys.append(step.other_key)
        case Replace() if step.keep is not None:
            keys.append(step.keep_key)
        case SetAttributes() if step.successor is not None:
            keys.append(step.successor)
        case Remove():
            keys += [key for key, _ in step.members]
        case Make() | Link() | Move() if step.displaces is not None:
            keys += keys_of(step.displaces)
    return tuple(keys)


def nodes_of(step: Transition) -> tuple[NodeId, ...]:
    """The side's own numbers of all nodes that a transition changes."""
    nodes = [step.node]
    match step:
        case Exchange():
            nodes.append(step.other)
        case Replace() if step.keep is not None:
            nodes.append(step.keep_node)
        case Remove():
            nodes += [node for _, node in step.members]
        case Make() | Link() | Move() if step.displaces is not None:
            nodes += nodes_of(step.displaces)
        case _:
            pass
    return tuple(nodes)


class Placed(Struct):
    """Where a run took a node, over all its steps."""

    key: int
    first: Place  # where it was before
    last: Place


class Placements(dict[NodeId, Placed]):
    """What the performed steps of one side moved. Add them in their order."""

    def add(self, step: Transition) -> None:
        """Note what a step moved, if it moves anything."""
        match step:
            case Park():
                self.move(step.node, step.key, step.old, step.old)
            case Move():
                self.move(step.node, step.key, step.old, step.new)
            case Exchange():
                self.move(step.node, step.key, step.old, step.new)
                self.move(step.other, step.other_key, step.new, step.old)
            case _:
                pass

    def move(self, node: NodeId, key: int, old: Place | None, new: Place) -> None:
        """Note that a node was moved; ``old`` is ``None`` for one that was parked."""
        if node in self:
            self[node].last = new
        elif old is not None:
            self[node] = Placed(key, old, new)


class Update(Struct, frozen=True, kw_only=True):
    """What the ancestor says about one node once its transitions are done.

    ``names`` are in archive numbers; none means the node is no longer part of the
    ancestor. ``attributes`` are what each side should then hold; what they really hold
    is looked up when the update is committed.
    """

    key: int
    names: frozenset[Place]
    content: Content | None = None
    ids: tuple[NodeId, NodeId] = (0, 0)
    attributes: tuple[Attributes | None, Attributes | None] = (None, None)
    presumed: bool = False


def homeless(updates: Mapping[int, Update], known: Container[int]) -> set[int]:
    """The keys of updates whose directory is neither known nor updated with them.

    They must not be agreed on: a name in nothing leads nobody to the node again.
    """
    left = dict(updates)
    while lost := [
        key
        for key, update in left.items()
        if any(p != ROOT and p not in known and p not in left for p, _ in update.names)
    ]:
        for key in lost:
            del left[key]
    return updates.keys() - left.keys()


class DirectoryTime(Struct, frozen=True):
    """A directory whose modification time is set when nothing is pending below it."""

    key: int
    ids: tuple[NodeId, NodeId]
    mtime_ns: tuple[int, int]
    seen_ns: tuple[int | None, int | None]  # what it had, where it was
    ours: tuple[bool, bool]  # where something is done in it, which changes its time


class Plan(Struct):
    """Both sides' transitions for one closure and what they add up to."""

    steps: tuple[list[Transition], list[Transition]] = field(default_factory=lambda: ([], []))
    ids: dict[int, tuple[NodeId | None, NodeId | None]] = field(default_factory=dict)
    # archive number -> what each side has of it, once the steps are done
    archived: dict[int, int] = field(default_factory=dict)  # key -> archive number
    updates: list[Update] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    directory_times: list[DirectoryTime] = field(default_factory=list)
    withheld: tuple[dict[NodeId, int], dict[NodeId, int]] = field(default_factory=lambda: ({}, {}))
    postponed: tuple[set[NodeId], set[NodeId]] = field(default_factory=lambda: (set(), set()))
    # what waits for a removal, to be decided anew after it
    # per side: nodes whose removal waits, and how many entries each stands for
    held: dict[int, str] = field(default_factory=dict)  # archive number or negative key
    held_nodes: tuple[set[NodeId], set[NodeId]] = field(default_factory=lambda: (set(), set()))
    blocked: list[tuple[Side, tuple[NodeId | None, NodeId | None], str]] = field(
        default_factory=list
    )
    # where it cannot be done, what each side has of the node, and why
    notes: list[tuple[int, bytes, str]] = field(default_factory=list)
    strays: list[tuple[bytes, str]] = field(default_factory=list)  # see Outcome

    def empty(self) -> bool:
        """Whether no side has anything to do and nothing new was agreed."""
        return not (self.steps[0] or self.steps[1] or self.updates)


def place_of(step: Transition) -> Place | None:
    """Where a step's node is to be, or was; ``None`` if it stays where it is."""
    match step:
        case Move() | Exchange():
            return step.new
        case Replace():
            return step.places[0]
        case Park():
            return step.old
        case SetAttributes():
            return None
        case _:
            return step.place


def new_places(step: Transition) -> tuple[Place, ...]:
    """Where a step gives a name that its node did not have there."""
    match step:
        case Make() | Link():
            return (step.place,)
        case Move():
            return (step.new,)
        case Exchange():
            return (step.new, step.old)
        case Replace() if step.keep is not None:
            return (step.keep,)
        case _:
            return ()
