"""Random trees, changed at random on both sides: they end equal and nothing is lost."""

import random
from pathlib import Path

import pytest

from tests.trees import (
    APPLIED,
    assert_equal,
    build,
    contents,
    everything,
    frozen,
    perturb,
    rsync_says_equal,
    sync,
)


@pytest.mark.parametrize("seed", range(4))
def test_random_history(pair: tuple[Path, Path], seed: int):
    """After each round both sides are equal, and every content met before it is live or kept."""
    a, b = pair
    rng = random.Random(seed)
    build(a, rng)
    sync(a, b)
    assert_equal(a, b)
    for _ in range(2):
        for side in pair:
            perturb(side, rng)
        met = contents(a) | contents(b)
        sync(a, b)
        assert_equal(a, b)
        rsync_says_equal(a, b)
        assert met <= everything(a, b)
    before = frozen(a), frozen(b)
    outcome = sync(a, b)
    assert outcome.counts(*APPLIED) == dict.fromkeys(APPLIED, 0)
    assert (frozen(a), frozen(b)) == before
