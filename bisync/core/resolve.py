"""Who wins a conflict. Decided by values, never by which side happens to drive."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import Enum

from msgspec import Struct, field

from bisync.core.node import Node, Side
from bisync.core.path import shorten


class Policy(Enum):
    """What ``--conflict`` may say."""

    NEWEST = "newest"
    OLDEST = "oldest"
    ALPHA = "alpha"
    BETA = "beta"
    KEEP_BOTH = "keep-both"
    MANUAL = "manual"


class OneWay(Enum):
    """What becomes of edits on beta where only alpha counts."""

    UNDO = "undo"  # they go to the rollback store
    REPORT = "report"  # they stay, and are told as problems


class Rules(Struct, frozen=True):
    """How a session settles what the values alone do not.

    ``replicas`` are short names of the two replicas for conflict copies, alpha first.
    ``presume``: files new on both sides with equal size and mtime are taken for equal.
    ``prove``: those that once were are read, and compared.
    ``amnesia``: a side lost its memory of objects (moved or restored root), so what it
    lacks was not deleted there. ``decisions``: path -> side a person chose for a conflict
    that waited, or ``None`` for both versions. ``one_way``: beta becomes what alpha is; nothing
    is disputed, and no deletion on alpha meets an edit that beats it.
    """

    policy: Policy = Policy.NEWEST
    replicas: tuple[str, str] = ("alpha", "beta")
    presume: bool = True
    prove: bool = False
    amnesia: tuple[bool, bool] = (False, False)
    decisions: Mapping[bytes, Side | None] = field(default_factory=dict)
    one_way: OneWay | None = None


def rank(node: Node) -> tuple[int, bytes]:
    """The order of two versions: newer first, ties by the smaller digest.

    A clock may decide which version wins, never whether both are kept.
    """
    content = node.content
    tie = content.digest or content.target or bytes([content.kind])
    return (-node.attributes.mtime_ns, tie)


def winner(policy: Policy, alpha: Node, beta: Node) -> Side | None:
    """The side whose version takes the name; ``None`` where a person must say."""
    match policy:
        case Policy.ALPHA:
            return Side.ALPHA
        case Policy.BETA:
            return Side.BETA
        case Policy.MANUAL:
            return None
        case Policy.OLDEST:
            a, b = rank(alpha), rank(beta)
            return Side.ALPHA if (-a[0], a[1]) <= (-b[0], b[1]) else Side.BETA
        case Policy.NEWEST | Policy.KEEP_BOTH:
            return Side.ALPHA if rank(alpha) <= rank(beta) else Side.BETA


def conflict_name(name: bytes, replica: str, mtime_ns: int, attempt: int = 0) -> bytes:
    """``NAME.conflict-REPLICA-YYYYMMDDTHHMMSS`` for a version of that time (UTC).

    The time is the version's own, so that every run gives it the same name.
    """
    seconds = min(max(mtime_ns // 10**9, -(10**10)), 2 * 10**11)
    when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    stamp = f"{when.year:04d}{when:%m%dT%H%M%S}"
    suffix = f".conflict-{replica}-{stamp}" + (f".{attempt + 1}" if attempt else "")
    return shorten(name, suffix.encode())
