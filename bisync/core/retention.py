"""How long displaced versions are kept."""

from collections.abc import Iterable, Sequence

from msgspec import Struct

RECENT_BYTES = 64 << 20
_LEAP_NS = 2 * 86_400 * 10**9
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

    leaps: tuple[tuple[int, int, int], ...] = ()
    """From when to when it went between two looks, for those that were far apart; and the latest
    it had been until then: what lies before that it had lived through already."""

    def at(self, now_ns: int) -> "Passing":
        """The same after another look."""
        latest = max(self.latest_ns, self.seen_ns)
        leaps = [leap for leap in self.leaps if leap[1] <= now_ns]  # else it was taken back
        if now_ns - self.seen_ns > _LEAP_NS:
            leaps.append((self.seen_ns, now_ns, latest))
        return Passing(now_ns, latest, tuple(sorted(leaps)[-_MOST_LEAPS:]))

    def age_ns(self, then_ns: int, most_ns: int) -> int:
        """How long ago something was at least; each leap since counts for at most ``most_ns``."""
        age = self.seen_ns - then_ns
        for start, end, latest in self.leaps:
            if then_ns <= latest:
                age -= max(0, end - (start if then_ns <= start else latest) - most_ns)
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
