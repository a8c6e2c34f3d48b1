"""What the store lets go of by itself: what is old, and versions of the engine's own."""

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import bisync
from bisync.core.retention import Passing
from bisync.fs import retention
from tests.trees import edit, put, run

Pair = tuple[Path, Path]
PERIOD = bisync.Retention(every_s=10**9, recent=1)  # all of a test is in one period
ALL = bisync.Retention(every_s=None)


@pytest.fixture(name="roots")
def _roots(tmp_path: Path) -> Pair:
    pair = tmp_path / "a", tmp_path / "b"
    for root in pair:
        root.mkdir()
    return pair


def _sync(pair: Pair, rules: bisync.Retention, **more: object) -> bisync.Report:
    report = bisync.sync(*pair, bisync.Config(retention=rules, **more))  # type: ignore[arg-type]
    assert report.exit_code == 0, report
    return report


def _kept(root: Path) -> list[bytes]:
    """The contents of all kept files of a store."""
    store = root / "rsync-rollback"
    days = [day for day in store.iterdir() if not day.name.startswith(".")]
    paths = [path for day in days for path in day.rglob("*") if path.is_file()]
    return sorted(path.read_bytes() for path in paths)


def test_one_version_in_a_period(roots: Pair):
    """Of what came from the peer and gave way to its next version, the last one is kept."""
    a, b = roots
    put(a / "busy", b"0")
    _sync(roots, PERIOD)
    for number in range(1, 5):
        edit(a / "busy", b"%d" % number)
        _sync(roots, PERIOD)
    assert _kept(b) == [b"3"]


def test_what_is_recent_stays_a_while(roots: Pair):
    """By default the newest versions of a file are all there, if they are not big."""
    a, b = roots
    for number in range(19):
        put(a / "busy", b"%02d" % number, t=10**9 + number)
        put(a / "big", bytes([number]) * (9 << 20), t=10**9 + number)
        _sync(roots, bisync.Retention(every_s=10**9))
    small = [content for content in _kept(b) if len(content) == 2]
    assert small == [b"%02d" % number for number in range(2, 18)]
    assert [content[0] for content in _kept(b) if len(content) > 2] == list(range(11, 18))


def test_what_was_recent_goes_when_its_time_is_over(roots: Pair, monkeypatch: pytest.MonkeyPatch):
    """The last version of each hour stays; the others go one hour after theirs is over."""
    a, b = roots
    hour = 3600 * 10**9
    start = time.time_ns() // hour * hour
    for number, minutes in enumerate([1, 2, 58, 61, 70, 119, 121, 181]):
        put(a / "busy", b"%d" % number, t=10**9 + number)
        monkeypatch.setattr(time, "time_ns", lambda m=minutes: start + m * hour // 60)
        _sync(roots, bisync.Retention())
        if minutes == 119:
            assert _kept(b) == [b"0", b"1", b"2", b"3", b"4"]
        if minutes == 121:
            assert _kept(b) == [b"1", b"2", b"3", b"4", b"5"]
    assert _kept(b) == [b"1", b"4", b"5", b"6"]


def test_all_versions_where_asked_for(roots: Pair):
    a, b = roots
    put(a / "busy", b"0")
    _sync(roots, ALL)
    for number in range(1, 4):
        edit(a / "busy", b"%d" % number)
        _sync(roots, ALL)
    assert _kept(b) == [b"0", b"1", b"2"]


def test_a_local_edit_is_never_thinned(roots: Pair):
    """A version that was made here stays, whatever came before and after it."""
    a, b = roots
    put(a / "f", b"from a")
    _sync(roots, PERIOD)
    edit(b / "f", b"made at b")
    _sync(roots, PERIOD)
    for number in range(3):
        edit(a / "f", b"a again %d" % number)
        _sync(roots, PERIOD)
    assert _kept(b) == [b"a again 1", b"made at b"]


def test_a_conflict_loser_and_a_deletion_are_never_thinned(roots: Pair):
    a, b = roots
    put(a / "f", b"0")
    _sync(roots, PERIOD)
    edit(a / "f", b"winner")
    edit(b / "f", b"loser")
    os.utime(b / "f", (10**9, 10**9))
    _sync(roots, PERIOD)
    edit(a / "f", b"one more")
    _sync(roots, PERIOD)
    (a / "f").unlink()
    _sync(roots, PERIOD, yes=True)
    assert _kept(b) == [b"loser", b"one more", b"winner"]


def test_what_was_there_before_is_never_thinned(roots: Pair):
    """Files that two trees had when they met are nobody's installed version."""
    a, b = roots
    for root in roots:
        put(root / "f", b"same", t=10**9)
    _sync(roots, PERIOD)
    for number in range(3):
        edit(a / "f", b"edit %d" % number)
        _sync(roots, PERIOD)
    assert _kept(b) == [b"edit 1", b"same"]


def test_a_name_in_the_store_may_be_used_again(roots: Pair):
    """The next version may get the name of one that a person moved away; it stays."""
    a, b = roots
    put(a / "f", b"0")
    _sync(roots, PERIOD)
    edit(a / "f", b"1")
    _sync(roots, PERIOD)
    (day,) = [p for p in (b / "rsync-rollback").iterdir() if not p.name.startswith(".")]
    day.rename(b / "rsync-rollback" / "2020-01-01")
    edit(a / "f", b"2")
    _sync(roots, PERIOD)
    assert _kept(b) == [b"0", b"1"]


def test_a_name_used_again_is_as_old_as_its_last_version():
    """What was let go of an hour ago says nothing about what took its name since."""

    class Records:
        @staticmethod
        def records() -> list[dict[str, object]]:
            lines = [("d/x", 10), ("d/y", 20), ("d/x", 100), ("d/z", "no number")]
            return [{"kept": kept, "time_ns": time_ns} for kept, time_ns in lines]

    now = Passing(1000)
    assert list(retention._older(Records(), 950, now)) == [b"d/y"]  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() != 0, reason="inode flags need root")
def test_a_locked_version_is_not_thinned(roots: Pair):
    a, b = roots
    put(a / "f", b"0")
    _sync(roots, PERIOD)
    edit(a / "f", b"1")
    _sync(roots, PERIOD)
    run("rollback", "lock", "--root", b)
    edit(a / "f", b"2")
    _sync(roots, PERIOD)
    run("rollback", "unlock", "--root", b)
    assert _kept(b) == [b"0", b"1"]


def test_little_space(tmp_path: Path, mount: Callable[..., None]):
    """Below the reserve one version per day is left, and a file with more names stays as it is."""
    a, b = tmp_path / "a", tmp_path / "b"
    mount(b, "-t", "tmpfs", "-o", "size=64m", "none")
    put(a / "busy", b"0")
    put(a / "one", b"1" * 10_000)
    _sync((a, b), ALL)
    for number in range(1, 4):
        edit(a / "busy", b"%d" % number)
        _sync((a, b), ALL)
    os.link(b / "one", b / ".bisync" / "two")  # a name that is not the tree's: it keeps its inode
    free = os.statvfs(b)
    with open(b / ".bisync" / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - (2 << 20))
    edit(a / "busy", b"4")
    edit(a / "one", b"2" * 10_000)
    report = bisync.sync(a, b, bisync.Config(retention=bisync.Retention()))
    assert (report.exit_code, (b / "busy").read_bytes()) == (23, b"4")
    assert (b / "one").read_bytes() == b"1" * 10_000
    assert _kept(b) == [b"3"]
    (b / ".bisync" / "ballast").unlink()
    _sync((a, b), bisync.Retention())
    assert (b / "one").read_bytes() == b"2" * 10_000


def test_mirror_thins_what_it_had_made_itself(roots: Pair):
    """By default one per file and hour; with ``--keep-every all``, or as a backup, all of them."""
    a, b = roots
    much = 33 << 20  # two of them are more than what is kept for a while
    put(a / "f", b"0" * much)
    put(b / "f", b"of b")
    source, target = f"{a}/", f"{b}/"
    for number in range(1, 4):
        run("mirror", "-a", "--keep-every", "99999d", source, target)
        edit(a / "f", b"%d" % number * much)
    assert [content[:4] for content in _kept(b)] == [b"1111", b"of b"]
    run("mirror", "-a", "--keep-every", "all", source, target)
    edit(a / "f", b"4")
    run("mirror", "-ab", "--backup-dir=rsync-rollback/2020-02-02", source, target)
    assert [content[:4] for content in _kept(b)] == [b"1111", b"2222", b"3333", b"of b"]


@pytest.mark.parametrize("text", ["", "h", "0h", "1x", "-1h", "1.5h"])
def test_times_that_make_no_sense(roots: Pair, text: str):
    assert "--keep-every" in run("sync", *roots, "--keep-every", text, check=2).stderr


def test_an_older_state_gets_what_it_lacks(roots: Pair):
    """State of format 1 has no table of installed versions; nothing is forgotten over that."""
    a, b = roots
    put(a / "f", b"0")
    put(a / "gone", b"1")
    _sync(roots, ALL)
    for root in roots:
        db = sqlite3.connect(root / ".bisync/state.db")
        for table in ("installed", "thinned", "halfway", "memory", "source", "operation"):
            db.execute(f"DROP TABLE {table}")
        db.execute("PRAGMA user_version=1")
        db.close()
    (a / "gone").unlink()
    _sync(roots, ALL, yes=True)
    assert sorted(p.name for p in b.iterdir() if p.name[0] != ".") == ["f", "rsync-rollback"]


def test_history_is_forgotten_without_a_store(roots: Pair, monkeypatch: pytest.MonkeyPatch):
    """What happened longer ago than ``--keep`` goes, also where nothing was ever kept."""
    a, b = roots
    rules = bisync.Retention(days=3)
    true_ns = time.time_ns
    for day in range(8):
        monkeypatch.setattr(time, "time_ns", lambda d=day: true_ns() + d * 86_400 * 10**9)
        put(a / f"new{day}", b"%d" % day)
        _sync(roots, rules)
    assert not (b / "rsync-rollback").exists()
    db = sqlite3.connect(b / ".bisync/state.db")
    times = [time_ns for (time_ns,) in db.execute("SELECT time_ns FROM operation")]
    db.close()
    assert len(times) >= 3
    assert min(times) > true_ns() + 3 * 86_400 * 10**9
