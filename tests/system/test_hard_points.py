"""Places where a simple engine loses data: what the file system does not let us do, or hides."""

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

import bisync
from bisync.fs import apply, perform
from bisync.linux import rename
from tests.system.vault import Vault
from tests.trees import (
    NOON,
    assert_equal,
    edit,
    everything,
    exchange,
    frozen,
    kept,
    killed,
    look,
    put,
    save,
    sync,
)

Pair = tuple[Path, Path]


# --- A writer caught in the moment of the exchange ---


def test_writer_who_opens_during_the_exchange(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """A writer that opens B's file while it is displaced writes to the live file, not to the store.

    Its ``open`` waits for our lease; we see that after the exchange and take it back.
    """
    a, b = here
    put(a / "x", b"old", t=NOON)
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    real, threads = perform.swap, []

    def write() -> None:
        with (b / "x").open("r+b", buffering=0) as file:
            file.write(b"WRITTEN")

    def swap(a_dir: int, a_name: bytes, b_dir: int, b_name: bytes) -> None:
        if not threads and b_name == b"x":
            threads.append(threading.Thread(target=write))
            threads[0].start()
            assert _somebody_waits(b / "x")
        real(a_dir, a_name, b_dir, b_name)

    monkeypatch.setattr(perform, "swap", swap)
    report = bisync.sync(a, b)
    threads[0].join()
    assert (b / "x").read_bytes() == b"WRITTEN"
    assert report.exit_code in (0, 24)
    monkeypatch.undo()
    bisync.sync(a, b)
    assert_equal(a, b)
    assert {b"WRITTEN", b"from alpha"} <= everything(a, b)


def _somebody_waits(path: Path) -> bool:
    """Wait until somebody who opens a file waits for its lease."""
    number, until = path.stat().st_ino, time.monotonic() + 20
    while time.monotonic() < until:
        for line in Path("/proc/locks").read_text().splitlines():
            if "LEASE" in line and "BREAKING" in line and line.split()[-3].endswith(f":{number}"):
                return True
        time.sleep(0.001)
    return False


@pytest.mark.parametrize("end", ["closes it", "goes on"])
@pytest.mark.parametrize("why", ["somebody waits", "no room"])
def test_writer_who_opens_what_is_taken_back(
    here: Pair, monkeypatch: pytest.MonkeyPatch, why: str, end: str
):
    """What was at the name for a moment only is the file of whoever opened it then."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)
    real, keep, threads, files = perform.swap, perform.Performer._keep, [], list[Any]()

    def write() -> None:
        with (b / "x").open("r+b", buffering=0) as file:
            file.write(b"WRITTEN")

    def use() -> None:
        files.append((b / "x").open("r+b", buffering=0))
        files[0].write(b"SOMETHING ELSE")
        if end == "closes it":
            files[0].close()

    def swap(a_dir: int, a_name: bytes, b_dir: int, b_name: bytes) -> None:
        if files or b_name != b"x" or why != "somebody waits":
            return real(a_dir, a_name, b_dir, b_name)
        threads.append(threading.Thread(target=write))
        threads[0].start()
        assert _somebody_waits(b / "x")
        real(a_dir, a_name, b_dir, b_name)
        return use()

    def kept(self: perform.Performer, *rest: Any) -> Any:
        if files or why != "no room":
            return keep(self, *rest)
        use()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(perform, "swap", swap)
    monkeypatch.setattr(perform.Performer, "_keep", kept)
    bisync.sync(a, b)
    for thread in threads:
        thread.join()
    edited = b"SOMETHING ELSE"
    if end == "goes on":
        files[0].write(b" AND MORE")
        files[0].close()
        edited += b" AND MORE"
    monkeypatch.undo()
    for _ in range(2):
        bisync.sync(a, b)
    assert_equal(a, b)
    assert {edited, b"from alpha"} <= everything(a, b)
    (beside,) = (name for name in look(b) if name.startswith("x.edited-"))
    assert look(b)[beside] == edited


def test_something_made_in_a_directory_that_is_taken_back(
    here: Pair, monkeypatch: pytest.MonkeyPatch
):
    """As of a file: it was somebody's for a moment."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    bisync.sync(a, b)
    (a / "x").unlink()
    (a / "x").mkdir()
    keep, done = perform.Performer._keep, list[Path]()

    def kept(self: perform.Performer, *rest: Any) -> Any:
        if not done:
            done.append(put(b / "x/new", b"made"))
            raise OSError(errno.ENOSPC, "No space left on device")
        return keep(self, *rest)

    monkeypatch.setattr(perform.Performer, "_keep", kept)
    bisync.sync(a, b)
    assert done
    monkeypatch.undo()
    for _ in range(2):
        bisync.sync(a, b)
    assert_equal(a, b)
    assert b"made" in everything(a, b)


@pytest.mark.parametrize("end", ["closes it", "goes on", "makes something in it"])
def test_killed_when_it_took_back_what_somebody_used(
    here: Pair, monkeypatch: pytest.MonkeyPatch, end: str
):
    """As above; but nobody is left to look at it, and the next run finds it in the stage."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    bisync.sync(a, b)
    (a / "x").unlink()
    if end == "makes something in it":
        (a / "x").mkdir()
        script = 'read go; printf EDITED > "$1/new"; echo done'
    else:
        put(a / "x", b"from alpha", t=NOON + 10)
        script = (
            'read go; exec 3<>"$1"; printf EDITED >&3; truncate -s 6 "$1"; echo done; '
            "read go; printf MORE >&3"
        )
    line = ["sh", "-c", script, "sh", b / "x"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as user:

        def use(*_: Any) -> Any:
            user.stdin.write(b"go\n")
            assert user.stdout.readline() == b"done\n"
            if end == "closes it":
                user.stdin.write(b"go\n")
                user.stdout.read()  # until it ended
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(perform.Performer, "_keep", use)
        monkeypatch.setattr(apply.Applier, "_clean_up", lambda *_: os.kill(os.getpid(), SIGKILL))
        killed(lambda: bisync.sync(a, b))
        monkeypatch.undo()
        report = bisync.sync(a, b)
        if end == "goes on":
            user.stdin.write(b"go\n")
        user.stdin.close()
    assert any("x.edited-" in said for said in report.messages), report
    for _ in range(2):
        bisync.sync(a, b)
    assert_equal(a, b)
    edited = b"EDITED" if end == "makes something in it" else b"EDITEDMORE"
    (beside,) = {name.split("/")[0] for name in look(b) if name.startswith("x.edited-")}
    assert edited in everything(a, b)
    assert edited in (look(b).get(beside), look(b).get(f"{beside}/new"))


# --- No rename leads there ---


@pytest.fixture
def project(file_system: Callable[[str], Path], tmp_path: Path) -> Iterator[Pair]:
    """A pair on XFS; B has a directory of another quota project, which no rename can enter."""
    base = file_system("xfs") / tmp_path.name
    a, b = base / "A", base / "B"
    for root in (a, b):
        (root / "quota").mkdir(parents=True)
    line = ["xfs_io", "-r", "-c", "chproj 42", "-c", "chattr +P", b / "quota"]
    done = subprocess.run(line, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no project ids here: {done.stderr.decode().strip()}")
    probe = put(b / "probe", b"")
    with pytest.raises(OSError, match="cross-device"):
        probe.rename(b / "quota/probe")
    probe.unlink()
    yield a, b
    shutil.rmtree(base)


def test_quota_project(project: Pair):
    """Files are made, edited, saved and removed where a rename from the stage is refused."""
    a, b = project
    for name in ("edited", "saved", "deleted", "tree/one", "tree/two", "quiet"):
        put(a / "quota" / name, b"old " + name.encode())
    (a / "quota/link").symlink_to("nowhere")
    sync(a, b)
    assert_equal(a, b)
    edit(a / "quota/edited", b"new edited")
    save(a / "quota/saved", b"new saved")
    (a / "quota/deleted").unlink()
    (a / "quota/link").unlink()
    (a / "quota/link").symlink_to("elsewhere")
    shutil.rmtree(a / "quota/tree")
    sync(a, b)
    assert_equal(a, b)
    names = ("edited", "saved", "deleted", "tree/one", "tree/two")
    wanted = [(f"quota/{n}".encode(), b"old " + n.encode()) for n in sorted(names)]
    assert sorted(kept(b)) == wanted
    before = [frozen(root) for root in project]
    sync(a, b)
    assert [frozen(root) for root in project] == before


def test_quota_project_hard_links(project: Pair):
    """A group inside the directory stays a group when it is edited."""
    a, b = project
    put(a / "quota/one", b"old")
    (a / "quota/two").hardlink_to(a / "quota/one")
    sync(a, b)
    assert_equal(a, b)
    edit(a / "quota/two", b"new")
    sync(a, b)
    assert_equal(a, b)
    assert look(b) == {"quota": None, "quota/one": b"new", "quota/two": b"new"}


def test_quota_project_conflict(project: Pair):
    """The loser of a conflict in such a directory is kept like any other."""
    a, b = project
    put(a / "quota/x", b"old", t=NOON)
    sync(a, b)
    edit(a / "quota/x", b"A", t=NOON + 20)
    edit(b / "quota/x", b"B", t=NOON + 10)
    assert sync(a, b).summary["conflicts"] == 1
    assert_equal(a, b)
    assert (b"quota/x", b"B") in kept(b)


# --- Locked encryption ---


def test_case_121_locked_folder(here: Pair, vault: Vault):
    """A locked folder lists other names and would let us delete them: it is left alone."""
    a, b = here[0], vault.root / "B"
    b.mkdir()
    (b / "secret").mkdir()
    vault.encrypt(b / "secret")
    for number in range(5):
        put(b / f"secret/{number}", b"%d" % number)
    put(b / "plain", b"plain")
    sync(a, b)
    assert len(look(a)) == 7
    assert vault.lock()
    before = frozen(b / "secret")
    edit(a / "plain", b"plain edited")
    (a / "secret/1").unlink()
    outcome = sync(a, b, check=23)
    assert outcome.summary["deleted"] == 0
    assert "locked" in outcome.said
    assert (b / "plain").read_bytes() == b"plain edited"
    assert frozen(b / "secret") == before
    assert (a / "secret/0").read_bytes() == b"0"
    vault.unlock()
    assert sync(a, b).summary["deleted"] == 1
    assert_equal(a, b)
    assert len(look(b)) == 6


def test_case_121_locked_root(here: Pair, vault: Vault):
    """A root that is locked as a whole halts, whichever of its names can be read."""
    a, b = here[0], vault.root / "B"
    b.mkdir()
    vault.encrypt(b)
    put(b / "f", b"one")
    sync(a, b)
    assert vault.lock()
    before = frozen(a)
    outcome = sync(a, b, check=(2, 12, 25))
    assert outcome.stderr.strip()
    assert frozen(a) == before
    vault.unlock()
    sync(a, b)
    assert_equal(a, b)


# --- A scan is not an instant ---


def test_files_that_move_during_the_scan(here: Pair):
    """Renames between directories hide files from a listing: none of them counts as deleted."""
    a, b = here
    for folder in range(40):
        for number in range(25):
            put(a / f"d{folder}/f{folder}-{number}", b"%d %d" % (folder, number))
    sync(a, b)
    done = threading.Event()

    def rename() -> None:
        step = 0
        while not done.is_set():
            source, target = step % 40, (step * 7 + 3) % 40
            for path in sorted((a / f"d{source}").iterdir())[:2]:
                path.rename(a / f"d{target}" / path.name)
            step += 1

    mover = threading.Thread(target=rename)
    mover.start()
    try:
        for _ in range(5):
            outcome = sync(a, b, check=None)
            assert outcome.rc in (0, 23, 24), outcome.said
            assert outcome.summary["deleted"] == 0
            assert outcome.summary["literal_bytes"] == 0
    finally:
        done.set()
        mover.join()
    sync(a, b)
    assert_equal(a, b)
    assert len(look(b)) == 1040
    assert kept(a) == kept(b) == []


# --- Nothing is flushed, and the power fails ---


def _another_boot(root: Path) -> None:
    """Let the state believe that the machine was started anew since."""
    with sqlite3.connect(root / ".bisync/state.db") as db:
        db.execute("UPDATE unflushed SET boot='an earlier one'")
    db.close()


def test_damage_after_an_unflushed_run(pair: Pair):
    """After ``--fsync never`` and another boot, a file without our bytes is damage: never a
    source, never a change; it comes again from the other side."""
    a, b = pair
    for name in ("lost", "whole", "edited"):
        put(a / name, b"content of " + name.encode())
    sync(a, b, "--fsync", "never")
    _another_boot(b)
    status = (b / "lost").stat()
    os.truncate(b / "lost", 0)
    os.utime(b / "lost", ns=(status.st_mtime_ns, status.st_mtime_ns))
    edit(b / "edited", b"a user's edit")
    outcome = sync(a, b)
    assert "damaged" in outcome.said
    assert outcome.summary["deleted"] == 0
    assert_equal(a, b)
    assert look(a) == {
        "lost": b"content of lost",
        "whole": b"content of whole",
        "edited": b"a user's edit",
    }
    assert outcome.summary["conflicts"] == 0


def test_unflushed_files_of_this_boot_are_whole(pair: Pair):
    """Without another boot nothing is suspected, and a later flushed run ends the suspicion."""
    a, b = pair
    put(a / "x", b"one")
    sync(a, b, "--fsync", "never")
    put(a / "y", b"two")
    assert sync(a, b).summary["literal_bytes"] == 3
    with sqlite3.connect(b / ".bisync/state.db") as db:
        assert db.execute("SELECT count(*) FROM unflushed").fetchone() == (0,)
    db.close()


# --- The log is lost while the stage holds the only copy ---


def test_stage_of_a_lost_log_goes_to_the_store(pair: Pair):
    """Whatever lies in the stage when the state is lost is kept, for it may be the only copy."""
    a, b = pair
    put(a / "x", b"one")
    sync(a, b)
    put(b / ".bisync/in/0123456789abcdef0123456789abcdef", b"the only copy")
    put(b / ".bisync/out/0123456789abcdef0123456789abcdef", b"another only copy")
    for name in ("state.db", "state.db-wal", "state.db-shm"):
        (b / ".bisync" / name).unlink(missing_ok=True)
    sync(a, b)
    assert {c for _, c in kept(b)} == {b"the only copy", b"another only copy"}
    assert os.listdir(b / ".bisync/in") == os.listdir(b / ".bisync/out") == []


# --- Retention ---


def _make_older(store: Path, days: int) -> None:
    """Let everything in a store be that much older."""
    for manifest in (store / ".manifest").iterdir():
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        for row in rows:
            row["time_ns"] -= days * 86_400 * 10**9
            day = time.strftime("%Y-%m-%d", time.localtime(row["time_ns"] / 1e9))
            if "kept" in row:
                row["kept"] = f"{day}/" + row["kept"].split("/", 1)[1]
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in [p for p in store.iterdir() if p.name[0] != "."]:
        then = time.mktime(time.strptime(folder.name, "%Y-%m-%d")) - days * 86_400
        folder.rename(store / time.strftime("%Y-%m-%d", time.localtime(then + 3600)))


def test_retention_stays_in_the_store(pair: Pair):
    """A manifest whose line leads out of the store removes nothing there."""
    a, b = pair
    put(a / "x", b"one")
    put(a / "precious", b"precious")
    sync(a, b)
    edit(a / "x", b"two")
    sync(a, b)
    _make_older(b / "rsync-rollback", 40)
    (manifest,) = (b / "rsync-rollback/.manifest").iterdir()
    (line,) = [json.loads(t) for t in manifest.read_text().splitlines() if '"kept"' in t]
    day = line["kept"].split("/")[0]
    forged = [
        line | {"kept": f"{day}/../../precious"},
        line | {"kept": 7},
        line | {"time_ns": "yesterday"},
        5,
        line,
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in forged))
    edit(a / "x", b"three")
    outcome = sync(a, b, "--keep", "30d")
    assert "1 kept versions" in outcome.said
    assert (b / "precious").read_bytes() == b"precious"


def test_retention(pair: Pair):
    """Versions older than ``--keep`` go, and this is said; younger and foreign ones stay."""
    a, b = pair
    put(a / "d/x", b"one")
    put(b / "rsync-rollback/2001-01-01/x", b"kept by another program")
    sync(a, b)
    edit(a / "d/x", b"two")
    sync(a, b)
    _make_older(b / "rsync-rollback", 40)
    edit(a / "d/x", b"three")
    sync(a, b)
    assert {c for _, c in kept(b)} == {b"one", b"two", b"kept by another program"}
    outcome = sync(a, b, "--keep", "30d")
    assert "1 kept versions" in outcome.said
    assert {c for _, c in kept(b)} == {b"two", b"kept by another program"}
    _make_older(b / "rsync-rollback", 400)
    sync(a, b, "--keep", "forever")
    assert {c for _, c in kept(b)} == {b"two", b"kept by another program"}
    sync(a, b)
    assert {c for _, c in kept(b)} == {b"kept by another program"}


# --- What a root says of itself ---


def test_facts(here: Pair):
    """A root tells its epoch, its last complete time and its busy files without its peer."""
    a, b = here
    put(a / "x", b"one")
    put(a / "y", b"one")
    with pytest.raises(bisync.UsageError):
        bisync.facts(a)
    before = time.time_ns()
    sync(a, b)
    first = bisync.facts(b).pairs[0]
    assert before <= first.complete_ns <= first.ended_ns
    assert bisync.facts(a).pairs[0].nonce == first.nonce
    edit(a / "x", b"two")
    edit(a / "y", b"two")
    with (b / "x").open("r+b"):
        sync(a, b, check=24)
    second = bisync.facts(b).pairs[0]
    assert second.epoch > first.epoch
    assert second.complete_ns == first.complete_ns
    assert second.ended_ns > first.ended_ns
    assert second.busy == ("x",)
    shutil.rmtree(a)
    assert bisync.facts(b).pairs[0] == second


# --- File systems without an exchange ---


def test_without_exchange(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Where two names cannot be swapped in one step (NFS, some FUSE), everything still works."""
    a, b = pair
    for name in ("edited", "one", "two", "over", "under", "conflict"):
        put(a / name, b"old " + name.encode(), t=NOON)
    put(a / "d/x", b"x")
    put(a / "e/y", b"y")
    config = bisync.Config(yes=True)
    assert bisync.sync(a, b, config).exit_code == 0

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(rename, "exchange", refuse)
    edit(a / "edited", b"new")
    exchange(a / "one", a / "two")
    (a / "over").rename(a / "under")
    exchange(a / "d", a / "e")
    edit(a / "conflict", b"A", t=NOON + 10)
    edit(b / "conflict", b"B", t=NOON + 20)
    report = bisync.sync(a, b, config)
    assert (report.exit_code, report.conflicts) == (0, 1)
    assert_equal(a, b)
    assert look(b)["e/x"] == b"x"
    assert {b"old edited", b"old under", b"A"} <= everything(a, b)
    assert os.listdir(b / ".bisync/in") == os.listdir(b / ".bisync/out") == []


def test_crash_without_exchange(here: Pair):
    """What was set aside beside a staged object may be the only copy: it goes to the store."""
    a, b = here
    put(a / "x", b"one")
    sync(a, b)
    put(b / ".bisync/in" / ("0123456789abcdef" * 2 + "-aside"), b"the only copy")
    put(b / ".bisync/in" / ("fedcba9876543210" * 2), b"never used")
    sync(a, b)
    assert {c for _, c in kept(b)} == {b"the only copy"}
    assert os.listdir(b / ".bisync/in") == []
