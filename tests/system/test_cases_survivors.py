"""What survives when sides delete, move and replace against each other: cases 9-26, 46-60, 72.

Whether such an outcome also counts as a conflict is not said here; what must be there is.
"""

import re
import shutil

import pytest

from tests.trees import NOON, Arena, Batch, collect, edit, look, put

COPY = re.compile(r"\.conflict-[^/]+-\d{8}T\d{6}$")


def _both_stay(c: Arena, name: str, contents: set[bytes]) -> None:
    """Both files are in the tree: one at the name, the other beside it as a conflict copy."""
    seen = look(c.a)
    assert set(seen.values()) == contents
    assert len(seen) == len(contents) == 2
    (copy,) = seen.keys() - {name}
    assert copy.startswith(name + ".conflict-")
    assert COPY.search(copy)


def case_009_move_against_delete(c: Arena):
    """A renames x to y, B deletes x: y survives on both."""
    put(c.a / "x", c("one"))
    yield
    (c.a / "x").rename(c.a / "y")
    (c.b / "x").unlink()
    yield
    assert look(c.b) == {"y": c("one")}


def case_010_two_names_for_one_file(c: Arena):
    """A renames x to y, B to z: the name that sorts first, on both."""
    put(c.a / "x", c("one"))
    put(c.a / "p", c("two"))
    yield
    (c.a / "x").rename(c.a / "y")
    (c.b / "x").rename(c.b / "z")
    (c.a / "p").rename(c.a / "r")
    (c.b / "p").rename(c.b / "q")
    yield
    assert look(c.a) == {"y": c("one"), "q": c("two")}


def case_012_rename_against_create(c: Arena):
    """A renames x to y, B makes another y: both stay in the tree."""
    put(c.a / "x", c("one"))
    yield
    (c.a / "x").rename(c.a / "y")
    put(c.b / "y", c("two"))
    yield
    _both_stay(c, "y", {c("one"), c("two")})


def case_013_two_renames_to_one_name(c: Arena):
    """A renames x to z, B renames w to z: both stay in the tree."""
    put(c.a / "x", c("one"))
    put(c.a / "w", c("two"))
    yield
    (c.a / "x").rename(c.a / "z")
    (c.b / "w").rename(c.b / "z")
    yield
    _both_stay(c, "z", {c("one"), c("two")})


def case_015_rename_over_against_edit_of_the_target(c: Arena):
    """A renames x over y, B edits y: x's content and B's y both survive."""
    put(c.a / "x", c("x"))
    put(c.a / "y", c("y"))
    yield
    (c.a / "x").rename(c.a / "y")
    edit(c.b / "y", c("y edited at B"))
    yield
    assert c.holds(c("x"))
    assert c.holds(c("y edited at B"))
    assert "x" not in look(c.a)
    assert "y" in look(c.a)


def case_022_directory_move_against_delete(c: Arena):
    """A renames D to E, B deletes D whole: E survives whole."""
    put(c.a / "D/f", c("f"))
    put(c.a / "D/sub/g", c("g"))
    yield
    (c.a / "D").rename(c.a / "E")
    shutil.rmtree(c.b / "D")
    yield
    assert look(c.b) == {"E": None, "E/f": c("f"), "E/sub": None, "E/sub/g": c("g")}


def case_023_move_out_of_a_deleted_directory(c: Arena):
    """A deletes D, B moves a file out of D: that file survives, the rest is deleted."""
    put(c.a / "D/f", c("f"))
    put(c.a / "D/g", c("g"))
    yield
    shutil.rmtree(c.a / "D")
    (c.b / "D/f").rename(c.b / "f")
    yield
    assert look(c.a) == {"f": c("f")}
    assert ("D/g", c("g")) in c.kept(1)


def case_025_move_cycle_of_two(c: Arena):
    """A moves X into Y, B moves Y into X: both trees complete, no orphan."""
    put(c.a / "X/x", c("x"))
    put(c.a / "Y/y", c("y"))
    yield
    (c.a / "X").rename(c.a / "Y/X")
    (c.b / "Y").rename(c.b / "X/Y")
    yield
    files = {path.rpartition("/")[2]: seen for path, seen in look(c.a).items() if seen}
    assert files == {"x": c("x"), "y": c("y")}
    assert set(look(c.a)) in ({"X", "X/x", "X/Y", "X/Y/y"}, {"Y", "Y/y", "Y/X", "Y/X/x"})
    assert c.kept() == []


def case_026_move_cycle_of_three(c: Arena):
    """A moves P into Q, B moves Q into R and R into P: both trees complete, no orphan."""
    for name in "PQR":
        put(c.a / name / name.lower(), c(name))
    yield
    (c.a / "P").rename(c.a / "Q/P")
    (c.b / "R").rename(c.b / "P/R")
    (c.b / "Q").rename(c.b / "P/R/Q")
    yield
    names = sorted(path.rpartition("/")[2] for path in look(c.a))
    assert names == ["P", "Q", "R", "p", "q", "r"]
    assert {seen for seen in look(c.a).values() if seen} == {c("P"), c("Q"), c("R")}
    assert c.kept() == []


def case_046_edit_against_delete(c: Arena):
    """A edits x, B deletes it: A's x everywhere."""
    put(c.a / "x", c("old"))
    put(c.a / "y", c("old y"))
    yield
    edit(c.a / "x", c("edited at A"))
    (c.b / "x").unlink()
    (c.a / "y").unlink()
    edit(c.b / "y", c("edited at B"))
    yield
    assert look(c.b) == {"x": c("edited at A"), "y": c("edited at B")}


def case_047_edit_in_a_deleted_directory(c: Arena):
    """A edits D/f, B deletes D: D/f survives with the parents it needs, its siblings go."""
    put(c.a / "D/sub/f", c("old"))
    put(c.a / "D/sub/g", c("g"))
    put(c.a / "D/other/h", c("h"))
    yield
    edit(c.a / "D/sub/f", c("edited at A"))
    shutil.rmtree(c.b / "D")
    yield
    assert look(c.b) == {"D": None, "D/sub": None, "D/sub/f": c("edited at A")}
    assert sorted(c.kept(0)) == [("D/other/h", c("h")), ("D/sub/g", c("g"))]


def case_058_two_modes(c: Arena):
    """Both sides change the mode: one of the two on both, no content kept."""
    put(c.a / "x", c("one"), mode=0o644)
    yield
    (c.a / "x").chmod(0o600)
    (c.b / "x").chmod(0o640)
    yield
    assert (c.a / "x").stat().st_mode & 0o777 in (0o600, 0o640)
    assert c.kept() == []


def case_059_directory_against_edit(c: Arena):
    """A makes a directory of a file, B edits the file: the directory stands, the edit is kept."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.b / "x", c("edited at B"), t=NOON + 10)
    (c.a / "x").unlink()
    put(c.a / "x/inner", c("inner"))
    yield
    assert look(c.b) == {"x": None, "x/inner": c("inner")}
    assert c("edited at B") in {content for _, content in c.kept(1)}


def case_060_symlink_against_edit(c: Arena):
    """A makes a symlink of a file, B edits the file: nothing is written through the link."""
    put(c.out / "sentinel", c("sentinel"))
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.b / "x", c("edited at B"), t=NOON + 10)
    (c.a / "x").unlink()
    (c.a / "x").symlink_to(c.out / "sentinel")
    yield
    assert look(c.b) == {"x": f"-> {c.out / 'sentinel'}"}
    assert look(c.out) == {"sentinel": c("sentinel")}
    assert c("edited at B") in {content for _, content in c.kept(1)}


def case_072_symlink_to_a_directory_against_a_directory(c: Arena):
    """A has a symlink where B has a directory with files: the files stay or are kept."""
    put(c.out / "f", c("sentinel"))
    (c.a / "d").symlink_to(c.out)
    put(c.b / "d/f", c("file of B"))
    put(c.b / "d/g", c("another of B"))
    yield
    assert c.holds(c("file of B"))
    assert c.holds(c("another of B"))
    assert look(c.out) == {"f": c("sentinel")}


def case_100_inode_number_used_again_against_edit(c: Arena):
    """A deletes f, an unrelated g may get f's inode number; B's edit of f stays at f."""
    put(c.a / "f", c("old"))
    yield
    (c.a / "f").unlink()
    put(c.a / "g", c("unrelated"))
    edit(c.b / "f", c("edited at B"))
    yield
    assert look(c.a) == {"f": c("edited at B"), "g": c("unrelated")}


CASES = collect(globals())


@pytest.mark.parametrize("case", CASES)
def test_case(batch: Batch, case: str):
    """Each case ends as its row says."""
    batch.verdict(case)


def test_counts(batch: Batch):
    """None of this is a problem."""
    batch.assert_runs("problems", "busy")
    assert batch.runs[1].summary["conflicts"] > 0


def test_rest(batch: Batch):
    """A run at rest writes nothing outside the state folder."""
    batch.assert_rest()
