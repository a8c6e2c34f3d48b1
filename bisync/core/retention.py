"""How long displaced versions are kept."""

from collections.abc import Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

RECENT_BYTES = 64 << 20
_LEAP_NS = 6 * 3600 * 10**9
_MOST_LEAPS = 256


class Retention(Struct, frozen=True):
    """How old a kept version may get, and how many of the engine's own are kept."""

    days: int | None = 90
    """Drop what was kept longer ago; ``None``: keep for ever. Of each time in which nobody looked
    at the clock, a third of this counts at most: see :class:`Passing`."""

    every_s: int | None = 3600
    """Of the versions of a file that the engine had installed itself, keep the last one in each
    so many seconds; ``None``: all. Edits, conflict losers and deletions are never thinned."""

    recent: int = 16
    """So many of the newest such versions of a file, 64 MiB together, are thinned one period
    later: what went wrong a few minutes ago can be undone step by step."""


class Leap(Struct, frozen=True):
    """A time in which nobody looked at the clock, or in which it was set."""

    start_ns: int
    end_ns: int
    latest_ns: int
    """The latest it had been until then: what lies before that had been lived through already."""

    undone: bool = False
    """The clock was set back to before its start."""


class Passing(Struct, frozen=True):
    """How much time has passed, as far as that can be told from a clock that may be set wrong.

    A clock that is a year ahead for a minute must not make everything a year old. Whoever looks
    at it now and then sees it leap; a machine that was off for long looks the same, and what is
    kept a while longer for that harms nobody.
    """

    seen_ns: int
    """When it was looked at for the last time."""

    latest_ns: int = 0
    """The latest it ever was."""

    leaps: tuple[Leap, ...] = ()

    def at(self, now_ns: int) -> "Passing":
        """The same after another look."""
        latest = max(self.latest_ns, self.seen_ns)
        leaps = list(self._left(now_ns))
        if now_ns - self.seen_ns > _LEAP_NS:
            leaps.append(Leap(self.seen_ns, now_ns, latest))
        leaps.sort(key=lambda leap: leap.start_ns)
        return Passing(now_ns, latest, tuple(leaps[-_MOST_LEAPS:]))

    def _left(self, now_ns: int) -> Iterable[Leap]:
        leapt = now_ns - self.seen_ns > _LEAP_NS
        for leap in self.leaps:
            if now_ns < self.seen_ns and leap.end_ns > now_ns:
                if now_ns > leap.start_ns:  # it was set a little too far
                    yield replace(leap, end_ns=now_ns)
                else:
                    yield replace(leap, undone=True)
            elif not leap.undone:
                yield leap
            elif leapt and self.seen_ns <= leap.start_ns and leap.end_ns <= now_ns:
                yield replace(leap, undone=False)  # it is where it was before it was set back
            elif now_ns <= leap.start_ns:
                yield leap

    def limit_ns(self, keep_ns: int, most_ns: int) -> int:
        """What was before is older than ``keep_ns`` in any case."""
        over = (leap.end_ns - leap.start_ns - most_ns for leap in self.leaps if not leap.undone)
        return self.seen_ns - keep_ns - sum(each for each in over if each > 0)

    def age_ns(self, then_ns: int, most_ns: int) -> int:
        """How long ago something was at least; each leap since counts for at most ``most_ns``."""
        age = self.seen_ns - then_ns
        for leap in self.leaps:
            if then_ns <= leap.latest_ns and not leap.undone:
                begin = leap.start_ns if then_ns <= leap.start_ns else leap.latest_ns
                age -= max(0, leap.end_ns - begin - most_ns)
        return age


class Thinnable(Struct, frozen=True):
    """A kept version that the engine had installed itself: name, size, time of keeping."""

    kept: bytes
    size: int
    time_ns: int


def period(time_ns: int, rules: Retention) -> int:
    """The number of the period a time belongs to; ``every_s`` is not ``None``."""
    assert rules.every_s is not None
    return time_ns // (rules.every_s * 10**9)


def settled(now_ns: int, rules: Retention) -> int:
    """Periods with a lower number are thinned down to their last version."""
    return period(now_ns, rules) - 1


def surplus(versions: Sequence[Thinnable], now_ns: int, rules: Retention) -> Iterable[Thinnable]:
    """Which versions of one file go; ``versions`` in the order in which they were kept."""
    taken = 0
    later: int | None = None
    for number, version in enumerate(reversed(versions), 1):
        of = period(version.time_ns, rules)
        last, later = of != later, of
        taken += version.size
        recent = number <= rules.recent and taken <= RECENT_BYTES
        if not last and (not recent or of < settled(now_ns, rules)):
            yield version
