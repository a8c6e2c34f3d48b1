"""Try many points of a run, within a time limit, and report the ones that failed."""

import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

FULL = os.environ.get("BISYNC_FULL", "") not in {"", "0"}
SEED = int(os.environ.get("BISYNC_SEED", "1"))
LANES = int(os.environ.get("BISYNC_LANES", "0")) or min(2, os.cpu_count() or 1)
ONLY = os.environ.get("BISYNC_POINT", "")
TIME_LIMIT = 0 if FULL else 600  # seconds for pytest-timeout; 0 = none
_SHOWN = 5  # failed points described in full

P = TypeVar("P")
L = TypeVar("L")


def spread(items: Sequence[P], seed: int = SEED) -> list[P]:
    """Return all items in an order of which every beginning is spread evenly over them.

    The binary digits of the positions are read backwards (van der Corput), from a seeded start.
    """
    count = len(items)
    if count == 0:
        return []
    bits = (count - 1).bit_length()
    start = random.Random(seed).randrange(count)
    places = (int(f"{n:0{bits}b}"[::-1], 2) if bits else 0 for n in range(1 << bits))
    return [items[(place + start) % count] for place in places if place < count]


@dataclass(slots=True)
class Outcome:
    """What came of one point."""

    complaints: list[str]
    hit: bool = True  # False: the run never came to the point
    context: str = ""


@dataclass(slots=True)
class Tally:
    """What came of all of them."""

    total: int
    tried: int = 0
    hit: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, Outcome]] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.tried} of {self.total} points tried, {self.hit} of them hit, "
            f"{len(self.failed)} failed, {self.seconds:.0f} s, seed {SEED}"
        )


@dataclass(slots=True)
class Campaign(Generic[L, P]):
    """A way to try points, and how long.

    Attributes:
        name: "FILE::TEST", for the command to replay a point.
        lanes: one thing per point tried at the same time, handed to `attempt`; a single lane is
            served by the calling thread.
        key: how a point is spelled in ``BISYNC_POINT``.
        seconds: time limit of a sample; the points running then are finished.
        least: that many points are tried whatever the time.
        unlimited: try all points.
    """

    name: str
    lanes: Sequence[L]
    attempt: Callable[[L, P], Outcome]
    key: Callable[[P], str]
    seconds: float
    least: int = 8
    unlimited: bool = FULL

    def run(self, points: Sequence[P]) -> Tally:
        """Try points in the given order; raise AssertionError if any failed."""
        chosen = [point for point in points if ONLY in {"", self.key(point)}]
        assert chosen, f"there is no point {ONLY!r}" if ONLY else f"{self.name}: no points"
        tally = Tally(total=len(points))
        began = time.monotonic()
        waiting = self._waiting(chosen, began)
        lock = threading.Lock()
        accidents: list[BaseException] = []
        if len(self.lanes) == 1:
            self._work(self.lanes[0], waiting, tally, lock, accidents)
        else:
            threads = [
                threading.Thread(target=self._work, args=(lane, waiting, tally, lock, accidents))
                for lane in self.lanes
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        tally.seconds = time.monotonic() - began
        if accidents:
            raise accidents[0]
        self._judge(tally)
        print(f"{self.name}: {tally}")
        return tally

    def _waiting(self, chosen: Sequence[P], began: float) -> Iterator[P]:
        for number, point in enumerate(chosen):
            late = time.monotonic() - began > self.seconds
            if late and not self.unlimited and number >= self.least:
                return
            yield point

    def _work(
        self,
        lane: L,
        waiting: Iterator[P],
        tally: Tally,
        lock: threading.Lock,
        accidents: list[BaseException],
    ) -> None:
        while not accidents:
            with lock:
                point = next(waiting, None)
            if point is None:
                return
            try:
                outcome = self.attempt(lane, point)
            except BaseException as accident:
                accidents.append(accident)
                return
            with lock:
                tally.tried += 1
                tally.hit += outcome.hit
                if outcome.complaints:
                    tally.failed.append((self.key(point), outcome))

    def _judge(self, tally: Tally) -> None:
        if tally.failed:
            raise AssertionError(self._report(tally))
        assert ONLY or tally.hit * 4 >= tally.tried * 3, (
            f"{self.name}: {tally}: runs differ too much from the reference run to be a sweep"
        )

    def _report(self, tally: Tally) -> str:
        lines = [f"{self.name}: {tally}"]
        for point, outcome in tally.failed[:_SHOWN]:
            lines += [f"\nat {point}:", *(f"  - {text}" for text in outcome.complaints[:10])]
            if len(outcome.complaints) > 10:
                lines.append(f"  - and {len(outcome.complaints) - 10} more")
            lines += [outcome.context] if outcome.context else []
            lines.append(f"  replay: {self.replay(point)}")
        lines.append(f"\nall failed points: {', '.join(point for point, _ in tally.failed)}")
        return "\n".join(lines)

    def replay(self, point: str) -> str:
        return (
            f"BISYNC_SEED={SEED} BISYNC_POINT='{point}' python -m pytest 'tests/sweeps/{self.name}'"
        )


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder for images and trees, in memory where there is room for 2 GiB."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 << 30
    with tempfile.TemporaryDirectory(
        prefix="bisync-sweep-", dir=memory if roomy else None, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)
