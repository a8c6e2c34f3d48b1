"""``verify`` and ``why``: bit rot found and repaired, decisions explained."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.system.live import AGENT, ready, watching
from tests.trees import NOON, edit, kept, look, put, run, sync

Pair = tuple[Path, Path]


def _verify(root: Path, *words: str | Path, check: int = 0) -> dict[str, Any]:
    return run("verify", "--json", root, *words, check=check).objects[-1]


def _rot(path: Path, data: bytes) -> None:
    """Change a file's bytes behind the back of its times: only the change time cannot be hidden.

    So what is recorded of it is brought in line, as if the disk had done it.
    """
    import sqlite3  # noqa: PLC0415

    info = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    root = next(p for p in path.parents if (p / ".bisync").exists())
    with sqlite3.connect(root / ".bisync/state.db") as db:
        db.execute("UPDATE node SET ctime=? WHERE ino=?", (path.stat().st_ctime_ns, info.st_ino))
    db.close()


def test_nothing_is_wrong(pair: Pair):
    """Every file is read once; a file that was edited since is not rot."""
    a, b = pair
    for name in ("d/x", "y", "z"):
        put(a / name, name.encode(), t=NOON)
    sync(a, b)
    edit(a / "y", b"a user's edit")
    row = _verify(a)
    assert (row["checked"], row["skipped"], row["rotten"]) == (2, 1, [])
    assert _verify(b)["checked"] == 3


def test_rot_is_found_and_repaired_from_the_peer(pair: Pair):
    """The intact content comes from the peer, the rotten one goes to the store."""
    a, b = pair
    put(a / "d/x", b"intact", t=NOON)
    put(a / "y", b"y", t=NOON)
    sync(a, b)
    _rot(a / "d/x", b"ROTTEN")
    assert _verify(a, check=23)["rotten"] == ["d/x"]
    assert look(a)["d/x"] == b"ROTTEN"
    row = _verify(a, b, "--repair")
    assert (row["rotten"], row["repaired"], row["lost"]) == (["d/x"], ["d/x"], [])
    assert look(a)["d/x"] == b"intact"
    assert {c for _, c in kept(a)} == {b"ROTTEN"}
    assert _verify(a)["rotten"] == []
    assert sync(a, b).summary["literal_bytes"] == 0


def test_rot_on_both_sides_is_said(pair: Pair):
    """Damaged everywhere: reported, never guessed; nothing is changed."""
    a, b = pair
    put(a / "x", b"intact", t=NOON)
    sync(a, b)
    _rot(a / "x", b"ROTTEN")
    _rot(b / "x", b"BROKEN")
    row = _verify(a, "--repair", check=23)
    assert (row["repaired"], row["lost"]) == ([], ["x"])
    assert (look(a)["x"], look(b)["x"]) == (b"ROTTEN", b"BROKEN")


def test_rot_is_repaired_from_a_store(pair: Pair):
    """The peer is gone, but a store has the version."""
    a, b = pair
    put(a / "x", b"intact", t=NOON)
    put(a / "y", b"y")
    sync(a, b)
    put(a / "rsync-rollback/2020-01-01/x", b"")
    (a / "x").rename(a / "x2")
    shutil.copy2(a / "x2", a / "x")
    (a / "x2").unlink()
    sync(a, b)
    edit(b / "x", b"other!")
    sync(a, b)
    edit(b / "x", b"intact", t=NOON)
    sync(a, b)
    shutil.rmtree(b)
    _rot(a / "x", b"ROTTEN")
    assert _verify(a, "--repair")["repaired"] == ["x"]
    assert look(a)["x"] == b"intact"


def test_presumed_files_are_read(pair: Pair):
    """What was presumed equal at first contact has a content from now on."""
    a, b = pair
    for root in pair:
        put(root / "x", b"same", t=NOON)
    assert sync(a, b).summary["presumed"] == 1
    assert _verify(a)["unread"] == 1
    assert _verify(a)["unread"] == 0


def test_sample(pair: Pair):
    """A share of the files, chosen at random."""
    a, b = pair
    for number in range(200):
        put(a / f"{number}", b"%d" % number, t=NOON)
    sync(a, b)
    assert 20 < _verify(a, "--sample", "30%")["checked"] < 110


@pytest.mark.parametrize(
    "words", [["--sample", "0%"], ["--sample", "lots"], ["none"], ["none/peer", "--repair"]]
)
def test_bad_words(here: Pair, words: list[str]):
    """One clear line, exit code 2."""
    a, b = here
    put(a / "x", b"x")
    sync(a, b)
    if words[0] == "none":
        outcome = run("verify", a / "none", check=2)
    elif words[0].startswith("none"):
        outcome = run("verify", a, a / "none", check=2)
    else:
        outcome = run("verify", a, *words, check=2)
    assert outcome.stderr.count("\n") == 1


def test_why(pair: Pair):
    """The last decision, the side, the rule, and what still waits."""
    a, b = pair
    put(a / "x", b"one", t=NOON)
    put(a / "busy", b"one")
    sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    edit(b / "x", b"of beta", t=NOON + 20)
    edit(a / "busy", b"two")
    with (b / "busy").open("r+b"):
        sync(a, b, check=24)
    (row,) = run("why", "--json", a / "x").objects
    assert (
        "newest" in row["decisions"][0]["reason"]
        or "edited on both" in row["decisions"][0]["reason"]
    )
    assert row["state"].startswith("agreed on: file, content ")
    assert len(row["conflicts"]) == 1
    (row,) = run("why", "--json", b / "busy").objects
    assert row["waits"]
    assert "waits: " in run("why", b / "busy").stdout
    assert "not agreed on" in run("why", a / "never").stdout


def _presumed(pair: Pair, more: int = 0) -> None:
    """Two trees that look alike meet; one file does not only look alike."""
    a, b = pair
    for root in pair:
        for name in ("same", *map(str, range(more))):
            put(root / name, b"same", t=NOON)
    put(a / "other", b"here", t=NOON)
    put(b / "other", b"over", t=NOON)
    assert sync(a, b).summary["presumed"] == 2 + more
    assert (look(a)["other"], look(b)["other"]) == (b"here", b"over")


@pytest.mark.parametrize("read", [(0,), (1,), (0, 1)])
def test_what_was_taken_for_equal_is_found_out(pair: Pair, read: tuple[int, ...]):
    """A file that was presumed equal and is not: a conflict of the next run, and both are kept."""
    a, b = pair
    _presumed(pair)
    for side in read:
        assert _verify(pair[side])["unread"] == 2
    done = sync(a, b)
    assert done.summary["conflicts"] == 1
    assert look(a) == look(b)
    assert {look(a)["other"], *(c for _, c in [*kept(a), *kept(b)])} == {b"here", b"over"}
    assert "presumed" not in run("why", a / "same").stdout
    assert sync(a, b).summary["conflicts"] == 0


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize("far", [(), (0,), (0, 1)])
def test_checksum_reads_what_was_taken_for_equal(here: Pair, one_way: bool, far: tuple[int, ...]):
    """In any later run; what was read is agreed on from then on, whatever came of it."""
    a, b = here
    _presumed(here)
    ends = [f"host:{root}" if side in far else root for side, root in enumerate(here)]
    words = (*ends, *AGENT, "--checksum", *["--one-way"] * one_way)
    planned = run("plan", "--json", *words, check=(0, 10))
    assert "other" in planned.stdout
    assert "same" not in planned.stdout
    assert run("sync", "--json", *words).summary["conflicts"] == (0 if one_way else 1)
    assert look(a) == look(b)
    if one_way:
        assert (look(b)["other"], [c for _, c in kept(b)]) == (b"here", [b"over"])
    else:
        assert {look(a)["other"], *(c for _, c in [*kept(a), *kept(b)])} == {b"here", b"over"}
    assert "presumed" not in run("why", a / "same").stdout
    again = run("sync", "--json", *words).summary
    assert (again["conflicts"], again["kept"]) == (0, 0)


def test_taken_for_equal_where_one_side_was_read(here: Pair):
    """Another pair of that root had read it: that says nothing of what the other side has."""
    a, b = here
    c = a.parent / "C"
    c.mkdir()
    put(a / "f", b"aaaa", t=NOON)
    sync(a, b)
    put(c / "f", b"cccc", t=NOON)
    assert sync(a, c).summary["presumed"] == 1
    assert "presumed" in run("why", c / "f").stdout
    assert sync(a, c, "--checksum").summary["conflicts"] == 1
    assert look(a) == look(c)
    assert {look(a)["f"], *(x for _, x in [*kept(a), *kept(c)])} == {b"aaaa", b"cccc"}
    assert sync(a, c, "--checksum").summary["conflicts"] == 0


@pytest.mark.parametrize("far", [False, True])
def test_a_session_reads_what_was_taken_for_equal(here: Pair, far: bool):
    """In its spare time, all of it: what only looked alike is a conflict, and both are kept."""
    a, b = here
    _presumed(here, more=80)
    with watching(a, f"host:{b}" if far else b, *AGENT) as it:
        ready(it)
        found = it.shows(lambda status: status["totals"]["conflicts"])
        assert found["totals"]["conflicts"] == 1, found
        it.shows(lambda _: "presumed" not in "".join(_states(a)))
        assert it.stop() == 0
    assert "presumed" not in "".join(_states(a))
    assert look(a) == look(b)
    assert {look(a)["other"], *(c for _, c in [*kept(a), *kept(b)])} == {b"here", b"over"}


def _states(root: Path) -> list[str]:
    return [run("why", root / name).stdout for name in ("0", "79", "same", "other")]


def test_what_was_taken_for_equal_and_edited(pair: Pair):
    """An edit wins over what it was never compared with; that is kept."""
    a, b = pair
    _presumed(pair)
    edit(a / "other", b"edited at a")
    _verify(b)
    sync(a, b)
    assert look(a) == look(b)
    assert look(b)["other"] == b"edited at a"
    assert b"over" in {c for _, c in kept(b)}
