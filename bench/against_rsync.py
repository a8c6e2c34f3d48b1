"""Whole processes against rsync over ssh to this machine, on the same bytes, in turn, in one run.

Usage (as root): python -m bench.against_rsync [--rounds N] [--files N] [--mib N] [--pages N]
                                               [--file-system KIND] [ROW ...]

rsync runs with the options of the script that all this began with (-aAXx -z --compress-level=9
--inplace --no-whole-file ...), and once without -z. Each figure is a median; ratios are ours
divided by theirs: below 1 we are faster. *cpu* is what the whole machine spent, so both ends and
both sshs are in it: let nothing else run. *moved* is what went through ssh, both ways.
"""

import argparse
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.images import MAKE, insert, mounted, scatter, touch
from bench.trees import place, small_files
from bisync import Reach, Session
from tests.system.sshd import Machine, machine, program

LAB = [
    "rsync",
    "--numeric-ids",
    "--delete",
    "--force",
    "--modify-window=1",
    "--ignore-errors",
    "--block-size=128K",
    "--inplace",
    "--no-whole-file",
    "-aAXx",
    "--exclude=rsync-rollback",
    "--exclude=.bisync",
    "--stats",
]
PROGRAMS: dict[str, list[str]] = {
    "sync": ["bisync", "sync", "--yes", "--stats"],
    "mirror": ["bisync", "mirror", "--delete", "--yes", "-aAXx", "--stats"],
    "rsync -z": [*LAB, "-z", "--compress-level=9"],
    "rsync": LAB,
}
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Figures:
    """Wall and CPU seconds, and bytes through ssh, of one program in one row."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    @property
    def medians(self) -> tuple[float, float, float]:
        return tuple(map(statistics.median, (self.wall, self.cpu, self.moved)))  # type: ignore[return-value]


def spent() -> float:
    """CPU seconds of the whole machine so far."""
    user, nice, system, _, _, irq, softirq = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) / TICK


class Bench:
    """Pairs of folders, one for each program."""

    def __init__(
        self, there: Machine, bins: Path, folder: Path, options: argparse.Namespace
    ) -> None:
        self.there, self.folder, self.options = there, folder, options
        self.env = {**os.environ, "PATH": f"{bins}:{os.environ['PATH']}"}
        self.pairs = {
            name: (folder / str(n) / "A", folder / str(n) / "B")
            for n, name in enumerate(options.programs)
        }
        for source, target in self.pairs.values():
            source.mkdir(parents=True)
            target.mkdir()

    def run(self, name: str, figures: Figures | None) -> None:
        """Let a program run once, from its source to its target at the other end."""
        source, target = self.pairs[name]
        line = [*PROGRAMS[name], "--rsh", self.there.rsh]
        line += [f"{source}/", f"localhost:{target}/"]
        subprocess.run(["sync"], check=True)
        cpu, began = spent(), time.monotonic()
        done = subprocess.run(line, capture_output=True, text=True, env=self.env, check=False)
        wall = time.monotonic() - began
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
        if figures is not None:
            figures.wall.append(wall)
            figures.cpu.append(spent() - cpu)
            figures.moved.append(moved(done.stdout))

    def rounds(self, change: Callable[[Path, int], None]) -> dict[str, Figures]:
        """Change all sources alike and let each program bring it over; the first is to warm up."""
        found = {name: Figures() for name in self.pairs}
        for number in range(-1, self.options.rounds):
            for name, (source, _) in self.pairs.items():
                change(source, number)
                self.run(name, found[name] if number >= 0 else None)
        return found


def moved(said: str) -> int:
    """Bytes sent and received, from the counters at the end."""
    total = 0
    for line in said.splitlines():
        words = line.replace(",", "").split()
        if line.startswith(("Total bytes", "  bytes_sent:", "  bytes_received:")):
            total += int(words[-1])
    return total


def first_copy(bench: Bench) -> dict[str, Figures]:
    """Small files into an empty directory."""
    found = {name: Figures() for name in bench.pairs}
    sources = {name: source for name, (source, _) in bench.pairs.items()}
    for source in sources.values():
        small_files(source, bench.options.files)
    for number in range(bench.options.rounds):
        for name, (source, target) in list(bench.pairs.items()):
            fresh = target.with_name(f"B{number}")
            fresh.mkdir()
            bench.pairs[name] = source, fresh
            bench.run(name, found[name])
            shutil.rmtree(source / ".bisync", ignore_errors=True)
            bench.pairs[name] = source, target
    return found


def _small(bench: Bench, change: Callable[[Path, int], None]) -> dict[str, Figures]:
    for name, (source, _) in bench.pairs.items():
        small_files(source, bench.options.files)
        bench.run(name, None)
    return bench.rounds(change)


def nothing(bench: Bench) -> dict[str, Figures]:
    """The same small files once more."""
    return _small(bench, lambda _root, _n: None)


def edited(bench: Bench) -> dict[str, Figures]:
    """One small file in a hundred was edited."""

    def edit(root: Path, number: int) -> None:
        for path in sorted(root.rglob("*.txt"))[::100]:
            with path.open("ab") as file:
                file.write(b"%d" % number)

    return _small(bench, edit)


def directory(bench: Bench) -> dict[str, Figures]:
    """A directory with half of the files has another name."""

    def rename(root: Path, number: int) -> None:
        old = next(p for p in sorted(root.iterdir()) if p.is_dir() and p.name[0] not in ".r")
        old.rename(root / f"d{number}")

    def unname(root: Path, number: int) -> None:
        rename(root, number)

    return _small(bench, unname)


def _image(bench: Bench, change: Callable[[Path, int], None]) -> dict[str, Figures]:
    _make_image(bench)
    return bench.rounds(change)


def _make_image(bench: Bench) -> None:
    chance = random.Random(1)
    first = next(iter(bench.pairs.values()))[0] / "image"
    with first.open("wb") as file:
        for _ in range(bench.options.mib):
            file.write(chance.randbytes(1 << 20))
    for name, (source, _) in bench.pairs.items():
        if source != first.parent:
            subprocess.run(["cp", "--reflink=never", first, source], check=True)
        bench.run(name, None)


def pages(bench: Bench) -> dict[str, Figures]:
    """So many pages of an image were written to."""
    return _image(bench, lambda root, n: scatter(root / "image", bench.options.pages, n))


def running(bench: Bench) -> dict[str, Figures]:
    """So many pages of an image were written to; ours is a session that stays open."""
    _make_image(bench)
    ours, *others = bench.pairs
    found = {name: Figures() for name in bench.pairs}
    source, target = bench.pairs[ours]
    reach = Reach(rsh=bench.there.rsh)
    with Session(source, f"localhost:{target}", reach=reach) as session:
        session.run()
        for number in range(-1, bench.options.rounds):
            scatter(source / "image", bench.options.pages, number)
            subprocess.run(["sync"], check=True)
            cpu, began = spent(), time.monotonic()
            report = session.run()
            if number >= 0:
                found[ours].wall.append(time.monotonic() - began)
                found[ours].cpu.append(spent() - cpu)
                found[ours].moved.append(report.bytes_sent + report.bytes_received)
            assert report.exit_code == 0
            for name in others:
                scatter(bench.pairs[name][0] / "image", bench.options.pages, number)
                bench.run(name, found[name] if number >= 0 else None)
    return found


def met(bench: Bench) -> dict[str, Figures]:
    """As before, and neither side remembers the other: a first contact of two versions."""

    def forget(root: Path, number: int) -> None:
        scatter(root / "image", bench.options.pages, number)
        for side in (root, root.with_name("B")):
            shutil.rmtree(side / ".bisync", ignore_errors=True)

    return _image(bench, forget)


def touched(bench: Bench) -> dict[str, Figures]:
    """An image has another time."""
    return _image(bench, lambda root, n: touch(root / "image", 0, n))


def inserted(bench: Bench) -> dict[str, Figures]:
    """Seven bytes more in front of an image."""
    return _image(bench, lambda root, n: insert(root / "image", 0, n))


def image_renamed(bench: Bench) -> dict[str, Figures]:
    """An image has another name."""

    def rename(root: Path, number: int) -> None:
        next(p for p in root.iterdir() if p.is_file() and p.name[0] == "i").rename(
            root / f"image{number}"
        )

    return _image(bench, rename)


def first_image(bench: Bench) -> dict[str, Figures]:
    """An image into an empty directory."""
    found = {name: Figures() for name in bench.pairs}
    chance = random.Random(1)
    for name, (source, target) in list(bench.pairs.items()):
        with (source / "image").open("wb") as file:
            for _ in range(bench.options.mib):
                file.write(chance.randbytes(1 << 20))
        for number in range(bench.options.rounds):
            fresh = target.with_name(f"B{number}")
            fresh.mkdir()
            bench.pairs[name] = source, fresh
            bench.run(name, found[name])
            shutil.rmtree(source / ".bisync", ignore_errors=True)
            shutil.rmtree(fresh)
    return found


ROWS: dict[str, Callable[[Bench], dict[str, Figures]]] = {
    "first-copy": first_copy,
    "nothing-to-do": nothing,
    "one-percent-edited": edited,
    "directory-renamed": directory,
    "image-first": first_image,
    "image-pages": pages,
    "image-running": running,
    "image-met": met,
    "image-touched": touched,
    "image-inserted": inserted,
    "image-renamed": image_renamed,
}


def main() -> None:
    """Run the rows and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--programs", nargs="*", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--file-system", choices=[*MAKE, ""], default="")
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    options = parser.parse_args()
    head = ("row", "program", "wall s", "cpu s", "moved KiB", "wall", "cpu")
    print("{:19} {:9} {:>8} {:>8} {:>10} {:>7} {:>7}  (sync / theirs)".format(*head))
    with tempfile.TemporaryDirectory() as keys, machine(Path(keys)) as there, place() as folder:
        bins = program(Path(keys))
        for name in options.rows:
            if options.file_system:
                size = len(options.programs) * 4 * (options.mib << 20) + (2 << 30)
                with mounted(folder, options.file_system, size) as (point, _):
                    _show(name, ROWS[name](Bench(there, bins, point / name, options)))
            else:
                _show(name, ROWS[name](Bench(there, bins, folder / name, options)))
                shutil.rmtree(folder / name)


def _show(row: str, found: dict[str, Figures]) -> None:
    ours = next(iter(found.values())).medians
    for name, figures in found.items():
        wall, cpu, size = figures.medians
        print(
            f"{row:19} {name:9} {wall:8.2f} {cpu:8.2f} {size / 1024:10.0f} "
            f"{ours[0] / wall:7.2f} {ours[1] / max(cpu, 0.01):7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
