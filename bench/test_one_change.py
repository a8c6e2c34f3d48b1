"""One changed file among many: from the edit to both archives, and what a run costs in memory.

BISYNC_BENCH_SIZES="1000 100000 1000000" chooses the sizes of the trees.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bisync
from bench.trees import copy, empty_files, place

SIZES = [int(n) for n in os.environ.get("BISYNC_BENCH_SIZES", "1000 100000").split()]


@pytest.mark.parametrize("count", SIZES, ids="{} entries".format)
def test_one_change(benchmark, count: int):
    """A session that stays open is told which directory changed."""
    with place() as folder:
        a, b = folder / "A", folder / "B"
        a.mkdir()
        b.mkdir()
        empty_files(a, count)
        copy(a, b)
        changed = a / "00000" / "f7"
        numbers = iter(range(10**9))
        with bisync.Session(a, b) as session:
            assert session.run().exit_code == 0

            def edit() -> None:
                changed.write_text(f"edit {next(numbers)}")

            def run() -> bisync.Report:
                return session.run(only=(["00000"], []))

            report = benchmark.pedantic(run, setup=edit, rounds=21, warmup_rounds=2)
        assert report.updated == 1
        assert (b / "00000" / "f7").read_text() == changed.read_text()


_FIRST_CONTACT = """
import sys, bisync
report = bisync.sync(sys.argv[1], sys.argv[2])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(report.exit_code, report.presumed, status["VmHWM"].split()[0])
"""


@pytest.mark.parametrize("count", SIZES, ids="{} entries".format)
@pytest.mark.parametrize("beta", ["equal", "empty"])
def test_first_contact(benchmark, count: int, beta: str):
    """Two trees that never met: equal ones are only compared, an empty one is filled."""
    with place() as folder:
        a, b = folder / "A", folder / "B"
        a.mkdir()
        b.mkdir()
        empty_files(a, count)
        if beta == "equal":
            copy(a, b)
        line = [sys.executable, "-c", _FIRST_CONTACT, a, b]
        done = benchmark.pedantic(
            lambda: subprocess.run(line, capture_output=True, check=True, text=True), rounds=1
        )
        code, presumed, peak_kib = map(int, done.stdout.split())
        assert code == 0
        assert presumed == (count if beta == "equal" else 0)
        benchmark.extra_info["peak_mb"] = round(peak_kib / 1000)
        assert sum(1 for _ in Path(b).rglob("f[0-9]*")) == count
