"""Moves and links that carry no content: cases 1-3, 5, 6, 11, 14, 17-19, 24, 27, 28, 30, 31, ...

Every case yields the number of moves that the run has to apply; no byte of content travels.
"""

import os

import pytest

from tests.trees import FAR, Arena, Batch, collect, exchange, look, put, snapshot


def case_001_rename(c: Arena):
    """A renames x to y: B renames it too, and nothing is displaced."""
    put(c.a / "x", c("one"))
    yield
    inode = (c.b / "x").stat().st_ino
    (c.a / "x").rename(c.a / "y")
    yield {"moves": 1}
    assert look(c.b) == {"y": c("one")}
    assert (c.b / "y").stat().st_ino == inode
    assert c.kept() == []


def case_002_swap_through_a_third_name(c: Arena):
    """A swaps two names through a third between two scans: B ends swapped."""
    put(c.a / "a", c("one"))
    put(c.a / "b", c("two"))
    yield
    (c.a / "a").rename(c.a / "t")
    (c.a / "b").rename(c.a / "a")
    (c.a / "t").rename(c.a / "b")
    yield {"moves": 2}
    assert look(c.b) == {"a": c("two"), "b": c("one")}
    assert c.kept() == []


def case_003_swap_by_exchange(c: Arena):
    """A swaps two names in one atomic step: as case 2."""
    put(c.a / "a", c("one"))
    put(c.a / "b", c("two"))
    yield
    exchange(c.a / "a", c.a / "b")
    yield {"moves": 2}
    assert look(c.b) == {"a": c("two"), "b": c("one")}
    assert c.kept() == []


def case_003_swap_of_directories(c: Arena):
    """Two directories that swap their names are two moves, whatever they hold."""
    put(c.a / "one/f", c("one"))
    put(c.a / "two/f", c("two"))
    yield
    exchange(c.a / "one", c.a / "two")
    yield {"moves": 2}
    assert look(c.b) == {"one": None, "one/f": c("two"), "two": None, "two/f": c("one")}
    assert c.kept() == []


def case_005_rotation(c: Arena):
    """Three names rotate at A: they rotate at B."""
    for name in "abc":
        put(c.a / name, c(name))
    yield
    (c.a / "c").rename(c.a / "t")
    (c.a / "b").rename(c.a / "c")
    (c.a / "a").rename(c.a / "b")
    (c.a / "t").rename(c.a / "a")
    yield {"moves": 3}
    assert look(c.b) == {"a": c("c"), "b": c("a"), "c": c("b")}
    assert c.kept() == []


def case_006_there_and_back(c: Arena):
    """A file renamed and renamed back is nothing to B."""
    put(c.a / "x", c("one"))
    yield
    (c.a / "x").rename(c.a / "y")
    (c.a / "y").rename(c.a / "x")
    before = (c.b / "x").stat()
    yield {"moves": 0}
    after = (c.b / "x").stat()
    assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns)


def case_011_same_rename_on_both(c: Arena):
    """Both sides rename x to y: agreed without a move."""
    put(c.a / "x", c("one"))
    yield
    (c.a / "x").rename(c.a / "y")
    (c.b / "x").rename(c.b / "y")
    yield {"moves": 0}
    assert look(c.b) == {"y": c("one")}
    assert c.kept() == []


def case_014_rename_over(c: Arena):
    """A renames x over y: B too, and y's old version is kept."""
    put(c.a / "x", c("one"))
    put(c.a / "y", c("two"))
    yield
    (c.a / "x").rename(c.a / "y")
    yield {"moves": 1}
    assert look(c.b) == {"y": c("one")}
    assert c.kept(1) == [("y", c("two"))]


def case_017_into_a_new_directory(c: Arena):
    """A file moves into a directory that is itself new."""
    put(c.a / "d1/f", c("one"))
    yield
    (c.a / "d2").mkdir()
    (c.a / "d1/f").rename(c.a / "d2/f")
    yield {"moves": 1}
    assert look(c.b) == {"d1": None, "d2": None, "d2/f": c("one")}
    assert c.kept() == []


def case_018_into_a_directory_renamed_at_the_other_side(c: Arena):
    """A moves f into d2, B renames d2 to d3: f is in d3 on both."""
    put(c.a / "f", c("one"))
    (c.a / "d2").mkdir()
    yield
    (c.a / "f").rename(c.a / "d2/f")
    (c.b / "d2").rename(c.b / "d3")
    yield {"moves": 2}
    assert look(c.a) == {"d3": None, "d3/f": c("one")}
    assert c.kept() == []


def case_019_directory_into_a_directory_renamed_at_the_other_side(c: Arena):
    """A moves D into E, B renames E to F: F/D on both."""
    put(c.a / "D/f", c("one"))
    put(c.a / "E/g", c("two"))
    yield
    (c.a / "D").rename(c.a / "E/D")
    (c.b / "E").rename(c.b / "F")
    yield {"moves": 2}
    assert look(c.a) == {"F": None, "F/D": None, "F/D/f": c("one"), "F/g": c("two")}
    assert c.kept() == []


def case_024_into_a_directory_deleted_at_the_other_side(c: Arena):
    """A deletes D, B moves a file into D: D is made again for it, the rest of D goes."""
    put(c.a / "D/old", c("old"))
    put(c.a / "f", c("one"))
    yield
    (c.a / "D/old").unlink()
    (c.a / "D").rmdir()
    (c.b / "f").rename(c.b / "D/f")
    yield {"moves": 1}
    assert look(c.a) == {"D": None, "D/f": c("one")}
    assert c.kept() == [("D/old", c("old"))]


def case_027_moved_up_then_parent_deleted(c: Arena):
    """D/sub moves up and D is deleted: sub is moved, never deleted and sent again."""
    put(c.a / "D/sub/f", c("one"))
    put(c.a / "D/g", c("two"))
    yield
    inode = (c.b / "D/sub/f").stat().st_ino
    (c.a / "D/sub").rename(c.a / "sub")
    (c.a / "D/g").unlink()
    (c.a / "D").rmdir()
    yield {"moves": 1}
    assert look(c.b) == {"sub": None, "sub/f": c("one")}
    assert (c.b / "sub/f").stat().st_ino == inode
    assert c.kept() == [("D/g", c("two"))]


def case_028_inversion(c: Arena):
    """P/Q moves to the top and P moves into Q: the inverted tree on B."""
    put(c.a / "P/Q/inner", c("one"))
    put(c.a / "P/outer", c("two"))
    yield
    (c.a / "P/Q").rename(c.a / "Q")
    (c.a / "P").rename(c.a / "Q/P")
    yield {"moves": 2}
    assert look(c.b) == {
        "Q": None,
        "Q/P": None,
        "Q/P/outer": c("two"),
        "Q/inner": c("one"),
    }
    assert c.kept() == []


def case_030_big_directory(c: Arena):
    """A renames a directory of 300 files: one operation at B, not 300."""
    for number in range(300):
        put(c.a / f"D/{number}", c(str(number)))
    yield
    names = {f"E/{number}" for number in range(300)} | {"E"}
    (c.a / "D").rename(c.a / "E")
    yield {"moves": 1}
    assert look(c.b).keys() == names
    assert c.kept() == []


def case_031_moved_out_of_the_root(c: Arena):
    """A moves a tree out of the root: a deletion at B, and B keeps it."""
    put(c.a / "tree/f", c("one"))
    put(c.a / "stays", c("two"))
    yield
    (c.a / "tree").rename(c.out / "tree")
    yield {"moves": 0}
    assert look(c.b) == {"stays": c("two")}
    assert c.kept() == [("tree/f", c("one"))]


def case_035_letter_case_only(c: Arena):
    """A change of letter case only is a plain rename."""
    put(c.a / "readme", c("one"))
    yield
    (c.a / "readme").rename(c.a / "README")
    yield {"moves": 1}
    assert look(c.b) == {"README": c("one")}
    assert c.kept() == []


def case_037_moved_twice(c: Arena):
    """x to y to z before the sync is one rename from x to z."""
    put(c.a / "x", c("one"))
    yield
    (c.a / "x").rename(c.a / "y")
    (c.a / "y").rename(c.a / "z")
    yield {"moves": 1}
    assert look(c.b) == {"z": c("one")}
    assert c.kept() == []


def case_038_between_two_names_of_one_inode(c: Arena):
    """A rename between two names of one inode does nothing: both names remain."""
    put(c.a / "x", c("one"))
    (c.a / "y").hardlink_to(c.a / "x")
    yield
    os.rename(c.a / "x", c.a / "y")
    yield {"moves": 0}
    assert look(c.b) == {"x": c("one"), "y": c("one")}
    assert c.kept() == []


def case_067_new_name_of_an_inode(c: Arena):
    """A links a new name to a file: B links it too."""
    put(c.a / "x", c("one"))
    yield
    (c.a / "y").hardlink_to(c.a / "x")
    yield {"moves": 0}
    assert (c.b / "x").samefile(c.b / "y")
    assert c.kept() == []


def case_068_equal_files_linked(c: Arena):
    """A makes one inode of two equal files: only the links change at B."""
    put(c.a / "x", c("same"))
    put(c.a / "y", c("same"))
    yield
    (c.a / "y").unlink()
    (c.a / "y").hardlink_to(c.a / "x")
    yield {"moves": 0}
    assert (c.b / "x").samefile(c.b / "y")
    assert (c.b / "x").read_bytes() == c("same")


def case_069_link_group_across_a_deleted_directory(c: Arena):
    """One of two directories of a link group goes: the surviving names stay linked."""
    put(c.a / "one/x", c("one"))
    (c.a / "one/y").hardlink_to(c.a / "one/x")
    (c.a / "two").mkdir()
    (c.a / "two/z").hardlink_to(c.a / "one/x")
    yield
    (c.a / "two/z").unlink()
    (c.a / "two").rmdir()
    yield {"moves": 0}
    assert look(c.b) == {"one": None, "one/x": c("one"), "one/y": c("one")}
    assert (c.b / "one/x").samefile(c.b / "one/y")
    assert (c.b / "one/x").stat().st_nlink == 2


def case_078_empty_directories(c: Arena):
    """Empty directories are made and removed like anything else."""
    (c.a / "old").mkdir()
    yield
    (c.a / "old").rmdir()
    (c.b / "new/inner").mkdir(parents=True)
    yield {"moves": 0}
    assert look(c.a) == {"new": None, "new/inner": None}


CASES = collect(globals())


@pytest.mark.parametrize("case", CASES)
def test_case(batch: Batch, case: str):
    """Each case ends as its row says."""
    batch.verdict(case)


def test_counts(batch: Batch):
    """A move counts as one move and carries no content."""
    batch.assert_runs("moves", "conflicts", "problems", "busy")
    local = () if FAR else ("bytes_sent", "bytes_received")
    carried = batch.runs[1].counts("literal_bytes", *local)
    assert carried == dict.fromkeys(carried, 0)


def test_rest(batch: Batch):
    """A run at rest writes nothing outside the state folder."""
    batch.assert_rest()


def test_first_copy(batch: Batch):
    """The first run copied every attribute of every name (the trees are not empty)."""
    assert len(snapshot(batch.roots[0])) > 300
    assert batch.runs[0].summary["created"] > 300
