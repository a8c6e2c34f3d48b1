"""Which time of a directory counts, when more is seen of it in the course of a run."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bisync import Config, Session
from bisync.core.node import Side
from bisync.core.plan import DirectoryTime
from bisync.core.resolve import OneWay
from bisync.endpoint.glance import AT_A_TIME, Peers
from bisync.endpoint.local import LocalEndpoint
from bisync.session import cycle
from bisync.session.foresight import peers
from bisync.session.times import _both
from bisync.watch.interface import Spot
from tests.trees import put

Pair = tuple[Path, Path]


def _time(
    wanted: int, seen: tuple[int | None, int | None], ours: tuple[bool, bool] = (False, False)
) -> DirectoryTime:
    return DirectoryTime(1, (2, 3), (wanted, wanted), seen, ours)


HERE, THERE = (True, False), (False, True)


@pytest.mark.parametrize(
    ("first", "then", "counts"),
    [
        # Nothing new was seen: what the engine did since is no reason.
        (_time(100, (100, 50), THERE), _time(900, (100, 900), THERE), 100),
        # Its user did something on the side that the engine let alone.
        (_time(100, (100, 50), THERE), _time(950, (200, 950), THERE), 200),
        (_time(100, (100, 50), THERE), _time(900, (80, 900), THERE), 80),
        # The first time came from the other side's user, and is the later one.
        (_time(300, (100, 300), THERE), _time(950, (200, 950), THERE), 300),
        # The engine did nothing at all: then what was decided last is right.
        (_time(100, (100, 50)), _time(950, (950, 200), THERE), 950),
        (_time(100, (100, 50)), _time(100, (100, 200)), 100),
        # It was not there before.
        (_time(100, (100, None), THERE), _time(100, (100, 900), THERE), 100),
    ],
)
def test_which_time_counts(first: DirectoryTime, then: DirectoryTime, counts: int):
    """The first one, and what a user did since where the engine did nothing."""
    assert _both(first, then).mtime_ns == (counts, counts)


TIMES = st.integers(1, 4)
SOME = st.builds(_time, TIMES, st.tuples(TIMES, TIMES), st.tuples(st.booleans(), st.booleans()))


@given(SOME, SOME)
def test_the_sides_are_alike(first: DirectoryTime, then: DirectoryTime):
    """But for which one a person wants to count, which is decided before."""

    def flip(time: DirectoryTime) -> DirectoryTime:
        a, b, c = time.ids, time.seen_ns, time.ours
        return DirectoryTime(1, (a[1], a[0]), time.mtime_ns, (b[1], b[0]), (c[1], c[0]))

    assert _both(flip(first), flip(then)) == flip(_both(first, then))


def test_one_way(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """What a user did on the side that does not count is not set on the one that does."""
    a, b = here
    put(a / "d/f", b"1")
    monkeypatch.setattr(cycle, "_FEW", -1)  # as where there is much to do
    wanted, other = 1_600_000_000 * 10**9, 1_500_000_000 * 10**9
    real = cycle.Cycle.repeat

    def repeat(self: cycle.Cycle) -> None:
        os.utime(b / "d", ns=(other, other))
        self.sides[1].scan()
        real(self)

    with Session(a, b, Config(one_way=OneWay.UNDO)) as session:
        session.run()
        os.utime(a / "d", ns=(wanted, wanted))
        monkeypatch.setattr(cycle.Cycle, "repeat", repeat)
        session.run()
        assert (a / "d").stat().st_mtime_ns == (b / "d").stat().st_mtime_ns == wanted


def test_files_with_many_names(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """What is asked for ahead fits one message, or is asked for in the usual way."""
    a, b = here
    put(a / "d/f", b"1")
    for number in range(20):
        os.link(a / "d/f", a / f"d/g{number}")
    with Session(a, b) as session:
        session.run()
        (a / "d/f").write_bytes(b"22")
        ledger, side = session._pairing.ledger, session._open_sides[0]  # type: ignore[union-attr]
        assert isinstance(side, LocalEndpoint)
        found = peers(ledger, side, Side.ALPHA, {Spot(b"d")})
        assert len(found.places) >= 21
        assert len(found.places) + len(found.nodes) <= AT_A_TIME
        monkeypatch.setattr("bisync.session.foresight.AT_A_TIME", 20)
        assert peers(ledger, side, Side.ALPHA, {Spot(b"d")}) == Peers()
