"""Users who act in the very moment, and situations in which an earlier engine lost something.

A *moment* is a call of the engine: the users' part runs just before or just after its n-th rename,
exchange or attribute change, in the same process, so that every run is the same.
"""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import bisync
from bisync import Session
from bisync.core.node import Node, NodeId
from bisync.endpoint.local import LocalEndpoint
from bisync.fs import perform
from tests.system.live import AGENT
from tests.trees import (
    NOON,
    assert_equal,
    command,
    edit,
    environment,
    everything,
    kept,
    look,
    put,
    run,
    sync,
)

Pair = tuple[Path, Path]
Act = Callable[[], object]
YES = bisync.Config(yes=True)


class Moment:
    """Lets somebody act around one call of the engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def sync(self, pair: Pair, call: str, act: Act, *, nth: int = 1, after: bool = False) -> int:
        """Run the engine once, with ``act`` before (or after) its n-th ``call``."""
        real, count = getattr(perform, call), 0

        def hooked(*args: object) -> object:
            nonlocal count
            count += 1
            if count == nth and not after:
                act()
            result = real(*args)
            if count == nth and after:
                act()
            return result

        with self.monkeypatch.context() as patch:
            patch.setattr(perform, call, hooked)
            code = bisync.sync(*pair, YES).exit_code
        assert count >= nth, f"the engine called {call} only {count} times"
        return code


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> Moment:
    return Moment(monkeypatch)


def _settle(pair: Pair) -> None:
    """Two more runs; then both trees are equal."""
    codes = [bisync.sync(*pair, YES).exit_code for _ in range(2)]
    assert codes[-1] == 0
    assert_equal(*pair)


# --- What users do while the engine works ---


def test_changes_beside_a_stale_file(here: Pair, moment: Moment):
    """One file is edited under our hands: what else changed in its directory is not forgotten."""
    a, b = here
    put(a / "d/x", b"one")
    put(a / "d/z", b"two")
    bisync.sync(a, b)
    edit(a / "d/x", b"from alpha")

    def act() -> None:
        edit(b / "d/x", b"of beta")
        (b / "d/z").unlink()
        (b / "d/new").mkdir()

    moment.sync(here, "swap", act)
    _settle(here)
    assert "d/z" not in look(a)
    assert look(a)["d/new"] is None
    assert {b"from alpha", b"of beta"} <= everything(a, b)


def test_edit_right_after_a_new_file_got_its_name(here: Pair, moment: Moment):
    """A user writes to B's new file between our rename and our look: it is B's edit."""
    a, b = here
    put(a / "other", b"other")
    bisync.sync(a, b)
    put(a / "x", b"1111")
    moment.sync(here, "rename_noreplace", lambda: (b / "x").write_bytes(b"2222"), after=True)
    _settle(here)
    assert look(a)["x"] == b"2222"
    edit(a / "x", b"3333")
    _settle(here)
    assert look(b)["x"] == b"3333"


def test_replacement_right_after_a_new_file_got_its_name(here: Pair, moment: Moment):
    """The same with a rename over it."""
    a, b = here
    put(b / "other", b"other")
    bisync.sync(a, b)
    put(a / "x", b"1111")
    moment.sync(here, "rename_noreplace", lambda: (b / "other").rename(b / "x"), after=True)
    _settle(here)
    assert look(a) == {"x": b"other"}
    assert b"1111" in everything(a, b)


def test_edit_right_after_an_update(here: Pair, moment: Moment):
    """A user writes to B's updated file just after the exchange."""
    a, b = here
    put(a / "x", b"old", t=NOON)
    bisync.sync(a, b)
    edit(a / "x", b"from alpha", t=NOON + 10)

    def act() -> None:
        (b / "x").unlink()
        put(b / "x", b"of beta!!!")

    moment.sync(here, "swap", act, after=True)
    _settle(here)
    assert look(a)["x"] == b"of beta!!!"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_chmod_during_a_run(here: Pair, moment: Moment, kind: str):
    """A permission taken away while the engine works is taken away on both sides."""
    a, b = here
    put(a / "d/x", b"one", mode=0o644)
    bisync.sync(a, b)
    if kind == "directory":
        put(a / "d/new", b"two")
        moment.sync(here, "rename_noreplace", lambda: (a / "d").chmod(0o700))
        changed = "d"
    else:
        (a / "d/x").rename(a / "d/y")
        moment.sync(here, "rename_noreplace", lambda: (b / "d/x").chmod(0o600))
        changed = "d/y"
    _settle(here)
    mode = 0o700 if kind == "directory" else 0o600
    assert [(root / changed).stat().st_mode & 0o777 for root in here] == [mode, mode]


def test_attributes_are_set_while_somebody_writes(here: Pair, moment: Moment):
    """A write in the moment in which the time is set is not hidden by that time."""
    a, b = here
    put(a / "x", b"1111", t=NOON)
    bisync.sync(a, b)
    os.utime(a / "x", (NOON + 10, NOON + 10))
    moment.sync(here, "apply_attributes", lambda: (b / "x").chmod(0o600), after=True)
    _settle(here)
    assert [(root / "x").stat().st_mode & 0o777 for root in here] == [0o600, 0o600]


def test_removal_that_goes_stale(here: Pair, moment: Moment):
    """A new file appears in a directory that is to go; when it has left, the removal is done."""
    a, b = here
    put(a / "d/x", b"one")
    put(a / "other", b"other")
    bisync.sync(a, b)
    shutil.rmtree(a / "d")
    moment.sync(here, "rename_noreplace", lambda: put(b / "d/lock", b"lock"))
    assert look(a) == look(b) == {"d": None, "d/lock": b"lock", "other": b"other"}
    (b / "d/lock").unlink()
    _settle(here)


def test_writes_into_a_displaced_directory(here: Pair, moment: Moment):
    """A shell stands in the directory that we displace: what it writes there comes back."""
    a, b = here
    put(a / "d/x", b"one")
    put(a / "other", b"other")
    bisync.sync(a, b)
    shutil.rmtree(a / "d")
    shell = os.open(b / "d", os.O_RDONLY | os.O_DIRECTORY)

    def act() -> None:
        flags = os.O_WRONLY | os.O_CREAT
        with open(os.open("precious", flags, 0o644, dir_fd=shell), "wb") as file:
            file.write(b"precious")

    real = perform.Performer._keep
    moment.monkeypatch.setattr(
        perform.Performer,
        "_keep",
        lambda self, *args: (real(self, *args), act())[0],
    )
    assert bisync.sync(a, b, YES).exit_code == 24
    os.close(shell)
    moment.monkeypatch.undo()
    _settle(here)
    assert b"precious" in look(a).values()


# --- Symlinks in hard-link groups ---


def test_symlinks_in_a_hard_link_group(pair: Pair):
    """A group that becomes symlinks links the links: nothing outside is touched or copied."""
    a, b = pair
    secret = put(a.with_name("secret"), b"SECRET")
    put(a / "d", b"one")
    sync(a, b)
    (b / "link").symlink_to(secret)
    (b / "link").rename(b / "d")
    (a / "c").hardlink_to(a / "d")
    sync(a, b)
    sync(a, b)
    assert_equal(a, b)
    assert b"SECRET" not in everything(a, b)
    assert secret.stat().st_nlink == 1
    assert look(a) == {"c": f"-> {secret}", "d": f"-> {secret}"}


# --- Directories that change places with what is in them ---

KNOTS = {
    "inverted": "mv A/d/e A/e2; mv A/d A/e2/d; mv A/e2 A/d",
    "flattened": "mv A/d/e A/t; rm -r A/d; mv A/t A/d",
    "deeper": "mv A/d A/t; mkdir A/d; mv A/t A/d/e",
}


@pytest.mark.parametrize("script", KNOTS.values(), ids=KNOTS)
def test_directory_knots(pair: Pair, script: str):
    """A directory takes the name of the one above it, or below: nothing leaves the tree."""
    a, b = pair
    put(a / "d/x", b"x")
    put(a / "d/e/y", b"y")
    put(a / "k", b"k")
    sync(a, b)
    subprocess.run(["sh", "-ec", script], check=True, cwd=a.parent)
    outcome = sync(a, b)
    assert outcome.summary["literal_bytes"] == 0
    assert_equal(a, b)
    assert os.listdir(b / ".bisync/out") == []


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("script", KNOTS.values(), ids=KNOTS)
def test_directory_knots_met_by_a_user(here: Pair, moment: Moment, script: str, nth: int):
    """The same, and a user makes something at the name that is free for a moment."""
    a, b = here
    put(a / "d/x", b"x")
    put(a / "d/e/y", b"y")
    sync(a, b)
    subprocess.run(["sh", "-ec", script], check=True, cwd=a.parent)

    def act() -> None:
        if not (b / "d").exists():
            put(b / "d/u", b"of beta's user")

    try:
        moment.sync(here, "rename_noreplace", act, nth=nth)
    except AssertionError as error:
        pytest.skip(str(error))
    assert {b"x", b"y"} <= everything(a, b)
    _settle(here)
    assert {b"x", b"y"} <= everything(a, b)


# --- A run that was stopped ---


def test_interrupted_run_forgets_nothing(here: Pair, moment: Moment):
    """Stopped before the last operations: the next run does them, renames of directories too."""
    a, b = here
    put(a / "d/q", b"one")
    sync(a, b)
    (a / "d").rename(a / "d2")
    put(a / "new", b"new")
    stopped = []

    def stop() -> None:
        if stopped:
            raise bisync.errors.Interrupted(15)

    config = bisync.Config(yes=True, stop=stop)
    real = perform.rename_noreplace
    with moment.monkeypatch.context() as patch:
        patch.setattr(
            perform, "rename_noreplace", lambda *args: (real(*args), stopped.append(1))[0]
        )
        with pytest.raises(bisync.errors.Interrupted):
            bisync.sync(a, b, config)
    _settle(here)
    assert look(b) == {"d2": None, "d2/q": b"one", "new": b"new"}


# --- Roots that were moved or restored ---


def _copied(root: Path) -> None:
    """Every object of a root is new, as after a restore: only names and contents are the same."""
    other = root.with_name("other")
    subprocess.run(["cp", "-a", root, other], check=True)
    shutil.rmtree(root)
    other.rename(root)


def test_what_is_missing_in_a_moved_root_comes_back(pair: Pair):
    """B was copied, and a file got lost on the way: no deletion, it comes from A."""
    a, b = pair
    for name in ("x", "y", "z"):
        put(a / name, name.encode())
    sync(a, b)
    _copied(b)
    (b / "x").unlink()
    outcome = sync(a, b)
    assert outcome.summary["deleted"] == 0
    assert_equal(a, b)
    assert len(look(a)) == 3


def test_a_moved_root_is_known_to_each_pair(pair: Pair):
    """A was copied and lost two files: neither of its peers loses them."""
    a, b = pair
    c = a.with_name("C")
    c.mkdir()
    for number in range(5):
        put(a / f"{number}", b"%d" % number)
    sync(a, b)
    sync(a, c)
    _copied(a)
    (a / "1").unlink()
    (a / "2").unlink()
    assert sync(a, b).summary["deleted"] == 0
    assert sync(a, c).summary["deleted"] == 0
    assert len(look(c)) == 5


def test_after_restore_keep(pair: Pair):
    """B's state and tree are an older copy; `keep` takes its tree for the truth."""
    a, b = pair
    put(a / "x", b"one")
    put(a / "d/y", b"two")
    sync(a, b)
    subprocess.run(["cp", "-a", b, b.with_name("backup")], check=True)
    (a / "d").rename(a / "d2")
    put(a / "n", b"new")
    sync(a, b)
    put(a / "m", b"newer")
    sync(a, b)
    subprocess.run(["rsync", "-aI", "--delete", f"{b.with_name('backup')}/", f"{b}/"], check=True)
    sync(a, b, check=25)
    sync(a, b, "--after-restore", "keep")
    sync(a, b)
    assert_equal(a, b)
    assert {b"one", b"two", b"new", b"newer"} <= everything(a, b)


# --- Filters ---


def test_excluded_file_in_a_moved_directory(pair: Pair):
    """A directory does not take along what is excluded only at its old place."""
    a, b = pair
    put(a / "d/x", b"one")
    sync(a, b)
    put(b / "d/secret", b"secret")
    (a / "d").rename(a / "e")
    outcome = sync(a, b, "--exclude", "/d/secret", check=23)
    assert "secret" in outcome.said
    assert b"secret" not in look(a).values()
    assert (b / "d/secret").exists()
    (b / "d/secret").unlink()
    sync(a, b, "--exclude", "/d/secret")
    assert_equal(a, b)


def test_excluded_file_moves_along_where_it_stays_excluded(pair: Pair):
    """A pattern that holds at both places is no obstacle."""
    a, b = pair
    put(a / "d/x", b"one")
    sync(a, b)
    put(b / "d/y.tmp", b"scratch")
    (a / "d").rename(a / "e")
    assert sync(a, b, "--exclude", "*.tmp").summary["moves"] == 1
    assert (b / "e/y.tmp").read_bytes() == b"scratch"
    assert "e/y.tmp" not in look(a)


def test_deleted_while_excluded(pair: Pair):
    """A file deleted while it was excluded merges when it is included again."""
    a, b = pair
    put(a / "x", b"one")
    put(a / "k", b"two")
    sync(a, b)
    sync(a, b, "--exclude", "x")
    (a / "x").unlink()
    sync(a, b, "--exclude", "x")
    sync(a, b)
    assert_equal(a, b)
    assert look(a)["x"] == b"one"


# --- Guards ---


def test_directory_replaced_by_a_file_is_guarded(pair: Pair):
    """What goes with a directory that is replaced counts as deleted."""
    a, b = pair
    for number in range(40):
        put(a / f"d/{number}", b"%d" % number)
    sync(a, b)
    shutil.rmtree(a / "d")
    put(a / "d", b"a file")
    put(a / "new", b"new")
    outcome = sync(a, b, check=25)
    assert outcome.summary["deleted"] == 0
    assert len(look(b)) == 42
    sync(a, b, "--yes")
    assert_equal(a, b)
    assert len(kept(b)) == 40


def test_directory_with_ignored_files_where_another_one_moves_to(pair: Pair):
    """It stays, so the other one cannot move: a problem that is said."""
    a, b = pair
    (a / "d").mkdir()
    put(a / "e/f", b"one")
    sync(a, b)
    put(b / "d/s.tmp", b"scratch")
    (a / "d").rmdir()
    (a / "e").rename(a / "d")
    outcome = sync(a, b, "--exclude", "*.tmp", check=23)
    assert "its name is held by something that stays" in outcome.said
    assert (b / "d/s.tmp").exists()
    (b / "d/s.tmp").unlink()
    sync(a, b, "--exclude", "*.tmp")
    assert_equal(a, b)


def test_directory_with_ignored_files_replaced_by_a_file(pair: Pair):
    """It stays, and this is a problem that is said; without the ignored file it goes."""
    a, b = pair
    put(a / "d/x", b"one")
    sync(a, b)
    put(b / "d/s.tmp", b"scratch")
    shutil.rmtree(a / "d")
    put(a / "d", b"a file")
    sync(a, b, "--exclude", "*.tmp", check=23)
    assert (b / "d/s.tmp").exists()
    (b / "d/s.tmp").unlink()
    sync(a, b, "--exclude", "*.tmp")
    assert_equal(a, b)


# --- Kinds that are skipped ---


def test_fifo_takes_the_name_of_a_moved_file(pair: Pair):
    """A FIFO stands where a file was: the file has moved, and B's edit of it travels."""
    a, b = pair
    put(a / "x", b"one")
    sync(a, b)
    (a / "x").rename(a / "y")
    os.mkfifo(a / "x")
    edit(b / "x", b"edited")
    sync(a, b)
    assert look(b) == {"y": b"edited"}
    assert (a / "y").read_bytes() == b"edited"


def test_names_like_our_own_are_told(pair: Pair):
    """A user's file with exactly the form of a temporary name stays, and is said."""
    a, b = pair
    put(a / f".bisync-{'0123456789abcdef' * 2}", b"the user's")
    outcome = sync(a, b)
    assert outcome.summary["skipped"] == 1
    assert "temporary" in outcome.said


# --- Crashes ---


def test_crash_in_a_save_by_backup(here: Pair):
    """Killed between the link to the backup's name and the exchange: no names get glued."""
    a, b = here
    put(a / "bk", b"old")
    sync(a, b)
    (a / "bk").rename(a / "bk~")
    put(a / "bk", b"new")
    line = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=renameat2"]
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    subprocess.run(
        [*line, "--inject=renameat2:signal=KILL:when=1", *command("sync", a, b)],
        env=environment(BISYNC_WORKERS="1"),
        check=False,
        capture_output=True,
    )
    sync(a, b)
    assert_equal(a, b)
    assert look(b) == {"bk": b"new", "bk~": b"old"}
    assert (b / "bk").stat().st_nlink == 1


def test_kept_version_written_to_later(here: Pair):
    """Somebody wrote to a kept version and its directory is gone: it comes back nearby."""
    a, b = here
    put(a / "d/x", b"one")
    put(a / "k", b"k")
    sync(a, b)
    edit(a / "d/x", b"two")
    sync(a, b)
    shutil.rmtree(b / "d")
    (path,) = (b / "rsync-rollback").rglob("d/x")
    path.write_bytes(b"written to the kept version")
    sync(a, b, check=(0, 24))
    sync(a, b, check=(0, 24))
    sync(a, b)
    assert_equal(a, b)
    assert b"written to the kept version" in everything(a, b)


# --- The state on another file system ---


@pytest.mark.parametrize("killed", [0, 1, 2, 3])
def test_state_elsewhere(here: Pair, mount: Callable[..., None], killed: int):
    """With `--state-dir` on another file system: renames over, saves, conflicts, and crashes."""
    a, b = here
    state = a.with_name("state")
    mount(state, "-t", "tmpfs", "-o", "mode=700", "none")
    for name in ("x", "y", "z"):
        put(a / name, b"old " + name.encode(), t=NOON)
    option = ("--state-dir", state)
    sync(a, b, *option)
    (a / "x").rename(a / "y")
    edit(a / "z", b"A", t=NOON + 10)
    edit(b / "z", b"B", t=NOON + 20)
    if killed:
        line = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=renameat2"]
        inject = f"--inject=renameat2:signal=KILL:when={killed}"
        subprocess.run(
            [*line, inject, *command("sync", *option, a, b)],
            env=environment(BISYNC_WORKERS="1"),
            check=False,
            capture_output=True,
        )
    sync(a, b, *option)
    assert_equal(a, b)
    assert look(b) == {"y": b"old x", "z": b"B"}
    assert {b"old y", b"A"} <= everything(a, b)
    assert not (a / ".bisync").exists()
    run("conflicts", "resolve", "z", "--take", "kept", "--root", a, *option)
    sync(a, b, *option)
    assert look(a) == look(b) == {"y": b"old x", "z": b"A"}


def test_plan_makes_no_state_dir(here: Pair):
    """A plan does not make the folder that `--state-dir` names."""
    a, b = here
    put(a / "x", b"one")
    run("plan", "--state-dir", a.with_name("none"), a, b)
    assert not a.with_name("none").exists()


# --- Deciding conflicts ---


@pytest.mark.parametrize("take", ["live", "kept", "both"])
@pytest.mark.parametrize("kind", ["content", "type", "name"])
def test_manual_conflicts_can_be_decided(here: Pair, kind: str, take: str):
    """Whatever waits can be decided, and is then off both lists."""
    a, b = here
    if kind == "content":
        put(a / "n", b"of alpha")
        put(b / "n", b"beta's")
    elif kind == "type":
        put(a / "n/f", b"of alpha")
        put(b / "n", b"beta's")
    else:
        put(a / "one", b"of alpha")
        put(a / "two", b"beta's")
        sync(a, b)
        (a / "one").rename(a / "n")
        (b / "two").rename(b / "n")
    before = everything(a, b)
    sync(a, b, "--conflict", "manual", check=40)
    run("conflicts", "resolve", "n", "--take", take, "--root", a)
    sync(a, b, "--conflict", "manual")
    assert_equal(a, b)
    assert before <= everything(a, b)
    for root in here:
        assert "no conflicts" in run("conflicts", cwd=root).stdout
    shown = look(a)
    if kind == "content":
        assert shown["n"] == (b"beta's" if take == "kept" else shown["n"])
        assert (len(shown) == 2) is (take == "both")
        if take == "live":
            assert shown == {"n": b"of alpha"}


def test_words_and_options_in_any_order(here: Pair):
    """`conflicts` takes its options before, between and behind its words."""
    a, b = here
    put(a / "n", b"of alpha", t=NOON)
    put(b / "n", b"beta's", t=NOON + 1)
    sync(a, b)
    for words in (
        ["--root", a, "show", "n"],
        ["show", "--root", a, "n"],
        ["show", "n", "--root", a],
    ):
        assert "n" in run("conflicts", *words).stdout


def test_directory_kept_and_a_file_kept_below_its_name(here: Pair):
    """A kept directory is a version: what is displaced later below the same path is not in it."""
    a, b = here
    put(a / "d/x", b"one")
    put(a / "other", b"other")
    sync(a, b)
    shutil.rmtree(a / "d")
    sync(a, b)
    put(a / "d/y", b"two")
    sync(a, b)
    edit(a / "d/y", b"three")
    sync(a, b)
    paths = sorted(path for path, _ in kept(b))
    assert paths == [b"d.~2~/y", b"d/x"]


# --- What cannot be looked at, and what took its place ---


def test_vanished_directory_whose_name_is_taken(pair: Pair):
    """As a plain user: a directory became a file while another one cannot be read. It waits."""
    if os.geteuid() != 0:
        pytest.skip("starting a process as another user needs root")
    a, b = pair
    user = 12_345
    for name in ("a/s/1", "a/2", "c/3"):
        put(a / name, name.encode())
    for path in (a, b, *a.rglob("*")):
        os.chown(path, user, user)
    sync(a, b, user=user)
    shutil.rmtree(b / "a")
    put(b / "a", b"a file")
    os.chown(b / "a", user, user)
    (b / "c").chmod(0)
    before = everything(a)
    sync(a, b, check=23, user=user)
    assert before <= everything(a)
    (b / "c").chmod(0o755)
    sync(a, b, user=user, check=(0, 23))
    sync(a, b, user=user)
    assert_equal(a, b)
    assert before | {b"a file"} <= everything(a, b)


def test_damaged_group_that_a_user_saved_anew(here: Pair):
    """One name of a damaged hard-link group belongs to a new file now: that one is not touched."""
    a, b = here
    put(a / "x", b"of the peer")
    (a / "y").hardlink_to(a / "x")
    sync(a, b, "--fsync", "never")
    with sqlite3.connect(b / ".bisync/state.db") as db:
        db.execute("UPDATE unflushed SET boot='an earlier one'")
    db.close()
    status = (b / "x").stat()
    os.truncate(b / "x", 0)
    os.utime(b / "x", ns=(status.st_mtime_ns, status.st_mtime_ns))
    put(b / "tmp", b"work of an hour").rename(b / "y")
    sync(a, b)
    sync(a, b)
    assert_equal(a, b)
    assert {b"work of an hour", b"of the peer"} <= everything(a, b)


def test_resolve_while_somebody_writes(here: Pair):
    """A choice that could not be carried out is carried out later, and not undone."""
    a, b = here
    put(a / "f", b"old", t=NOON)
    sync(a, b)
    edit(a / "f", b"loser", t=NOON + 10)
    edit(b / "f", b"winner", t=NOON + 20)
    sync(a, b, "--conflict", "keep-both")
    run("conflicts", "resolve", "f", "--take", "kept", "--root", a)
    with (a / "f").open("ab"):
        sync(a, b, check=23)
    sync(a, b)
    sync(a, b)
    assert look(a) == look(b) == {"f": b"loser"}
    assert b"winner" in everything(a, b)


def test_store_on_another_quota_project(file_system: Callable[[str], Path], tmp_path: Path):
    """The store takes everything by copy: directories too, and nothing comes back."""
    base = file_system("xfs") / tmp_path.name
    a, b = base / "A", base / "B"
    (b / "rsync-rollback").mkdir(parents=True)
    a.mkdir()
    line = ["xfs_io", "-r", "-c", "chproj 43", "-c", "chattr +P", b / "rsync-rollback"]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("no project ids here")
    put(a / "d/x", b"one")
    put(a / "e", b"two")
    sync(a, b)
    shutil.rmtree(a / "d")
    edit(a / "e", b"three")
    sync(a, b)
    sync(a, b)
    assert look(a) == look(b) == {"e": b"three"}
    assert sorted(kept(b)) == [(b"d/x", b"one"), (b"e", b"two")]
    shutil.rmtree(base)


def test_a_directory_that_moves_on_before_it_is_agreed(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """What is in it is not agreed on either: a name in nothing would never be looked at again."""
    a, b = here
    put(a / "d/sub/f", b"1")
    put(a / "g", b"2")
    real, hides = LocalEndpoint.nodes, [True, True]

    def nodes(self: LocalEndpoint, ids: Iterable[NodeId]) -> dict[NodeId, Node]:
        found = real(self, ids)
        callers = {sys._getframe(n).f_code.co_name for n in (1, 2, 3)}
        if "_rows" in callers and hides:
            hides.pop()
            top = next(n for n in found if self.path(n) == b"d")
            del found[top]
        return found

    monkeypatch.setattr(LocalEndpoint, "nodes", nodes)
    Session(a, b).run()
    assert not hides
    for root in (a, b):
        with contextlib.closing(sqlite3.connect(root / ".bisync/state.db")) as db:
            lost = db.execute(
                "SELECT * FROM agreed_name WHERE parent<>1 AND NOT EXISTS"
                " (SELECT 1 FROM agreed WHERE agreed.key=agreed_name.parent)"
            )
            assert lost.fetchall() == []
            assert db.execute("SELECT count(*) FROM agreed").fetchone() == (5,)  # all, in the end
    (a / "d/sub/f").write_bytes(b"changed")
    assert sync(a, b).summary["updated"] == 1
    assert_equal(a, b)


def test_a_new_file_whose_second_name_cannot_be_made(here: Pair, moment: Moment):
    """What was made of a file is not forgotten when the file itself is gone by then."""
    a, b = here
    put(a / "x", b"1")
    os.link(a / "x", a / "y")

    def act() -> None:
        for name in ("x", "y"):
            (a / name).unlink()
            if not (b / name).exists():
                put(b / name, b"somebody else's")

    moment.sync(here, "rename_noreplace", act, after=True)
    _settle(here)
    assert len(look(a)) == 2
    assert b"somebody else's" in look(a).values()


@pytest.mark.parametrize("only", [[""], ["d"], ["d/e"], ["d", ""], None])
def test_a_mount_over_what_is_known(here: Pair, mount: Callable[..., None], only: list[str] | None):
    """Nothing below it was deleted, whichever directories are looked at; nor what went there."""
    a, b = here
    for name in ("d/f", "d/e/g", "x/h", *(f"z{n}" for n in range(40))):
        put(a / name, name.encode())
    with Session(a, b) as session:
        session.run()
        (a / "x/h").rename(a / "d/h")
        mount(a / "d", "-t", "tmpfs", "none")
        put(a / "z1", b"changed")
        where = None if only is None else ([*only, "x", ""], [])
        for _ in range(2):
            assert session.run(only=where).deleted == 0
        assert {"d/f", "d/e/g"} <= look(b).keys()
        assert b"x/h" in look(b).values()
        assert look(b)["z1"] == b"changed"
        subprocess.run(["umount", a / "d"], check=True)
        session.run()
    _settle(here)
    assert look(a)["d/h"] == b"x/h"


@pytest.mark.parametrize("far", [False, True])
def test_what_waits_for_a_removal_is_done_after_it(here: Pair, far: bool):
    """A name that is taken by what goes: the move, and what is new where it came from."""
    a, b = here
    (a / "d").mkdir()
    (a / "dN").mkdir()
    put(a / "dN2/gone", b"1")
    put(a / "e/kept", b"2")
    ends = (a, Path(f"elsewhere:{b}"), *AGENT) if far else (a, b)
    sync(*ends)
    (a / "dN").rmdir()
    (a / "d").rename(a / "dN")
    put(a / "d/e", b"new")
    put(a / "d/sub/f", b"new, too")
    shutil.rmtree(a / "dN2")
    (a / "e").rename(a / "dN2")
    put(a / "e/more", b"3")
    sync(*ends)
    assert_equal(a, b)
    done = sync(*ends).summary
    assert (done["created"], done["moves"], done["deleted"]) == (0, 0, 0)


def test_what_waits_for_a_withheld_removal_is_not_forgotten(here: Pair):
    """Approved in a later run, all of it is done."""
    a, b = here
    for number in range(40):
        put(a / f"dN/{number}", b"%d" % number)
    put(a / "d/kept", b"1")
    sync(a, b)
    shutil.rmtree(a / "dN")
    (a / "d").rename(a / "dN")
    put(a / "d/e", b"new")
    sync(a, b, check=25)
    sync(a, b, check=25)
    sync(a, b, "--yes")
    assert_equal(a, b)


def test_a_directory_above_moves_while_times_are_set(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """The time that could not be set is set by a later run."""
    a, b = here
    put(a / "top/d/f", b"1")
    bisync.sync(a, b)
    put(a / "top/d/g", b"2")
    real, away = LocalEndpoint.set_directory_times, True

    def hooked(self: LocalEndpoint, todo: list[tuple[NodeId, int, bool]]) -> object:
        if away:
            (b / "top").rename(b / "pot")
            self.replica.directories.close()  # as where there are too many to hold them all
        try:
            return real(self, todo)
        finally:
            if away:
                (b / "pot").rename(b / "top")

    monkeypatch.setattr(LocalEndpoint, "set_directory_times", hooked)
    assert bisync.sync(a, b).exit_code == 24
    assert (b / "top/d").stat().st_mtime_ns != (a / "top/d").stat().st_mtime_ns
    away = False
    _settle(here)


def test_something_done_in_a_directory_just_before_it_is_moved(here: Pair, moment: Moment):
    """Its time is not agreed on as one that nobody carried over."""
    a, b = here
    put(a / "d/f", b"1")
    bisync.sync(a, b)
    (a / "d").rename(a / "e")

    def act() -> None:
        put(b / "d/g", b"2").unlink()

    moment.sync(here, "rename_noreplace", act)
    _settle(here)
    assert look(a) == {"e": None, "e/f": b"1"}
