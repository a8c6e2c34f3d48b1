"""The root itself: unmounted, replaced, emptied, filtered, nested, shared. Cases 117-120, 125, 126.

"Withheld" always means: exit 25, no deletion, nothing written into the wrong place.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trees import assert_equal, edit, frozen, kept, look, put, snapshot, sync


def _filled(a: Path, b: Path) -> None:
    """Bring a pair with a few files into agreement."""
    put(a / "f", b"one")
    put(a / "d/g", b"two")
    sync(a, b)
    assert_equal(a, b)


def _withheld(a: Path, b: Path, codes: int | tuple[int, ...] = 25) -> None:
    """Run, and require that nothing happened to either tree."""
    before = frozen(a), snapshot(b) if b.is_dir() else None
    outcome = sync(a, b, check=codes)
    assert outcome.counts("deleted", "moves", "created", "updated") == dict.fromkeys(
        ("deleted", "moves", "created", "updated"), 0
    )
    assert (frozen(a), snapshot(b) if b.is_dir() else None) == before


def test_case_117_unmounted(fsdir: Path, mount: Callable[..., None]):
    """B is unmounted: its mount point is an empty directory; halt, fill nothing, delete nothing."""
    a, b, real = (fsdir / name for name in ("A", "B", "real"))
    for folder in (a, real):
        folder.mkdir()
    mount(b, "--bind", real)
    _filled(a, b)
    subprocess.run(["umount", b], check=True)
    _withheld(a, b)
    assert os.listdir(b) == []
    subprocess.run(["mount", "--bind", real, b], check=True)
    edit(a / "f", b"edited meanwhile")
    sync(a, b)
    assert_equal(a, b)


def test_case_118_mounted_over(pair: tuple[Path, Path], mount: Callable[..., None]):
    """Another file system is mounted over B: found before anything is done."""
    a, b = pair
    _filled(a, b)
    mount(b, "-t", "tmpfs", "none")
    put(b / "alien", b"alien")
    _withheld(a, b)
    subprocess.run(["umount", b], check=True)
    sync(a, b)
    assert_equal(a, b)


@pytest.mark.parametrize("now", ["gone", "a file", "a symlink"])
def test_case_119_not_a_directory_any_more(pair: tuple[Path, Path], now: str):
    """B is deleted or renamed, and perhaps something else has its name: halt."""
    a, b = pair
    _filled(a, b)
    elsewhere = b.rename(b.with_name("elsewhere"))
    if now == "a file":
        b.write_bytes(b"a file")
    elif now == "a symlink":
        b.symlink_to(elsewhere)
    before = frozen(a), frozen(elsewhere)
    sync(a, b, check=(2, 25))
    assert (frozen(a), frozen(elsewhere)) == before
    assert b.is_symlink() == (now == "a symlink")
    assert b.exists() == (now != "gone")


def test_case_119_another_directory(pair: tuple[Path, Path]):
    """Another directory has B's name: halt; ``--accept-root`` merges and deletes nothing."""
    a, b = pair
    _filled(a, b)
    b.rename(b.with_name("elsewhere"))
    put(b / "f", b"of the other directory")
    _withheld(a, b)
    sync(a, b, "--yes", check=25)  # that is for deletions
    outcome = sync(a, b, "--accept-root", "--yes")
    assert outcome.summary["deleted"] == 0
    assert_equal(a, b)
    assert look(a)["d/g"] == b"two"


@pytest.mark.parametrize("files", [3, 40])
def test_case_120_emptied(pair: tuple[Path, Path], files: int):
    """All of B is deleted, at any count: halt; ``--yes`` propagates it and A keeps everything."""
    a, b = pair
    for number in range(files):
        put(a / f"{number}", b"%d" % number)
    sync(a, b)
    for path in b.iterdir():
        if path.is_file():
            path.unlink()
    _withheld(a, b)
    outcome = sync(a, b, "--yes")
    assert outcome.summary["deleted"] == files
    assert look(a) == look(b) == {}
    assert len(kept(a)) == files


def test_case_120_emptied_with_its_state(pair: tuple[Path, Path]):
    """All of B, its state included, is deleted: an empty tree is not merged unasked."""
    a, b = pair
    _filled(a, b)
    subprocess.run(["find", b, "-mindepth", "1", "-delete"], check=True)
    _withheld(a, b)
    assert look(a) == {"f": b"one", "d": None, "d/g": b"two"}


def test_case_125_filter_changed(pair: tuple[Path, Path]):
    """Newly ignored paths are deleted nowhere; newly included ones merge."""
    a, b = pair
    put(a / "keep", b"keep")
    put(a / "x.log", b"log")
    put(a / "logs.d/y.log", b"log too")
    sync(a, b)
    edit(a / "x.log", b"log edited at A")
    put(a / "new.log", b"new at A")
    put(b / "other.log", b"new at B")
    edit(b / "keep", b"keep edited at B")
    filtered = sync(a, b, "--exclude", "*.log")
    assert filtered.summary["deleted"] == 0
    assert look(a)["keep"] == b"keep edited at B"
    assert look(b)["x.log"] == b"log"
    assert look(b).keys() == {"keep", "x.log", "logs.d", "logs.d/y.log", "other.log"}
    outcome = sync(a, b)
    assert outcome.counts("deleted", "conflicts") == {"deleted": 0, "conflicts": 0}
    assert_equal(a, b)
    assert look(b)["x.log"] == b"log edited at A"
    assert {"new.log", "other.log"} <= look(a).keys()


def test_case_126_nested_roots(pair: tuple[Path, Path]):
    """A root inside the other, and a root with itself, are refused before anything is made."""
    a, b = pair
    put(a / "sub/f", b"one")
    before = frozen(a)
    sync(a, a / "sub", check=2)
    sync(a / "sub", a, check=2)
    sync(a, a, check=2)
    assert frozen(a) == before
    assert not (a / ".bisync").exists()
    sync(a, b)
    b.with_name("C").mkdir()
    sync(a / "sub", b.with_name("C"), check=2)
    assert not (a / "sub/.bisync").exists()


def test_case_126_a_star(pair: tuple[Path, Path]):
    """One root in two pairs: edits, moves and deletions reach the third side through it."""
    a, b = pair
    c = a.with_name("C")
    c.mkdir()
    put(a / "f", b"one")
    put(a / "g", b"two")
    put(a / "h", b"three")
    sync(a, b)
    sync(a, c)
    edit(c / "f", b"edited at C")
    (c / "g").rename(c / "moved")
    (c / "h").unlink()
    sync(a, c)
    outcome = sync(a, b)
    assert outcome.counts("moves", "deleted", "conflicts") == {
        "moves": 1,
        "deleted": 1,
        "conflicts": 0,
    }
    assert look(b) == look(c) == {"f": b"edited at C", "moved": b"two"}
