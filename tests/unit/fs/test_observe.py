"""Objects whose identity has to be guessed: two of them may look like one."""

import os
import struct
from pathlib import Path

import pytest

from bisync import Session
from bisync.linux.handle import HandleReader
from tests.trees import assert_equal, edit, look, put

Pair = tuple[Path, Path]
SAME = struct.pack("=4sQqI", b"born", 12, 0, 0)


class Alike:
    """Files that seem to be one, by all that tells of identity there."""

    def __init__(self) -> None:
        self._numbers: set[int] = set()
        self._true = HandleReader._by_birth

    def add(self, path: Path, data: bytes) -> None:
        put(path, data)
        self._numbers.add(path.stat().st_ino)

    def read(self, reader: HandleReader, dir_fd: int, name: bytes) -> bytes:
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False) if name else os.fstat(dir_fd)
        return SAME if info.st_ino in self._numbers else self._true(reader, dir_fd, name)


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> Alike:
    """No file has a handle, and some have one inode number."""
    found = Alike()

    def read(reader: HandleReader, dir_fd: int, name: bytes) -> bytes:
        return found.read(reader, dir_fd, name)

    monkeypatch.setattr(HandleReader, "read", read)
    return found


def test_a_new_one_like_a_known_one(here: Pair, alike: Alike):
    """It is new; the known one was not moved, and stays. Of edits it is said what waits."""
    a, b = here
    alike.add(a / "x/f1", b"one")
    (a / "y").mkdir()
    with Session(a, b) as session:
        session.run()
        alike.add(a / "y/f2", b"two2")
        session.run(only=([b"y"], []))
        assert_equal(a, b)
        session.run()
        assert_equal(a, b)
        edit(a / "x/f1", b"one again")
        edit(a / "y/f2", b"two again")
        report = session.run()
    assert look(a) == {"x": None, "x/f1": b"one again", "y": None, "y/f2": b"two again"}
    assert report.exit_code == 24 or look(b) == look(a)
    assert report.moves == report.deleted == 0


def test_two_at_first_sight(here: Pair, alike: Alike):
    """Both are copied, each with its content."""
    a, b = here
    alike.add(a / "x/f1", b"1")
    alike.add(a / "y/f2", b"2")
    with Session(a, b) as session:
        for _ in range(3):  # one of them is what was looked at last; the other one waits
            session.run()
    assert_equal(a, b)
    assert (b / "y/f2").read_bytes() == b"2"


def test_one_that_moves(here: Pair, alike: Alike):
    """A guess is good enough for a file that is not where it was, and as it was."""
    a, b = here
    alike.add(a / "x/f1", b"one")
    (a / "y").mkdir()
    with Session(a, b) as session:
        session.run()
        (a / "x/f1").rename(a / "y/f9")
        report = session.run()
    assert (report.moves, report.literal_bytes, report.exit_code) == (1, 0, 0)
    assert_equal(a, b)
