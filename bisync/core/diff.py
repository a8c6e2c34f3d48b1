"""Join the ancestor and both sides by identity: one value per node, seen from three places.

Nodes are matched by node number first (a rename is a row in which only the name
differs), by succession second, by equal place last.

Succession, per side and name:

* same name, new object, old object nowhere else: a save; the same node.
* the old object lives under another name and the new one is known: moves; follow the ids.
* the old object lives under another name and the new one is unknown: directories follow
  the ids; a regular file is split, the new object continues the node and the old object
  is a new node that carries the agreed content (a save by backup).
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping

from msgspec import Struct, field

from bisync.core.node import (
    ROOT,
    SIDES,
    Agreed,
    AgreedPart,
    Content,
    Kind,
    Node,
    NodeId,
    Part,
    Place,
    Side,
)

_NOTHING: frozenset[Place] = frozenset()


class Joined(Struct):
    """One node, seen from the ancestor and from both sides.

    ``key`` is its archive number, or a negative number for a node the ancestor does not
    know. Names are in keys: (parent's key, name).
    """

    key: int
    agreed: Agreed | None = None
    base: frozenset[Place] = _NOTHING
    seen: list[Node | None] = field(default_factory=lambda: [None, None])
    names: list[frozenset[Place]] = field(default_factory=lambda: [_NOTHING, _NOTHING])
    forgotten: list[bool] = field(default_factory=lambda: [False, False])
    halfway: list[bool] = field(default_factory=lambda: [False, False])
    origin: int | None = None  # the key it was split from

    @property
    def is_dir(self) -> bool:
        for node in (*self.seen, self.agreed):
            if node is not None:
                return node.content.kind is Kind.DIR
        return False

    def claims(self, side: Side) -> frozenset[Place]:
        """The names its user gave it there; where the engine left it halfway is nobody's wish.

        None, where its agreed name has been agreed for another node since.
        """
        return self.base if self.halfway[side] else self.names[side]

    def node(self, side: Side) -> Node:
        """The node on a side where it is present."""
        node = self.seen[side]
        if node is None:
            raise LookupError(f"node {self.key} is not on {side.label}")
        return node


class Join:
    """All nodes of one closure, joined. Build with :func:`join`."""

    def __init__(self, agreed: AgreedPart, parts: tuple[Part, Part]) -> None:
        self.agreed = agreed
        self.parts = parts
        self.nodes: dict[int, Joined] = {}
        self.key_of: tuple[dict[NodeId, int], dict[NodeId, int]] = ({}, {})
        self.local_of: tuple[dict[int, NodeId], dict[int, NodeId]] = ({}, {})
        self._next = -1

    def occupant(self, side: Side, place: Place) -> int | None:
        """The key of what a side has at a place in keys; ``None`` where it is free or unknown."""
        parent = self.local_of[side].get(place[0])
        if parent is None:
            return None
        local = self.parts[side].names.get((parent, place[1]))
        return None if local is None else self.key_of[side].get(local)

    def path(self, side: Side, place: Place) -> bytes:
        """The path of a place as a side sees it; for ties, output and ignore rules only."""
        parts = [place[1]]
        key = place[0]
        seen = set()
        while key != ROOT and key not in seen:
            seen.add(key)
            joined = self.nodes.get(key)
            names = (joined.names[side] or joined.base) if joined else _NOTHING
            if not names:
                break
            key, name = min(names, key=lambda p: p[1])
            parts.append(name)
        return b"/".join(reversed(parts))

    def bind(self, side: Side, local: NodeId, key: int) -> None:
        self.key_of[side][local] = key
        self.local_of[side][key] = local

    def fresh_key(self) -> int:
        key = self._next
        self._next -= 1
        return key


def join(agreed: AgreedPart, parts: tuple[Part, Part]) -> Join:
    """Match the nodes of a closure; see the module's text for the rules."""
    result = Join(agreed, parts)
    for side in SIDES:
        _bind_known(result, side)
        _bind_successors(result, side)
    for side in SIDES:
        _bind_new(result, side)
    _collect(result)
    return result


def _bind_known(j: Join, side: Side) -> None:
    part = j.parts[side]
    for local in part.nodes:
        key = j.agreed.by_side[side].get(local)
        if key is not None and part.names_of.get(local):
            j.bind(side, local, key)
    j.bind(side, ROOT, ROOT)


def _top_down(agreed: AgreedPart) -> Iterator[Agreed]:
    """The ancestor's nodes, parents first."""
    children: dict[int, list[int]] = defaultdict(list)
    for key, names in agreed.names_of.items():
        for parent, _ in names:
            children[parent].append(key)
    queue, done = deque([ROOT]), {ROOT}
    while queue:
        for key in children[queue.popleft()]:
            if key not in done and key in agreed.nodes:
                done.add(key)
                queue.append(key)
                yield agreed.nodes[key]


def _bind_successors(j: Join, side: Side) -> None:
    part, taken = j.parts[side], j.key_of[side]
    for node in _top_down(j.agreed):
        old = node.ids[side]
        if old is not None and old in part.forgotten:
            continue
        old_names = part.names_of.get(old, _NOTHING) if old is not None else _NOTHING
        bases = j.agreed.names_of[node.id]
        for parent, name in sorted(bases, key=lambda p: (p[1], p[0])):
            local_parent = j.local_of[side].get(parent)
            if local_parent is None:
                continue
            new = part.names.get((local_parent, name))
            if new is None or new == old or new in taken:
                continue
            is_dir = part.nodes[new].kind is Kind.DIR
            if is_dir is not (node.content.kind is Kind.DIR):
                continue
            if not old_names:
                j.bind(side, new, node.id)
                break
            if is_dir or len(bases) > 1 or part.nodes[new].kind is not Kind.FILE:
                continue
            if node.content.kind is Kind.FILE and (local_parent, name) not in old_names:
                # A save by backup: the old object becomes a node of its own.
                assert old is not None
                if _is_halfway(part, old):
                    continue  # it was not its user who moved it
                split = j.fresh_key()
                j.bind(side, old, split)
                j.bind(side, new, node.id)
                j.nodes[split] = Joined(split, origin=node.id)
                break


def _bind_new(j: Join, side: Side) -> None:
    """Give nodes that the ancestor does not know a key; pair those at equal places."""
    part, other = j.parts[side], j.parts[side.other]
    waiting: dict[NodeId, list[tuple[bytes, NodeId]]] = defaultdict(list)
    for local, names in part.names_of.items():
        key = j.key_of[side].get(local)
        if (key is None or key < 0) and local in part.nodes:
            for parent, name in names:
                waiting[parent].append((name, local))
    queue = deque(sorted(p for p in waiting if p in j.key_of[side]))
    while queue:
        parent = queue.popleft()
        other_parent = j.local_of[side.other].get(j.key_of[side][parent])
        for name, local in sorted(waiting.pop(parent, ())):
            twin = other.names.get((other_parent, name)) if other_parent is not None else None
            if twin is not None and _may_pair(j, side, local, twin):
                _pair(j, side, local, twin)
            if local not in j.key_of[side]:
                j.bind(side, local, j.fresh_key())
            if local in waiting:
                queue.append(local)


def _may_pair(j: Join, side: Side, local: NodeId, twin: NodeId) -> bool:
    """Whether two objects at one place, new on both sides, are versions of one node."""
    mine, theirs = j.key_of[side].get(local), j.key_of[side.other].get(twin)
    if mine is not None and theirs is not None:
        if mine == theirs or mine > 0 or theirs > 0:
            return False
        splits = j.nodes.get(mine), j.nodes.get(theirs)  # both: the old object of a save?
        if splits[0] is None or splits[1] is None or splits[0].origin != splits[1].origin:
            return False
    elif (mine or theirs or -1) > 0:
        return False
    if mine is not None and mine in j.local_of[side.other]:
        return False
    if theirs is not None and theirs in j.local_of[side]:
        return False
    kinds = j.parts[side].nodes[local].kind, j.parts[side.other].nodes[twin].kind
    return (kinds[0] is Kind.DIR) == (kinds[1] is Kind.DIR)


def _pair(j: Join, side: Side, local: NodeId, twin: NodeId) -> None:
    """Give two objects one key: what one has already, or a new one."""
    mine, theirs = j.key_of[side].get(local), j.key_of[side.other].get(twin)
    if mine is not None and theirs is not None:
        del j.local_of[side.other][theirs], j.nodes[theirs]
        theirs = None
    key = mine if mine is not None else theirs
    if key is None:
        key = j.fresh_key()
    if mine is None:
        j.bind(side, local, key)
    if theirs is None:
        j.bind(side.other, twin, key)


def _collect(j: Join) -> None:
    for key, agreed in j.agreed.nodes.items():
        joined = j.nodes[key] = Joined(key, agreed=agreed, base=j.agreed.names_of[key])
        for side in SIDES:
            old = agreed.ids[side]
            joined.forgotten[side] = old is not None and old in j.parts[side].forgotten
    for side in SIDES:
        part = j.parts[side]
        for local, key in j.key_of[side].items():
            joined = j.nodes.setdefault(key, Joined(key))
            if local == ROOT:
                joined.seen[side] = part.nodes.get(ROOT)
                continue
            joined.seen[side] = part.nodes[local]
            joined.names[side] = frozenset(
                (j.key_of[side][parent], name) for parent, name in part.names_of[local]
            )
            if _is_halfway(part, local):
                joined.halfway[side] = joined.agreed is not None


def _is_halfway(part: Part, local: NodeId) -> bool:
    """Whether a node is where a run that went wrong left it, and not where its user put it."""
    place = part.halfway.get(local)
    return place is not None and part.names_of[local] == {place}


def same_version(node: Node, agreed: Agreed, side: Side) -> bool:
    """Whether a side's object is the agreed one and nobody wrote to it since.

    Versions are counted per node: a successor's mean nothing beside its predecessor's.
    """
    return node.id == agreed.ids[side] and node.version == agreed.versions[side]


def frozen_keys(
    j: Join, frozen: tuple[Mapping[NodeId, str], Mapping[NodeId, str]]
) -> dict[int, str]:
    """The keys that lie in or below what a side could not look at, with the reason.

    Nothing may be done there: what is not seen is neither changed nor deleted.
    """
    held: dict[int, str] = {}
    for side in SIDES:
        for node, reason in frozen[side].items():
            key = j.key_of[side].get(node)
            if key is not None:
                held[key] = reason
    if not held:
        return held
    clear: set[int] = {ROOT}
    for start in j.nodes:
        trail, queue = {start}, [start]
        reason = ""
        while queue and not reason:
            key = queue.pop()
            if key in held:
                reason = held[key]
            elif key not in clear:
                joined = j.nodes.get(key)
                places = joined.base.union(*joined.names) if joined is not None else _NOTHING
                above = {parent for parent, _ in places} - trail
                trail |= above
                queue += above
        if reason:
            held.setdefault(start, reason)
        else:
            clear |= trail
    return held


def unchanged(joined: Joined, side: Side) -> bool:
    """Whether a side still holds the agreed content. Unknown digests count as changed."""
    node, agreed = joined.seen[side], joined.agreed
    if node is None or agreed is None:
        return False
    return same_version(node, agreed, side) or same_content(node.content, agreed.content)


def same_content(a: Content, b: Content) -> bool:
    """Whether two contents are known to be equal."""
    return a == b and a.known


def presumed_equal(a: Node, b: Node) -> bool:
    """Whether two files nobody read look alike: same kind, size and mtime (first contact)."""
    return (
        a.kind is b.kind is Kind.FILE
        and not (a.content.known and b.content.known)
        and a.content.size == b.content.size
        and a.attributes.mtime_ns == b.attributes.mtime_ns
    )


def untouched(joined: Joined, side: Side) -> bool:
    """Whether it looks as if nobody wrote to an agreed file there.

    A version alone also counts looks that could not be sure, as at a file of this very moment.
    """
    agreed, node = joined.agreed, joined.seen[side]
    if agreed is None or node is None:
        return False
    attributes = agreed.attributes[side]
    looks = attributes is not None and node.attributes.mtime_ns == attributes.mtime_ns
    return unchanged(joined, side) or (looks and node.content.size == agreed.content.size)


def wanted_digests(
    j: Join, *, presume: bool = True, prove: bool = False
) -> tuple[set[NodeId], set[NodeId]]:
    """The nodes of each side that must be read before this closure can be decided.

    Args:
        presume: take files that are new on both sides with equal size and mtime for equal.
        prove: read what was taken for equal that way.
    """
    wanted: tuple[set[NodeId], set[NodeId]] = (set(), set())
    for joined in j.nodes.values():
        nodes = [joined.seen[side] for side in SIDES]
        if all(n is None or n.content.known for n in nodes):
            continue
        a, b = nodes
        agreed = joined.agreed
        if agreed is None and joined.origin is not None and (a is None or b is None):
            # The old object of a save by backup: is it what the other side still has?
            before = j.nodes[joined.origin].agreed
            changed = [
                n is not None and (before is None or not same_version(n, before, s))
                for s, n in zip(SIDES, nodes, strict=True)
            ]
        elif agreed is None:
            if a is None or b is None or a.kind is not b.kind:
                continue
            if presume and joined.origin is None and presumed_equal(a, b):
                continue
            changed = [True, True]
        else:
            changed = [
                n is not None and not same_version(n, agreed, s)
                for s, n in zip(SIDES, nodes, strict=True)
            ]
            read = prove or any(n is not None and n.content.known for n in nodes)
            unread = agreed.presumed or not agreed.content.known
            if unread and (any(changed) or (agreed.presumed and read)):
                changed = [True, True]  # nobody read the agreed version: compare the sides
        for side in SIDES:
            node = nodes[side]
            if changed[side] and node is not None and not node.content.known:
                wanted[side].add(node.id)
    return wanted
