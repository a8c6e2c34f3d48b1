"""Real time: what happens on one side is soon on the other, whoever tells of it."""

import contextlib
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bisync
from bisync import Config, Fsync, Session
from bisync.watch.interface import AT_ONCE, Pace, Spot
from tests.system.live import AGENT, Watching, ready, watching
from tests.trees import (
    assert_equal,
    contents,
    environment,
    exchange,
    kept,
    look,
    put,
    snapshot,
    sync,
)

Pair = tuple[Path, Path]
Start = Callable[..., Watching]
KINDS = ["fanotify", "inotify", "poll"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """How changes are noticed."""
    if request.param == "fanotify" and os.geteuid() != 0:
        pytest.skip("a mark on a file system is for root")
    return str(request.param)


FULL = bool(os.environ.get("BISYNC_FULL"))


@pytest.fixture(params=["near", "far"])
def live(
    request: pytest.FixtureRequest, kind: str, here: Pair
) -> Iterator[tuple[Path, Path, Watching]]:
    """Two roots that are kept equal, the second one here or elsewhere."""
    a, b = here
    if (request.param, kind) == ("far", "poll") and not FULL:
        pytest.skip("a far poll is played in full runs")
    put(a / "d/f", b"1")
    there = b if request.param == "near" else f"elsewhere:{b}"
    with watching(a, there, "--watcher", kind, "--poll", "1s", *AGENT) as it:
        yield a, b, ready(it)


def test_both_ways(live: tuple[Path, Path, Watching]):
    """New, edited, moved and removed, on either side."""
    a, b, it = live
    put(b / "d/g", b"2")
    (a / "d/f").write_bytes(b"edited")
    it.wait()
    assert look(a) == {"d": None, "d/f": b"edited", "d/g": b"2"}
    inode = (a / "d/f").stat().st_ino
    (b / "d").rename(b / "e")
    (b / "e/g").unlink()
    put(a / "new/deep/er/x", b"x")
    it.wait()
    assert look(b) == {
        "e": None, "e/f": b"edited", "new": None, "new/deep": None, "new/deep/er": None,
        "new/deep/er/x": b"x",
    }  # fmt: skip
    assert (a / "e/f").stat().st_ino == inode
    assert_equal(a, b)
    assert it.stop() == 0
    assert it.summary["moves"] == 1 and it.summary["deleted"] == 1


@pytest.mark.parametrize("count", [1, 150], ids=["few", "many"])
def test_the_time_of_a_directory(live: tuple[Path, Path, Watching], count: int):
    """It says when something was done in it: to its user's side as it was, and to the other."""
    a, b, it = live
    (a / "d/below").mkdir()
    it.wait()
    for one, other in ((a, b), (b, a)):
        for act in (
            lambda at: [put(at / f"n{n}", b"1") for n in range(count)],
            lambda at: [(at / f"n{n}").rename(at / f"m{n}") for n in range(count)],
            lambda at: [(at / f"m{n}").unlink() for n in range(min(count, 20))],
        ):
            act(one / "d/below")
            then = (one / "d/below").stat().st_mtime_ns
            it.wait()
            assert (one / "d/below").stat().st_mtime_ns == then
            assert (other / "d/below").stat().st_mtime_ns == then
    assert_equal(a, b)


def test_without_being_asked(here: Pair, kind: str):
    """Nobody has to wait for it: the change comes by itself."""
    a, b = here
    with watching(a, b, "--watcher", kind, "--poll", "0.2s") as it:
        ready(it)
        put(a / "f", b"1")
        assert it.until(lambda e: e.get("action") == "create" and e["path"] == "f")
        put(b / "g", b"1")
        assert it.until(lambda e: e.get("action") == "create" and e["path"] == "g")
        (a / "f").rename(a / "h")
        assert it.until(lambda e: e.get("action") == "move" and e["path"] == "h")
        (b / "g").unlink()
        assert it.until(lambda e: e.get("action") == "delete" and e["path"] == "g")
    assert_equal(a, b)


STORM = """
import os, random, sys
root, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(seed)
os.chdir(root)
def some(kind):
    found = []
    for folder, folders, files in os.walk('.'):
        if '.bisync' in folders: folders.remove('.bisync')
        if 'rsync-rollback' in folders: folders.remove('rsync-rollback')
        found += [os.path.join(folder, n) for n in (folders if kind == 'd' else files)]
    return found
for step in range(steps):
    try:
        folders, files = ['.', *some('d')], some('f')
        here = chance.choice(folders)
        name = os.path.join(here, f'{seed}-{step}')
        match chance.randrange(9):
            case 0 | 1: open(name, 'w').write(name)
            case 2: os.makedirs(name + '/a/b'); open(name + '/a/b/f', 'w').write(name)
            case 3 if files: open(chance.choice(files), 'a').write(name)
            case 4 if files: os.rename(chance.choice(files), name)
            case 5 if len(folders) > 1: os.rename(chance.choice(folders[1:]), name)
            case 6 if files: os.unlink(chance.choice(files))
            case 7 if files:
                old = chance.choice(files)
                open(old + '.tmp', 'w').write(name); os.rename(old + '.tmp', old)
            case 8 if files: os.chmod(chance.choice(files), chance.choice((0o600, 0o644)))
    except OSError:
        pass
"""


@pytest.mark.parametrize("seed", range(20 if FULL else 2))
def test_storms_on_both_sides(live: tuple[Path, Path, Watching], seed: int):
    """When it is quiet again both sides are equal, and the marks alone led there."""
    a, b, it = live
    writers = [
        subprocess.Popen([sys.executable, "-c", STORM, str(root), str(2 * seed + n), "250"])
        for n, root in enumerate((a, b))
    ]
    for writer in writers:
        assert writer.wait() == 0
    for _ in range(5):
        # What one side's user did to what the other's run was about is decided in the next one.
        if it.wait(check=(0, 23, 24)).rc == 0:
            break
    assert_equal(a, b)
    assert it.stop() == 0
    again = sync(a, b)
    assert again.counts("created", "updated", "deleted", "moves") == {
        "created": 0, "updated": 0, "deleted": 0, "moves": 0,
    }  # fmt: skip


def test_without_flushes(here: Pair):
    """What the engine wrote it does not hold open: it would be busy for ever."""
    a, b = here
    put(a / "d/f", b"0")
    with Session(a, b, Config(fsync=Fsync.NEVER)) as session:
        session.run()
        for number in range(3):
            (a / "d/f").write_bytes(b"again %d" % number)
            assert session.run(only=(["d"], [])).exit_code == 0
            assert (b / "d/f").read_bytes() == b"again %d" % number


def test_while_a_file_is_written(live: tuple[Path, Path, Watching]):
    """A new file is carried when its writer closes it; others do not wait for it."""
    a, b, it = live
    with (a / "slow").open("wb", buffering=0) as file:
        file.write(b"half")
        put(a / "quick", b"1")
        assert it.wait(check=24).rc == 24
        assert look(b).get("quick") == b"1"
        assert "slow" not in look(b)
        assert any("slow" in path for path in it.status()["busy"])
        file.write(b" and half")
    it.wait()
    assert look(b)["slow"] == b"half and half"


def test_saved_as_vim_does(here: Pair, kind: str):
    """Renamed away, written anew, the old one removed: one edit, never a removal."""
    a, b = here
    put(a / "text", b"0")
    with watching(a, b, "--watcher", kind, "--poll", "0.5s") as it:
        ready(it)
        for number in range(1, 6):
            (a / "text").rename(a / "text~")
            (a / "text").write_bytes(b"%d" % number)
            (a / "text~").unlink()
            it.wait()
            assert look(b) == {"text": b"%d" % number}
        assert not [e for e in it.events if e.get("action") == "delete"]


def test_git(here: Pair):
    """A repository that is worked in on one side is sound on the other when it is quiet."""
    a, b = here

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e@x", *words],
            cwd=a, check=True, capture_output=True,
        )  # fmt: skip

    if shutil.which("git") is None:
        pytest.skip("no git here")
    with watching(a, b) as it:
        ready(it)
        git("init", "-q")
        for number in range(10):
            put(a / f"src/{number}.txt", b"%d\n" % number * 50)
            git("add", "-A")
            git("commit", "-qm", f"{number}")
        git("checkout", "-q", "-b", "other", "HEAD~5")
        git("gc", "-q")
        it.wait()
    assert_equal(a, b)
    subprocess.run(["git", "fsck", "--strict"], cwd=b, check=True, capture_output=True)


def test_a_database_that_is_written(here: Pair):
    """Each version of a database that can be seen on the other side is one that was."""
    a, b = here
    with sqlite3.connect(a / "db", isolation_level=None) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE t(n INTEGER)")
    with watching(a, b) as it:
        ready(it)
        for number in range(20):
            with sqlite3.connect(a / "db") as db:
                db.executemany("INSERT INTO t VALUES(?)", [(number,)] * 10)
            db.close()
        it.wait()
    copy = sqlite3.connect(b / "db")
    assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert copy.execute("SELECT count(*) FROM t").fetchone() == (200,)
    copy.close()


def test_figures_for_prometheus(live: tuple[Path, Path, Watching]):
    """Each line as the format has it, with what ``status`` says."""
    a, _, it = live
    put(a / "f", b"1")
    it.wait()
    lines = it.ask("status", "--prometheus").stdout.splitlines()
    form = re.compile(r'bisync_[a-z_]+\{[a-z]+="(?:[^"\\\n]|\\.)*"(?:,[a-z]+="[^"]*")*\} [0-9.]+')
    samples = [line for line in lines if not line.startswith("#")]
    assert all(form.fullmatch(line) for line in samples), samples
    named = {line.split("{")[0] for line in samples}
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE ")}
    assert named == typed
    made = next(line for line in samples if line.startswith("bisync_created_total"))
    assert int(made.split()[-1]) == it.status()["totals"]["created"] >= 1


def test_pause_and_resume(live: tuple[Path, Path, Watching]):
    """While it rests nothing is carried; afterwards everything is."""
    a, b, it = live
    it.ask("pause")
    put(a / "f", b"1")
    assert it.status()["phase"] == "paused"
    it.ask("wait", "--timeout", "2", check=(0, 30))
    it.ask("resume")
    it.wait()
    assert_equal(a, b)


def test_a_mass_deletion_waits_for_a_person(here: Pair, kind: str):
    """Withheld, shown, and approved: then it is done."""
    a, b = here
    for number in range(60):
        put(a / f"f{number}", b"%d" % number)
    with watching(a, b, "--watcher", kind, "--poll", "1s") as it:
        ready(it)
        for number in range(50):
            (a / f"f{number}").unlink()
        put(a / "other", b"1")
        assert it.wait(check=25).rc == 25
        assert len(look(b)) == 61
        assert it.status()["withheld"] == 50
        (a / "f50").unlink()  # for a moment all removals wait for new owners
        put(a / "more", b"2")
        assert it.shows(lambda status: status["totals"]["created"] == 62)["withheld"] >= 50
        it.ask("resume", "--yes")
        it.wait()
        assert len(look(b)) == 11
        assert_equal(a, b)
        assert len(kept(b)) == 51


def test_the_root_itself(live: tuple[Path, Path, Watching]):
    """Its own attributes are carried as anybody's."""
    a, b, it = live
    it.wait()
    for mode in (0o751, 0o710):
        a.chmod(mode)
        it.wait()
        assert stat.S_IMODE(b.stat().st_mode) == mode
    os.setxattr(b, "user.x", b"1")
    it.wait()
    assert os.getxattr(a, "user.x") == b"1"


def test_exchanged_directories(live: tuple[Path, Path, Watching]):
    """Two folders take each other's names; what is made in them later is carried at once."""
    a, b, it = live
    for name in ("one", "two"):
        put(a / name / "deep" / name, b"1")
    it.wait()
    exchange(a / "one", a / "two")
    it.wait()
    assert_equal(a, b)
    for root in (a, b):
        for name in ("one", "two"):
            put(root / name / f"new-{root.name}" / "f", b"2")
            it.wait()
            put(root / name / f"new-{root.name}" / "g", b"3")
            it.wait()
            assert_equal(a, b)


@pytest.mark.parametrize("mode", [0, 0o400, 0o100])
def test_a_directory_that_may_be_read_again(here: Pair, mode: int):
    """It is watched from then on, with all that is in it."""
    a, b = here
    put(a / "d/e/1", b"1")
    (a / "d").chmod(mode)
    words = (
        ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    )
    try:
        with watching(a, b, "--watcher", "inotify", prefix=words) as it:
            ready(it)
            (a / "d").chmod(0o755)
            it.wait()
            assert_equal(a, b)
            for number in (2, 3):
                put(a / "d/e" / f"{number}", b"1")
                it.wait()
                assert_equal(a, b)
    finally:
        (a / "d").chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="files of others are for root to make")
def test_a_writer_that_nobody_could_ask_for(here: Pair):
    """Without a lease a replaced file is looked at until it was still for a minute."""
    a, b = here
    put(a / "f", b"old")
    with watching(a, b, prefix=("setpriv", "--bounding-set=-lease")) as it:
        ready(it)
        for root in (a, b):
            os.chown(root / "f", 12345, 12345)
        it.wait()
        with (b / "f").open("ab", buffering=0) as file:
            put(a / "f", b"from alpha")
            it.wait()
            assert (b / "f").read_bytes() == b"from alpha"
            until = time.monotonic() + 4  # the look after a second is over
            while time.monotonic() < until:
                put(a / "other", b"%f" % time.monotonic())
                it.wait()
            assert it.status()["weaker_check"] == 1
            assert "weaker check: 1" in it.ask("status").stdout
            file.write(b" AND LATE")
            assert it.until(lambda e: ".edited-" in e.get("path", ""))
        it.wait()
        assert_equal(a, b)
        assert {b"from alpha", b"old AND LATE"} <= contents(a)
        assert it.shows(lambda s: not s["weaker_check"])["weaker_check"] == 0


def test_what_is_deleted_after_it_was_shown_is_not_approved(here: Pair, kind: str):
    """A person approves what was shown; a tree emptied meanwhile is for another look."""
    a, b = here
    for number in range(60):
        put(a / f"f{number}", b"%d" % number)
    with watching(a, b, "--watcher", kind, "--poll", "1s") as it:
        ready(it)
        for number in range(40):
            (a / f"f{number}").unlink()
        assert it.wait(check=25).rc == 25
        it.ask("pause")
        for number in range(40, 60):
            (a / f"f{number}").unlink()
        it.ask("resume", "--yes")
        assert it.wait(check=25).rc == 25
        assert set(look(b)) == {f"f{number}" for number in range(40, 60)}
        assert it.status()["withheld"] == 20
        it.ask("resume", "--yes")
        it.wait()
        assert look(b) == {}
        assert len(kept(b)) == 60
        put(a / "new", b"1")
        it.wait()
        (a / "new").unlink()
        it.stop()
    assert it.summary["withheld"] == 0


def test_a_root_that_is_accepted_while_it_is_looked_at(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """What a person says during a run counts for the next one."""
    a, b = here
    put(a / "f", b"1")
    bisync.sync(a, b)
    b.rename(b.with_name("away"))
    put(b / "g", b"2")
    session = bisync.Session(a, b)
    live, real, runs = bisync.Live(session), session.run, list[bool]()

    def run(**more: Any) -> Any:
        runs.append(session.config.accept_root)
        if len(runs) == 1:
            live.resume(accept_root=True)
        if runs[-1] or len(runs) == 3:
            live.stop()
        return real(**more)

    monkeypatch.setattr(session, "run", run)
    live.run()
    assert runs == [False, True]
    assert_equal(a, b)
    assert set(look(a)) == {"f", "g"}


def test_complete_is_no_later_than_what_waits(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """A mark that is not due yet is of something that is not done; the roots' facts know."""
    a, b = here
    put(a / "f", b"1")
    session = bisync.Session(a, b)
    live, real, times = bisync.Live(session), session.run, list[int]()

    def run(**more: Any) -> Any:
        report = real(**more)
        if not times:
            live._marks[0].touched(Spot(b"d"), Pace(not_before_s=5.0))
            times.append(time.time_ns())
            live._marks[0].touched(Spot(b""), AT_ONCE)
        else:
            times.append(bisync.facts(a).pairs[0].complete_ns or 0)
            live.stop()
        return report

    monkeypatch.setattr(session, "run", run)
    live.run()
    marked, complete = times
    assert 0 < complete <= marked


def test_a_root_that_goes_and_comes_back(here: Pair, kind: str):
    """A root that was moved away halts; back again, it goes on by itself."""
    a, b = here
    put(a / "d/f", b"1")
    with watching(a, b, "--watcher", kind, "--poll", "1s") as it:
        ready(it)
        before = snapshot(b)
        a.rename(a.with_name("away"))
        assert it.wait(check=25).rc == 25
        assert it.status()["phase"] == "halted"
        put(b / "g", b"2")
        a.with_name("away").rename(a)
        deadline = time.monotonic() + 60
        while not (a / "g").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        it.wait()
        assert_equal(a, b)
        assert set(before) <= set(snapshot(b))


def test_an_agent_that_is_killed(here: Pair):
    """The connection is made again, and what happened meanwhile is found."""
    a, b = here
    put(a / "f", b"1")
    with watching(a, f"elsewhere:{b}", *AGENT) as it:
        ready(it)
        for number in range(3):
            pids = _agents_of(it.process.pid)
            assert pids
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            put(b / f"g{number}", b"x")
            put(a / f"h{number}", b"x")
            it.wait()
            assert_equal(a, b)


def _agents_of(pid: int) -> list[int]:
    """The agents that a process started."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        for child in map(int, children):
            todo.append(child)
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"agent" in words and b"-c" not in words:
                found.append(child)
    return found


def test_a_star(here: Pair):
    """Two sessions in processes of their own share a root: what happens at one end gets through."""
    base = here[0].parent
    a, hub, c = here[0], here[1], base / "C"
    c.mkdir()
    put(a / "d/f", b"1")
    with watching(a, hub, runtime=base / "r1") as one, watching(hub, c, runtime=base / "r2") as two:
        ready(one)
        ready(two)
        chance = random.Random(1)
        for number in range(15):
            put(chance.choice((a, hub, c)) / f"n{number % 4}/{number}", b"%d" % number)
            one.wait()
            two.wait()
            one.wait()
        (c / "d").rename(c / "e")
        two.wait()
        one.wait()
        assert (a / "e/f").exists()
        assert not (a / "d").exists()
        assert_equal(a, hub)
        assert_equal(hub, c)


def test_a_command_beside_it(live: tuple[Path, Path, Watching]):
    """``sync`` of the same roots gets its turn, and the session goes on."""
    a, b, it = live
    put(a / "f", b"1")
    sync(a, b, "--timeout", "30")
    put(b / "g", b"1")
    it.wait()
    assert_equal(a, b)


def test_stopped_while_it_works(here: Pair):
    """It ends soon, with 0, and the next one goes on."""
    a, b = here
    for number in range(3000):
        put(a / f"d{number % 30}/{number}", b"%d" % number)
    with watching(a, b) as it:
        assert it.until(lambda e: e.get("action") == "create")
        assert it.stop(signal.SIGTERM) == 0
    with watching(a, b) as it:
        ready(it)
        it.wait()
    assert_equal(a, b)


def test_nothing_to_do_costs_nothing(here: Pair, kind: str):
    """At rest it neither runs nor reads."""
    a, b = here
    put(a / "d/f", b"1")
    with watching(a, b, "--watcher", kind) as it:
        ready(it)
        it.wait()
        runs, used = it.status()["totals"]["runs"], _cpu_s(it.process.pid)
        time.sleep(3)  # nothing can be waited for: that nothing happens is what is looked at
        assert it.status()["totals"]["runs"] == runs
        assert _cpu_s(it.process.pid) - used < 0.15


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_nobody_to_ask(tmp_path: Path):
    """Without a session the commands say so: 12."""
    for words in (("status",), ("wait",), ("pause",), ("resume",), ("flush",)):
        done = subprocess.run(
            [sys.executable, "-m", "bisync", *words],
            env=environment(BISYNC_RUNTIME_DIR=str(tmp_path / "run")), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 12
        assert "no session runs here" in done.stderr


def test_a_runtime_folder_far_down(here: Pair):
    """However long its path is, those who ask find it."""
    a, b = here
    runtime = a.parent / ("r" * 120)
    with watching(a, b, runtime=runtime) as it:
        ready(it)
        put(a / "f", b"1")
        it.wait()
        assert_equal(a, b)


def test_which_session(here: Pair):
    """A session is called by its name or by a side; a word that means none is refused."""
    a, b = here
    with watching(a, b, "--name", "books") as it:
        ready(it)
        for word in ("books", str(a), str(b)):
            it.ask("wait", "--timeout", "30", word)
        assert "no session" in it.ask("wait", "papers", check=2).said
        assert it.status()["session"] == "books"
    assert contents(a) == contents(b)


def test_a_mark_of_what_the_engine_moves(here: Pair, kind: str):
    """A mark waits while the directory gets another name from the other side: it is not lost."""
    a, b = here
    put(a / "d/sub/f", b"1")
    put(a / "d/sub/g", b"1")
    with watching(a, b, "--watcher", kind, "--poll", "1s") as it:
        ready(it)
        for number in range(3):
            put(a / "d/sub/h", b"%d" % number)
            it.wait()
            (a / "d/sub/h").unlink()
            (a / "d/sub/l").symlink_to(f"{number}")
            (b / "d").rename(b / "e")
            it.wait()
            it.wait()
            assert_equal(a, b)
            assert not (b / "e/sub/h").exists()
            (a / "e").rename(a / "d")
            (a / "d/sub/l").unlink()
            it.wait()


def test_what_happens_elsewhere(here: Pair, kind: str):
    """Directories, the root and what it lies in are away for a moment, and changed meanwhile."""
    base = here[0].parent
    (base / "up").mkdir()
    a, b = base / "up/A", here[1]
    put(a / "d/sub/f", b"1")
    with watching(a, b, "--watcher", kind, "--poll", "1s", runtime=base / "runtime") as it:
        ready(it)
        (a / "d").rename(base / "out")
        (base / "out/sub/f").write_bytes(b"2")
        (base / "out").rename(a / "d")
        it.wait()
        assert look(b)["d/sub/f"] == b"2"
        for move in (base / "up", a):
            it.wait()
            move.rename(base / "away")
            inside = base / "away" / a.relative_to(move)
            (inside / "d/sub/f").write_bytes(move.name.encode())
            (base / "away").rename(move)
            it.wait(check=(0, 25))  # it may have met the root's absence
            deadline = time.monotonic() + 60
            while look(b)["d/sub/f"] != move.name.encode() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert look(b)["d/sub/f"] == move.name.encode()


@pytest.mark.parametrize("name", ["x (deleted)", "y" * 255, " "])
def test_names_that_mislead(here: Pair, kind: str, name: str):
    """Whatever a directory is called, what happens in it is noticed."""
    a, b = here
    put(a / name / "f", b"1")
    with watching(a, b, "--watcher", kind, "--poll", "1s") as it:
        ready(it)
        put(a / name / "g", b"2")
        it.wait()
        assert_equal(a, b)


def test_paths_that_are_too_long_to_ask_for(here: Pair, kind: str):
    """Deeper than a path may be, and still noticed."""
    a, b = here
    fd = os.open(a, os.O_RDONLY)
    for _ in range(45):
        os.mkdir(b"n" * 100, dir_fd=fd)
        below = os.open(b"n" * 100, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    with watching(a, b, "--watcher", kind, "--poll", "1s") as it:
        ready(it)
        file = os.open(b"f", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
        os.write(file, b"1")
        os.close(file)
        it.wait()
        assert it.status()["totals"]["created"] == 46
        put(a / "g", b"1")
        it.wait()
        assert (b / "g").exists()
    os.close(fd)


def test_directories_inside_out(live: tuple[Path, Path, Watching]):
    """What was above is below, again and again: nobody goes round in circles."""
    a, b, it = live
    put(a / "x/y/f", b"1")
    it.wait()
    script = (
        "import os,sys\nos.chdir(sys.argv[1])\n"
        "for i in range(60):\n"
        "    os.rename('x/y', 'y'); os.rename('x', 'y/x'); open('y/f%d' % i, 'w').close()\n"
        "    os.rename('y/x', 'x'); os.rename('y', 'x/y')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(a)], check=True)
    it.wait()
    assert_equal(a, b)
    assert len(look(b)) == 65


def test_stopped_while_the_other_end_is_silent(here: Pair):
    """It ends soon, however long the other end would take."""
    a, b = here
    put(a / "f", b"1")
    with watching(a, f"elsewhere:{b}", *AGENT) as it:
        ready(it)
        pids = _agents_of(it.process.pid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            put(a / "g", b"1")
            time.sleep(0.5)  # so that the run is in hand; it may as well not be
            began = time.monotonic()
            assert it.stop(signal.SIGTERM) == 0
            assert time.monotonic() - began < 20
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


ASKING = """
import time
from bisync import BisyncError
from bisync.session.control import ask
end = time.monotonic() + 4
while time.monotonic() < end:
    try:
        ask({"do": "status"})
    except BisyncError:
        pass
"""


def test_asked_while_it_begins(here: Pair):
    """Whoever asks at any moment does no harm."""
    a, b = here
    runtime = a.parent / "runtime"
    runtime.mkdir(mode=0o700)
    asking = subprocess.Popen(
        [sys.executable, "-c", ASKING], env=environment(BISYNC_RUNTIME_DIR=str(runtime))
    )
    for _ in range(3):
        with watching(a, b) as it:
            ready(it)
            it.wait()
    assert asking.wait() == 0


def test_a_link_in_a_directory_that_moved(here: Pair):
    """Told of one directory only, a run takes no name away that it did not see missing."""
    a, b = here
    put(a / "d1/f", b"1")
    for name in ("d2", "d3"):
        (a / name).mkdir()
    os.link(a / "d1/f", a / "d2/f")
    with Session(a, b) as session:
        session.run()
        (a / "d1/f").unlink()
        (a / "d2").rename(a / "e2")
        os.link(a / "e2/f", a / "d3/f")
        session.run(only=(["d3"], []))
        # It may notice on its way that d2 is elsewhere.
        assert set(look(b)) in ({"d1", x, f"{x}/f", "d3", "d3/f"} for x in ("d2", "e2"))
        session.run(only=(["", "d1"], []))
    assert set(look(b)) == {"d1", "e2", "e2/f", "d3", "d3/f"}
    assert_equal(a, b)


LISTED_ONLY = """
import os, sys
from bisync import Session
a, b = sys.argv[1:]
with Session(a, b) as session:
    session.run()
    os.mkdir(a + "/x")
    open(a + "/x/f", "w").close()
    os.chmod(a + "/x", 0o444)
    assert session.run(only=([""], [])).exit_code == 23
    os.chmod(a + "/x", 0o755)
    assert session.run(only=([""], [])).exit_code == 0
    assert os.path.exists(b + "/x/f")
"""


def test_a_directory_that_may_only_be_listed(here: Pair):
    """A problem of that directory, and nothing else."""
    words = [sys.executable, "-c", LISTED_ONLY, *map(str, here)]
    if os.geteuid() == 0:
        for root in here:
            os.chown(root, 65534, 65534)
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *words]
    put(here[0] / "f", b"1")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
