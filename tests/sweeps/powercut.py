"""Cut the power: stop a run at chosen calls and clone the disks as they are at that moment.

The images of the pair lie on a file system with reflinks (a loop-mounted XFS), so a clone of an
image is one FICLONE: what a disk without a volatile cache holds at that moment. Whatever is only in
the page cache of the mounted image is missing in the clone. strace sends SIGSTOP at every chosen
call, which takes effect right after it; strace's log says when the thread has stopped.

Two kinds of cuts:

* after each *flush*: what the engine has made durable so far, and nothing more;
* after each *name operation*, when in addition an unrelated file on the same disk was flushed by
  somebody else: that commits the journal, names included, but not the data of other files. It is
  how a rename becomes durable before the content it makes visible.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from . import calls, engine, place
from .place import ImageTemplate, Pair

_SIGNALLED = re.compile(rb"^(\d+) +--- SIGSTOP \{")
_STOPPED = re.compile(rb"^(\d+) +--- stopped by SIGSTOP ---")
_ENTERED = re.compile(rb"^(\d+) +(\w+\(.*)$")
_SILENCE = 5.0  # seconds without a line after which a stopped run is woken up


@dataclass(frozen=True, slots=True)
class Cut:
    """The disks at one moment."""

    number: int
    after: str  # the call, as strace wrote it
    images: tuple[Path, ...]


@contextmanager
def reflink_disk(folder: Path) -> Iterator[Path]:
    """Yield a mounted XFS on which files can be cloned."""
    image = folder / "reflink.img"
    with image.open("wb") as file:
        file.truncate(8 << 30)  # sparse
    line = ["mkfs.xfs", "-q", "-m", "reflink=1", str(image)]
    subprocess.run(line, check=True, capture_output=True)
    with place.mount(image, folder / "reflink") as point:
        yield point


def record(template: ImageTemplate, names: tuple[str, ...], *, commit: bool) -> list[Cut]:
    """Run the scenario once and return the disks after each call with one of the names.

    Args:
        commit: before each clone, let somebody else flush an unrelated file on each disk.

    The last cut is the moment after the end of the run.
    """
    log, said = template.folder / "strace.log", template.folder / "said.log"
    log.unlink(missing_ok=True)
    with template.clones() as images, template.mounted(images) as pair, said.open("wb") as output:
        camera = _Camera(template.folder, tuple(images), pair, commit)
        stops = f"{','.join(f'?{name}' for name in names)}:signal=STOP"
        line = pair.line()
        tracing = calls.tracer(log, names, stops)
        process = engine.start(line, pair.home, before=tracing, output=output)
        try:
            _follow(process, log, camera)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        assert code == 0, f"the run to be cut ended with {code}: {said.read_text()[-1500:]}"
        camera.take("the end of the run")
    return camera.cuts


class _Camera:
    """Clones the disks, again and again."""

    def __init__(self, folder: Path, images: tuple[Path, ...], pair: Pair, commit: bool) -> None:
        self.cuts: list[Cut] = []
        self._folder = folder
        self._images = images
        self._disks = sorted(pair.base.iterdir())
        self._commit = commit

    def take(self, after: str) -> None:
        number = len(self.cuts)
        if self._commit:
            for disk in self._disks:
                _flush_something(disk / "unrelated")
        clones = []
        for image in self._images:
            clone = self._folder / f"cut-{number}-{image.name}"
            place.reflink(image, clone)
            clones.append(clone)
        self.cuts.append(Cut(number, after, tuple(clones)))


def _flush_something(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b".")
        file.flush()
        os.fsync(file.fileno())


def _follow(process: "subprocess.Popen[bytes]", log: Path, camera: _Camera) -> None:
    """Serve each stop of a traced run until it ends."""
    deadline = time.monotonic() + engine.PATIENCE
    while not log.exists() and process.poll() is None:
        assert time.monotonic() < deadline, "strace did not start"
        time.sleep(0.001)
    if not log.exists():
        return
    last_call: dict[int, str] = {}
    signalled: set[int] = set()
    heard = time.monotonic()
    with log.open("rb") as file:
        while True:
            ended = process.poll() is not None
            lines = list(_complete_lines(file))
            for line in lines:
                if match := _ENTERED.match(line):
                    last_call[int(match[1])] = match[2].decode(errors="backslashreplace")
                elif match := _SIGNALLED.match(line):
                    signalled.add(int(match[1]))
                elif (match := _STOPPED.match(line)) and int(match[1]) in signalled:
                    thread = int(match[1])
                    signalled.discard(thread)
                    camera.take(last_call.get(thread, "?"))
                    _wake(thread)
            now = time.monotonic()
            heard = now if lines else heard
            if ended and not lines:
                return
            if now - heard > _SILENCE:  # a stop that another thread's waking-up cut short
                for thread in last_call:
                    _wake(thread)
                heard = now
            assert now < deadline, "the traced run did not end"
            time.sleep(0.0005)


def _complete_lines(file: BinaryIO) -> Iterator[bytes]:
    while True:
        position = file.tell()
        line = file.readline()
        if not line.endswith(b"\n"):
            file.seek(position)
            return
        yield line


def _wake(thread: int) -> None:
    try:
        os.kill(thread, signal.SIGCONT)
    except ProcessLookupError:
        return
