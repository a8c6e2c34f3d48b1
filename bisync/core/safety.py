"""Guards: when a deletion is likelier to be a lost mount or an accident than a wish.

A guard withholds deletions, never transfers. Moves are not deletions.
"""

from msgspec import Struct

_DEFAULT_PERCENT = 50
_DEFAULT_MINIMUM = 20
HOUR_NS = 3600 * 10**9


class DeleteLimit(Struct, frozen=True):
    """What ``--max-delete`` says. Default: 50 % of the entries and more than 20."""

    count: int | None = None  # absolute
    percent: float = _DEFAULT_PERCENT
    minimum: int = _DEFAULT_MINIMUM

    def exceeded(self, wanted: int, entries: int) -> bool:
        """Whether ``wanted`` deletions out of ``entries`` are too many."""
        if self.count is not None:
            return wanted > self.count
        return wanted > self.minimum and wanted * 100 > entries * self.percent


class Wanted(Struct, frozen=True):
    """The deletions that one side's tree asks of the other."""

    count: int  # entries that would go now
    done_this_hour: int  # by this pair, for the same side
    entries: int  # agreed now
    emptied: bool  # the side that asks holds nothing at all any more


def withhold(wanted: Wanted, limit: DeleteLimit) -> str | None:
    """Why the deletions have to wait for a person, or ``None``.

    They are counted over a sliding hour against the entries at its start, so that a
    deletion in slices trips the guard like one at once.
    """
    if wanted.count == 0:
        return None
    if wanted.emptied:
        return f"the tree is completely empty; {wanted.count} deletions withheld"
    total = wanted.count + wanted.done_this_hour
    at_start = wanted.entries + wanted.done_this_hour
    if limit.exceeded(total, at_start):
        return f"{total} of {at_start} entries would be deleted; withheld"
    return None
