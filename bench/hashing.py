"""How fast big files are listed, against the packages that do the arithmetic.

Usage: python -m bench.hashing [--mib N] [--rounds N] [--folder DIR]

A file in the page cache, on all cores. *known*: its list is known and right, so only finding
digests are computed; *new*: nothing is known, so both. The peers give the same package calls to as
many threads: *read*, on blocks that each thread reads into a buffer of its own; *memory*, on blocks
of a buffer that holds the same bytes. Neither makes a list. Medians, alternating; *share* is ours /
theirs, 1 is as fast.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import xxhash
from blake3 import blake3

from bisync.delta.blocks import Blocks
from bisync.delta.digest import BLOCK_SIZE
from bisync.fs.bigfile import list_blocks

SEED = 7
BUFFER = 8 * BLOCK_SIZE


def packages(data: memoryview | int, size: int, workers: int, *, both: bool) -> None:
    """The package calls for each block, nothing else; of a file, read through one buffer."""
    count = -(-size // BLOCK_SIZE)
    step = -(-count // workers)

    def work(first: int) -> None:
        space = memoryview(bytearray(BUFFER))
        for start in range(first * BLOCK_SIZE, min((first + step) * BLOCK_SIZE, size), BUFFER):
            length = min(BUFFER, size - start)
            if isinstance(data, int):
                piece = space[: os.preadv(data, [space[:length]], start)]
            else:
                piece = data[start : start + length]
            for at in range(0, length, BLOCK_SIZE):
                block = piece[at : at + BLOCK_SIZE]
                xxhash.xxh3_128_digest(block, SEED)
                if both:
                    blake3(block).digest()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(0, count, step)))


def seconds(act: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    workers = os.cpu_count() or 1
    chance = random.Random(1)
    data = b"".join(chance.randbytes(1 << 20) for _ in range(options.mib))
    view = memoryview(data)
    with tempfile.NamedTemporaryFile(dir=options.folder) as file:
        file.write(data)
        file.flush()
        fd, size = file.fileno(), len(data)
        known = list_blocks(fd, size, Blocks(0, SEED), workers=workers)
        assert known is not None
        print(f"{options.mib} MiB, {workers} threads: GB/s")
        print(f"{'':6} {'bisync':>7} {'read':>7} {'share':>6} {'memory':>7} {'share':>6}")
        for what in ("known", "new"):
            old, both = (known, False) if what == "known" else (Blocks(0, SEED), True)
            acts = (
                partial(list_blocks, fd, size, old, workers=workers),
                partial(packages, fd, size, workers, both=both),
                partial(packages, view, size, workers, both=both),
            )
            times: list[list[float]] = [[], [], []]
            for _ in range(options.rounds):
                for act, found in zip(acts, times, strict=True):
                    found.append(seconds(act))
            ours, read, memory = (size / statistics.median(found) / 1e9 for found in times)
            print(
                f"{what:6} {ours:7.2f} {read:7.2f} {ours / read:6.2f} {memory:7.2f} "
                f"{ours / memory:6.2f}"
            )


if __name__ == "__main__":
    main()
