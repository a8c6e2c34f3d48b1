"""The search for moved content against rsync and rdiff: user CPU on one pair of files.

Usage: python -m bench.search [--mib N] [--rounds N]

The new version is the old one with seven bytes more in front. *anchors* is the whole of our work:
the lists of both versions, the search, and the assembly of the new file. *rolling* looks at every
offset for all blocks of the old version, as a search without a hint has to. rsync and rdiff do the
same with 128 KiB blocks. User CPU, medians; MB/s of the new file by one core.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.trees import place
from bisync.delta.backend import BACKEND, SumTable
from bisync.delta.blocks import Blocks
from bisync.delta.changes import send_changes
from bisync.delta.digest import BLOCK_SIZE
from bisync.fs.bigfile import Patch, Reader, list_blocks

TILE = 1 << 20


def user_cpu(act: Callable[[], None]) -> float:
    """User CPU seconds of this process and its children."""
    before = [resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, -1)]
    act()
    after = [resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, -1)]
    return sum(after) - sum(before)


def by_anchors(folder: Path) -> None:
    """List both, search, assemble."""
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / name).open("w+b" if name == "made" else "rb"))
            for name in ("old", "new", "made")
        }
        lists = {
            name: list_blocks(files[name].fileno(), (folder / name).stat().st_size, Blocks(0, 1))
            for name in ("old", "new")
        }
        old, new = lists["old"], lists["new"]
        assert old is not None
        assert new is not None
        patch = Patch(files["made"].fileno(), files["old"].fileno(), old)
        send_changes(new, patch, Reader(files["new"].fileno()), lambda _n: None, BACKEND)
        assert patch.blocks().digest() == new.digest()
        assert patch.literal < 4 * BLOCK_SIZE


def rolling(folder: Path) -> None:
    """Every offset of the new version against all blocks of the old one."""
    sums = []
    with (folder / "old").open("rb") as old:
        while data := old.read(8 * BLOCK_SIZE):
            sums.append(BACKEND.block_sums(np.frombuffer(data, np.uint8)))
    table, found = SumTable.of(np.concatenate(sums)), 0
    read = Reader(os.open(folder / "new", os.O_RDONLY))
    for start in range(0, (folder / "new").stat().st_size, TILE):
        data = np.frombuffer(bytes(read(start, TILE + BLOCK_SIZE - 1)), np.uint8)
        found += len(BACKEND.find(data, table)[0])
    assert found >= len(table.sums)


def rdiff(folder: Path) -> None:
    """Signature and delta."""
    sig, delta = folder / "sig", folder / "delta"
    run = ["rdiff", "-f"]
    subprocess.run([*run, "-b", str(BLOCK_SIZE), "signature", folder / "old", sig], check=True)
    subprocess.run([*run, "delta", sig, folder / "new", delta], check=True)


def rsync(folder: Path) -> None:
    """Sender, receiver and generator."""
    target = folder / "target"
    shutil.copyfile(folder / "old", target)
    words = ["--no-whole-file", f"--block-size={BLOCK_SIZE}", "--ignore-times"]
    subprocess.run(["rsync", *words, folder / "new", target], check=True)


WORKS = {"anchors": by_anchors, "rolling": rolling, "rdiff": rdiff, "rsync": rsync}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with place() as folder:
        chance = random.Random(1)
        data = b"".join(chance.randbytes(1 << 20) for _ in range(options.mib))
        (folder / "old").write_bytes(data)
        (folder / "new").write_bytes(b"7 bytes" + data)
        took: dict[str, list[float]] = {name: [] for name in WORKS}
        for number in range(-1, options.rounds):  # the first one is to warm up
            for name, work in WORKS.items():
                spent = user_cpu(lambda work=work: work(folder))  # type: ignore[misc]
                if number >= 0:
                    took[name].append(spent)
    print(f"{'work':8} {'user s':>8} {'MB/s':>8}")
    for name, times in took.items():
        middle = statistics.median(times)
        print(f"{name:8} {middle:8.2f} {(options.mib << 20) / 1e6 / max(middle, 1e-9):8.0f}")


if __name__ == "__main__":
    main()
