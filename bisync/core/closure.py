"""What a cycle must look at, given what changed: the smallest set that decides alone.

Starting with marked nodes, until nothing new turns up: every name of each node, the node
now and formerly at each such name, the same node and the same place on the other side,
all parents up to the root, and for a vanished directory the ancestor's subtree with what
the other side has below it. The law that holds it to account: the plan of a closure is
the plan of the whole trees, restricted to it.
"""

from collections.abc import Iterable
from typing import Protocol

from bisync.core.node import (
    ROOT,
    SIDES,
    Agreed,
    AgreedPart,
    Kind,
    Node,
    NodeId,
    Part,
    Place,
    Side,
)


class View(Protocol):
    """Lookups in one side's index. Every call takes a batch, for sides far away."""

    def nodes(self, ids: Iterable[NodeId]) -> dict[NodeId, Node]:
        """Return the nodes that have a name; absent ones are left out."""
        ...

    def names_of(self, ids: Iterable[NodeId]) -> dict[NodeId, frozenset[Place]]:
        """Return all names of each node; nodes without one may be left out."""
        ...

    def at(self, places: Iterable[Place]) -> dict[Place, NodeId]:
        """Return what is at each place; free places are left out."""
        ...

    def children(self, ids: Iterable[NodeId]) -> dict[NodeId, list[tuple[bytes, NodeId]]]:
        """Return what each directory holds."""
        ...

    def forgotten(self, ids: Iterable[NodeId]) -> set[NodeId]:
        """Return those that a filter now hides."""
        ...


class AgreedView(Protocol):
    """Lookups in the ancestor, in batches."""

    def nodes(self, keys: Iterable[int]) -> dict[int, Agreed]: ...

    def names_of(self, keys: Iterable[int]) -> dict[int, frozenset[Place]]: ...

    def at(self, places: Iterable[Place]) -> dict[Place, int]: ...

    def children(self, keys: Iterable[int]) -> dict[int, list[tuple[bytes, int]]]: ...

    def by_side(self, side: Side, ids: Iterable[NodeId]) -> dict[NodeId, int]: ...


class _Closure:
    def __init__(self, agreed: AgreedView, views: tuple[View, View], *, one_way: bool) -> None:
        self.one_way = one_way
        self.agreed_view = agreed
        self.views = views
        self.agreed = AgreedPart()
        self.parts = (Part(), Part())
        self.nodes_due: tuple[set[NodeId], set[NodeId]] = ({ROOT}, {ROOT})
        self.keys_due: set[int] = {ROOT}
        self.places_due: tuple[set[Place], set[Place]] = (set(), set())
        self.agreed_places_due: set[Place] = set()
        self.waiting: tuple[set[Place], set[Place]] = (set(), set())  # counterpart unknown yet
        self.vanished: tuple[set[int], set[int]] = (set(), set())  # directories, looked into
        self.successor: tuple[dict[int, NodeId], dict[int, NodeId]] = ({}, {})
        self.twin: tuple[dict[NodeId, NodeId], dict[NodeId, NodeId]] = ({}, {})
        self.unresolved: tuple[set[int], set[int]] = (set(), set())

    def run(self) -> None:
        progress = True
        while progress:
            progress = self._load_keys()
            for side in SIDES:
                progress |= self._load_nodes(side)
                progress |= self._load_places(side)
            progress |= self._load_agreed_places()
            for side in SIDES:
                progress |= self._counterparts(side)
                progress |= self._look_into_vanished(side)

    # -- loading -------------------------------------------------------------

    def _load_nodes(self, side: Side) -> bool:
        part = self.parts[side]
        due = {n for n in self.nodes_due[side] if n not in part.names_of}
        self.nodes_due[side].clear()
        if not due:
            return False
        view = self.views[side]
        part.nodes.update(view.nodes(due))
        names_of = view.names_of(due)
        part.forgotten |= view.forgotten(due - names_of.keys())
        known = self.agreed_view.by_side(side, due)
        if self.one_way and side is Side.BETA:
            self._look_into_new(due - known.keys())
        for node in due:
            names = names_of.get(node, frozenset())
            part.names_of[node] = names
            key = ROOT if node == ROOT else known.get(node)
            self.agreed.by_side[side][node] = key
            if key is not None:
                self.keys_due.add(key)
            for place in names:
                part.names[place] = node
                self.nodes_due[side].add(place[0])
                self.waiting[side].add(place)
        return True

    def _look_into_new(self, nodes: set[NodeId]) -> None:
        """What is new on beta may have to go, with all that is in it."""
        part = self.parts[Side.BETA]
        dirs = [node for node in nodes if node in part.nodes and part.nodes[node].kind is Kind.DIR]
        for below in self.views[Side.BETA].children(dirs).values():
            self.nodes_due[Side.BETA].update(node for _, node in below)

    def _load_keys(self) -> bool:
        due = {k for k in self.keys_due if k not in self.agreed.names_of}
        self.keys_due.clear()
        if not due:
            return False
        nodes = self.agreed_view.nodes(due)
        names_of = self.agreed_view.names_of(due)
        for key in due:
            names = names_of.get(key, frozenset())
            self.agreed.names_of[key] = names
            agreed = nodes.get(key)
            if agreed is None:
                continue
            self.agreed.nodes[key] = agreed
            for side in SIDES:
                local = agreed.ids[side]
                if local is not None:
                    self.nodes_due[side].add(local)
                if agreed.content.kind is Kind.DIR:
                    self.unresolved[side].add(key)
            for place in names:
                self.agreed.names[place] = key
                self.keys_due.add(place[0])
                self._want_on_sides(place)
        return True

    def _load_places(self, side: Side) -> bool:
        part = self.parts[side]
        due = {p for p in self.places_due[side] if p not in part.names}
        self.places_due[side].clear()
        if not due:
            return False
        found = self.views[side].at(due)
        for place in due:
            node = found.get(place)
            part.names[place] = node
            if node is not None:
                self.nodes_due[side].add(node)
        return True

    def _load_agreed_places(self) -> bool:
        due = {p for p in self.agreed_places_due if p not in self.agreed.names}
        self.agreed_places_due.clear()
        if not due:
            return False
        found = self.agreed_view.at(due)
        for place in due:
            key = found.get(place)
            self.agreed.names[place] = key
            if key is not None:
                self.keys_due.add(key)
        return True

    # -- following -----------------------------------------------------------

    def _local(self, side: Side, key: int) -> NodeId | None:
        """A side's directory for an agreed one: itself, or what took its name."""
        if key == ROOT:
            return ROOT
        if key in self.successor[side]:
            return self.successor[side][key]
        agreed = self.agreed.nodes.get(key)
        return None if agreed is None else agreed.ids[side]

    def _want_on_sides(self, place: Place) -> None:
        for side in SIDES:
            parent = self._local(side, place[0])
            if parent is not None:
                self.places_due[side].add((parent, place[1]))

    def _key(self, side: Side, local: NodeId) -> int | None:
        key = self.agreed.by_side[side].get(local)
        if key is not None:
            return key
        return next((k for k, n in self.successor[side].items() if n == local), None)

    def _counterparts(self, side: Side) -> bool:
        """Look at the same place on the other side and in the ancestor."""
        found: list[tuple[Place, Place]] = []
        progress = False
        for place in list(self.waiting[side]):
            parent, name = place
            if parent not in self.parts[side].names_of:
                continue
            key = self._key(side, parent)
            if key is not None:
                if key not in self.agreed.names_of:
                    continue
                self.agreed_places_due.add((key, name))
                other = self._local(side.other, key)
            else:
                other = self.twin[side].get(parent)
                if other is None:
                    continue
            self.waiting[side].discard(place)
            progress = True
            if other is not None:
                self.places_due[side.other].add((other, name))
                found.append((place, (other, name)))
        self._load_places(side.other)
        for place, there in found:
            self._pair(side, self.parts[side].names[place], there)
        return progress

    def _pair(self, side: Side, local: NodeId | None, there: Place) -> None:
        """Remember directories new on both sides at one place: their names correspond."""
        twin = self.parts[side.other].names.get(there)
        if local is None or twin is None or self._key(side, local) is not None:
            return
        self.twin[side][local] = twin
        self.twin[side.other][twin] = local

    def _look_into_vanished(self, side: Side) -> bool:
        """A directory that a side no longer has takes its whole subtree into the closure."""
        progress = False
        part = self.parts[side]
        gone: dict[int, list[Place]] = {}  # and where it was
        for key in list(self.unresolved[side]):
            agreed = self.agreed.nodes[key]
            local = agreed.ids[side]
            if key == ROOT:
                self.unresolved[side].discard(key)
                continue
            if local is not None and local not in part.names_of:
                continue
            if local is not None and part.names_of[local]:
                self.unresolved[side].discard(key)
                continue
            places = [
                (parent, name)
                for p, name in self.agreed.names_of[key]
                if (parent := self._local(side, p)) is not None
            ]
            progress = True
            if any(place not in part.names for place in places):
                self.places_due[side].update(places)
                continue
            self.unresolved[side].discard(key)
            gone[key] = places
        if gone:
            self._succeed(side, gone)
            for children in self.agreed_view.children(gone).values():
                self.keys_due.update(child for _, child in children)
            there = [n for key in gone if (n := self._local(side.other, key)) is not None]
            for below in self.views[side.other].children(there).values():
                self.nodes_due[side.other].update(node for _, node in below)
        return progress

    def _succeed(self, side: Side, gone: dict[int, list[Place]]) -> None:
        """A new directory at the place of one that is gone takes over what is below it."""
        part, view = self.parts[side], self.views[side]
        here = {
            key: [node for place in places if (node := part.names.get(place)) is not None]
            for key, places in gone.items()
        }
        found = {node for nodes in here.values() for node in nodes}
        fresh = found - self.agreed_view.by_side(side, found).keys()
        part.nodes.update(view.nodes(fresh - part.nodes.keys()))
        heirs: dict[int, NodeId] = {}
        for key, nodes in here.items():
            for node in nodes:
                if node in fresh and node in part.nodes and part.nodes[node].kind is Kind.DIR:
                    heirs[key] = node
                    break
        if not heirs:
            return
        self.successor[side].update(heirs)
        for children in view.children(set(heirs.values())).values():
            self.nodes_due[side].update(child for _, child in children)
        for parent, name in self.agreed.names:
            if parent in heirs:
                self.places_due[side].add((heirs[parent], name))


def close(
    agreed: AgreedView,
    views: tuple[View, View],
    marks: tuple[Iterable[NodeId], Iterable[NodeId]],
    *,
    one_way: bool = False,
) -> tuple[AgreedPart, tuple[Part, Part]]:
    """Gather everything that decides about the marked nodes.

    Args:
        agreed: the ancestor.
        views: each side's index.
        marks: nodes of each side that may have changed, been made or vanished.
        one_way: only alpha counts; see :class:`bisync.core.resolve.Rules`.

    Cost: proportional to the changes and the depth of the tree, not to its size.
    """
    closure = _Closure(agreed, views, one_way=one_way)
    for side, nodes in zip(SIDES, marks, strict=True):
        closure.nodes_due[side].update(nodes)
    closure.run()
    for side in SIDES:
        part = closure.parts[side]
        for node in [n for n, names in part.names_of.items() if not names and n != ROOT]:
            part.nodes.pop(node, None)
    return closure.agreed, closure.parts
