"""The clock is set: years ahead, years back, while the engine runs and between its runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.system.live import AGENT, ready, watching
from tests.trees import assert_equal, command, edit, environment, kept, look, put

Pair = tuple[Path, Path]
DAYS = (0, 400, 401, -4000, 0, 3650, 1)


# Loaded by each Python that is started with the environment below.
SET = """
import os, time
true, true_ns = time.time, time.time_ns
def days():
    with open(os.environ["CLOCK"]) as file:
        return int(file.read())
time.time = lambda: true() + days() * 86_400
time.time_ns = lambda: true_ns() + days() * 86_400 * 10**9
"""


class Clock:
    """A clock for processes that are started with its environment; the kernel has its own."""

    def __init__(self, folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(SET)
        self._file = folder / "clock"
        path = os.pathsep.join([str(folder), environment()["PYTHONPATH"]])
        self.environment = {"CLOCK": str(self._file), "PYTHONPATH": path}
        self.set(0)

    def set(self, days: int) -> None:
        """So many days before or behind the true one."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{days}")
        new.rename(self._file)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    """A clock that can be set."""
    clock = Clock(tmp_path)
    clock.set(-4000)
    words = [sys.executable, "-c", "import time; print(time.time())"]
    done = subprocess.run(
        words, env=environment(**clock.environment), capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < time.time() - 3999 * 86_400
    clock.set(0)
    return clock


def _sync(clock: Clock, *words: str | Path) -> dict[str, Any]:
    done = subprocess.run(
        command("sync", "--json", *words), env=environment(**clock.environment),
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_between_runs(here: Pair, clock: Clock):
    """Each run does its work, and nothing that was kept goes, however old it seems to be."""
    a, b = here
    put(a / "f", b"0")
    _sync(clock, a, b)
    for number, days in enumerate(DAYS, 1):
        clock.set(days)
        edit((a, b)[number % 2] / "f", b"%d" % number)
        put(a / f"new{number}", b"x")
        found = _sync(clock, a, b)
        assert (found["updated"], found["created"], found["conflicts"]) == (1, 1, 0), days
    assert_equal(a, b)
    assert {content for root in here for _, content in kept(root)} == {
        b"%d" % number for number in range(len(DAYS))
    }


@pytest.mark.parametrize("kind", ["fanotify", "inotify"])
@pytest.mark.parametrize("where", ["near", "far"])
def test_while_it_watches(here: Pair, clock: Clock, kind: str, where: str):
    """What happens is carried, each ``wait`` ends, and nobody waits for a time to come."""
    if kind == "fanotify" and os.geteuid() != 0:
        pytest.skip("a mark on a file system is for root")
    a, b = here
    there = b if where == "near" else f"elsewhere:{b}"
    words = ("--watcher", kind, "--keep", "30d", *AGENT)
    prefix = ("env", *(f"{name}={value}" for name, value in clock.environment.items()))
    with watching(a, there, *words, prefix=prefix) as it:
        ready(it)
        for number, days in enumerate(DAYS):
            clock.set(days)
            put(a / "d/from-a", b"%d" % number)
            put(b / f"d/{number}", b"%d" % number)
            it.wait()
            (a / f"d/{number}").rename(a / f"{number}")
            it.wait()
            assert look(a) == look(b)
            assert len(look(a)) == number + 3
            status = it.shows(lambda s: (s["phase"], s["oldest_age_s"]) == ("watching", None), 20)
            assert (status["phase"], status["oldest_age_s"]) == ("watching", None), status
    assert {content for _, content in kept(b)} == {b"%d" % n for n in range(len(DAYS) - 1)}
