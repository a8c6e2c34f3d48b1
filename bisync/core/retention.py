"""How long displaced versions are kept."""

from collections.abc import Iterable, Sequence

from msgspec import Struct

RECENT_BYTES = 64 << 20


class Retention(Struct, frozen=True):
    """How old a kept version may get, and how many of the engine's own are kept."""

    days: int | None = 90
    """Drop what was kept longer ago; ``None``: keep for ever."""

    every_s: int | None = 3600
    """Of the versions of a file that the engine had installed itself, keep the last one in each
    so many seconds; ``None``: all. Edits, conflict losers and deletions are never thinned."""

    recent: int = 16
    """So many of the newest such versions of a file, 64 MiB together, are thinned one period
    later: what went wrong a few minutes ago can be undone step by step."""


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
