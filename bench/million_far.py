"""A million small files to another machine: the memory of both ends, from the first copy on.

Usage (as root): python -m bench.million_far [--entries N]

The other machine is this one, through a real sshd. The peaks are what the kernel kept of each
process; the agent's is looked at twice a second, and has to be seen at least once.
"""

import argparse
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from bench.trees import empty_files, place
from tests.system.sshd import machine, program


def _peak(pid: int | str) -> int:
    """The most memory that a process ever had, in MB; 0: it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) // 1000 for line in lines if line.startswith("VmHWM")), 0)


def _agents() -> list[str]:
    found = []
    for each in Path("/proc").iterdir():
        try:
            words = (each / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:4] == [b"-m", b"bisync", b"agent"]:
            found.append(each.name)
    return found


def run(line: list[str], env: dict[str, str]) -> tuple[float, int, int]:
    """Seconds, and the peaks of the driver and of the agent in MB."""
    began = time.monotonic()
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True)
    peaks, ended = [0, 0], threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            peaks[0] = max(peaks[0], _peak(process.pid))
            peaks[1] = max(peaks[1], *map(_peak, _agents()), 0)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        said, _ = process.communicate()
    finally:
        ended.set()
        watcher.join()
    assert process.returncode == 0, said[-2000:]
    assert all(peaks), "an end was never seen"
    return time.monotonic() - began, peaks[0], peaks[1]


def main() -> None:
    """Make the tree, copy it, and run once more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    entries = parser.parse_args().entries
    with tempfile.TemporaryDirectory() as keys, machine(Path(keys)) as there, place() as folder:
        env = {**os.environ, "PATH": f"{program(Path(keys))}:{os.environ['PATH']}"}
        a, b = folder / "A", folder / "B"
        a.mkdir()
        b.mkdir()
        empty_files(a, entries)
        line = ["bisync", "sync", "--yes", "--rsh", there.rsh, str(a), f"localhost:{b}"]
        for name in ("first copy", "nothing to do"):
            wall, driver, agent = run(line, env)
            print(f"{name}: {wall:.0f} s, peak {driver} MB here, {agent} MB there", flush=True)
        count = sum(len(files) for top, _, files in os.walk(b) if ".bisync" not in top)
        assert count == entries, count


if __name__ == "__main__":
    main()
