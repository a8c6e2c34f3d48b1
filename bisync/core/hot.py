"""How often a version is taken of a *hot* file: one that is written to and never closed.

Each version of it is a frozen clone, after which every page that is written is copied once more,
and a reading. What that costs is a debt, which is paid off with a small share of the time that
passes; no version is taken while the debt is more than one burst. A clone that was slow, or of very
many extents, says that the file suffers: then the interval is doubled, and halved when it is cheap
again.
"""

import math

from msgspec import Struct

_SECOND = 10**9  # ns


class Allowance(Struct, frozen=True):
    """What a hot file may cost."""

    share: float = 0.05
    """Of the time that passes, this part is for its versions in the long run."""

    burst_s: float = 30.0
    """So much work may be done at once: a file that is written now and then is followed at once."""

    slow_clone_s: float = 0.1
    """A clone that took longer doubles the interval."""

    first_s: float = 10.0
    """The first interval that is more than none."""

    longest_s: float = 3600.0
    """The longest interval."""


class Cost(Struct, frozen=True):
    """What one version cost: seconds in all, those for the clone, and very many extents."""

    all_s: float
    clone_s: float
    many_extents: bool = False


class Debt(Struct, frozen=True):
    """What the versions of a hot file have cost so far.

    Attributes:
        debt_s: seconds of work that are not paid off, at ``at_ns``.
        at_ns: when that was; of the last version.
        interval_s: between two versions, at least.
    """

    debt_s: float = 0.0
    at_ns: int = 0
    interval_s: float = 0.0


def wait_s(debt: Debt, now_ns: int, allowance: Allowance) -> float:
    """Seconds until the next version may be taken; 0: now."""
    passed = _passed(debt, now_ns)
    over = debt.debt_s - allowance.burst_s
    return max(0.0, debt.interval_s - passed, over / allowance.share - passed)


def taken(debt: Debt, cost: Cost, now_ns: int, allowance: Allowance) -> Debt:
    """The debt after a version was taken."""
    left = max(0.0, debt.debt_s - _passed(debt, now_ns) * allowance.share)
    if cost.many_extents or cost.clone_s > allowance.slow_clone_s:
        interval = min(max(2 * debt.interval_s, allowance.first_s), allowance.longest_s)
    else:
        interval = debt.interval_s / 2
        interval = interval if interval >= allowance.first_s / 2 else 0.0
    return Debt(left + cost.all_s, now_ns, interval)


def owes_more(debt: Debt, work_s: float) -> Debt:
    """The debt after some more work for the version that was taken last."""
    return Debt(debt.debt_s + work_s, debt.at_ns, debt.interval_s)


def _passed(debt: Debt, now_ns: int) -> float:
    # A clock that was set back must not make anybody wait until it is where it was.
    return math.inf if now_ns < debt.at_ns else (now_ns - debt.at_ns) / _SECOND
