"""Disk images against rsync: a few small writes to a big file, local, on ext4, XFS and btrfs.

Usage (as root): python -m bench.images [--rounds N] [--sizes MIB ...] [--pages N]
                             [--changes ...] [--programs ...] [FILE_SYSTEM ...]

A source and a replica for each program, on one loop-mounted file system each time. In each round
the same pages are written to all sources, then the programs run in turn. *written* is what the
device took, state and all, divided by the bytes of the pages. Medians; ratios are ours / theirs.
"""

import argparse
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.against_peers import BISYNC, RSYNC, Figures
from bench.trees import place

MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
PAGE = 4096
PROGRAMS: dict[str, list[str]] = {
    "bisync": BISYNC,
    "rsync": [*RSYNC, "--no-whole-file"],
    "rsync in place": [*RSYNC, "--no-whole-file", "--inplace"],
    "rsync whole": [*RSYNC, "--whole-file"],
}


@contextmanager
def mounted(folder: Path, kind: str, size: int) -> Iterator[tuple[Path, str]]:
    """A fresh file system, and the name of its device."""
    image, point = folder / f"{kind}.img", folder / kind
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", image, point], check=True)
    try:
        device = subprocess.run(
            ["findmnt", "-no", "SOURCE", point], check=True, capture_output=True, text=True
        )
        yield point, Path(device.stdout.strip()).name
    finally:
        subprocess.run(["umount", point], check=True)
        point.rmdir()
        image.unlink()


def written(device: str) -> int:
    """Bytes that a block device took so far, all caches flushed."""
    subprocess.run(["sync"], check=True)
    return int(Path(f"/sys/block/{device}/stat").read_text().split()[6]) * 512


def scatter(path: Path, pages: int, seed: int) -> None:
    """Write so many pages all over a file, in place."""
    chance = random.Random(seed)
    count = path.stat().st_size // PAGE
    with path.open("r+b") as file:
        for page in chance.sample(range(count), pages):
            file.seek(page * PAGE)
            file.write(chance.randbytes(PAGE))


def insert(path: Path, _pages: int, seed: int) -> None:
    """Seven bytes more in front of a file."""
    with path.with_name("new").open("wb") as new, path.open("rb") as old:
        new.write(b"%07d" % (seed % 10**7))
        shutil.copyfileobj(old, new, 1 << 20)
    path.with_name("new").replace(path)


def touch(path: Path, _pages: int, seed: int) -> None:
    """Another time, the same bytes."""
    os.utime(path, (10**9 + seed, 10**9 + seed))


CHANGES: dict[str, Callable[[Path, int, int], None]] = {
    "pages": scatter,
    "touch": touch,
    "insert": insert,
}


def measure(
    folder: Path, kind: str, mib: int, pages: int, rounds: int, change: str, programs: list[str]
) -> None:
    """One table row per program."""
    with mounted(folder, kind, (len(programs) * 3 * mib << 20) + (2 << 30)) as (root, device):
        roots = {
            name: (root / str(n) / "A", root / str(n) / "B") for n, name in enumerate(programs)
        }
        first = next(iter(roots.values()))[0] / "image"
        for source, target in roots.values():
            source.mkdir(parents=True)
            target.mkdir()
        chance = random.Random(1)
        with first.open("wb") as file:
            for _ in range(mib):
                file.write(chance.randbytes(1 << 20))
        for name, (source, target) in roots.items():
            if source != first.parent:
                subprocess.run(["cp", "--reflink=never", first, source], check=True)
            Figures().run([*PROGRAMS[name], f"{source}/", target])
        found = {name: Figures() for name in programs}
        took: dict[str, list[int]] = {name: [] for name in programs}
        for number in range(-1, rounds):  # the first one is to warm up
            for name, (source, target) in roots.items():
                CHANGES[change](source / "image", pages, number)
                before = written(device)
                (found[name] if number >= 0 else Figures()).run(
                    [*PROGRAMS[name], f"{source}/", target]
                )
                if number >= 0:
                    took[name].append(written(device) - before)
        ours = found["bisync"].medians
        for name, figures in found.items():
            wall, cpu = figures.medians
            amount = sorted(took[name])[len(took[name]) // 2]
            print(
                f"{change:7} {kind:6} {mib:6} {name:15} {wall:8.2f} {cpu:8.2f} "
                f"{ours[0] / wall:7.2f} {ours[1] / cpu:7.2f} {amount / (pages * PAGE):9.2f}",
                flush=True,
            )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--changes", nargs="*", choices=list(CHANGES), default=list(CHANGES))
    parser.add_argument("--programs", nargs="*", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("file_systems", nargs="*", default=list(MAKE))
    options = parser.parse_args()
    head = ("change", "fs", "MiB", "program", "wall s", "cpu s", "wall", "cpu", "written x")
    print("{:7} {:6} {:>6} {:15} {:>8} {:>8} {:>7} {:>7} {:>9}".format(*head))
    with place() as folder:
        for change in options.changes:
            for kind in options.file_systems:
                for mib in options.sizes:
                    measure(
                        folder, kind, mib, options.pages, options.rounds, change, options.programs
                    )
                    shutil.rmtree(folder / kind)


if __name__ == "__main__":
    main()
