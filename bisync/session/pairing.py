"""What the states of two roots say about each other: go on, begin anew, or halt.

A pure decision over what both sides say of themselves. The table is hard-won: the same
root without state merges and deletes nothing; another root at the recorded location is
likelier a lost mount than a wish.
"""

from enum import Enum

from msgspec import Struct, field

from bisync.core.node import SIDES, Side
from bisync.endpoint.interface import Hello
from bisync.errors import HaltError
from bisync.fs.archive import PairState
from bisync.session.config import Config


class Start(Enum):
    """How the pair starts this run."""

    GO_ON = "go on"
    FIRST = "first contact"


class Relation(Struct):
    """The decision, and what each side has to do before the run."""

    start: Start = Start.FIRST
    new_identity: list[bool] = field(default_factory=lambda: [False, False])
    new_incarnation: list[bool] = field(default_factory=lambda: [False, False])
    clear: list[bool] = field(default_factory=lambda: [False, False])  # forget the ancestor
    messages: list[str] = field(default_factory=list)


def relate(hellos: tuple[Hello, Hello], familiar: tuple[bool, bool], config: Config) -> Relation:
    """Decide how two roots stand to each other.

    Args:
        hellos: what each side says.
        familiar: whether a side whose root object changed still looks like its old tree.
        config: approvals (``accept_root``, ``yes``).

    Raises:
        HaltError: a person must confirm first.
    """
    relation = Relation()
    _same_identity(relation, hellos)
    for side in SIDES:
        _own_record(relation, side, hellos[side], familiar=familiar[side], config=config)
    pairs = tuple(_pair_of(hellos[s], hellos[s.other], relation) for s in SIDES)
    if pairs[0] is not None and pairs[1] is not None:
        relation.start = Start.GO_ON
        return relation
    for side in SIDES:
        mine, there = pairs[side], hellos[side.other]
        if mine is not None:
            relation.clear[side] = True
            relation.messages.append(
                f"{there.path}: its state was lost; {config.merging}"
                + (f" ({there.damaged})" if there.damaged else "")
            )
        else:
            _record_of_location(relation, side, hellos, config)
    return relation


def _same_identity(relation: Relation, hellos: tuple[Hello, Hello]) -> None:
    a, b = hellos
    if not a.replica or a.replica != b.replica:
        return
    # A copy of a root brought the state along; the one that does not fit is the copy.
    copy = Side.ALPHA if a.recorded != a.root and b.recorded == b.root else Side.BETA
    relation.new_identity[copy] = True
    relation.messages.append(
        f"{hellos[copy].path}: this root is a copy of the other; it becomes a replica of its own"
    )


def _own_record(
    relation: Relation, side: Side, hello: Hello, *, familiar: bool, config: Config
) -> None:
    if hello.became_link and not config.accept_root:
        raise HaltError(
            f"{hello.path}: a symbolic link stands where the root was; nothing was touched. "
            "If it is right, run again with --accept-root"
        )
    if not hello.recorded or hello.recorded == hello.root or relation.new_identity[side]:
        return
    if not familiar and not config.accept_root:
        raise HaltError(
            f"{hello.path}: this is not the root its state was made for, and its files do not "
            "fit either; nothing was touched. If it is right, run again with --accept-root"
        )
    relation.new_incarnation[side] = True
    relation.messages.append(
        f"{hello.path}: the root was moved or restored; it is compared by names"
    )


def _pair_of(me: Hello, peer: Hello, relation: Relation) -> PairState | None:
    fresh = relation.new_identity
    if any(fresh) or not peer.replica or not me.known:
        return None
    return next((p for p in me.pairs if p.peer == peer.replica), None)


def _record_of_location(
    relation: Relation, side: Side, hellos: tuple[Hello, Hello], config: Config
) -> None:
    """This side knew something else, or the same root with other state, at that location."""
    me, there = hellos[side], hellos[side.other]
    if not me.known or relation.new_identity[side]:
        return
    fits = [p for p in me.pairs if there.root and p.identity == there.root]
    fits += [p for p in me.pairs if p.location == there.path]
    record = next(iter(fits), None)
    if record is None or relation.new_identity[side.other]:
        return
    same_root = record.identity == there.root
    lost_all = there.empty and record.entries > 0
    if same_root and not lost_all:
        relation.messages.append(f"{there.path}: its state was lost; {config.merging}")
        return
    if not config.accept_root:
        what = "is empty and has no state" if lost_all else "is another root than before"
        raise HaltError(
            f"{there.path}: {what}; a lost mount is likelier than a wish, nothing was touched. "
            "Mount it, or merge anyway with --accept-root"
        )
    relation.messages.append(f"{there.path}: accepted as a new root; {config.merging}")
