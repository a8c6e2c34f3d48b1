"""The deletion guard as a table."""

# ruff: noqa: E501 - a row of a table is a line
import pytest

from bisync.core.safety import DeleteLimit, Wanted, withhold

DEFAULT = DeleteLimit()

# fmt: off
ROWS = {
    #                          wanted now, done this hour, entries now, emptied -> withheld
    "nothing":                 (Wanted(0, 500, 100, emptied=False), DEFAULT, False),
    "a few":                   (Wanted(5, 0, 6, emptied=False), DEFAULT, False),
    "twenty":                  (Wanted(20, 0, 21, emptied=False), DEFAULT, False),
    "twenty-one of many":      (Wanted(21, 0, 1000, emptied=False), DEFAULT, False),
    "half":                    (Wanted(50, 0, 100, emptied=False), DEFAULT, False),
    "more than half":          (Wanted(51, 0, 100, emptied=False), DEFAULT, True),
    "in slices":               (Wanted(10, 45, 55, emptied=False), DEFAULT, True),
    "slices, still below":     (Wanted(5, 40, 60, emptied=False), DEFAULT, False),
    "emptied, however small":  (Wanted(1, 0, 1, emptied=True), DEFAULT, True),
    "count":                   (Wanted(4, 0, 100, emptied=False), DeleteLimit(count=3), True),
    "count reached":           (Wanted(3, 0, 100, emptied=False), DeleteLimit(count=3), False),
    "percent of a small tree": (Wanted(2, 0, 4, emptied=False), DeleteLimit(percent=30, minimum=0), True),
    "none at all":             (Wanted(1, 0, 100, emptied=False), DeleteLimit(count=0), True),
}
# fmt: on


@pytest.mark.parametrize(("wanted", "limit", "withheld"), ROWS.values(), ids=ROWS)
def test_withhold(wanted: Wanted, limit: DeleteLimit, withheld: bool):
    """The guard speaks exactly where the table says, and says how many."""
    reason = withhold(wanted, limit)
    assert (reason is not None) is withheld
    if reason is not None:
        assert str(wanted.count) in reason or str(wanted.count + wanted.done_this_hour) in reason
