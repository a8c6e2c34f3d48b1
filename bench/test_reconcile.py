"""The rules alone: closure, join, reconcile and plan of one change in a tree in memory."""

import pytest

from bisync.core.node import ROOT, Content, Kind
from tests.fakes.memory import MemoryPair, file_content


@pytest.mark.parametrize("count", [1000], ids="{} entries".format)
def test_plan_of_one_edit(benchmark, count: int):
    """The fake's lookups are linear, so this is an upper bound of what the rules cost."""
    pair = MemoryPair()
    for number in range(count // 100):
        folder = pair.sides[0].make(ROOT, b"d%d" % number, Content(Kind.DIR))
        for each in range(100):
            pair.sides[0].make(folder, b"f%d" % each, file_content(f"{number} {each}"))
    pair.cycle()
    pair.sides[0].edit(pair.sides[0].at_place[folder, b"f7"], file_content("edited"))
    marks = (set(pair.sides[0].marks), set())
    plan, _ = benchmark(pair.plan, marks)
    assert len(plan.steps[1]) == 1
