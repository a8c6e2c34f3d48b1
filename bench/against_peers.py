"""Whole processes against `cp -a` and `rsync`, on the same bytes, in turn, in one run.

Usage: python -m bench.against_peers [--rounds N] [--files N] [ROW ...]

Each figure is a median. Ratios are ours divided by the peer's: below 1 we are faster. Rounds
alternate between the programs, so that a noisy machine is noisy for all of them.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.trees import copy, place, small_files

BISYNC = [sys.executable, "-m", "bisync", "sync", "-q"]
MIRROR = [sys.executable, "-m", "bisync", "mirror", "-aHAX", "--delete", "--yes"]
INSTALLED = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
RSYNC = ["rsync", "-aHAX", "--delete", "--exclude=/.bisync", "--exclude=/rsync-rollback"]


@dataclass(slots=True)
class Figures:
    """Wall and CPU seconds of one program in one row."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, line: list[str | Path]) -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        subprocess.run(line, check=True, capture_output=True, env=INSTALLED)
        self.wall.append(time.monotonic() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.wall), statistics.median(self.cpu)


Row = Callable[[Path, int, int], dict[str, Figures]]


def first_copy(folder: Path, files: int, rounds: int) -> dict[str, Figures]:
    """Small files into an empty directory."""
    source = folder / "source"
    source.mkdir()
    small_files(source, files)
    found = {"bisync": Figures(), "cp -a": Figures(), "rsync": Figures()}
    for number in range(rounds):
        for name, figures in found.items():
            target = folder / f"target-{name[:2]}-{number}"  # kept: see place()
            target.mkdir()
            subprocess.run(["sync"], check=True)
            match name:
                case "bisync":
                    figures.run([*BISYNC, source, target])
                    shutil.rmtree(source / ".bisync")
                case "cp -a":
                    figures.run(["cp", "-a", f"{source}/.", target])
                case _:
                    figures.run([*RSYNC, f"{source}/", target])
    return found


def nothing_to_do(folder: Path, files: int, rounds: int) -> dict[str, Figures]:
    """The same trees once more."""
    return _known_pair(folder, files, rounds, lambda _root, _n: None)


def edited(folder: Path, files: int, rounds: int) -> dict[str, Figures]:
    """One file in a hundred was edited."""

    def edit(root: Path, number: int) -> None:
        for path in sorted(root.rglob("*.txt"))[:: max(1, files // (files // 100))]:
            with path.open("ab") as file:
                file.write(b"%d" % number)

    return _known_pair(folder, files, rounds, edit)


def directory_renamed(folder: Path, files: int, rounds: int) -> dict[str, Figures]:
    """The top directory of half of the files got another name."""

    def rename(root: Path, number: int) -> None:
        old = next(p for p in sorted(root.iterdir()) if p.is_dir() and p.name[0] != ".")
        old.rename(root / f"renamed-{number}")

    return _known_pair(folder, files, rounds, rename)


def _known_pair(
    folder: Path, files: int, rounds: int, change: Callable[[Path, int], None]
) -> dict[str, Figures]:
    pairs = {name: (folder / name / "A", folder / name / "B") for name in ("bisync", "rsync")}
    for source, target in pairs.values():
        source.mkdir(parents=True)
        target.mkdir()
        small_files(source, files)
        copy(source, target)
    found = {name: Figures() for name in pairs}
    for number in range(-1, rounds):
        for name, (source, target) in pairs.items():
            change(source, number)
            figures = found[name] if number >= 0 else Figures()  # the first one is to warm up
            if name == "bisync":
                figures.run([*BISYNC, source, target])
            else:
                figures.run([*RSYNC, f"{source}/", target])
    return found


def mirror_first(folder: Path, files: int, rounds: int) -> dict[str, Figures]:
    """`bisync mirror` of small files into an empty directory."""
    source = folder / "source"
    source.mkdir()
    small_files(source, files)
    return _mirrored(folder, source, rounds, again=0)


def mirror_nothing(folder: Path, files: int, rounds: int) -> dict[str, Figures]:
    """`bisync mirror` of small files once more."""
    source = folder / "source"
    source.mkdir()
    small_files(source, files)
    return _mirrored(folder, source, 1, again=rounds)


def usr_first(folder: Path, _files: int, rounds: int) -> dict[str, Figures]:
    """`bisync mirror` of a whole /usr into an empty directory."""
    return _mirrored(folder, Path("/usr"), min(rounds, 3), again=0)


def usr_nothing(folder: Path, _files: int, rounds: int) -> dict[str, Figures]:
    """`bisync mirror` of a whole /usr once more."""
    return _mirrored(folder, Path("/usr"), 1, again=rounds)


def _mirrored(folder: Path, source: Path, rounds: int, *, again: int) -> dict[str, Figures]:
    """Into new directories; or ``again`` times into the same one, the first copy not counted."""
    found = {"bisync": Figures(), "rsync": Figures()}
    lines = {"bisync": MIRROR, "rsync": RSYNC}
    for number in range(rounds):
        for name, figures in found.items():
            (folder / f"{name}-{number}").mkdir()
            subprocess.run(["sync"], check=True)
            first = Figures() if again else figures
            first.run([*lines[name], f"{source}/", folder / f"{name}-{number}"])
    for _ in range(again):
        for name, figures in found.items():
            figures.run([*lines[name], f"{source}/", folder / f"{name}-0"])
    return found


ROWS: dict[str, Row] = {
    "mirror-first": mirror_first,
    "mirror-nothing-to-do": mirror_nothing,
    "mirror-usr-first": usr_first,
    "mirror-usr-nothing": usr_nothing,
    "first-copy": first_copy,
    "nothing-to-do": nothing_to_do,
    "one-percent-edited": edited,
    "directory-renamed": directory_renamed,
}


def main() -> None:
    """Run the rows and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    options = parser.parse_args()
    head = ("row", "program", "wall s", "cpu s", "wall", "cpu")
    print("{:20} {:8} {:>8} {:>8} {:>7} {:>7}  (ours / theirs)".format(*head))
    with place() as folder:
        for name in options.rows:
            (folder / name).mkdir()
            found = ROWS[name](folder / name, options.files, options.rounds)
            wall, cpu = found["bisync"].medians
            for program, figures in found.items():
                theirs = figures.medians
                print(
                    f"{name:20} {program:8} {theirs[0]:8.2f} {theirs[1]:8.2f} "
                    f"{wall / theirs[0]:7.2f} {cpu / theirs[1]:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
