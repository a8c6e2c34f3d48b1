"""What the other end says ahead, so that what will be asked next needs no way there and back."""

from collections.abc import Iterable

from msgspec import Struct, field

from bisync.core.closure import View
from bisync.core.node import Node, NodeId, Place
from bisync.endpoint.inline import Inline
from bisync.fs.conflicts import Choice
from bisync.fs.walk import ScanResult

AT_A_TIME = 5000  # things that are asked about in one message
MOST_AROUND = 4 * AT_A_TIME  # nodes in one answer, those that were asked for included


class Around(Struct, frozen=True):
    """Some nodes of a side's index, with all directories above them."""

    nodes: dict[NodeId, Node] = field(default_factory=dict)
    names_of: dict[NodeId, frozenset[Place]] = field(default_factory=dict)
    without: set[NodeId] = field(default_factory=set)  # those without any name
    forgotten: set[NodeId] = field(default_factory=set)  # of them: a filter hides them


class Peers(Struct, frozen=True):
    """What will be asked about on one side, because of what changed on the other."""

    nodes: list[NodeId] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    contents: bool = True  # whether what changed on that side may come to the other


class Glance(Struct, frozen=True):
    """What a run over a few directories begins with; see :meth:`RemoteEndpoint.wake`."""

    choices: list[Choice]
    scanned: ScanResult
    companions: list[Place]
    around: Around  # what has to be looked at, and the peers of what changed on the other side
    at: dict[Place, NodeId]  # what is at their places
    contents: dict[NodeId, Inline]  # of what was marked: a few small files


def around(view: View, ids: Iterable[NodeId]) -> Around:
    """Look up nodes, and what is above them as far as it fits into one answer."""
    found = Around()
    due = set(ids)
    while due and len(found.names_of) + len(found.without) + len(due) <= MOST_AROUND:
        names_of = view.names_of(due)
        found.nodes.update(view.nodes(due))
        found.names_of.update((node, names) for node, names in names_of.items() if names)
        without = {node for node in due if not names_of.get(node)}
        found.without.update(without)
        found.forgotten.update(view.forgotten(without))
        due = {parent for names in names_of.values() for parent, _ in names}
        due -= found.names_of.keys() | found.without
    return found
