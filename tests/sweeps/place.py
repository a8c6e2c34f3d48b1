"""Where a pair of roots lives, and how each run gets a fresh copy of the same pair.

With the right to mount: one or two file system images are made, the pair is prepared in them
once, and each run works on a clone of the images, mounted at the same places. Inode numbers,
handles, file system uuid, times and the engine's state are then the same in each run, and a fresh
copy takes some hundredths of a second. Otherwise each copy is prepared anew in folders, by running
the engine.
"""

import copy
import errno
import fcntl
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from . import engine
from .ledger import Ledger

FICLONE = 0x40049409
SIZES = {"ext4": 128 << 20, "xfs": 320 << 20}  # bytes, sparse; XFS refuses less than 300 MiB


@dataclass(frozen=True, slots=True)
class Pair:
    """Two roots, and a home folder for the engine that belongs to them."""

    alpha: Path
    beta: Path
    home: Path
    base: Path  # all of it is below
    words: tuple[str, ...] = ()  # options of every run

    def line(self, *options: str) -> list[str]:
        """Return the command line of a run."""
        return engine.command(self.alpha, self.beta, (*self.words, *options))

    def sync(self, *options: str, before: Sequence[str] = ()) -> engine.Run:
        return engine.run(self.line(*options), self.home, before=before)

    def recover(self) -> engine.Run:
        """Make beta's half-written files whole, as at the start of a machine."""
        return engine.run([*engine.program(), "recover", str(self.beta)], self.home)

    def mirror(self, *options: str, before: Sequence[str] = ()) -> engine.Run:
        line = engine.mirror(self.alpha, self.beta, options)
        return engine.run(line, self.home, before=before)

    def agree(self) -> None:
        """Make the first run; whatever is tested next is worthless when it fails."""
        outcome = self.sync()
        assert outcome.code == 0, f"cannot prepare the scenario: {outcome}"


Prepare = Callable[[Pair], Ledger]


class Template(Protocol):
    """A prepared pair that can be had again and again."""

    def copy(self) -> AbstractContextManager[tuple[Pair, Ledger]]:
        """Return the pair as it was prepared, and a ledger of its own."""


@dataclass(slots=True)
class FolderTemplate:
    """Prepares the pair anew for each copy; needs no rights."""

    folder: Path
    prepare: Prepare
    words: tuple[str, ...] = ()

    @contextmanager
    def copy(self) -> Iterator[tuple[Pair, Ledger]]:
        base = self.folder / "pair"
        try:
            yield (pair := _make_pair(base, base, base, self.words)), self.prepare(pair)
        finally:
            shutil.rmtree(base, ignore_errors=True)


@dataclass(slots=True)
class ImageTemplate:
    """Prepares the pair once, in one or two images, and clones those."""

    folder: Path
    prepare: Prepare
    filesystem: str = "ext4"
    disks: int = 1
    words: tuple[str, ...] = ()
    originals: list[Path] = field(default_factory=list)
    ledger: Ledger | None = None

    def build(self) -> None:
        """Make the images and the pair inside; done once, when the first copy is wanted."""
        for number in range(self.disks):
            image = self.folder / f"original-{number}.img"
            make_filesystem(image, self.filesystem)
            self.originals.append(image)
        with self.mounted(self.originals, fresh=True) as pair:
            self.ledger = self.prepare(pair)

    @contextmanager
    def copy(self) -> Iterator[tuple[Pair, Ledger]]:
        """Yield a mounted clone of the pair and a ledger of its own."""
        with self.clones() as images, self.mounted(images) as pair:
            yield pair, self.fresh_ledger()

    @contextmanager
    def clones(self) -> Iterator[list[Path]]:
        """Yield clones of the prepared images, not mounted."""
        if self.ledger is None:
            self.build()
        images = [image.with_name(f"run-{image.name}") for image in self.originals]
        try:
            for original, image in zip(self.originals, images, strict=True):
                clone_file(original, image)
            yield images
        finally:
            for image in images:
                image.unlink(missing_ok=True)

    @contextmanager
    def mounted(self, images: Sequence[Path], *, fresh: bool = False) -> Iterator[Pair]:
        """Mount images where the pair is used to be."""
        base = self.folder / "mounted"
        points = [base / f"disk-{number}" for number in range(len(images))]
        with ExitStack() as stack:
            for image, point in zip(images, points, strict=True):
                stack.enter_context(mount(image, point))
            if fresh:
                yield _make_pair(base, points[0], points[-1], self.words)
            else:
                yield _pair(base, points[0], points[-1], self.words)

    def fresh_ledger(self) -> Ledger:
        return copy.deepcopy(self.ledger)  # type: ignore[return-value]


def _pair(base: Path, first: Path, second: Path, words: tuple[str, ...]) -> Pair:
    return Pair(first / "alpha", second / "beta", first / "home", base, words)


def _make_pair(base: Path, first: Path, second: Path, words: tuple[str, ...]) -> Pair:
    pair = _pair(base, first, second, words)
    for folder in (pair.alpha, pair.beta, pair.home):
        folder.mkdir(parents=True)
    return pair


def make_filesystem(image: Path, filesystem: str) -> None:
    """Make an empty file system in a new sparse file."""
    with image.open("wb") as file:
        file.truncate(SIZES[filesystem])
    tool = {"ext4": ["mkfs.ext4", "-q", "-F", "-m", "0"], "xfs": ["mkfs.xfs", "-q"]}[filesystem]
    subprocess.run([*tool, str(image)], check=True, capture_output=True)


@contextmanager
def mount(image: Path, point: Path, *options: str) -> Iterator[Path]:
    """Mount an image through a loop device, until the block ends."""
    point.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-o", ",".join(("loop", *options)), str(image), str(point)]
    subprocess.run(words, check=True, capture_output=True)
    try:
        yield point
    finally:
        unmount(point)


@contextmanager
def mount_tmpfs(point: Path, options: str) -> Iterator[Path]:
    point.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
    subprocess.run(words, check=True, capture_output=True)
    try:
        yield point
    finally:
        unmount(point)


def unmount(point: Path, patience: float = 20.0) -> None:
    """Unmount; a process that was killed may need a moment to let go."""
    deadline = time.monotonic() + patience
    while True:
        done = subprocess.run(["umount", str(point)], capture_output=True, check=False)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)
            raise AssertionError(f"somebody still uses {point}: {done.stderr.decode()}")
        time.sleep(0.01)


def clone_file(source: Path, target: Path) -> None:
    """Copy a file as a reflink where that is possible, else its data without the holes."""
    try:
        reflink(source, target)
    except OSError:
        with source.open("rb") as old, target.open("wb") as new:
            _copy_sparse(old.fileno(), new.fileno())


def reflink(source: Path, target: Path) -> None:
    """Clone a file in one instant; OSError where the file system cannot."""
    with source.open("rb") as old, target.open("wb") as new:
        fcntl.ioctl(new, FICLONE, old.fileno())


def _copy_sparse(old: int, new: int) -> None:
    os.ftruncate(new, os.fstat(old).st_size)
    position = 0
    while (position := _next_data(old, position)) >= 0:
        end = os.lseek(old, position, os.SEEK_HOLE)
        while position < end:
            data = os.pread(old, min(end - position, 1 << 20), position)
            position += os.pwrite(new, data, position)


def _next_data(file: int, position: int) -> int:
    """Return where the next data begins; -1 if there is only a hole up to the end."""
    try:
        return os.lseek(file, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return -1


@functools.cache
def cannot_mount() -> str:
    """Say why images cannot be mounted here; empty if they can."""
    if os.geteuid() != 0:
        return "mounting an image needs root"
    missing = [tool for tool in ("mount", "mkfs.ext4", "mkfs.xfs") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "trial.img")
        try:
            make_filesystem(image, "ext4")
            with mount(image, Path(folder, "trial")):
                return ""
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"") or str(error).encode()
            return f"a trial mount failed: {reason.decode().strip()}"
