"""The three-way merge of one aspect: places, or attributes one by one."""

from collections.abc import Callable, Hashable
from typing import TypeAlias, TypeVar

from msgspec import Struct

from bisync.core.node import SIDES, Attributes, Node, Place, Side, XAttrs

T = TypeVar("T", bound=Hashable)
Order: TypeAlias = Callable[[Place], tuple[bytes, bytes]]
Fate: TypeAlias = Place | None
"""What became of one agreed name: itself, a new place, or ``None`` where it is gone."""


def fates(
    base: frozenset[Place], now: frozenset[Place], order: Order
) -> tuple[dict[Place, Fate], frozenset[Place]]:
    """Pair the names a side lost with those it gained.

    Returns:
        The fate of each base name, and the names that were added without losing one
        (hard links). A lost name pairs with a gained one of equal bytes first (its
        directory changed), then with one in the same directory, then in order.
    """
    fate: dict[Place, Fate] = {place: place for place in base & now}
    lost = sorted(base - now, key=order)
    gained = sorted(now - base, key=order)
    tests: tuple[Callable[[Place, Place], bool], ...] = (
        lambda a, b: a[1] == b[1],
        lambda a, b: a[0] == b[0],
        lambda _a, _b: True,
    )
    for test in tests:
        for place in list(lost):
            match = next((g for g in gained if test(place, g)), None)
            if match is not None:
                fate[place] = match
                lost.remove(place)
                gained.remove(match)
    fate.update(dict.fromkeys(lost))
    return fate, frozenset(gained)


class MergedPlaces(Struct, frozen=True):
    """Names both sides should have; ``disputes`` are (kept, dropped) of double renames."""

    places: frozenset[Place]
    disputes: tuple[tuple[Place, Place], ...] = ()


def merge_places(
    base: frozenset[Place], alpha: frozenset[Place], beta: frozenset[Place], *, order: Order
) -> MergedPlaces:
    """Merge the names of one node that at least one side still has.

    ======== ======== ======== ===============================
    agreed   alpha    beta     result
    ======== ======== ======== ===============================
    x        x        y        y
    x        gone     gone     gone
    x        y        gone     y (move beats delete)
    x        y        z        the name whose bytes sort first
    \\-      x        -        x (a new name, a new link)
    ======== ======== ======== ===============================
    """
    if alpha == beta:
        return MergedPlaces(alpha)
    fate_a, extra_a = fates(base, alpha, order)
    fate_b, extra_b = fates(base, beta, order)
    places, disputes = set(extra_a | extra_b), []
    for place in sorted(base, key=order):
        a, b = fate_a[place], fate_b[place]
        if b in (a, place):
            merged = a
        elif a == place:
            merged = b
        elif a is None or b is None:
            merged = a or b
        else:
            merged, dropped = sorted((a, b), key=order)
            if dropped not in places:
                disputes.append((merged, dropped))
        if merged is not None:
            places.add(merged)
    if not places and alpha | beta:
        # Each side removed the names the other kept: neither meant the node to go.
        places.add(min(alpha | beta, key=order))
    return MergedPlaces(frozenset(places), tuple(disputes))


class MergedAttributes(Struct, frozen=True):
    """What each side should hold. ``disputes`` names attributes set on both sides."""

    alpha: Attributes
    beta: Attributes
    disputes: tuple[str, ...]
    leader: Side


def merge_attributes(
    columns: tuple[Attributes | None, Attributes | None],
    nodes: tuple[Node, Node],
    content_leader: Side | None,
    master: Side | None = None,
) -> MergedAttributes:
    """Merge each attribute alone, each side against its own column.

    A side's change is a difference to what *it* really held after the last agreement, so
    a side that cannot hold an attribute never rewrites the other. Set on both sides: the
    side whose content won, else the newer change time, else the greater value; an
    extended attribute that one side lacks stays. The modification time goes with the
    content, else the newer one stands.

    Args:
        columns: attributes of each side in the ancestor, ``None`` where never agreed.
        nodes: the node as each side has it now.
        content_leader: the side whose content both will hold, ``None`` if equal already.
        master: the one side that counts, if only one does.
    """
    now = (nodes[0].attributes, nodes[1].attributes)
    if now[0] == now[1]:
        return MergedAttributes(now[0], now[1], (), content_leader or Side.ALPHA)
    leader = _newer(nodes) if content_leader is None else content_leader
    disputes: list[str] = []

    def one(name: str, values: tuple[T, T], old: tuple[T | None, T | None]) -> tuple[T, T]:
        changed = [columns[s] is None or values[s] != old[s] for s in SIDES]
        if values[0] == values[1] or not any(changed):
            return values
        if master is not None:
            value = values[master]
        elif all(changed):
            if name == "mtime":
                value = max(values)  # type: ignore[type-var]
            elif None in values:
                value = values[1] if values[0] is None else values[0]
            else:
                disputes.append(name)
                value = values[leader]
        else:
            value = values[0] if changed[0] else values[1]
        return value, value

    old_a, old_b = columns
    mode = one(
        "mode",
        ((now[0].mode, now[0].acl), (now[1].mode, now[1].acl)),
        ((old_a.mode, old_a.acl) if old_a else None, (old_b.mode, old_b.acl) if old_b else None),
    )
    uid = one("owner", (now[0].uid, now[1].uid), tuple(a.uid if a else None for a in columns))  # type: ignore[arg-type]
    gid = one("group", (now[0].gid, now[1].gid), tuple(a.gid if a else None for a in columns))  # type: ignore[arg-type]
    mtimes = (now[0].mtime_ns, now[1].mtime_ns)
    if content_leader is not None:
        mtime = (mtimes[content_leader], mtimes[content_leader])
    else:
        mtime = one("mtime", mtimes, tuple(a.mtime_ns if a else None for a in columns))  # type: ignore[arg-type]
    xattrs: tuple[dict[bytes, bytes], dict[bytes, bytes]] = ({}, {})
    maps = [dict(a.xattrs) for a in now]
    olds = [dict(a.xattrs) if a else {} for a in columns]
    for name in sorted(maps[0].keys() | maps[1].keys()):
        pair = one(
            name.decode("utf-8", "backslashreplace"),
            (maps[0].get(name), maps[1].get(name)),
            (olds[0].get(name), olds[1].get(name)),
        )
        for side in SIDES:
            value = pair[side]
            if value is not None:
                xattrs[side][name] = value
    merged = [
        Attributes(
            mode[s][0], uid[s], gid[s], mtime[s], tuple(sorted(xattrs[s].items())), mode[s][1]
        )
        for s in SIDES
    ]
    return MergedAttributes(merged[0], merged[1], tuple(disputes), leader)


def _newer(nodes: tuple[Node, Node]) -> Side:
    """The side changed last; equal clocks: the greater value, never the side."""

    def key(node: Node) -> tuple[int, int, int, int, XAttrs]:
        a = node.attributes
        return (node.ctime_ns, a.mode, a.uid, a.gid, a.xattrs)

    return Side.ALPHA if key(nodes[0]) >= key(nodes[1]) else Side.BETA
