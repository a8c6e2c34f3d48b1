"""Errors from system calls, short writes, full disks: an orderly end, nothing lost or torn.

Cases 123, 139, 140, 145, 146. After an error the run ends by itself with a documented exit code and
without a traceback, and with 0 only if both trees are equal. Everything visible is a complete
version. Once the cause is gone, one run brings agreement, with the outcome of a run that met no
error, and each content that no user threw away is live or in a store (see `ledger`).

A sample in 25 s (writing calls) and 12 s (reading calls); with ``BISYNC_FULL=1`` every call with
every error, once and from then on.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import calls, scenario, verdict
from .calls import Call
from .campaign import FULL, LANES, ONLY, SEED, TIME_LIMIT, Campaign, Outcome, scratch, spread
from .engine import Run
from .lane import Lane, cannot_trace, lanes
from .ledger import Ledger
from .place import FolderTemplate, Pair, cannot_mount, mount_tmpfs

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(TIME_LIMIT)]
needs_strace = pytest.mark.skipif(bool(cannot_trace()), reason=cannot_trace())
needs_mount = pytest.mark.skipif(bool(cannot_mount()), reason=cannot_mount())

WRITE_ERRORS = ("EIO", "ENOSPC", "EDQUOT")
# Not from then on: the openat that creates cannot be told from the one that reads, and a lease or a
# clone that is refused has a fallback of its own.
_ONCE_ONLY = {"openat", "ioctl", "fcntl"}


@dataclass(frozen=True, slots=True)
class Fault:
    """An error of one call, or of every writing call from that one on."""

    call: Call
    error: str
    onwards: bool
    injections: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.error}@{self.call.point}{'+' if self.onwards else ''}"


@pytest.fixture(scope="module", name="ways")
def _ways() -> Iterator[list[Lane]]:
    with scratch() as folder:
        yield lanes(folder, LANES)


@needs_strace
def test_errors_of_writing_calls(ways: list[Lane]) -> None:
    """Any write may fail, once or from then on."""
    reference, pair = ways[0].reference(calls.WRITING)
    points = [call for call in calls.points(reference, pair) if call.name != "fcntl"]
    faults = [fault for call in points for fault in faults_of(reference, call)]
    if not FULL and not ONLY:
        chance = random.Random(SEED)
        faults = [chance.choice(faults_of(reference, call)) for call in points]
    campaign = Campaign(
        "test_faults.py::test_errors_of_writing_calls",
        lanes=ways,
        attempt=_fail_writing,
        key=lambda fault: fault.key,
        seconds=25,
    )
    campaign.run(spread(faults))


@needs_strace
def test_errors_of_reading_calls(ways: list[Lane]) -> None:
    """A listing or a file that cannot be read is a problem, never a deletion."""
    reference, pair = ways[0].reference(calls.READING)
    faults = [
        Fault(call, "EIO", False, (f"{call.name}:error=EIO:when={call.nth}",))
        for call in calls.reads(reference, pair)
    ]
    campaign = Campaign(
        "test_faults.py::test_errors_of_reading_calls",
        lanes=ways,
        attempt=_fail_reading,
        key=lambda fault: fault.key,
        seconds=12,
    )
    campaign.run(spread(faults))


@pytest.mark.parametrize("limit", [1, 500, 4096, 30_000, 70_000, 131_073, 200_000, 307_199])
def test_short_writes(ways: list[Lane], limit: int) -> None:
    """No file may grow beyond a limit: the write that crosses it is short, the next one fails."""
    lane = ways[0]
    expected = lane.expected()
    with lane.template.copy() as (pair, ledger):
        run = pair.sync(before=["prlimit", f"--fsize={limit}", "--core=0"])
        complaints = _without_room(pair, ledger, run)
        complaints += verdict.converged(pair, ledger, pair.sync(), expected)
    assert not complaints, _told(complaints)


@needs_mount
@pytest.mark.parametrize("free", [0, 4, 32, 128, 400, 1000])
def test_full_disk(ways: list[Lane], free: int) -> None:
    """The disk of both roots has only so many KiB left; later there is room again."""
    lane = ways[0]
    expected = lane.expected()
    with lane.template.copy() as (pair, ledger):
        filler = pair.home.parent / "filler"
        _fill(filler, free)
        complaints = _without_room(pair, ledger, pair.sync())
        filler.unlink()
        complaints += verdict.converged(pair, ledger, pair.sync(), expected)
    assert not complaints, _told(complaints)


@needs_mount
@pytest.mark.parametrize("free", [0, 64])
def test_full_tmpfs(tmp_path: Path, free: int) -> None:
    """The same in memory, where files have no delayed allocation: the write itself fails."""
    with (
        mount_tmpfs(tmp_path / "full", "size=48m") as point,
        FolderTemplate(point, scenario.prepare).copy() as (pair, ledger),
    ):
        _fill(point / "filler", free)
        complaints = _without_room(pair, ledger, pair.sync())
        (point / "filler").unlink()
        complaints += verdict.converged(pair, ledger, pair.sync())
    assert not complaints, _told(complaints)


@needs_mount
@pytest.mark.parametrize("free", [0, 3, 12])
def test_no_inodes_left(tmp_path: Path, free: int) -> None:
    """Bytes are free, inodes are not: names can be moved, but nothing can be made."""
    with (
        mount_tmpfs(tmp_path / "full", "size=64m,nr_inodes=1500") as point,
        FolderTemplate(point, scenario.prepare).copy() as (pair, ledger),
    ):
        fillers = _use_inodes(point / "fillers", free)
        complaints = _without_room(pair, ledger, pair.sync())
        for filler in fillers:
            filler.unlink()
        complaints += verdict.converged(pair, ledger, pair.sync())
    assert not complaints, _told(complaints)


def faults_of(reference: list[Call], call: Call) -> list[Fault]:
    """Return every fault that begins at a call."""
    found = []
    for error in WRITE_ERRORS:
        once = f"{call.name}:error={error}:when={call.nth}"
        found.append(Fault(call, error, False, (once,)))
        if call.name in _ONCE_ONLY:
            continue
        made = calls.counts_before(reference, call)
        names = {other.name for other in reference} - _ONCE_ONLY
        onwards = tuple(f"{n}:error={error}:when={made[n] + 1}+" for n in sorted(names))
        found.append(Fault(call, error, True, onwards))
    return found


def _fail_writing(lane: Lane, fault: Fault) -> Outcome:
    return _fail(lane, fault, calls.WRITING)


def _fail_reading(lane: Lane, fault: Fault) -> Outcome:
    return _fail(lane, fault, calls.READING)


def _fail(lane: Lane, fault: Fault, names: tuple[str, ...]) -> Outcome:
    expected = lane.expected()
    with lane.template.copy() as (pair, ledger):
        run = pair.sync(before=calls.tracer(lane.log, names, *fault.injections, fast=True))
        inside, outside = injected(lane.log, pair)
        if outside:  # the terminal, a pipe or a library failed: the run cannot even say so
            complaints = verdict.interrupted(ledger)
            complaints += [f"no orderly end: {run}"] if run.code < 0 else []
        else:
            complaints = _after_errors(pair, ledger, run)
        complaints += verdict.converged(pair, ledger, pair.sync(), expected)
    return Outcome(
        complaints,
        hit=inside > 0,
        context=f"  first at: {fault.call.name}({fault.call.text}\n"
        f"  {inside} errors injected; {run}",
    )


def injected(log: Path, pair: Pair) -> tuple[int, int]:
    """Count the injected errors in the place of the pair, and elsewhere."""
    lines = [
        line
        for line in log.read_text(errors="backslashreplace").splitlines()
        if line.endswith("(INJECTED)")
    ]
    inside = sum(str(pair.base) in line for line in lines)
    return inside, len(lines) - inside


def _after_errors(pair: Pair, ledger: Ledger, run: Run) -> list[str]:
    return verdict.interrupted(ledger) + verdict.ended_well(pair, run)


def _without_room(pair: Pair, ledger: Ledger, run: Run) -> list[str]:
    """Judge a run that had no room for all of its work, so that it cannot have succeeded."""
    complaints = _after_errors(pair, ledger, run)
    return complaints + (["success without room"] if run.code == 0 else [])


def _fill(filler: Path, free: int) -> None:
    """Use up a disk but for `free` KiB."""
    with filler.open("wb") as file:
        for step in (1 << 20, 1 << 16, 1 << 12):
            while _grow(file.fileno(), step):
                pass
        size = os.fstat(file.fileno()).st_size
        assert size > free << 10, f"only {size} bytes to fill"
        file.truncate(size - (free << 10))
        os.fsync(file.fileno())


def _grow(file: int, step: int) -> bool:
    try:
        os.posix_fallocate(file, os.fstat(file).st_size, step)
    except OSError:
        return False
    return True


def _use_inodes(folder: Path, free: int) -> list[Path]:
    """Use up the inodes of a file system but for `free`; return the files made."""
    folder.mkdir()
    made = []
    while True:
        path = folder / str(len(made))
        try:
            path.touch()
        except OSError:
            break
        made.append(path)
    for _ in range(free):
        made.pop().unlink()
    return made


def _told(complaints: list[str]) -> str:
    return "\n  - ".join(["", *complaints[:20]])
