"""Files that resist, disks that are full, writers who hold on: nothing is lost, all is said."""

import errno
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.trees import (
    NOON,
    assert_equal,
    deep,
    edit,
    everything,
    frozen,
    kept,
    look,
    noise,
    put,
    save,
    sync,
    write_at,
)

MIB = 1 << 20
Pair = tuple[Path, Path]


# --- Names that look like ours, trees that are odd -----------------------------------------------


def test_case_134_names_like_temporary_ones(pair: Pair):
    """A user's file that is named like our temporaries arrives, or the user is told; it stays."""
    a, b = pair
    names = (".bisync-mine", "sub/.bisync-0123456789abcdef")
    for name in names:
        put(a / name, name.encode())
    put(a / "plain", b"plain")
    outcome = sync(a, b, check=(0, 23))
    for name in names:
        assert (a / name).read_bytes() == name.encode()
        assert (b / name).exists() or name in outcome.said
    sync(a, b, check=(0, 23))
    assert set(names) <= look(a).keys()


def test_case_132_only_a_deep_path(pair: Pair):
    """A tree of nothing but one path of 15 000 bytes is copied and emptied in one piece."""
    a, b = pair
    chain = [b"%03d" % level + b"\xff" * 250 for level in range(60)]
    with deep(a, chain) as fd:
        write_at(fd, b"leaf", b"one")
    put(a / "other", b"other")
    sync(a, b)
    assert_equal(a, b)
    subprocess.run(["rm", "-rf", os.path.join(os.fsencode(b), chain[0])], check=True)
    sync(a, b, "--yes")
    assert look(a) == {"other": b"other"}
    assert [content for _, content in kept(a)] == [b"one"]


# --- Files that may not be changed ---------------------------------------------------------------


@contextmanager
def _attributes(flags: str, *paths: Path) -> Iterator[None]:
    done = subprocess.run(["chattr", f"+{flags}", *paths], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no chattr +{flags} here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{flags}", *paths], check=True)


def test_case_142_immutable_targets(pair: Pair):
    """What may not be changed is a problem of that path; without the flag the next run does it."""
    a, b = pair
    for name in ("edited", "deleted", "moved", "free", "d/edited", "d/deleted"):
        put(a / name, b"old " + name.encode())
    sync(a, b)
    with _attributes("i", b / "edited", b / "deleted", b / "moved", b / "d"):
        edit(a / "edited", b"new edited")
        (a / "deleted").unlink()
        (a / "moved").rename(a / "renamed")
        edit(a / "free", b"new free")
        save(a / "d/edited", b"new d/edited")
        (a / "d/deleted").unlink()
        put(a / "d/new", b"new")
        outcome = sync(a, b, check=23)
        assert outcome.summary["problems"] >= 3
        assert (b / "edited").read_bytes() == b"old edited"
        assert (b / "deleted").read_bytes() == b"old deleted"
        assert (b / "free").read_bytes() == b"new free"
        assert (b / "d/deleted").exists()
        assert not (a / "deleted").exists()
        assert (a / "edited").read_bytes() == b"new edited"
        sync(a, b, check=23)
    sync(a, b)
    assert_equal(a, b)
    assert look(b) == {
        "edited": b"new edited",
        "renamed": b"old moved",
        "free": b"new free",
        "d": None,
        "d/edited": b"new d/edited",
        "d/new": b"new",
    }
    old = {b"old " + name for name in (b"edited", b"deleted", b"free", b"d/edited", b"d/deleted")}
    assert old <= {content for _, content in kept(b)}


def test_case_142_append_only_target(pair: Pair):
    """The same for a file that may only grow."""
    a, b = pair
    put(a / "log", b"old")
    put(a / "free", b"old free")
    sync(a, b)
    with _attributes("a", b / "log"):
        edit(a / "log", b"rewritten")
        edit(a / "free", b"new free")
        sync(a, b, check=23)
        assert look(b) == {"log": b"old", "free": b"new free"}
    sync(a, b)
    assert_equal(a, b)
    assert (b"log", b"old") in kept(b)


# --- Full disks ----------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, here: Pair, mount: Callable[..., None]) -> Path:
    """A file system of 32 MB."""
    point = here[0].with_name("small")
    if request.param == "tmpfs":
        mount(point, "-t", "tmpfs", "-o", "size=32m", "none")
    elif shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    else:
        image = here[0].with_name("small.img")
        with image.open("wb") as file:
            file.truncate(32 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", image], check=True)
        mount(point, "-o", "loop", image)
    return point


def _fill(folder: Path, leave: int) -> Path:
    """Fill a file system but for ``leave`` bytes."""
    ballast = folder / "ballast"
    room = os.statvfs(folder)
    wanted = room.f_bavail * room.f_bsize - leave
    with ballast.open("wb") as file:
        while True:  # the ballast's own map takes room too
            try:
                os.posix_fallocate(file.fileno(), 0, wanted)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                wanted -= 1 << 16
            else:
                return ballast


def test_case_139_full_disk(here: Pair, small: Path):
    """What does not fit is a problem, the old file stays whole; with room the next run does it."""
    a, b = here[0], small / "B"
    b.mkdir()
    put(a / "big", noise(6 * MIB, seed=1))
    put(a / "small", b"small")
    sync(a, b)
    old = noise(6 * MIB, seed=1)
    ballast = _fill(small, leave=2 * MIB)
    put(a / "big", noise(6 * MIB, seed=2))
    put(a / "another", noise(5 * MIB, seed=3))
    put(a / "small", b"edited")
    put(b / "of-beta", b"of beta")
    before = frozen(a)
    outcome = sync(a, b, check=23)
    assert outcome.summary["problems"] >= 2
    assert (b / "big").read_bytes() == old
    assert not (b / "another").exists()
    assert (b / "small").read_bytes() == b"edited"
    assert (a / "of-beta").read_bytes() == b"of beta"
    after = frozen(a)
    assert [path for path in before if path != b"." and before[path] != after.get(path)] == []
    ballast.unlink()
    sync(a, b)
    assert_equal(a, b)
    assert (b"big", old) in kept(b)


def test_case_139_no_room_for_anything(here: Pair, small: Path):
    """Not even the state finds room: the run fails in words, and nothing is lost."""
    a, b = here[0], small / "B"
    b.mkdir()
    put(a / "x", b"old")
    put(a / "y", b"other")
    sync(a, b)
    ballast = _fill(small, leave=0)
    with (small / "rest").open("wb", buffering=0) as rest:
        try:
            while rest.write(bytes(4096)):
                pass
        except OSError:
            pass
    edit(a / "x", noise(100_000, seed=1))
    (a / "y").unlink()
    outcome = sync(a, b, check=None)
    assert outcome.rc in (0, 1, 23)
    assert outcome.rc == 0 or outcome.said.strip()
    assert {b"old", b"other"} <= everything(a, b)
    assert (b / "x").read_bytes() in (b"old", noise(100_000, seed=1))
    ballast.unlink()
    (small / "rest").unlink()
    sync(a, b)
    assert_equal(a, b)
    assert not (a / "y").exists()


# --- Writers at the target -----------------------------------------------------------------------


def test_writer_at_the_target(pair: Pair):
    """Someone has B's file open for writing: busy, and what he writes later is not lost."""
    a, b = pair
    put(a / "x", b"old", t=NOON)
    put(a / "y", b"old y")
    sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    edit(a / "y", b"new y")
    with (b / "x").open("r+b", buffering=0) as writer:
        outcome = sync(a, b, check=24)
        assert outcome.summary["busy"] == 1
        assert look(b) == {"x": b"old", "y": b"new y"}
        writer.write(b"THE WRITE")
    sync(a, b)
    assert_equal(a, b)
    assert {b"THE WRITE", b"from alpha"} <= everything(a, b)
    assert look(b)["x"] == b"THE WRITE"


def test_writer_who_writes_nothing(pair: Pair):
    """The writer leaves without a write: the next run does what was put off."""
    a, b = pair
    for name in ("edited", "deleted", "quiet"):
        put(a / name, b"old " + name.encode())
    sync(a, b)
    edit(a / "edited", b"new")
    (a / "deleted").unlink()
    with (b / "edited").open("r+b"), (b / "deleted").open("r+b"):
        sync(a, b, check=24)
        assert (b / "edited").read_bytes() == b"old edited"
        assert (b / "deleted").read_bytes() == b"old deleted"
    sync(a, b)
    assert look(a) == look(b) == {"edited": b"new", "quiet": b"old quiet"}


def test_attributes_wait_with_their_object(pair: Pair):
    """What a save by backup left aside keeps its mode where the save could not be followed."""
    a, b = pair
    put(a / "x", b"first", mode=0o644)
    sync(a, b)
    (a / "x").rename(a / "x~")
    (a / "x~").chmod(0o600)
    put(a / "x", b"second", mode=0o644)
    with (b / "x").open("r+b"):
        sync(a, b, check=24)
        assert look(b) == {"x": b"first"}
        assert (b / "x").stat().st_mode & 0o777 == 0o644
    assert sync(a, b).summary["conflicts"] == 0
    assert look(a) == look(b) == {"x": b"second", "x~": b"first"}
    for root in pair:
        assert [(root / n).stat().st_mode & 0o777 for n in ("x", "x~")] == [0o644, 0o600]


def test_writer_through_a_memory_map(pair: Pair):
    """A map whose descriptor is closed can be written to: busy as well, and nothing is lost."""
    a, b = pair
    old, edited, written = (letter * 8192 for letter in (b"o", b"e", b"w"))
    put(a / "x", old, t=NOON)
    sync(a, b)
    edit(a / "x", edited, t=NOON + 10)
    fd = os.open(b / "x", os.O_RDWR)
    view = mmap.mmap(fd, 0)
    os.close(fd)
    with view:
        sync(a, b, check=24)
        assert (b / "x").read_bytes() == old
        view[:] = written
        view.flush()
    sync(a, b)
    assert_equal(a, b)
    assert {edited, written} <= everything(a, b)


# --- Odd moments ---------------------------------------------------------------------------------


def test_store_of_another_owner_of_the_name(pair: Pair):
    """A directory rsync-rollback that was there before is the store: never synchronised."""
    a, b = pair
    put(a / "rsync-rollback/2020-01-01/x", b"kept by rsync long ago")
    put(a / "x", b"old")
    sync(a, b)
    assert not (b / "rsync-rollback/2020-01-01").exists()
    edit(b / "x", b"new")
    sync(a, b)
    assert sorted(kept(a)) == [(b"x", b"kept by rsync long ago"), (b"x", b"old")]


def test_store_deleted_by_a_person(pair: Pair):
    """The store may be deleted between two runs; it is made again when needed."""
    a, b = pair
    put(a / "x", b"one")
    sync(a, b)
    edit(a / "x", b"two")
    sync(a, b)
    shutil.rmtree(b / "rsync-rollback")
    edit(a / "x", b"three")
    sync(a, b)
    assert look(b) == {"x": b"three"}
    assert kept(b) == [(b"x", b"two")]


def test_store_is_private(pair: Pair):
    """State and store are closed to others; a kept file has no set-id bit."""
    a, b = pair
    put(a / "x", b"one", mode=0o4755)
    sync(a, b)
    edit(a / "x", b"two")
    sync(a, b)
    for root, name in ((a, ".bisync"), (b, ".bisync"), (b, "rsync-rollback")):
        assert (root / name).stat().st_mode & 0o777 == 0o700
    (path,) = [path for path in (b / "rsync-rollback").rglob("x") if path.is_file()]
    assert path.stat().st_mode & 0o6000 == 0
