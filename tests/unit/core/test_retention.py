"""How old something is, by a clock that may be wrong."""

from hypothesis import given
from hypothesis import strategies as st

from bisync.core.retention import Passing

DAY = 86_400 * 10**9
NOW = 20_000 * DAY
MOST = 30 * DAY


def looked(*times: int, start: int = NOW) -> Passing:
    """After looks at the clock, in days since the first one."""
    clock = Passing(start)
    for each in times:
        clock = clock.at(start + each * DAY)
    return clock


def test_days_go_by():
    """Somebody who looks now and then sees all of the time."""
    clock = looked(*range(1, 200))
    assert clock.age_ns(NOW + 20 * DAY, MOST) == 179 * DAY
    assert all(leap.end_ns - leap.start_ns == DAY for leap in clock.leaps)


def test_looked_at_once_a_month():
    """What is no longer than may count counts in full."""
    assert looked(*range(0, 360, 30)).age_ns(NOW, MOST) == 330 * DAY


def test_looked_at_rarely():
    """Each long time without a look counts for a part of it."""
    assert looked(100, 200).age_ns(NOW, MOST) == 60 * DAY


def test_a_year_ahead():
    """Set wrong, and put right: nothing is old for it then, or later."""
    wrong = looked(1, 2, 2 + 365)
    assert wrong.age_ns(NOW + 2 * DAY, MOST) == MOST
    assert wrong.age_ns(NOW + 2 * DAY + 1, MOST) == 365 * DAY - 1  # it was kept by that clock
    right = wrong.at(NOW + 3 * DAY // 2)
    assert right.age_ns(NOW + DAY, MOST) == DAY // 2
    for day in range(2, 500):
        right = right.at(NOW + day * DAY)
    assert right.age_ns(NOW + DAY, MOST) == 498 * DAY


def test_put_right_step_by_step():
    """First the hour, then the year: what is ten days old is so all the while."""
    clock = looked(*range(1, 11)).at(NOW + 375 * DAY).at(NOW + 375 * DAY - DAY // 24)
    assert clock.age_ns(NOW, MOST) <= 11 * DAY + MOST
    assert clock.at(NOW + 11 * DAY).age_ns(NOW, MOST) == 11 * DAY


def test_a_wrong_year_with_a_start_in_1970():
    """It is set back for a moment, and then forward to where it was."""
    clock = looked(*range(1, 11))
    for day in range(20):
        clock = clock.at(NOW + (375 + day) * DAY)
    clock = clock.at(3600 * 10**9).at(NOW + 395 * DAY)
    assert clock.age_ns(NOW, MOST) <= 31 * DAY + MOST


def test_again_and_again_ahead():
    """Each time counts by itself."""
    clock = looked(*(day for n in range(1, 40) for day in (n, n + 3650)))
    assert clock.age_ns(NOW, MOST) <= 39 * DAY + MOST


def test_ahead_of_what_was_ahead():
    """What was kept while the clock was wrong has its time, too."""
    clock = looked(1, 400, -4000, 2)
    for then in (1, 400, -4000):
        assert clock.at(NOW + 3650 * DAY).age_ns(NOW + then * DAY, MOST) <= 400 * DAY + MOST


def test_no_clock_at_the_start():
    """A machine that begins in 1970 each time, and learns the time soon after."""
    clock = looked()
    for day in range(1, 100):
        clock = clock.at(3600 * 10**9).at(NOW + day * DAY)
    assert clock.age_ns(NOW, MOST) == 99 * DAY
    assert clock.age_ns(NOW + 50 * DAY, MOST) == 49 * DAY


@given(
    times=st.lists(st.integers(0, 40_000 * DAY), min_size=1),
    then=st.integers(0, 40_000 * DAY),
    most=st.integers(0, 100 * DAY),
)
def test_never_older_than_the_clock_says(times: list[int], then: int, most: int):
    """Nor than the time that was seen, whatever the clock did."""
    clock = Passing(times[0])
    seen = 0
    for now in times[1:]:
        seen += max(0, min(now - clock.seen_ns, max(most, 2 * DAY)))
        clock = clock.at(now)
    age = clock.age_ns(then, most)
    assert age <= clock.seen_ns - then
    limit = clock.limit_ns(most, most // 3)
    assert clock.age_ns(limit - 1, most // 3) > most
    if then == times[0] and times == sorted(times):
        assert age <= seen
