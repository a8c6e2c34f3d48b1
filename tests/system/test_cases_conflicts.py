"""Two changes that cannot both stand: one winner by rule on both sides, the loser kept.

Every case yields the number of conflicts that the run has to list.
"""

import pytest

from tests.trees import NOON, Arena, Batch, collect, edit, look, put, save

YEAR = 365 * 86_400


def case_041_both_edit(c: Arena):
    """Both sides edit x: the newer wins on both, the loser is kept."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.a / "x", c("A"), t=NOON + 10)
    edit(c.b / "x", c("B"), t=NOON + 20)
    yield {"conflicts": 1}
    assert look(c.a) == {"x": c("B")}
    assert ("x", c("A")) in c.kept()


def case_041_one_edits_and_one_saves(c: Arena):
    """A saves x by renaming over it, B edits it: a conflict of one file, not two files."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    save(c.a / "x", c("A"), t=NOON + 20)
    edit(c.b / "x", c("B"), t=NOON + 10)
    yield {"conflicts": 1}
    assert look(c.b) == {"x": c("A")}
    assert ("x", c("B")) in c.kept()


def case_043_both_create(c: Arena):
    """Both sides have an x before they ever met: the newer wins, the other is kept."""
    put(c.a / "x", c("from A"), t=NOON + 20)
    put(c.b / "x", c("of B, longer"), t=NOON + 10)
    yield {"conflicts": 1}
    assert look(c.b) == {"x": c("from A")}
    assert c.kept() == [("x", c("of B, longer"))]


def case_045_directories_with_one_common_file(c: Arena):
    """Both sides make D with one differing file: merged, one conflict."""
    put(c.a / "D/a", c("a"))
    put(c.a / "D/both", c("A"), t=NOON)
    put(c.b / "D/b", c("b"))
    put(c.b / "D/both", c("B"), t=NOON + 10)
    yield {"conflicts": 1}
    assert look(c.a) == {"D": None, "D/a": c("a"), "D/b": c("b"), "D/both": c("B")}
    assert c.kept() == [("D/both", c("A"))]


def case_051_made_anew_against_edit(c: Arena):
    """A deletes x and makes it anew with new bytes, B edits x: a conflict, not a replacement."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    (c.a / "x").unlink()
    put(c.a / "x", c("anew"), t=NOON + 20)
    edit(c.b / "x", c("edited"), t=NOON + 10)
    yield {"conflicts": 1}
    assert look(c.b) == {"x": c("anew")}
    assert ("x", c("edited")) in c.kept()


def case_052_conflict_after_conflict(c: Arena):
    """The winner is edited on both sides again: a new conflict, and no version is dropped."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.a / "x", c("A1"), t=NOON + 10)
    edit(c.b / "x", c("B1"), t=NOON + 20)
    yield {"conflicts": 1}
    edit(c.a / "x", c("A2"), t=NOON + 40)
    edit(c.b / "x", c("B2"), t=NOON + 30)
    yield {"conflicts": 1}
    assert look(c.b) == {"x": c("A2")}
    assert {c("A1"), c("B2")} <= {content for _, content in c.kept()}


def case_055_fifty_rounds_apart(c: Arena):
    """Fifty edits on both sides between two runs are one conflict."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    for number in range(50):
        edit(c.a / "x", c(f"A{number}"), t=NOON + number)
        save(c.b / "x", c(f"B{number}"), t=NOON + 100 + number)
    yield {"conflicts": 1}
    assert look(c.a) == {"x": c("B49")}
    assert ("x", c("A49")) in c.kept()


def case_061_clock_ten_years_ahead(c: Arena):
    """One clock is ten years ahead: it may decide who wins, not whether both are kept."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.a / "x", c("A"), t=NOON + 10)
    edit(c.b / "x", c("B"), t=NOON + 10 * YEAR)
    yield {"conflicts": 1}
    assert len(look(c.a)) == 1
    assert c.holds(c("A"))
    assert c.holds(c("B"))


def case_061_clock_runs_backwards(c: Arena):
    """An edit with a time before the agreed one is an edit all the same."""
    put(c.a / "x", c("old"), t=NOON)
    put(c.a / "y", c("old y"), t=NOON)
    yield
    edit(c.a / "x", c("new"), t=NOON - 10 * YEAR)
    edit(c.b / "y", c("new y"), t=-5)
    yield {"conflicts": 0}
    assert look(c.a) == {"x": c("new"), "y": c("new y")}


def case_081_save_with_backup_against_edit(c: Arena):
    """A renames x to a backup and writes x anew, B edits x: the edit meets x, not the backup."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    (c.a / "x").rename(c.a / "x~")
    put(c.a / "x", c("A"), t=NOON + 20)
    edit(c.b / "x", c("B"), t=NOON + 10)
    yield {"conflicts": 1}
    assert look(c.b) == {"x": c("A"), "x~": c("old")}
    assert c("B") in {content for _, content in c.kept()}


def case_065_link_group_edited_through_two_names(c: Arena):
    """Both sides edit one inode through different names: one conflict, one winner at all names."""
    put(c.a / "x", c("old"), t=NOON)
    (c.a / "y").hardlink_to(c.a / "x")
    yield
    edit(c.a / "x", c("A"), t=NOON + 10)
    edit(c.b / "y", c("B"), t=NOON + 20)
    yield {"conflicts": 1}
    assert look(c.a) == {"x": c("B"), "y": c("B")}
    assert (c.a / "x").samefile(c.a / "y")
    assert c("A") in {content for _, content in c.kept()}


CASES = collect(globals())


@pytest.mark.parametrize("case", CASES)
def test_case(batch: Batch, case: str):
    """Each case ends as its row says."""
    batch.verdict(case)


def test_counts(batch: Batch):
    """Each run lists the conflicts of that run, and a decided conflict is no failure."""
    batch.assert_runs("conflicts", "problems", "busy")


def test_rest(batch: Batch):
    """A run at rest writes nothing outside the state folder."""
    batch.assert_rest()
