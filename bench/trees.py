"""Trees to measure on: the same bytes in every run."""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PER_FOLDER = 100


@contextmanager
def place(folder: str | None = None) -> Iterator[Path]:
    """A fresh folder, removed at the end (BISYNC_BENCH_DIR, else the temp folder).

    Nothing in it is removed before: ext4 is slow at giving out inodes that were given back a
    moment ago, and would punish whoever comes second.
    """
    base = folder or os.environ.get("BISYNC_BENCH_DIR")
    path = Path(tempfile.mkdtemp(prefix="bisync-bench-", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def small_files(root: Path, count: int, *, size: int = 4000, seed: int = 1) -> None:
    """``count`` files of about ``size`` bytes, 100 to a folder."""
    rng = random.Random(seed)
    block = rng.randbytes(2 * size)
    for number in range(count):
        if number % PER_FOLDER == 0:
            folder = root / f"{number // 10_000:03d}" / f"{number // PER_FOLDER:05d}"
            folder.mkdir(parents=True)
        start = rng.randrange(size)
        with open(folder / f"file-{number:07d}.txt", "wb") as file:
            file.write(b"%d" % number + block[start : start + rng.randrange(size // 2, size)])


def empty_files(root: Path, count: int) -> None:
    """``count`` files of a few bytes, 1 000 to a folder: what a scan has to look at."""
    for first in range(0, count, 1000):
        folder = root / f"{first // 1000:05d}"
        folder.mkdir(parents=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        for number in range(first, min(first + 1000, count)):
            flags = os.O_WRONLY | os.O_CREAT
            file = os.open(f"f{number}", flags, 0o644, dir_fd=fd)
            os.write(file, b"%d" % number)
            os.close(file)
        os.close(fd)


def copy(source: Path, target: Path) -> None:
    """A copy with all attributes, by an independent program."""
    subprocess.run(["cp", "-a", f"{source}/.", target], check=True)


def drop_caches() -> bool:
    """Let the next scan find nothing in memory; ``False`` without the right to."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True
