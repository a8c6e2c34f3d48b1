"""One-way replication: beta becomes what alpha is, and what beta's users did is not lost."""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.system.live import AGENT, ready, watching
from tests.trees import assert_equal, kept, look, put, run, snapshot, sync

Pair = tuple[Path, Path]


def _fill(a: Path) -> None:
    put(a / "d/f", b"1")
    put(a / "d/sub/g", b"2")
    put(a / "h", b"3")


def _play(b: Path) -> None:
    """What users do on the replica."""
    put(b / "d/f", b"edited")
    (b / "h").rename(b / "renamed")
    (b / "d/sub/g").unlink()
    put(b / "new/deep/x", b"made")
    (b / "new/link").symlink_to("deep/x")
    (b / "d").chmod(0o700)


def test_edits_on_beta_are_undone(pair: Pair):
    """All of it, in one run; alpha is not touched, and what beta had is in its store."""
    a, b = pair
    _fill(a)
    sync(a, b, "--one-way")
    _play(b)
    before = snapshot(a)
    done = sync(a, b, "--one-way")
    assert snapshot(a) == before
    assert_equal(a, b)
    assert done.summary["conflicts"] == 0
    assert {b"edited", b"made"} <= {content for _, content in kept(b)}
    assert not kept(a)
    quiet = sync(a, b, "--one-way").summary
    assert not any(quiet[name] for name in ("created", "updated", "deleted", "moves"))


def test_both_sides_changed(here: Pair):
    """Alpha's version counts, and its deletions, whatever was edited on beta."""
    a, b = here
    _fill(a)
    sync(a, b, "--one-way")
    _play(b)
    put(a / "d/f", b"alpha's")
    (a / "h").unlink()
    put(a / "new", b"a file here, a folder there")
    before = snapshot(a)
    sync(a, b, "--one-way")
    assert snapshot(a) == before
    assert_equal(a, b)
    assert {b"edited", b"3", b"made"} <= {content for _, content in kept(b)}


def test_edits_that_stay(here: Pair):
    """They are told, as problems, until somebody undoes them; everything else goes on."""
    a, b = here
    _fill(a)
    sync(a, b, "--one-way")
    put(b / "d/f", b"edited")
    put(b / "new/x", b"made")
    put(a / "h", b"changed")
    words = ("--one-way", "--leave-edits")
    for _ in range(2):
        done = sync(a, b, *words, check=23)
        assert "edited on beta; it stays" in done.said
        assert "made on beta; it stays" in done.said
        assert look(b)["d/f"] == b"edited"
        assert look(b)["h"] == b"changed"
        assert look(a) == {"d": None, "d/f": b"1", "d/sub": None, "d/sub/g": b"2", "h": b"changed"}
    put(b / "d/f", b"1")
    (b / "new/x").unlink()
    (b / "new").rmdir()
    sync(a, b, *words)
    assert_equal(a, b)


def test_first_contact_takes_away_what_only_beta_has(here: Pair):
    """The guard counts it as deletions, and it goes to the store."""
    a, b = here
    _fill(a)
    for number in range(40):
        put(b / f"extra/{number}", b"%d" % number)
    put(b / "h", b"3")
    os.utime(b / "h", ns=(1, 1))
    assert sync(a, b, "--one-way", check=25).summary["withheld"] >= 40
    assert len(look(b)) == 46
    sync(a, b, "--one-way", "--yes")
    assert_equal(a, b)
    assert len(kept(b)) >= 40


@pytest.mark.parametrize("one_way", [True, False])
def test_what_is_said_after_a_lost_state(here: Pair, one_way: bool):
    """Whether something will be removed is not told wrongly."""
    a, b = here
    words = ("--one-way",) * one_way
    _fill(a)
    sync(a, b, *words)
    shutil.rmtree(b / ".bisync")
    put(b / "own", b"of the replica")
    done = sync(a, b, *words, "--yes")
    assert ("nothing is deleted" in done.said) is not one_way
    assert ("goes to its store" in done.said) is one_way
    assert (b / "own").exists() is not one_way
    assert (b"of the replica" in [content for _, content in kept(b)]) is one_way


@pytest.mark.parametrize("far", [0, 1])
def test_over_the_network(here: Pair, far: int):
    """The same with the source, or the replica, on another machine."""
    a, b = here
    _fill(a)
    ends = [a, b]
    ends[far] = Path(f"elsewhere:{ends[far]}")
    sync(*ends, *AGENT, "--one-way")
    _play(b)
    before = snapshot(a)
    sync(*ends, *AGENT, "--one-way")
    assert snapshot(a) == before
    assert_equal(a, b)


@pytest.mark.parametrize("kind", ["inotify", "poll"])
def test_in_real_time(here: Pair, kind: str):
    """An edit of the replica lives a moment only."""
    a, b = here
    _fill(a)
    with watching(a, b, "--one-way", "--watcher", kind, "--poll", "1s") as it:
        ready(it)
        _play(b)
        put(a / "more", b"4")
        it.wait()
        assert_equal(a, b)
        assert b"edited" in {content for _, content in kept(b)}
        assert it.status()["direction"] == "to beta"


def test_a_database_of_the_replica(here: Pair):
    """Its files are undone together."""
    a, b = here
    with closing(sqlite3.connect(a / "x.db")) as db, db:
        db.execute("CREATE TABLE t(n)")
    sync(a, b, "--one-way")
    with closing(sqlite3.connect(b / "x.db", isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("INSERT INTO t VALUES(1)")
        copy = b / "x.db-wal"
        saved = copy.read_bytes()
    copy.write_bytes(saved)
    sync(a, b, "--one-way")
    assert_equal(a, b)
    with closing(sqlite3.connect(b / "x.db")) as db:
        assert db.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_words_that_make_no_sense(here: Pair):
    """Nothing is taken and then ignored."""
    a, b = here
    assert "ALPHA counts" in sync(a, b, "--one-way", "--conflict", "newest", check=2).said
    assert "--one-way" in sync(a, b, "--leave-edits", check=2).said


def test_what_else_must_not_surprise(here: Pair):
    """A file made on both sides, a choice that would change alpha, what a filter hid."""
    a, b = here
    put(a / "f", b"1", t=1_700_000_000)
    sync(a, b)
    put(a / "f", b"of alpha", t=1_700_000_010)
    put(b / "f", b"of beta!!", t=1_700_000_020)
    sync(a, b)
    run("conflicts", "resolve", "f", "--take", "kept", "--root", b)
    put(a / "n", b"alpha's")
    put(b / "n", b"beta's, longer")
    before = snapshot(a)
    sync(a, b, "--one-way", "--leave-edits", check=23)
    assert snapshot(a) == before
    assert look(b)["n"] == b"beta's, longer"
    sync(a, b, "--one-way")
    assert snapshot(a) == before
    assert_equal(a, b)
    sync(a, b, "--one-way", "--exclude", "n")
    (a / "n").unlink()
    assert "nobody can say" in sync(a, b, "--one-way", check=23).said
    (b / "n").unlink()
    sync(a, b, "--one-way")
    assert_equal(a, b)
