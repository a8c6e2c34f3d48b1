"""What following an image costs who writes to it: page writes per second, with and without.

Usage (as root): python -m bench.guest [--mib N] [--seconds N] [--rounds N] [--burst S]
[FILE_SYSTEM ...]

A process writes pages all over an image and flushes after every tenth, as a guest's file system
does; in every other round a session syncs the image again and again, a second after the last time.
Medians; *rate* is with bisync / without.
"""

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import bisync
from bench.images import MAKE, PAGE, mounted
from bench.trees import place

WRITER = """
import os, random, sys, time
fd, chance, count = os.open(sys.argv[1], os.O_RDWR), random.Random(int(sys.argv[3])), 0
pages, end = os.fstat(fd).st_size // 4096, time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    os.pwrite(fd, chance.randbytes(4096), chance.randrange(pages) * 4096)
    count += 1
    if count % 10 == 0:
        os.fdatasync(fd)
print(count / float(sys.argv[2]))
"""


def rate(
    image: Path, seconds: float, seed: int, session: bisync.Session | None
) -> tuple[float, int]:
    """Pages per second, and how many versions were taken meanwhile."""
    versions = 0
    words = [sys.executable, "-c", WRITER, image, str(seconds), str(seed)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        while writer.poll() is None:
            if session is not None:
                versions += session.run().updated
            time.sleep(1)
        assert writer.stdout is not None
        return float(writer.stdout.read()), versions


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--burst", type=float, default=30, help="seconds of work at once")
    parser.add_argument("file_systems", nargs="*", default=list(MAKE))
    options = parser.parse_args()
    print(f"{'fs':6} {'MiB':>6} {'alone /s':>9} {'with /s':>9} {'rate':>6} {'versions':>8}")
    for kind in options.file_systems:
        with (
            place() as folder,
            mounted(folder, kind, (4 * options.mib << 20) + (2 << 30)) as (
                root,
                _,
            ),
        ):
            a, b = root / "A", root / "B"
            a.mkdir()
            b.mkdir()
            chance = random.Random(1)
            with (a / "image").open("wb") as file:
                for _ in range(options.mib):
                    file.write(chance.randbytes(256 * PAGE))
            config = bisync.Config(
                retention=bisync.Retention(days=None),
                allowance=bisync.Allowance(burst_s=options.burst),
            )
            found: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
            with bisync.Session(a, b, config) as session:
                session.run()
                for number in range(2 * options.rounds):
                    followed = bool(number % 2)
                    found[followed].append(
                        rate(a / "image", options.seconds, number, session if followed else None)
                    )
            alone, with_ = (
                statistics.median(each for each, _ in found[key]) for key in (False, True)
            )
            versions = statistics.median(count for _, count in found[True])
            print(
                f"{kind:6} {options.mib:6} {alone:9.0f} {with_:9.0f} {with_ / alone:6.2f} "
                f"{versions:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
