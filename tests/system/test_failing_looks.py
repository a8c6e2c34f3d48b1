"""Looks that fail: nothing is taken for deleted, what was done stands or was taken back.

In one process, without strace: the sweeps fail the system calls of a larger scenario.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import bisync
from bisync.fs import walk
from bisync.fs.look import Looker
from tests.trees import assert_equal, edit, everything, exchange, look, put

Pair = tuple[Path, Path]
YES = bisync.Config(yes=True)


def _agreed(a: Path) -> None:
    for name in ("moved", "over", "under", "p", "q", "gone", "saved", "d/stays", "d/out", "e/x"):
        put(a / name, b"old " + name.encode())
    os.link(a / "gone", a / "link")


def _perturb(a: Path) -> None:
    (a / "moved").rename(a / "moved-on")
    edit(a / "moved-on", b"moved and edited")
    (a / "over").rename(a / "under")
    exchange(a / "p", a / "q")
    (a / "link").unlink()
    (a / "d/out").rename(a / "out")
    (a / "d/stays").unlink()
    (a / "d").rmdir()
    (a / "e").rename(a / "e2")
    put(a / "e/y", b"new")
    (a / "saved").rename(a / "saved~")
    put(a / "saved", b"saved anew")


class Fault:
    """Lets the n-th look of one kind fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.count = 0

    def sync(self, pair: Pair, call: str, nth: int) -> int:
        """Run the engine once; ``count`` says how often it made the call."""
        real = getattr(Looker, call)
        self.count = 0

        def hooked(*args: object) -> object:
            self.count += 1
            if self.count == nth:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args)

        with self.monkeypatch.context() as patch:
            patch.setattr(Looker, call, hooked)
            return bisync.sync(*pair, YES).exit_code


@pytest.mark.parametrize("call", ["stat", "handle"])
def test_one_look_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    """The next run ends where an undisturbed one does: nothing lost, no needless conflict."""
    fault, nth, looks = Fault(monkeypatch), 0, 1
    wanted: dict[str, bytes | None] = {}
    while nth <= looks:
        a, b = pair = tmp_path / f"{nth}/a", tmp_path / f"{nth}/b"
        a.mkdir(parents=True)
        b.mkdir()
        _agreed(a)
        assert bisync.sync(*pair, YES).exit_code == 0
        _perturb(a)
        before = everything(a, b)
        code = fault.sync(pair, call, nth)
        if nth == 0:
            wanted, looks = look(a), fault.count
            assert looks > 20
        assert code in (0, 23, 24), f"{call} {nth}"
        assert bisync.sync(*pair, YES).exit_code == 0, f"{call} {nth}"
        assert_equal(*pair)
        assert look(a) == wanted, f"{call} {nth}"
        assert before <= everything(a, b), f"{call} {nth}"
        nth += 1


class Unreadable:
    """A directory entry whose ``stat`` fails."""

    def __init__(self, name: str) -> None:
        self.name = name

    def stat(self, *, follow_symlinks: bool) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _fail_one_stat(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[str]:
    """Let the scan fail once to look at an entry; the list is empty once it has."""
    real, waiting = os.scandir, [path.name]

    @contextlib.contextmanager
    def scandir(fd: int) -> Iterator[Iterator[object]]:
        is_it = os.path.samestat(os.fstat(fd), folder)
        with real(fd) as entries:
            yield (_entry(entry) if is_it else entry for entry in entries)

    def _entry(entry: os.DirEntry[str]) -> object:
        if entry.name in waiting:
            waiting.remove(entry.name)
            return Unreadable(entry.name)
        return entry

    folder = path.parent.stat()
    monkeypatch.setattr(os, "scandir", scandir)
    return waiting


def test_a_moved_file_that_nobody_can_see(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """Its old name is gone, its new one cannot be looked at, and the kernel knows neither just
    now (it gives "/" for an object that it only knows by handle): it is not deleted.
    """
    a, b = here
    put(a / "d/old", b"one")
    put(a / "other", b"other")
    assert bisync.sync(a, b, YES).exit_code == 0
    (a / "d/old").rename(a / "new")
    edit(b / "d/old", b"edited at beta")
    real = os.readlink

    def readlink(path: bytes, **more: int) -> bytes:
        found = real(path, **more)
        return b"/" if found.endswith((b"/new", b"/old")) else found

    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", readlink)
        waiting = _fail_one_stat(patch, a / "new")
        report = bisync.sync(a, b, YES)
        assert not waiting
    assert report.exit_code == 23
    assert bisync.sync(a, b, YES).exit_code == 0
    assert_equal(a, b)
    assert look(a) == {"d": None, "new": b"edited at beta", "other": b"other"}


def test_a_name_that_waits_for_what_cannot_be_looked_at(
    here: Pair, monkeypatch: pytest.MonkeyPatch
):
    """A directory moved on and cannot be listed: what took its name comes through next time."""
    a, b = here
    put(a / "d/1", b"one")
    assert bisync.sync(a, b, YES).exit_code == 0
    (a / "d").rename(a / "moved")
    put(a / "d/1", b"two")
    real, folder = os.scandir, (a / "moved").stat()

    def scandir(fd: int) -> object:
        if os.path.samestat(os.fstat(fd), folder):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        patch.setattr(walk, "_RACY_NS", 0)  # as if the changes were not of this very moment
        assert bisync.sync(a, b, YES).exit_code == 23
    assert look(b) == {"d": None, "d/1": b"one"}
    assert bisync.sync(a, b, YES).exit_code == 0
    assert_equal(a, b)
    assert look(b) == {"d": None, "d/1": b"two", "moved": None, "moved/1": b"one"}


def test_a_file_that_could_not_be_looked_at_becomes_a_directory(
    here: Pair, monkeypatch: pytest.MonkeyPatch
):
    """It waits for one run, and then its place is taken."""
    a, b = here
    put(a / "x", b"one")
    assert bisync.sync(a, b, YES).exit_code == 0
    (a / "x").unlink()
    put(a / "x/y", b"two")
    with monkeypatch.context() as patch:
        waiting = _fail_one_stat(patch, b / "x")
        assert bisync.sync(a, b, YES).exit_code == 23
        assert not waiting
    assert bisync.sync(a, b, YES).exit_code == 0
    assert_equal(a, b)
    assert look(b) == {"x": None, "x/y": b"two"}
    assert b"one" in everything(a, b)
