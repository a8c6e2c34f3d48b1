"""Moves that meet edits, and ways of saving: nobody lost anything, so nothing is a conflict."""

import os
import shutil

import pytest

from tests.trees import Arena, Batch, collect, edit, exchange, look, noise, put, save

MIB = 1 << 20


def case_004_chain(c: Arena):
    """b becomes c, a becomes b, a is new: two moves, and the new a is sent."""
    put(c.a / "a", c("one"))
    put(c.a / "b", c("two"))
    yield
    (c.a / "b").rename(c.a / "c")
    (c.a / "a").rename(c.a / "b")
    put(c.a / "a", c("new"))
    yield
    assert look(c.b) == {"a": c("new"), "b": c("one"), "c": c("two")}
    assert c.kept() == []


def case_007_rename_and_edit(c: Arena):
    """A renames a file and edits a page of it: B renames and takes little more than the page."""
    old = noise(MIB, seed=7)
    put(c.a / "x", old)
    yield
    (c.a / "x").rename(c.a / "y")
    with (c.a / "y").open("r+b") as file:
        file.seek(300_000)
        file.write(b"edited")
    yield
    assert look(c.b) == {"y": old[:300_000] + b"edited" + old[300_006:]}


def case_008_rename_against_edit(c: Arena):
    """A renames x to y, B edits x: y with B's edit on both."""
    put(c.a / "x", c("old"))
    yield
    (c.a / "x").rename(c.a / "y")
    edit(c.b / "x", c("edited at B"))
    yield
    assert look(c.a) == {"y": c("edited at B")}


def case_016_rename_over_against_edit_of_the_source(c: Arena):
    """A renames x over y, B edits x: the edit lands at y, the old y is kept."""
    put(c.a / "x", c("x"))
    put(c.a / "y", c("y"))
    yield
    (c.a / "x").rename(c.a / "y")
    edit(c.b / "x", c("x edited at B"))
    yield
    assert look(c.a) == {"y": c("x edited at B")}
    assert ("y", c("y")) in c.kept(1)


def case_020_rename_of_a_directory_against_a_new_file(c: Arena):
    """A renames D to E, B adds D/new: E/new on both and no stray D."""
    put(c.a / "D/f", c("one"))
    yield
    (c.a / "D").rename(c.a / "E")
    put(c.b / "D/new", c("new"))
    yield
    assert look(c.a) == {"E": None, "E/f": c("one"), "E/new": c("new")}
    assert c.kept() == []


def case_021_rename_of_a_directory_against_an_edit(c: Arena):
    """A renames D to E, B edits D/f: E/f with the edit."""
    put(c.a / "D/f", c("one"))
    yield
    (c.a / "D").rename(c.a / "E")
    edit(c.b / "D/f", c("edited at B"))
    yield
    assert look(c.a) == {"E": None, "E/f": c("edited at B")}


def case_029_directory_renamed_and_made_anew(c: Arena):
    """A renames D to E and makes a new D with the same names: never merged."""
    put(c.a / "D/f", c("old"))
    put(c.a / "D/g", c("other"))
    yield
    inode = (c.b / "D/f").stat().st_ino
    (c.a / "D").rename(c.a / "E")
    put(c.a / "D/f", c("new"))
    yield
    assert look(c.b) == {
        "D": None,
        "D/f": c("new"),
        "E": None,
        "E/f": c("old"),
        "E/g": c("other"),
    }
    assert (c.b / "E/f").stat().st_ino == inode
    assert c.kept() == []


def case_032_moved_into_the_root(c: Arena):
    """A tree moved in from outside arrives whole."""
    for number in range(20):
        put(c.out / f"tree/deep/er/{number}", c(str(number)))
    yield
    (c.out / "tree").rename(c.a / "tree")
    yield
    assert len(look(c.b)) == 23


def case_033_out_edited_and_back(c: Arena):
    """A file moved out, edited there and moved back is an edit of it."""
    put(c.a / "f", c("old"))
    yield
    (c.a / "f").rename(c.out / "f")
    edit(c.out / "f", c("new"))
    (c.out / "f").rename(c.a / "f")
    yield
    assert look(c.b) == {"f": c("new")}
    assert c.kept(1) == [("f", c("old"))]


def case_042_same_edit_on_both(c: Arena):
    """Both sides edit x to the same bytes: no conflict, nothing kept."""
    put(c.a / "x", c("old"))
    yield
    edit(c.a / "x", c("same"))
    edit(c.b / "x", c("same"))
    yield
    assert look(c.a) == {"x": c("same")}
    assert c.kept() == []


def case_044_both_create_a_directory(c: Arena):
    """Both sides make D with other files in it, before they ever met: merged."""
    put(c.a / "D/a", c("a"))
    put(c.b / "D/b", c("b"))
    yield
    assert look(c.a) == {"D": None, "D/a": c("a"), "D/b": c("b")}


def case_048_both_delete(c: Arena):
    """Both sides delete x: agreed."""
    put(c.a / "x", c("x"))
    put(c.a / "y", c("y"))
    yield
    (c.a / "x").unlink()
    (c.b / "x").unlink()
    yield
    assert look(c.a) == {"y": c("y")}


def case_049_whole_and_part_deleted(c: Arena):
    """A deletes all of D, B a part of it: all of it is gone."""
    put(c.a / "D/f", c("f"))
    put(c.a / "D/sub/g", c("g"))
    put(c.a / "y", c("y"))
    yield
    shutil.rmtree(c.a / "D")
    (c.b / "D/f").unlink()
    yield
    assert look(c.b) == {"y": c("y")}
    assert c.kept(1) == [("D/sub/g", c("g"))]


def case_050_deleted_and_made_again(c: Arena):
    """A deletes x and makes it again with the same bytes: B's file stays what it is."""
    put(c.a / "x", c("same"))
    yield
    inode = (c.b / "x").stat().st_ino
    put(c.a / "keep-the-inode", c("other"))
    (c.a / "x").unlink()
    put(c.a / "x", c("same"))
    yield
    assert (c.b / "x").stat().st_ino == inode
    assert c.kept() == []


def case_056_touch_against_edit(c: Arena):
    """A touches x, B edits it: B's content on both."""
    put(c.a / "x", c("old"), t=1.6e9)
    yield
    os.utime(c.a / "x", (1.8e9, 1.8e9))
    edit(c.b / "x", c("edited at B"), t=1.7e9)
    yield
    assert look(c.a) == {"x": c("edited at B")}


def case_057_chmod_against_edit(c: Arena):
    """A changes the mode, B the content: both effects on both sides."""
    put(c.a / "x", c("old"), mode=0o644)
    yield
    (c.a / "x").chmod(0o600)
    edit(c.b / "x", c("edited at B"))
    yield
    assert look(c.a) == {"x": c("edited at B")}
    assert (c.b / "x").stat().st_mode & 0o777 == 0o600


def case_081_save_with_a_backup_that_is_deleted(c: Arena):
    """x is renamed to a backup, written anew, the backup deleted: one edit of x."""
    put(c.a / "x", c("old"))
    yield
    (c.a / "x").rename(c.a / "x~")
    put(c.a / "x", c("new"))
    (c.a / "x~").unlink()
    yield
    assert look(c.b) == {"x": c("new")}
    assert c.kept(1) == [("x", c("old"))]


def case_081_save_with_a_backup_that_stays(c: Arena):
    """x is renamed to a backup and written anew: the backup is a rename, x is an edit."""
    put(c.a / "x", c("old"))
    yield
    (c.a / "x").rename(c.a / "x~")
    put(c.a / "x", c("new"))
    yield
    assert look(c.b) == {"x": c("new"), "x~": c("old")}


def case_082_save_with_a_copied_backup(c: Arena):
    """A copy beside x, a swap file, x written in place: two new files and one edit."""
    put(c.a / "x", c("old"))
    yield
    shutil.copy2(c.a / "x", c.a / "x~")
    put(c.a / ".x.swp", c("swap"))
    edit(c.a / "x", c("new"))
    yield
    assert look(c.b) == {"x": c("new"), "x~": c("old"), ".x.swp": c("swap")}
    assert c.kept(1) == [("x", c("old"))]


def case_083_save_by_rename_over(c: Arena):
    """A temp file renamed over x is an edit of x, with the new file's mode."""
    put(c.a / "x", c("old"), mode=0o644)
    (c.a / "y").hardlink_to(c.a / "x")
    yield
    save(c.a / "x", c("new"), mode=0o600)
    yield
    assert look(c.b) == {"x": c("new"), "y": c("old")}
    assert (c.b / "x").stat().st_mode & 0o777 == 0o600
    assert (c.b / "y").stat().st_nlink == 1


def case_083_save_against_chmod(c: Arena):
    """A saves x by renaming over it, B edits nothing but the mode: both effects."""
    put(c.a / "x", c("old"), mode=0o644)
    yield
    save(c.a / "x", c("new"), mode=0o644)
    (c.b / "x").chmod(0o640)
    yield
    assert look(c.b) == {"x": c("new")}
    assert (c.a / "x").stat().st_mode & 0o777 == 0o640


def case_085_save_by_exchange(c: Arena):
    """A temp file exchanged with x, then deleted, is an edit of x."""
    put(c.a / "x", c("old"))
    yield
    put(c.a / "tmp", c("new"))
    exchange(c.a / "x", c.a / "tmp")
    (c.a / "tmp").unlink()
    yield
    assert look(c.b) == {"x": c("new")}
    assert c.kept(1) == [("x", c("old"))]


def case_095_times_preserved_by_a_tool(c: Arena):
    """A file replaced by one of the same size and time (cp -p, tar) is a change."""
    put(c.a / "x", c("old"), t=1.6e9)
    yield
    save(c.a / "x", c("new"), t=1.6e9)
    yield
    assert look(c.b) == {"x": c("new")}
    assert c.kept(1) == [("x", c("old"))]


def case_096_times_put_back_after_an_edit(c: Arena):
    """An edit in place whose size and mtime are as before is a change."""
    put(c.a / "x", c("old"), t=1.6e9)
    yield
    edit(c.a / "x", c("new"), t=1.6e9)
    yield
    assert look(c.b) == {"x": c("new")}
    assert c.kept(1) == [("x", c("old"))]


def case_100_inode_number_used_again(c: Arena):
    """A deletes f and makes an unrelated g, perhaps with f's inode number; B edits f."""
    put(c.a / "f", c("old"))
    put(c.a / "quiet", c("quiet"))
    yield
    (c.a / "f").unlink()
    put(c.a / "g", c("unrelated"))
    edit(c.b / "quiet", c("edited at B"))
    yield
    assert look(c.b) == {"g": c("unrelated"), "quiet": c("edited at B")}
    assert ("f", c("old")) in c.kept(1)
    (c.a / "quiet").unlink()
    put(c.a / "h", c("unrelated too"))
    yield
    assert look(c.b) == {"g": c("unrelated"), "h": c("unrelated too")}
    assert ("quiet", c("edited at B")) in c.kept(1)


CASES = collect(globals())


@pytest.mark.parametrize("case", CASES)
def test_case(batch: Batch, case: str):
    """Each case ends as its row says."""
    batch.verdict(case)


def test_counts(batch: Batch):
    """None of this is a conflict or a problem, and no content travels twice."""
    batch.assert_runs("conflicts", "problems", "busy")
    assert batch.runs[1].summary["literal_bytes"] < 2 * MIB


def test_rest(batch: Batch):
    """A run at rest writes nothing outside the state folder."""
    batch.assert_rest()
