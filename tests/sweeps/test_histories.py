"""Random histories of two sites: whatever happens, nothing is lost.

The history of a seed is the same in every run; see `histories` for the rules of the users and
`ledger` for what must exist at the end.

* With real processes: at least 24 histories, as many as fit in 25 s; a third of the runs is killed.
* In this process, through the library: at least 300 short histories, up to 1 500 in 35 s.

``BISYNC_HISTORIES=10000`` plays so many, without a time limit. ``BISYNC_POINT=SEED`` plays one.
"""

import importlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from . import calls, engine
from .campaign import LANES, ONLY, SEED, Campaign, Outcome, scratch
from .histories import History, fresh_pair
from .lane import cannot_trace
from .place import Pair

COUNT = int(os.environ.get("BISYNC_HISTORIES", "0"))
pytestmark = [pytest.mark.history, pytest.mark.timeout(0 if COUNT else 600)]


@dataclass(slots=True)
class Site:
    """Folders for one history at a time: in memory and on disk, taken in turn."""

    number: int
    places: list[Path]
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def log(self) -> Path:
        return self.places[0] / f"strace-{self.number}.log"

    def folder(self, seed: int) -> Path:
        return self.places[seed % len(self.places)] / f"site-{self.number}"


@pytest.fixture(name="places")
def _places(tmp_path: Path) -> Iterator[list[Path]]:
    with scratch() as memory:
        yield [memory, tmp_path]


@pytest.mark.skipif(bool(cannot_trace()), reason=cannot_trace())
def test_histories_with_kills(places: list[Path]) -> None:
    """Real processes, killed in a third of the rounds."""
    sites = [Site(number, places) for number in range(LANES)]
    campaign = Campaign(
        "test_histories.py::test_histories_with_kills",
        lanes=sites,
        attempt=_play_with_kills,
        key=str,
        seconds=25,
        least=24,
        unlimited=bool(COUNT),
    )
    tally = campaign.run([SEED * 1_000_000 + n for n in range(COUNT or 400)])
    counts = sum((site.counts for site in sites), Counter())
    print(f"{tally.tried} histories: {counts['runs']} runs, {counts['kills']} of them killed")
    assert ONLY or counts["kills"] >= tally.tried / 10, "too few kills: the history is too tame"


def test_histories_in_process(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library call, many short histories, at rest in the end."""
    for name, value in engine.environment(tmp_path / "home").items():
        if name.startswith(("XDG_", "BISYNC_")):
            monkeypatch.setenv(name, value)
    campaign = Campaign(
        "test_histories.py::test_histories_in_process",
        lanes=[Site(0, places[:1])],
        attempt=_play_in_process,
        key=str,
        seconds=35,
        least=300,
        unlimited=bool(COUNT),
    )
    campaign.run([SEED * 1_000_000 + n for n in range(COUNT or 1500)])


def _play_with_kills(site: Site, seed: int) -> Outcome:
    """Play one history. Its first run is only watched, to know at which calls a run can die."""
    ways_to_die: list[str] = []
    told: list[str] = []

    def sync(pair: Pair, chance: random.Random, may_die: bool) -> int | None:
        death = chance.choice(ways_to_die) if may_die and ways_to_die else ""
        if not told:
            before = calls.tracer(site.log, calls.WRITING)
        else:
            before = calls.tracer(site.log, calls.WRITING, death) if death else []
        run = pair.sync("--yes", before=before)
        if not told:
            found = calls.points(calls.calls(site.log), pair)
            ways_to_die.extend(f"{call.name}:signal=KILL:when={call.nth}" for call in found)
        told.append(f"{death or 'undisturbed'}: {run if run.code else 'ended with 0'}")
        return None if run.was_killed else run.code

    with fresh_pair(site.folder(seed)) as pair:
        history = History(seed, pair, sync)
        complaints = history.play(rounds=2 + seed % 2, longest_turn=6)
    site.counts.update(runs=history.runs, kills=history.kills)
    runs = "\n".join(f"    run {n}: {text}" for n, text in enumerate(told, 1))
    return Outcome(complaints, context=f"  in {site.folder(seed)}\n{history.story()}\n{runs}")


def _play_in_process(site: Site, seed: int) -> Outcome:
    with fresh_pair(site.folder(seed)) as pair:
        history = History(seed, pair, _sync_in_process)
        complaints = history.play(rounds=1, longest_turn=5)
        return Outcome(complaints, context=history.story())


def _sync_in_process(pair: Pair, chance: random.Random, may_die: bool) -> int:
    bisync = importlib.import_module(os.environ.get("BISYNC_LIBRARY", "bisync"))
    config = bisync.Config(yes=True)
    return bisync.sync(str(pair.alpha), str(pair.beta), config).exit_code
