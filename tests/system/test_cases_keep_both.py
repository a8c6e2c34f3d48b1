"""Conflicts under ``--conflict keep-both``: the loser stays in the tree beside the winner."""

import re

import pytest

from tests.trees import NOON, Arena, Batch, collect, edit, look, put

OPTIONS = ("--conflict", "keep-both")
COPY = re.compile(r"\.conflict-[^/]+-\d{8}T\d{6}$")


def _copies(c: Arena, name: str) -> list[str]:
    """Names of the conflict copies of ``name``."""
    return [each for each in look(c.a) if each.startswith(name + ".conflict-")]


def case_041_both_edit(c: Arena):
    """Both sides edit x: both versions are in the tree."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.a / "x", c("A"), t=NOON + 20)
    edit(c.b / "x", c("B"), t=NOON + 10)
    yield {"conflicts": 1}
    (copy,) = _copies(c, "x")
    assert COPY.search(copy)
    assert {look(c.a)["x"], look(c.a)[copy]} == {c("A"), c("B")}
    assert len(look(c.a)) == 2


def case_052_copy_edited_on_both_sides(c: Arena):
    """The conflict copy is edited on both sides: a new conflict, nothing dropped."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.a / "x", c("A"), t=NOON + 20)
    edit(c.b / "x", c("B"), t=NOON + 10)
    yield {"conflicts": 1}
    (copy,) = _copies(c, "x")
    edit(c.a / copy, c("copy at A"), t=NOON + 30)
    edit(c.b / copy, c("copy at B"), t=NOON + 40)
    winner = look(c.a)["x"]
    yield {"conflicts": 1}
    assert set(look(c.a).values()) == {winner, c("copy at A"), c("copy at B")}
    assert len(look(c.a)) == 3


def case_054_conflict_name_too_long(c: Arena):
    """A name of 255 bytes leaves no room: the copy's base is cut, on a whole character."""
    name = "é" * 127 + "x"
    put(c.a / name, c("old"), t=NOON)
    yield
    edit(c.a / name, c("A"), t=NOON + 20)
    edit(c.b / name, c("B"), t=NOON + 10)
    yield {"conflicts": 1}
    assert set(look(c.a).values()) == {c("A"), c("B")}
    (copy,) = look(c.a).keys() - {name}
    assert len(copy.encode()) <= 255  # raises on a character cut in two
    assert COPY.search(copy)


def case_059_directory_against_edit(c: Arena):
    """A makes a directory of a file, B edits the file: the edit stands beside the directory."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.b / "x", c("edited at B"), t=NOON + 10)
    (c.a / "x").unlink()
    put(c.a / "x/inner", c("inner"))
    yield {"conflicts": 1}
    (copy,) = _copies(c, "x")
    assert look(c.a) == {"x": None, "x/inner": c("inner"), copy: c("edited at B")}


def case_060_symlink_against_edit(c: Arena):
    """A makes a symlink of a file, B edits the file: the edit stands beside the symlink."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.b / "x", c("edited at B"), t=NOON + 10)
    (c.a / "x").unlink()
    (c.a / "x").symlink_to("nowhere")
    yield {"conflicts": 1}
    (copy,) = _copies(c, "x")
    assert look(c.a) == {"x": "-> nowhere", copy: c("edited at B")}


def case_062_copy_deleted(c: Arena):
    """A person deletes the copy on one side: it is gone on both and does not return."""
    put(c.a / "x", c("old"), t=NOON)
    yield
    edit(c.a / "x", c("A"), t=NOON + 20)
    edit(c.b / "x", c("B"), t=NOON + 10)
    yield {"conflicts": 1}
    (copy,) = _copies(c, "x")
    winner = look(c.a)["x"]
    (c.b / copy).unlink()
    yield {"conflicts": 0}
    assert look(c.a) == {"x": winner}


CASES = collect(globals())


@pytest.mark.parametrize("case", CASES)
def test_case(batch: Batch, case: str):
    """Each case ends as its row says."""
    batch.verdict(case)


def test_counts(batch: Batch):
    """Each run lists the conflicts of that run."""
    batch.assert_runs("conflicts", "problems", "busy")


def test_rest(batch: Batch):
    """A run at rest writes nothing outside the state folder."""
    batch.assert_rest()
