"""State lost, damaged, restored, copied, locked: cases 102, 157-160, 167, 174."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.trees import (
    assert_equal,
    command,
    edit,
    environment,
    everything,
    frozen,
    kept,
    look,
    put,
    run,
    save,
    sync,
)

SIDES = pytest.mark.parametrize("side", [0, 1], ids=["alpha", "beta"])


def _agreed(a: Path, b: Path) -> None:
    for name in ("edited", "deleted", "quiet"):
        put(a / name, b"old " + name.encode())
    sync(a, b)


def _damage(state: Path, how: str) -> None:
    """Damage the state database, and take away what could repair it."""
    database = state / "state.db"
    assert database.is_file(), f"the state is {sorted(os.listdir(state))}"
    size = database.stat().st_size
    for beside in ("state.db-wal", "state.db-shm", "state.db-journal"):
        (state / beside).unlink(missing_ok=True)
    match how:
        case "truncated":
            os.truncate(database, size // 2)
        case "empty":
            os.truncate(database, 0)
        case "zeroed":
            database.write_bytes(bytes(size))
        case "garbage":
            database.write_bytes(b"\xa5garbage" * (size // 8))


def test_case_102_restored_in_place(pair: tuple[Path, Path]):
    """Every file of B is put back from a backup: new identities, no conflict, no deletion."""
    a, b = pair
    for number in range(10):
        put(a / f"d/{number}", b"%d" % number)
    put(a / "f", b"old")
    sync(a, b)
    subprocess.run(["cp", "-a", b / "d", b.with_name("backup")], check=True)
    shutil.rmtree(b / "d")
    subprocess.run(["cp", "-a", b.with_name("backup"), b / "d"], check=True)
    edit(a / "d/3", b"edited at A")
    (a / "d/4").rename(a / "d/moved")
    outcome = sync(a, b)
    assert outcome.counts("conflicts", "problems") == {"conflicts": 0, "problems": 0}
    assert_equal(a, b)
    assert look(b)["d/3"] == b"edited at A"
    assert look(b)["d/moved"] == b"4"
    assert len(look(a)) == 12


@SIDES
@pytest.mark.parametrize("how", ["truncated", "empty", "zeroed", "garbage"])
def test_case_157_damaged_database(here: tuple[Path, Path], side: int, how: str):
    """A damaged state database: merged or refused, no deletion, no loss, no traceback."""
    a, b = here
    _agreed(a, b)
    (a / "deleted").unlink()
    edit(a / "edited", b"edited at A")
    put(b / "new", b"new at B")
    _damage(here[side] / ".bisync", how)
    before = everything(a, b)
    outcome = sync(a, b, check=(0, 2, 25))
    assert outcome.summary["deleted"] == 0
    assert (b / "deleted").exists()
    assert before <= everything(a, b)
    if outcome.rc == 0:
        assert_equal(a, b)
        sync(a, b)


def test_case_157_damaged_database_on_each_file_system(pair: tuple[Path, Path]):
    """The same with both sides damaged, on every file system."""
    a, b = pair
    _agreed(a, b)
    (a / "deleted").unlink()
    edit(a / "edited", b"edited at A")
    for side in pair:
        _damage(side / ".bisync", "garbage")
    before = everything(a, b)
    outcome = sync(a, b, check=(0, 2, 25))
    assert outcome.summary["deleted"] == 0
    assert (b / "deleted").exists()
    assert before <= everything(a, b)


def test_case_158_state_restored_from_a_backup(pair: tuple[Path, Path]):
    """B's state is an older link of the pair's chain: halt, until a person says what is true."""
    a, b = pair
    _agreed(a, b)
    subprocess.run(["cp", "-a", b / ".bisync", b.with_name("backup")], check=True)
    for number in range(3):
        put(a / f"later{number}", b"%d" % number)
        sync(a, b)
    (a / "deleted").unlink()
    sync(a, b)
    shutil.rmtree(b / ".bisync")
    subprocess.run(["cp", "-a", b.with_name("backup"), b / ".bisync"], check=True)
    before = frozen(a), frozen(b)
    outcome = sync(a, b, check=25)
    assert outcome.summary["deleted"] == 0
    assert (frozen(a), frozen(b)) == before
    merged = sync(a, b, "--after-restore", "merge")
    assert merged.summary["deleted"] == 0
    assert_equal(a, b)
    assert len(look(a)) == 5


@SIDES
def test_case_159_state_lost(pair: tuple[Path, Path], side: int):
    """One side's state is lost, its root is the same: merge, delete nothing, exit 0, said once."""
    a, b = pair
    _agreed(a, b)
    (a / "deleted").unlink()
    edit(b / "edited", b"edited at B")
    shutil.rmtree(pair[side] / ".bisync")
    before = everything(a, b)
    first = run("sync", a, b)
    assert_equal(a, b)
    assert look(a)["deleted"] == b"old deleted"
    assert look(a)["edited"] == b"edited at B"
    assert before <= everything(a, b)
    lines = first.said.splitlines()
    told = {line for line in lines if re.search("state|merge", line, re.IGNORECASE)}
    again = run("sync", a, b)
    assert told - set(again.said.splitlines())


def test_case_159_both_states_lost(pair: tuple[Path, Path]):
    """Both states are lost: a first contact of two equal trees."""
    a, b = pair
    _agreed(a, b)
    for side in pair:
        shutil.rmtree(side / ".bisync")
    outcome = sync(a, b)
    assert outcome.counts("presumed", "deleted", "literal_bytes") == {
        "presumed": 3,
        "deleted": 0,
        "literal_bytes": 0,
    }


def test_case_160_equal_results_that_nobody_recorded(pair: tuple[Path, Path]):
    """Both trees already hold the same new state: it is recorded, and built on later."""
    a, b = pair
    _agreed(a, b)
    for side in pair:
        save(side / "edited", b"the same", t=1.7e9)
        (side / "deleted").unlink()
        put(side / "new", b"new", t=1.7e9)
    outcome = sync(a, b)
    assert outcome.counts("conflicts", "literal_bytes", "kept") == {
        "conflicts": 0,
        "literal_bytes": 0,
        "kept": 0,
    }
    (b / "new").unlink()
    sync(a, b)
    assert "new" not in look(a)
    assert kept(a) == [(b"new", b"new")]


def test_state_copied_with_the_tree(pair: tuple[Path, Path]):
    """C is a copy of A with A's state: it becomes a replica of its own, and nothing is deleted."""
    a, b = pair
    c = a.with_name("C")
    _agreed(a, b)
    put(a / "d/f", b"f")
    sync(a, b)
    subprocess.run(["cp", "-a", a, c], check=True)
    (a / "deleted").unlink()
    outcome = sync(a, c)
    assert outcome.counts("deleted", "conflicts") == {"deleted": 0, "conflicts": 0}
    assert_equal(a, c)
    edit(c / "edited", b"edited at C")
    (c / "quiet").unlink()
    sync(a, c)
    sync(a, b)
    assert look(a) == look(b) == look(c)
    assert look(b)["edited"] == b"edited at C"
    assert "quiet" not in look(b)
    assert (b"quiet", b"old quiet") in kept(b)


def test_case_174_stale_lock(pair: tuple[Path, Path]):
    """A lock file that names a living process which holds nothing stops nobody."""
    a, b = pair
    _agreed(a, b)
    for side in pair:
        (side / ".bisync/lock").write_text(f"{os.getpid()}\n")
    edit(a / "edited", b"edited at A")
    sync(a, b)
    assert_equal(a, b)


def test_case_167_second_engine(here: tuple[Path, Path]):
    """A root at which another engine works is refused with 3, whatever the other root is."""
    a, b = here
    other = a.with_name("C")
    other.mkdir()
    for number in range(4000):
        put(a / f"{number % 40}/{number}", b"%d" % number)
    first = subprocess.Popen(
        command("sync", a, b), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    while first.poll() is None and not look_for_files(b):
        pass
    first.send_signal(signal.SIGSTOP)
    try:
        assert first.poll() is None, "the first engine was too fast for this test"
        sync(a, b, check=3)
        sync(a, other, check=3)
        sync(other, b, check=3)
        assert not (other / "0").exists()
    finally:
        first.send_signal(signal.SIGCONT)
        _, said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert_equal(a, b)


def look_for_files(root: Path) -> bool:
    """Whether anything of a tree is visible at its root."""
    return bool({*os.listdir(root)} - {".bisync", "rsync-rollback"})
