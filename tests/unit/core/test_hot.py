"""How often a version of a hot file is taken, as laws."""

from hypothesis import given
from hypothesis import strategies as st

from bisync.core.hot import Allowance, Cost, Debt, owes_more, taken, wait_s

SECOND = 10**9
COSTS = st.builds(
    Cost,
    st.floats(0.001, 100, allow_nan=False),
    st.floats(0, 1, allow_nan=False),
    st.booleans(),
)
VISITS = st.lists(st.tuples(st.floats(0, 5000, allow_nan=False), COSTS), max_size=40)


@given(VISITS)
def test_the_share_is_kept(visits: list[tuple[float, Cost]]):
    """In the long run the work is the share, one burst and one version beside."""
    rules, debt, now = Allowance(), Debt(), 10**18
    began, spent, dearest = now, 0.0, 0.0
    for later, cost in visits:
        now += int(later * SECOND)
        if wait_s(debt, now, rules) > 0:
            continue
        debt = taken(debt, cost, now, rules)
        spent, dearest = spent + cost.all_s, max(dearest, cost.all_s)
        passed = (now - began) / SECOND
        assert spent <= rules.burst_s + passed * rules.share + dearest + 1e-6


@given(VISITS)
def test_what_it_says_is_so(visits: list[tuple[float, Cost]]):
    """After the wait it may be taken; a clock that was set back makes nobody wait."""
    rules, debt, now = Allowance(), Debt(), 10**18
    for later, cost in visits:
        now += int(later * SECOND)
        wait = wait_s(debt, now, rules)
        now += int(wait * SECOND) + 1
        assert wait_s(debt, now, rules) <= 1e-6
        debt = taken(debt, cost, now, rules)
        assert 0 <= debt.interval_s <= rules.longest_s
        assert wait_s(debt, now - 1, rules) == 0


def test_followed_at_once_while_it_is_cheap():
    """A hundred cheap versions in a row are taken; then one every so often."""
    rules, debt, now = Allowance(), Debt(), 10**18
    count = 0
    while wait_s(debt, now, rules) == 0:
        debt = taken(debt, Cost(0.3, 0.001), now, rules)
        count += 1
    assert 100 <= count <= 102
    assert 0 < wait_s(debt, now, rules) <= 0.3 / rules.share


def test_slow_clones_double_the_interval():
    """10 s, 20 s ... 1 h; halved by each cheap one, and then none."""
    rules, debt, now = Allowance(burst_s=1e9), Debt(), 10**18
    seen = []
    for _ in range(12):
        debt = taken(debt, Cost(1, 0.2), now, rules)
        seen.append(debt.interval_s)
    assert seen[:3] == [10, 20, 40]
    assert seen[-1] == 3600
    for _ in range(8):
        debt = taken(debt, Cost(1, 0.01), now, rules)
    assert 10 < debt.interval_s < 20
    for _ in range(2):
        debt = taken(debt, Cost(1, 0.01), now, rules)
    assert debt.interval_s == 0
    assert taken(Debt(), Cost(1, 0.0, many_extents=True), now, rules).interval_s == 10


def test_work_that_comes_later():
    """Sending is part of the cost."""
    rules = Allowance()
    debt = taken(Debt(), Cost(30, 0), 10**18, rules)
    assert wait_s(debt, 10**18, rules) == 0
    assert wait_s(owes_more(debt, 1), 10**18, rules) == 20
