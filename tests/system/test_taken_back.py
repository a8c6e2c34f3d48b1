"""Exchanges that are taken back, with a user at one of the names in that very moment."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

import bisync
from bisync import Take, resolve
from bisync.fs import displaced, perform, takeback
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from tests.trees import NOON, assert_equal, edit, everything, killed, look, put, save

Pair = tuple[Path, Path]
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def store_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """The store takes nothing, and something happens while it is tried."""

    def keep(act: Callable[[], object]) -> None:
        def no(*_: Any, **__: Any) -> Any:
            act()
            raise NO_SPACE

        monkeypatch.setattr(Store, "keep", no)

    return keep


def _settled(monkeypatch: pytest.MonkeyPatch, a: Path, b: Path) -> set[bytes]:
    monkeypatch.undo()
    for _ in range(3):
        bisync.sync(a, b)
    assert_equal(a, b)
    return everything(a, b)


@pytest.mark.parametrize("state", ["all is well", "nothing can be set aside"])
def test_saved_while_the_old_version_is_not_kept(
    here: Pair,
    monkeypatch: pytest.MonkeyPatch,
    store_fails: Callable[[Callable[[], object]], None],
    state: str,
):
    """What a user saves over a new version that is about to be taken back keeps its name."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    saves = [b"SAVED"]
    store_fails(lambda: saves and save(b / "x", saves.pop()))
    if state == "nothing can be set aside":
        monkeypatch.setattr(Stage, "set_aside", _refuse)
    bisync.sync(a, b)
    assert (b / "x").read_bytes() == b"SAVED"
    assert {b"SAVED", b"from alpha", b"old"} <= _settled(monkeypatch, a, b)


def _refuse(*_: Any) -> None:
    raise NO_SPACE


def test_removed_while_the_old_version_is_not_kept(
    here: Pair,
    monkeypatch: pytest.MonkeyPatch,
    store_fails: Callable[[Callable[[], object]], None],
):
    """A name that nobody has any more takes nothing back; the old version is kept."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    store_fails(lambda: (b / "x").unlink(missing_ok=True))
    bisync.sync(a, b)
    assert {b"from alpha", b"old"} <= _settled(monkeypatch, a, b)


@pytest.mark.parametrize("which", ["x", "y"])
def test_saved_while_the_old_version_of_a_group_is_not_kept(
    here: Pair,
    monkeypatch: pytest.MonkeyPatch,
    store_fails: Callable[[Callable[[], object]], None],
    which: str,
):
    """As above, at either name of a hard-link group."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    os.link(a / "x", a / "y")
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    saves = [b"SAVED"]
    store_fails(lambda: saves and save(b / which, saves.pop()))
    bisync.sync(a, b)
    assert (b / which).read_bytes() == b"SAVED"
    assert {b"SAVED", b"from alpha"} <= _settled(monkeypatch, a, b)


@pytest.mark.parametrize("saves", [1, 2])
def test_saved_while_a_group_is_exchanged(here: Pair, monkeypatch: pytest.MonkeyPatch, saves: int):
    """The newest that a user saved in that moment has the name; none is lost."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    os.link(a / "x", a / "y")
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    real, done = perform.swap, list[bytes]()

    def swap(a_dir: int, a_name: bytes, b_dir: int, b_name: bytes) -> None:
        if done or b_name != b"y":
            return real(a_dir, a_name, b_dir, b_name)
        done.append(b"SAVED")
        save(b / "y", b"SAVED")
        real(a_dir, a_name, b_dir, b_name)
        if saves == 2:
            done.append(b"SAVED AGAIN")
            save(b / "y", b"SAVED AGAIN")
        return None

    monkeypatch.setattr(perform, "swap", swap)
    bisync.sync(a, b)
    assert (b / "y").read_bytes() == done[-1]
    assert {*done, b"from alpha"} <= _settled(monkeypatch, a, b)


def test_killed_when_a_group_was_exchanged_with_what_somebody_saved(
    here: Pair, monkeypatch: pytest.MonkeyPatch
):
    """What came out of the tree then is known to nobody but the next run."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    os.link(a / "x", a / "y")
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    real = perform.swap

    def swap(a_dir: int, a_name: bytes, b_dir: int, b_name: bytes) -> None:
        if b_name == b"y":
            save(b / "y", b"SAVED")
        real(a_dir, a_name, b_dir, b_name)
        if b_name == b"y":
            os.kill(os.getpid(), SIGKILL)

    monkeypatch.setattr(perform, "swap", swap)
    killed(lambda: bisync.sync(a, b))
    assert {b"SAVED", b"from alpha"} <= _settled(monkeypatch, a, b)


@pytest.mark.parametrize("names", ["swapped back", "taken by somebody"])
def test_a_choice_that_the_store_has_no_room_for(
    here: Pair,
    monkeypatch: pytest.MonkeyPatch,
    store_fails: Callable[[Callable[[], object]], None],
    names: str,
):
    """What a chosen version would displace is edited, and displaced before anybody saw that."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    edit(b / "x", b"from beta!", t=NOON + 20)
    bisync.sync(a, b)
    (waiting,) = [q for root in (a, b) for q in bisync.conflicts(root)][:1]
    side = a if b"from alpha" in everything(a) else b
    resolve(side, waiting.id, Take.KEPT)
    edit(side / "x", b"EDITED", t=NOON + 30)
    saves = [b"SAVED"] if names == "taken by somebody" else []
    store_fails(lambda: saves and save(side / "x", saves.pop()))
    bisync.sync(a, b)
    expected = {b"SAVED", b"EDITED"} if names == "taken by somebody" else {b"EDITED"}
    assert expected <= everything(a, b) | _in_stage(side)
    assert expected <= _settled(monkeypatch, a, b)


def _in_stage(root: Path) -> set[bytes]:
    return {
        path.read_bytes() for part in ("in", "out") for path in (root / ".bisync" / part).iterdir()
    }


def test_a_link_that_cannot_be_made(
    here: Pair,
    monkeypatch: pytest.MonkeyPatch,
    store_fails: Callable[[Callable[[], object]], None],
):
    """A name more of a file is nobody's work: nothing of it stays beside."""
    a, b = here
    put(a / "x", b"one", t=NOON)
    put(a / "y", b"two", t=NOON)
    bisync.sync(a, b)
    (a / "y").unlink()
    os.link(a / "x", a / "y")
    store_fails(lambda: None)
    for _ in range(3):
        bisync.sync(a, b)
    assert set(look(b)) == {"x", "y"}
    assert b"two" in _settled(monkeypatch, a, b)
    assert set(look(b)) == {"x", "y"}


@pytest.mark.parametrize("what", ["a new object", "a displaced one"])
def test_written_and_closed_before_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    """The look at a file counts from when nobody can write to it."""
    path, real = put(tmp_path / "x", b"new"), displaced.probed
    info = path.stat()

    def probed(dir_fd: int, name: bytes) -> Any:
        with path.open("ab") as file:
            file.write(b" PRECIOUS")
        return real(dir_fd, name)

    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        before = displaced.evidence(fd, b"x")
        monkeypatch.setattr(displaced, "probed", probed)
        if what == "a new object":
            assert not displaced.remove_unused(fd, b"x", (info.st_size, info.st_mtime_ns))
        else:
            assert displaced.was_written(fd, b"x", before)
    finally:
        os.close(fd)
    assert path.read_bytes() == b"new PRECIOUS"


def test_what_was_saved_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of what a user saves while it is swapped back, the newest keeps the name."""
    stage, real = tmp_path / "stage", takeback.swap
    stage.mkdir()
    put(stage / "new", b"old")
    put(tmp_path / "x", b"NEW")
    todo = [b"ONE", b"TWO", b"THREE"]

    def swap(*names: Any) -> None:
        if todo:
            save(tmp_path / "x", todo.pop(0))
        real(*names)

    handles = takeback.HandleReader()
    tree, waiting = (os.open(folder, os.O_RDONLY) for folder in (tmp_path, stage))
    ours = handles.read(tree, b"x")
    monkeypatch.setattr(takeback, "swap", swap)
    try:
        assert not takeback.swap_back(handles, (waiting, b"new"), (tree, b"x"), ours)
    finally:
        os.close(tree)
        os.close(waiting)
    assert (tmp_path / "x").read_bytes() == b"THREE"
