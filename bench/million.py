"""A tree of a million entries: first contact, memory, nothing to do, and one changed file.

Usage: python -m bench.million [--entries N]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bisync
from bench.trees import copy, empty_files, place

_RUN = """
import sys, time, bisync
began = time.monotonic()
report = bisync.sync(sys.argv[1], sys.argv[2])
wall = time.monotonic() - began
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(report.exit_code, report.presumed, round(wall, 2), int(status["VmHWM"].split()[0]) // 1000)
"""
_ROUNDS = 21


def _run(a: Path, b: Path) -> tuple[int, int, float, int]:
    line = [sys.executable, "-c", _RUN, str(a), str(b)]
    code, presumed, wall, peak = subprocess.check_output(line, text=True).split()
    return int(code), int(presumed), float(wall), int(peak)


def main() -> None:
    """Build the trees, run, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    entries = parser.parse_args().entries
    with place() as folder:
        a, b = folder / "A", folder / "B"
        a.mkdir()
        b.mkdir()
        empty_files(a, entries)
        copy(a, b)
        code, presumed, wall, peak = _run(a, b)
        assert (code, presumed) == (0, entries)
        print(f"first contact of equal trees: {wall:.1f} s, peak {peak} MB", flush=True)
        code, _, wall, peak = _run(a, b)
        print(f"nothing to do: {wall:.1f} s, peak {peak} MB", flush=True)
        size = sum(f.stat().st_size for f in (a / ".bisync").iterdir() if f.is_file())
        print(f"state: {size / entries:.0f} bytes per entry", flush=True)
        changed, walls = a / "00000" / "f7", []
        with bisync.Session(a, b) as session:
            session.run()
            for number in range(_ROUNDS):
                changed.write_text(f"edit {number}")
                os.sync()
                began = time.monotonic()
                report = session.run(only=(["00000"], []))
                walls.append(time.monotonic() - began)
                assert report.updated == 1
        milliseconds = statistics.median(walls) * 1000
        print(f"one change: {milliseconds:.0f} ms median, {max(walls) * 1000:.0f} ms worst")


if __name__ == "__main__":
    main()
