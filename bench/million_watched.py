"""A tree of a million files that is watched: how soon it is ready, what it takes, how fast it is.

Usage (as root): python -m bench.million_watched [--entries N] [--rounds N]

Both folders are equal and known at first. *ready*: from the start of the process until both sides
were looked at and are watched. Let nothing else run.
"""

import argparse
import subprocess
import time
from pathlib import Path

from bench.against_peers import BISYNC, INSTALLED
from bench.realtime import cpu_s, show, until
from bench.trees import copy, empty_files, place
from tests.system.live import ready, watching

_REST_S = 20


def memory_mb(pid: int) -> tuple[float, float]:
    """What a process has in memory, and the most it had."""
    text = Path(f"/proc/{pid}/status").read_text()
    now, most = (int(text.split(name)[1].split()[0]) / 1000 for name in ("VmRSS:", "VmHWM:"))
    return now, most


def writes(one: Path, two: Path, rounds: int) -> list[float]:
    """Small files all over the tree, rewritten one after the other."""
    times = []
    folders = sorted(path.name for path in one.iterdir() if path.name.isdecimal())
    for number in range(rounds):
        folder = one / folders[number * 7919 % len(folders)]
        name = f"{folder.name}/{min(path.name for path in folder.iterdir())}"
        data = b"%d" % time.time_ns()
        (one / name).write_bytes(data)
        times.append(until(lambda n=name, d=data: (two / n).read_bytes() == d))  # type: ignore[misc]
        time.sleep(0.3)
    return times


def main() -> None:
    """Build the trees, watch them, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    with place() as folder:
        a, b = folder / "A", folder / "B"
        a.mkdir()
        b.mkdir()
        empty_files(a, options.entries)
        copy(a, b)
        began = time.monotonic()
        subprocess.run([*BISYNC, a, b], check=True, env=INSTALLED)
        print(f"first contact of equal trees: {time.monotonic() - began:.1f} s", flush=True)
        for kind in ("fanotify", "inotify"):
            began = time.monotonic()
            with watching(a, b, "--watcher", kind) as it:
                it.until(lambda e: e["type"] == "ready", 600)
                ready(it)
                print(f"{kind}: ready after {time.monotonic() - began:.1f} s", flush=True)
                show(f"{kind}: small write", writes(a, b, options.rounds))
                show(f"{kind}: small write, back", writes(b, a, options.rounds))
                it.wait()
                used = cpu_s(it.process.pid)
                time.sleep(_REST_S)
                share = (cpu_s(it.process.pid) - used) / _REST_S * 100
                now, most = memory_mb(it.process.pid)
                print(f"{kind}: at rest {share:.2f} % of a core, {now:.0f} MB (most: {most:.0f})")


if __name__ == "__main__":
    main()
