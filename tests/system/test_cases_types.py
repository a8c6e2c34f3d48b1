"""Types, links and special files: cases 63-66, 70, 71, 73-75, 79, 80."""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trees import (
    Arena,
    Batch,
    assert_equal,
    collect,
    deep,
    edit,
    frozen,
    kept,
    look,
    noise,
    put,
    save,
    sync,
)

MIB = 1 << 20


def case_063_file_to_directory(c: Arena):
    """A makes a directory of a file: the file is kept."""
    put(c.a / "x", c("file"))
    yield
    (c.a / "x").unlink()
    put(c.a / "x/inner", c("inner"))
    yield
    assert look(c.b) == {"x": None, "x/inner": c("inner")}
    assert [content for _, content in c.kept(1)] == [c("file")]


def case_063_directory_to_file(c: Arena):
    """A makes a file of a directory with files: all of them are kept."""
    put(c.a / "x/one", c("one"))
    put(c.a / "x/sub/two", c("two"))
    yield
    shutil.rmtree(c.a / "x")
    put(c.a / "x", c("file"))
    yield
    assert look(c.b) == {"x": c("file")}
    assert {content for _, content in c.kept(1)} == {c("one"), c("two")}


def case_063_there_and_back(c: Arena):
    """File, directory, file of one name within a day: every version is kept."""
    put(c.a / "x", c("first"))
    yield
    (c.a / "x").unlink()
    put(c.a / "x/inner", c("inner"))
    yield
    shutil.rmtree(c.a / "x")
    put(c.a / "x", c("second"))
    yield
    edit(c.a / "x", c("third"))
    yield
    assert look(c.b) == {"x": c("third")}
    assert {content for _, content in c.kept(1)} == {c("first"), c("inner"), c("second")}


def case_064_only_the_final_state(c: Arena):
    """File to symlink to file between two runs is an edit of the file."""
    put(c.a / "x", c("old"))
    yield
    (c.a / "x").unlink()
    (c.a / "x").symlink_to("nowhere")
    (c.a / "x").unlink()
    put(c.a / "x", c("new"))
    yield
    assert look(c.b) == {"x": c("new")}


def case_065_link_group_edited(c: Arena):
    """One of three names is written in place: one inode with three names at B."""
    put(c.a / "x", c("old"))
    for name in ("y", "sub/z"):
        (c.a / name).parent.mkdir(exist_ok=True)
        (c.a / name).hardlink_to(c.a / "x")
    yield
    assert (c.b / "x").stat().st_nlink == 3
    edit(c.a / "y", c("new"))
    yield
    assert {seen for seen in look(c.b).values() if seen} == {c("new")}
    assert (c.b / "x").stat().st_nlink == 3
    assert c("old") in {content for _, content in c.kept(1)}


def case_065_big_link_group_edited(c: Arena):
    """The same for a file of many blocks of which a page changes."""
    old = noise(MIB, seed=65)
    put(c.a / "x", old)
    (c.a / "y").hardlink_to(c.a / "x")
    yield
    with (c.a / "y").open("r+b") as file:
        file.write(c("a page"))
    yield
    assert (c.b / "x").read_bytes() == c("a page") + old[len(c("a page")) :]
    assert (c.b / "x").samefile(c.b / "y")


def case_066_one_name_replaced(c: Arena):
    """One of three names is saved by rename: a group of two and a file."""
    put(c.a / "x", c("old"))
    for name in "yz":
        (c.a / name).hardlink_to(c.a / "x")
    yield
    save(c.a / "x", c("new"))
    yield
    assert look(c.b) == {"x": c("new"), "y": c("old"), "z": c("old")}
    assert (c.b / "y").samefile(c.b / "z")
    assert (c.b / "y").stat().st_nlink == 2


def case_070_link_to_outside(c: Arena):
    """A file at B has a name outside the root: an edit from A does not reach that name."""
    old = noise(MIB, seed=70)
    put(c.a / "x", old)
    put(c.a / "small", c("old"))
    yield
    (c.out / "x").hardlink_to(c.b / "x")
    (c.out / "small").hardlink_to(c.b / "small")
    with (c.a / "x").open("r+b") as file:
        file.write(b"edited")
    edit(c.a / "small", c("new"))
    yield
    assert look(c.out) == {"x": old, "small": c("old")}
    assert look(c.b) == {"x": b"edited" + old[6:], "small": c("new")}


def case_071_symlinks(c: Arena):
    """A symlink's target is bytes: kept as it is, never followed."""
    targets = ["file", "/etc/passwd", "nowhere/at all", "self", "..", "new\nline", "\udcff", "./f/"]
    put(c.out / "sentinel", c("sentinel"))
    for number, target in enumerate([*targets, "x" * 1023, "y" * 4095]):
        with contextlib.suppress(OSError):  # XFS: at most 1023 bytes
            (c.a / ("self" if target == "self" else f"link{number}")).symlink_to(target)
    (c.a / "out").symlink_to(c.out)
    yield
    assert {f"-> {target}" for target in targets} <= set(look(c.b).values())
    (c.a / "out").unlink()
    (c.a / "out").symlink_to(c.out / "sentinel")
    (c.b / "self").unlink()
    yield
    assert look(c.b)["out"] == f"-> {c.out / 'sentinel'}"
    assert "self" not in look(c.a)
    assert look(c.out) == {"sentinel": c("sentinel")}


def case_075_holes_and_zeros(c: Arena):
    """A hole punched, zeros written, zeros allocated: equal content; a new hole stays a hole."""
    data = noise(MIB, seed=75)
    put(c.a / "punched", data)
    put(c.a / "zeroed", data)
    put(c.a / "zeros", bytes(MIB))
    with (c.a / "allocated").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, MIB)
    with (c.a / "sparse").open("wb") as file:
        file.truncate(16 * MIB)
        file.seek(8 * MIB)
        file.write(c("in the middle"))
    yield
    assert (c.b / "sparse").stat().st_blocks * 512 < 2 * MIB
    hole = ["fallocate", "-p", "-o", str(MIB // 4), "-l", str(MIB // 2)]
    subprocess.run([*hole, c.a / "punched"], check=True)
    with (c.a / "zeroed").open("r+b") as file:
        file.seek(MIB // 4)
        file.write(bytes(MIB // 2))
    yield
    expected = data[: MIB // 4] + bytes(MIB // 2) + data[-MIB // 4 :]
    assert (c.b / "punched").read_bytes() == (c.b / "zeroed").read_bytes() == expected


CASES = collect(globals())


@pytest.mark.parametrize("case", CASES)
def test_case(batch: Batch, case: str):
    """Each case ends as its row says."""
    batch.verdict(case)


def test_counts(batch: Batch):
    """None of this is a conflict or a problem."""
    batch.assert_runs("conflicts", "problems", "busy")


def test_rest(batch: Batch):
    """A run at rest writes nothing outside the state folder."""
    batch.assert_rest()


def test_case_073_special_files(pair: tuple[Path, Path]):
    """FIFO, socket and device are skipped, counted and never opened; the rest is synchronised."""
    a, b = pair
    put(a / "f", b"one")
    os.mkfifo(a / "fifo")
    with deep(a, []) as fd, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"/proc/self/fd/{fd}/socket")  # the path itself may be too long
    if os.geteuid() == 0:
        os.mknod(a / "null", 0o20600, os.makedev(1, 3))
    special = len(os.listdir(a)) - 1
    for _ in range(2):
        outcome = sync(a, b)
        assert look(b) == {"f": b"one"}
        assert outcome.counts("skipped", "problems") == {"skipped": special, "problems": 0}
    assert (a / "fifo").is_fifo()
    assert (a / "socket").is_socket()


def test_case_073_special_files_on_request(pair: tuple[Path, Path]):
    """With the options for them, FIFO and device are made at the other side."""
    a, b = pair
    os.mkfifo(a / "fifo", 0o640)
    if os.geteuid() == 0:
        os.mknod(a / "null", 0o20600, os.makedev(1, 3))
    sync(a, b, "--specials", "--devices")
    assert (b / "fifo").is_fifo()
    assert_equal(a, b)


def test_case_074_a_tebibyte_of_nothing(pair: tuple[Path, Path]):
    """A file of 1 TiB without data arrives as a hole; a byte written into it does too."""
    a, b = pair
    with (a / "huge").open("wb") as file:
        file.truncate(1 << 40)
    sync(a, b)
    assert (b / "huge").stat().st_blocks * 512 < MIB
    with (a / "huge").open("r+b") as file:
        file.seek(1 << 39)
        file.write(b"something")
    sync(a, b)
    assert_equal(a, b)
    assert (b / "huge").stat().st_blocks * 512 < 2 * MIB


def test_case_079_ignored_file_in_a_deleted_directory(pair: tuple[Path, Path]):
    """B deletes a directory in which A has an ignored file: that file and its parents stay."""
    a, b = pair
    put(a / "D/f", b"f")
    put(a / "D/E/junk.tmp", b"junk")
    put(a / "other", b"other")
    sync(a, b, "--exclude", "*.tmp")
    shutil.rmtree(b / "D")
    sync(a, b, "--exclude", "*.tmp", check=(0, 23))
    assert look(a) == {"D": None, "D/E": None, "D/E/junk.tmp": b"junk", "other": b"other"}
    assert (b"D/f", b"f") in kept(a)


def test_case_080_mount_point_inside_the_root(pair: tuple[Path, Path], mount: Callable[..., None]):
    """What is mounted inside a root is a boundary: listed, not copied, not read as emptied."""
    a, b = pair
    put(a / "m/f", b"under the mount")
    put(a / "g", b"old")
    sync(a, b)
    mount(a / "m", "-t", "tmpfs", "none")
    put(a / "m/other", b"on the mount")
    edit(a / "g", b"new")
    outcome = sync(a, b, check=23)
    assert outcome.summary["problems"] > 0
    assert look(b) == {"m": None, "m/f": b"under the mount", "g": b"new"}
    subprocess.run(["umount", a / "m"], check=True)
    sync(a, b)
    assert_equal(a, b)
    assert look(a) == {"m": None, "m/f": b"under the mount", "g": b"new"}


def test_case_080_boundary_made_and_gone(pair: tuple[Path, Path], mount: Callable[..., None]):
    """A mounted directory whose mount point is empty later deletes nothing at the other side."""
    a, b = pair
    (a / "m").mkdir()
    mount(a / "m", "-t", "tmpfs", "none")
    put(b / "m/f", b"of B")
    sync(a, b, check=23)
    before = frozen(b)
    subprocess.run(["umount", a / "m"], check=True)
    sync(a, b)
    assert look(b) == look(a) == {"m": None, "m/f": b"of B"}
    assert before[b"m/f"] == frozen(b)[b"m/f"]
