"""Real time where watchers are told nothing, and while a machine is short of something."""

import mmap
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.system.live import AGENT, ready, watching
from tests.trees import assert_equal, look, put

Pair = tuple[Path, Path]
PAUSE_S = 60.0 if os.environ.get("BISYNC_FULL") else 3.0
KINDS = ["fanotify", "inotify"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """What tells of changes."""
    if request.param == "fanotify" and os.geteuid() != 0:
        pytest.skip("a mark on a file system is for root")
    return str(request.param)


# --- What a status remembers ---------------------------------------------------------------------


def test_how_old_the_oldest_change_may_be(here: Pair):
    """Started anew while the other side is away: as old as the last time that all was done."""
    a, b = here
    put(a / "f", b"1")
    there = f"elsewhere:{b}"
    with watching(a, there, *AGENT) as it:
        ready(it)
        it.wait()
        assert it.status()["oldest_age_s"] is None
        complete_ns = it.status()["complete_ns"]
    with watching(a, there, "--rsh", "false") as it:
        found = it.shows(lambda status: status.get("reason"))
        assert abs(found["complete_ns"] - complete_ns) < 1e9
        assert abs(found["oldest_age_s"] * 1e9 - (time.time_ns() - complete_ns)) < 10e9
        assert found["oldest_age_s"] > 0
    with watching(a, there, *AGENT) as it:
        ready(it)
        it.wait()
        assert it.status()["oldest_age_s"] is None


# --- Changes that nobody tells of ----------------------------------------------------------------


def test_written_through_a_mapping(here: Pair, kind: str):
    """A mapped file that is never synced: no event tells of it, a look at everything finds it."""
    a, b = here
    put(a / "db", b"old" + bytes(8189))
    with watching(a, b, "--watcher", kind, "--hot", "db") as it:
        ready(it)
        with (a / "db").open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
            file.close()
            pages[:3] = b"new"
            it.ask("flush", "--timeout", "60", check=(0, 24))
        it.ask("flush", "--timeout", "60")
        assert (b / "db").read_bytes()[:3] == b"new"


def test_written_through_a_name_outside(here: Pair, kind: str):
    """A hard link elsewhere leads to a file of the root: inotify is not told, a look at all is."""
    a, b = here
    put(a / "f", b"one")
    outside = a.parent / "outside"
    os.link(a / "f", outside)
    with watching(a, b, "--watcher", kind) as it:
        ready(it)
        outside.write_bytes(b"two, longer")
        it.ask("flush", "--timeout", "60")
        assert look(b) == {"f": b"two, longer"}
        outside.unlink()
        it.wait()
        assert look(b) == {"f": b"two, longer"}


# --- How programs save ---------------------------------------------------------------------------


def test_saved_as_an_office_does(here: Pair, kind: str):
    """A lock file, a new version beside it, renamed over the old one, the lock removed."""
    a, b = here
    put(a / "doc.odt", b"0")
    with watching(a, b, "--watcher", kind) as it:
        ready(it)
        for number in range(1, 5):
            put(a / ".~lock.doc.odt#", b",me,here,now;")
            put(a / "lu1234.tmp", b"%d" % number)
            (a / "lu1234.tmp").rename(a / "doc.odt")
            (a / ".~lock.doc.odt#").unlink()
            it.wait()
            assert look(b) == {"doc.odt": b"%d" % number}
        deleted = {e["path"] for e in it.events if e.get("action") == "delete"}
        assert "doc.odt" not in deleted


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
@pytest.mark.parametrize("way", ["--inplace", "--no-inplace"])
def test_rsync_writes_into_it(here: Pair, kind: str, way: str):
    """Its temporary names and its writes in place: the result is there, nothing else."""
    a, b = here
    source = a.parent / "source"
    for number in range(20):
        put(source / f"d{number % 3}/f{number}", b"%d" % number * 40_000)
    with watching(a, b, "--watcher", kind) as it:
        ready(it)
        for change in range(3):
            for number in range(0, 20, 4):
                with (source / f"d{number % 3}/f{number}").open("r+b") as file:
                    file.write(b"change %d" % change)
            subprocess.run(["rsync", "-a", "--delete", way, f"{source}/", f"{a}/"], check=True)
            it.wait()
            assert_equal(a, b)
            assert look(b) == look(source)


def test_tar_unpacks_into_it(here: Pair, kind: str):
    """Directories whose times are set at the end, hard links and symbolic ones."""
    a, b = here
    source = a.parent / "source"
    for number in range(30):
        put(source / f"t/d{number % 4}/f{number}", b"%d" % number * 500)
    os.link(source / "t/d0/f0", source / "t/d1/hard")
    os.symlink("f1", source / "t/d1/soft")
    for folder in source.rglob("d*"):
        os.utime(folder, (1e9, 1e9))
    with tarfile.open(a.parent / "t.tar", "w") as tar:
        tar.add(source / "t", "t")
    with watching(a, b, "--watcher", kind) as it:
        ready(it)
        subprocess.run(["tar", "-xpf", a.parent / "t.tar"], cwd=a, check=True)
        it.wait()
        assert_equal(a, b)
        assert (b / "t/d1/hard").stat().st_ino == (b / "t/d0/f0").stat().st_ino


# --- A machine that is short of something --------------------------------------------------------


@pytest.mark.parametrize("where", ["near", "far"])
def test_stopped_for_a_while(here: Pair, kind: str, where: str):
    """SIGSTOP, as when a machine sleeps: what happened meanwhile is carried when it goes on."""
    a, b = here
    put(a / "f", b"1")
    there = b if where == "near" else f"elsewhere:{b}"
    with watching(a, there, "--watcher", kind, *AGENT) as it:
        ready(it)
        it.process.send_signal(signal.SIGSTOP)
        try:
            put(a / "g", b"2")
            put(b / "h", b"3")
            (b / "f").unlink()
            time.sleep(PAUSE_S)  # nothing else makes it miss its own beats
        finally:
            it.process.send_signal(signal.SIGCONT)
        it.wait()
        assert look(a) == look(b) == {"g": b"2", "h": b"3"}


@pytest.mark.parametrize("limit", [0, 1])
def test_too_few_watches(here: Pair, limit: int):
    """With no watch at all, or one for the root only, the rest is polled, and that is said."""
    a, b = here
    put(a / "d/f", b"1")
    inside = f'echo {limit} > /proc/sys/user/max_inotify_watches && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "sh", "-c", inside, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace of users here")
    with watching(a, b, "--poll", "0.5s", prefix=prefix) as it:
        ready(it)
        put(a / "d/f", b"two")
        put(b / "e/g", b"3")
        assert it.until(lambda e: e.get("path") == "e/g"), it.status()
        it.wait()
        assert look(a) == look(b) == {"d": None, "d/f": b"two", "e": None, "e/g": b"3"}
        shown = it.status()["watchers"]
        assert any("watch" in note for each in shown for note in each["notes"]), shown
        assert all(each["kind"] == "poll" or each["polled"] for each in shown), shown
    if limit == 0:
        with watching(a, b, "--watcher", "inotify", prefix=prefix) as it:
            assert it.process.wait(60) == 2
            it.until(lambda _e: False, 0.1)
        assert "watch limit" in "".join(it.said)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts are for root")
def test_a_full_file_system(here: Pair, kind: str):
    """No space on the other side: said, not torn, tried again, and done when there is room."""
    a, b = here
    line = ["mount", "-t", "tmpfs", "-o", "size=16m", "small", b]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("no mounts here")
    try:
        with watching(a, b, "--watcher", kind) as it:
            ready(it)
            put(a / "small", b"1")
            it.wait()
            put(a / "large", os.urandom(20 << 20))
            assert it.wait(check=23).rc == 23
            assert look(b) == {"small": b"1"}
            assert any("large" in str(each) for each in it.status()["problems"]), it.status()
            put(a / "next", b"2")
            it.wait(check=23)
            assert look(b)["next"] == b"2"
            put(a / "large", b"short now")
            it.wait()
            assert look(b) == {"small": b"1", "next": b"2", "large": b"short now"}
    finally:
        subprocess.run(["umount", b], check=True)


# --- A storm --------------------------------------------------------------------------------------

# Says how many events it made: two for a name that comes and goes, else one a call.
STORM = """
import os, sys, time
os.chdir(sys.argv[1])
end, seed, done = time.monotonic() + float(sys.argv[2]), sys.argv[3], 0
files = [os.open(f"{seed}-{n}", os.O_WRONLY | os.O_CREAT) for n in range(64)]
while time.monotonic() < end:
    for turn in range(50):
        for fd in files:  # in turn, or the kernel makes one event of several
            os.pwrite(fd, b"%08d" % done, 0)
            done += 1
    os.rename(f"{seed}-0", f"{seed}-x")
    os.rename(f"{seed}-x", f"{seed}-0")
    for n in range(20):
        os.close(os.open(f"{seed}-new{n}", os.O_WRONLY | os.O_CREAT))
        os.unlink(f"{seed}-new{n}")
    done += 64
open(f"{seed}-last", "w").write("%d" % done)
print(done)
"""


def test_a_storm_of_events(here: Pair, kind: str):
    """As many as two programs can make: memory is bounded, nothing is lost, then there is rest."""
    a, b = here
    seconds = 30.0 if os.environ.get("BISYNC_FULL") else 4.0
    (a / "d").mkdir()
    with watching(a, b, "--watcher", kind) as it:
        ready(it)
        it.wait()
        before = _memory_mb(it.process.pid)
        began = time.monotonic()
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", STORM, a / "d", str(seconds), str(number)],
                stdout=subprocess.PIPE, text=True,
            )
            for number in range(2)
        ]  # fmt: skip
        events = sum(int(writer.communicate(timeout=seconds + 60)[0]) for writer in writers)
        rate = events / (time.monotonic() - began)
        it.wait()
        assert_equal(a, b)
        assert len(look(b)) == 131
        grown = _memory_mb(it.process.pid, "VmHWM:") - before
        it.shows(lambda s: s["oldest_age_s"] is None)
        runs = it.status()["totals"]["runs"]
        it.wait()  # one more run; none of its own
        assert it.status()["totals"]["runs"] <= runs + 2
    print(f"{kind}: {rate:.0f} events a second, {grown:.0f} MB more")
    assert grown < 64


def _memory_mb(pid: int, what: str = "VmRSS:") -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split(what)[1].split()[0]) / 1000
