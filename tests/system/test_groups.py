"""Directories that somebody declared to be one thing: taken, decided and applied as a whole."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bisync
from bisync.errors import PathError
from bisync.fs import instant, perform
from bisync.fs.apply import Applier
from bisync.fs.bases import Bases
from bisync.fs.store import Store
from bisync.linux import subvolume
from tests.trees import environment, kept, look, run, sync

Pair = tuple[Path, Path]
CONTROL, LOGS = "global/control", "log"
SERVER = bisync.Declared(b"db", stamp=CONTROL.encode(), last=LOGS.encode())
WHOLE = bisync.Declared(b"db")
CONFIG = bisync.Config(groups=(SERVER,))


def turn(root: Path, number: int) -> dict[str, bytes | str | None]:
    """Bring a made-up server's directory to its state of a number; what that is."""
    db = root / "db"
    for folder in ("global", "base/1", LOGS, f"base/{number + 100}"):
        (db / folder).mkdir(parents=True, exist_ok=True)
    (db / CONTROL).write_bytes(b"checkpoint %d" % number)
    for name in range(5):
        (db / f"base/1/{name}").write_bytes(b"%d of %d " % (name, number) * 2000)
    (db / f"base/{number + 100}/0").write_bytes(b"new in %d" % number)
    (db / f"base/1/old{number - 1}").unlink(missing_ok=True)
    (db / f"base/1/old{number}").write_bytes(b"old of %d" % number)
    (db / "always").write_bytes(b"the same")
    for old in sorted((db / LOGS).iterdir()):
        if int(old.name) < number:  # it is used again, under a new name
            old.rename(db / LOGS / f"{number + 2:03}")
    for segment in range(number, number + 3):
        (db / LOGS / f"{segment:03}").touch()
    (db / LOGS / f"{number:03}").write_bytes(b"log of %d " % number * 4000)
    (db / "base/saved~").unlink(missing_ok=True)
    if (db / "base/saved").exists():
        (db / "base/saved").rename(db / "base/saved~")  # a save with a backup
    (db / "base/saved").write_bytes(b"saved in %d" % number)
    return whole(root)


def whole(root: Path) -> dict[str, bytes | str | None]:
    """All files of it."""
    there = look(root).items()
    return {path: data for path, data in there if path.startswith("db/") and data is not None}


@pytest.fixture(params=["xfs", "btrfs", "btrfs-clones", "ext4"])
def disks(
    request: pytest.FixtureRequest,
    file_system: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Pair:
    """Two roots on a file system; on btrfs with and without the right to make snapshots."""
    if request.param == "btrfs-clones":
        monkeypatch.setattr(Bases, "snapshot", lambda _self, _subvolume: None)
    base = file_system(request.param.split("-")[0]) / tmp_path.name
    for name in "AB":
        (base / name).mkdir(parents=True)
    return base / "A", base / "B"


def test_it_is_followed(disks: Pair):
    a, b = disks
    for number in range(4):
        turn(a, number)
        assert bisync.sync(a, b, CONFIG).exit_code == 0
        assert look(a) == look(b)
        assert bisync.sync(a, b, CONFIG).files_scanned
    assert not list((a / ".bisync").glob("bases/new*"))
    assert kept(b)


def _meddling(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[bytes]:
    """Do something after each file that is held, by its number; the paths that were held."""
    held: list[bytes] = []
    method = instant.Taker.take

    def take(self: instant.Taker) -> object:
        gather = type(self).gather

        def gathered(self, there, hold, files=None):  # type: ignore[no-untyped-def]
            def holding(path, info):  # type: ignore[no-untyped-def]
                found = hold(path, info)
                held.append(path)
                act(len(held))
                return found

            return gather(self, there, holding, files)

        with monkeypatch.context() as patch:
            patch.setattr(instant.Taker, "gather", gathered)
            return method(self)

    monkeypatch.setattr(instant.Taker, "take", take)
    return held


def test_the_order_in_which_it_is_taken(disks: Pair, monkeypatch: pytest.MonkeyPatch):
    """The control file first, the log last; all of it, on ext4 too."""
    a, b = disks
    turn(a, 1)
    held = _meddling(monkeypatch, lambda _number: None)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    if held[0] != CONTROL.encode():
        assert "btrfs" in str(a) and not _clones_only()  # one instant has no order
        return
    assert [path.startswith(LOGS.encode() + b"/") for path in held] == sorted(
        path.startswith(LOGS.encode() + b"/") for path in held
    )
    assert len(held) == len(whole(a))


def _clones_only() -> bool:
    return Bases.snapshot.__name__ == "<lambda>"


@pytest.mark.parametrize("times", [1, 1000])
def test_a_checkpoint_ends_while_it_is_taken(
    disks: Pair, monkeypatch: pytest.MonkeyPatch, times: int
):
    """It is taken again; if that never ends, it is busy, and nothing of it is shown."""
    a, b = disks
    old = turn(a, 1)
    (a / "beside").write_bytes(b"1")
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    turn(a, 2)
    (a / "beside").write_bytes(b"2")
    made = 0

    def checkpoint(number: int) -> None:
        nonlocal made
        if number % 3 == 0 and made < times:
            made += 1
            (a / "db" / CONTROL).write_bytes(b"checkpoint %d" % (made + 10))
            (a / "db/base/1/3").write_bytes(b"written by %d" % made)

    monkeypatch.setattr(instant, "_FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(instant, "_LONGEST_WAIT_S", 0.0)
    _meddling(monkeypatch, checkpoint)
    report = bisync.sync(a, b, CONFIG)
    assert look(b)["beside"] == b"2"
    assert made >= 1
    if _is_snapshot(a):
        # What was written after the snapshot is not in it.
        assert report.exit_code in (0, 24)
        assert look(b)["db/" + CONTROL] in (b"checkpoint 2", look(a)["db/" + CONTROL])
    elif times == 1:
        assert report.exit_code in (0, 24)  # 24 where it cannot be held still
        assert whole(b) in (whole(a), old)
    else:
        assert report.exit_code == 24
        assert whole(b) == old
    monkeypatch.undo()
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    assert look(a) == look(b)


def _is_snapshot(a: Path) -> bool:
    return "/btrfs/" in str(a) and not _clones_only()


@pytest.mark.parametrize("what", ["segment", "table", "folder", "gone"])
def test_files_come_and_go_while_it_is_taken(
    disks: Pair, monkeypatch: pytest.MonkeyPatch, what: str
):
    """It is looked at again; what is shown has all that the server needs."""
    a, b = disks
    turn(a, 1)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    turn(a, 2)
    once = iter([True])
    method = instant.Taker.take

    def take(self: instant.Taker) -> object:
        if next(once, False):
            match what:
                case "segment":
                    (a / "db" / LOGS / "900").write_bytes(b"the newest")
                case "table":
                    (a / "db/base/1/77").write_bytes(b"a table")
                case "folder":
                    (a / "db/base/500").mkdir()
                    (a / "db/base/500/1").write_bytes(b"a database")
                case _:
                    (a / "db/base/1/2").unlink()
            (a / "db" / CONTROL).write_bytes(b"checkpoint after it")
        return method(self)

    monkeypatch.setattr(instant.Taker, "take", take)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    assert look(a) == look(b)


def test_files_come_again_and_again(disks: Pair, monkeypatch: pytest.MonkeyPatch):
    """A server that fills segment after segment is met between two of them, sooner or later."""
    a, b = disks
    turn(a, 1)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    turn(a, 2)
    segments = iter(range(900, 912))
    method = instant.Taker.take

    def take(self: instant.Taker) -> object:
        if number := next(segments, None):
            (a / "db" / LOGS / str(number)).write_bytes(b"the newest")
        return method(self)

    monkeypatch.setattr(instant.Taker, "take", take)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    assert look(b)[f"db/{LOGS}/911"] == b"the newest"
    assert look(a) == look(b)


def test_a_segment_appears_behind_the_others(disks: Pair, monkeypatch: pytest.MonkeyPatch):
    """While its files are cloned the server goes on: the log has to be whole."""
    a, b = disks
    turn(a, 1)

    def append(number: int) -> None:
        if number == 2:
            (a / "db" / LOGS / "901").write_bytes(b"what the tables have already")

    _meddling(monkeypatch, append)
    report = bisync.sync(a, b, CONFIG)
    monkeypatch.undo()
    if report.exit_code == 0 and not _is_snapshot(a):
        assert look(b)["db/log/901"] == b"what the tables have already"
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    assert look(a) == look(b)


def test_written_to_while_it_is_read(disks: Pair, monkeypatch: pytest.MonkeyPatch):
    """Without a stamp of its own, all its files have to rest; where that cannot be, it is busy."""
    a, b = disks
    config = bisync.Config(groups=(WHOLE,))
    old = turn(a, 1)
    assert bisync.sync(a, b, config).exit_code == 0
    assert whole(b) == old
    turn(a, 2)
    monkeypatch.setattr(instant, "_LONGEST_WAIT_S", 0.0)

    def write(number: int) -> None:
        (a / "db/base/1/4").write_bytes(b"%d" % number)

    _meddling(monkeypatch, write)
    report = bisync.sync(a, b, config)
    if not _is_snapshot(a):
        assert report.exit_code == 24
        assert whole(b) == old
    monkeypatch.undo()
    assert bisync.sync(a, b, config).exit_code == 0
    assert look(a) == look(b)


def test_times_that_are_too_young(disks: Pair, monkeypatch: pytest.MonkeyPatch):
    """Two writes in one tick of the clock leave the same times: who relies on them waits."""
    a, b = disks
    turn(a, 1)
    monkeypatch.setattr(instant, "_TICK_NS", 10**12)
    monkeypatch.setattr(instant, "_LONGEST_WAIT_S", 0.0)
    wanted = 0 if _is_snapshot(a) else 24
    assert bisync.sync(a, b, bisync.Config(groups=(WHOLE,))).exit_code == wanted
    assert bool(whole(b)) == (wanted == 0)


def test_a_snapshot_that_a_crash_left(file_system: Callable[[str], Path], tmp_path: Path):
    base = file_system("btrfs") / tmp_path.name
    a, b = base / "A", base / "B"
    a.mkdir(parents=True)
    b.mkdir()
    turn(a, 1)
    words = ("--groups", toml(tmp_path, directory="db"))
    sync(a, b, *words)
    turn(a, 2)
    line = [sys.executable, "-c", CRASH, "bisync.fs.bases.Bases.open_snapshot", "0"]
    subprocess.run([*line, a, b], env=environment(), check=False)
    left = list((a / ".bisync/bases").iterdir())
    assert [path.name[:4] for path in left] == ["new."]
    assert (left[0] / tmp_path.name / "A/db/always").read_bytes() == b"the same"
    sync(a, b, *words)
    assert look(a) == look(b)
    assert not list((a / ".bisync/bases").iterdir())


CRASH = """
import importlib, os, signal, sys
import bisync
path, count = sys.argv[1].split("."), int(sys.argv[2])
owner = importlib.import_module(".".join(path[:3]))
for name in path[3:-1]:
    owner = getattr(owner, name)
act = getattr(owner, path[-1])

def wrapped(*words, **more):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return act(*words, **more)

setattr(owner, path[-1], wrapped)
rule = bisync.Declared(b"db", stamp=b"global/control", last=b"log")
print(bisync.sync(sys.argv[3], sys.argv[4], bisync.Config(groups=(rule,))).exit_code)
"""


@pytest.mark.parametrize("call", ["perform.rename_noreplace", "perform.swap", "store.Store.keep"])
def test_killed_between_two_files(here: Pair, call: str):
    """Recovery, before anything else, makes it the old state or the new one."""
    a, b = here
    other = a.parent / "C"
    other.mkdir()
    turn(a, 0)
    assert bisync.sync(a, b, CONFIG).exit_code == bisync.sync(b, other, CONFIG).exit_code == 0
    killed = forward = 0
    for count in range(40):
        old, new = whole(b), turn(a, count + 1)
        line = [sys.executable, "-c", CRASH, f"bisync.fs.{call}", str(count)]
        done = subprocess.run([*line, a, b], env=environment(), capture_output=True, check=False)
        killed += done.returncode == -9
        bisync.sync(b, other, CONFIG)  # another pair of the root: it recovers, and knows no A
        assert whole(b) in (old, new), count
        forward += whole(b) == new and done.returncode == -9
        assert bisync.sync(a, b, CONFIG).exit_code == 0
        assert whole(b) == new
        assert look(a) == look(b)
        if done.returncode == 0:
            break
    assert killed >= 3 and forward >= 2
    assert done.returncode == 0


@pytest.mark.parametrize("also", [False, True], ids=["store", "and the stage"])
def test_the_store_is_full(here: Pair, monkeypatch: pytest.MonkeyPatch, also: bool):
    """No half of it: what was replaced waits in the stage; the next run brings it to the store."""
    a, b = here
    turn(a, 1)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    old, new = whole(b), turn(a, 2)
    keep, move, left = Store.keep, perform.rename_noreplace, 3

    def full(*words: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise PathError("cannot keep the old version: No space left on device")
        return keep(*words, **more)

    def stuck(*words: Any) -> Any:
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return move(*words)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "keep", full)
        if also:
            patch.setattr(perform, "rename_noreplace", stuck)
        report = bisync.sync(a, b, CONFIG)
    assert report.exit_code == 23
    assert any("waits in the stage" in met.reason for met in report.met)
    assert whole(b) in (old, new)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    assert whole(a) == whole(b) == new
    lost = {data for data in old.values() if isinstance(data, bytes)} - set(new.values())
    assert lost <= {data for _, data in kept(b)}
    assert not [path for path in (b / ".bisync").rglob("*") if path.parent.name in ("in", "out")]


@pytest.mark.parametrize("policy", list(bisync.Policy))
def test_both_sides_wrote(here: Pair, policy: bisync.Policy):
    """One side's, whole; or nothing until a person says."""
    a, b = here
    turn(a, 1)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    mine = turn(a, 2)
    turn(b, 3)
    (b / "db/base/1/only here").write_bytes(b"1")
    theirs = whole(b)
    config = bisync.Config(groups=(SERVER,), conflict=policy)
    report = bisync.sync(a, b, config)
    if policy in (bisync.Policy.MANUAL, bisync.Policy.KEEP_BOTH):
        assert report.exit_code == 23
        assert (whole(a), whole(b)) == (mine, theirs)
        return
    wanted = mine if policy in (bisync.Policy.ALPHA, bisync.Policy.OLDEST) else theirs
    assert report.exit_code == 0
    assert whole(a) == whole(b) == wanted
    assert report.conflicts
    lost = theirs if wanted is mine else mine
    stored = {data for side in here for _, data in kept(side)}
    assert {data for data in lost.values() if isinstance(data, bytes)} <= stored | {
        data for data in wanted.values() if isinstance(data, bytes)
    }


@pytest.mark.parametrize("name", ["base/1/3", "always"])
def test_somebody_works_with_it_at_the_other_side(here: Pair, name: str):
    """A server runs there: a file that would stay as it is shows that, too."""
    a, b = here
    old = turn(a, 1)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    new = turn(a, 2)
    with (b / "db" / name).open("r+b"):
        assert bisync.sync(a, b, CONFIG).exit_code == 24
        assert whole(b) == old
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    assert whole(b) == new


def test_it_would_lose_most_of_its_files(here: Pair):
    """Somebody deleted tables: nothing of it goes on until a person says so."""
    a, b = here
    turn(a, 1)
    for number in range(60):
        (a / f"db/base/1/t{number}").write_bytes(b"%d" % number)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    old = whole(b)
    for number in range(55):
        (a / f"db/base/1/t{number}").unlink()
    new = turn(a, 2)
    report = bisync.sync(a, b, CONFIG)
    assert report.exit_code == 25
    assert report.withheld >= 55
    assert whole(b) == old
    assert whole(a) == new
    assert bisync.sync(a, b, bisync.Config(groups=(SERVER,), yes=True)).exit_code == 0
    assert whole(b) == whole(a) == new


def test_all_of_it_goes(here: Pair):
    """That is a deletion like any other."""
    a, b = here
    turn(a, 1)
    (a / "other").write_bytes(b"1")
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    subprocess.run(["rm", "-r", a / "db"], check=True)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    assert not (b / "db").exists()


@pytest.mark.parametrize("how", ["control", "link"])
def test_it_cannot_be_taken_as_a_whole(here: Pair, tmp_path: Path, how: str):
    a, b = here
    old = turn(a, 1)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    turn(a, 2)
    if how == "control":
        (a / "db" / CONTROL).unlink()
    else:
        (a / "db" / LOGS).rename(tmp_path / "log")
        (a / "db" / LOGS).symlink_to(tmp_path / "log")
    report = bisync.sync(a, b, CONFIG)
    assert report.exit_code == 23
    assert whole(b) == old


def test_other_files_go_on(here: Pair):
    """A group that waits makes nothing else wait, and a later run needs no event for it."""
    a, b = here
    turn(a, 1)
    with _open_for_writing(a / "db/always"):
        (a / "beside").write_bytes(b"1")
        report = bisync.sync(a, b, CONFIG)
        assert look(b)["beside"] == b"1"
    assert report.exit_code in (0, 24)
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    assert look(a) == look(b)


@contextlib.contextmanager
def _open_for_writing(path: Path) -> Iterator[None]:
    with path.open("r+b"):
        yield


def test_a_plan_changes_nothing(here: Pair):
    a, b = here
    turn(a, 1)
    assert bisync.plan(a, b, CONFIG).changes
    assert not whole(b)


@pytest.mark.parametrize(
    ("paths", "said"),
    [(["db", "db/base"], "part of another"), ([""], "below the root"), (["../db"], "below")],
)
def test_groups_that_make_no_sense(here: Pair, paths: list[str], said: str):
    a, b = here
    words = [word for path in paths for word in ("--postgresql", path)]
    assert said in run("sync", *words, a, b, check=2).said


def test_the_way_to_a_subvolume(file_system: Callable[[str], Path], tmp_path: Path):
    top = file_system("btrfs")
    folder = top / tmp_path.name / "a" / "b"
    folder.mkdir(parents=True)
    for path in (folder, top):
        fd = os.open(path, os.O_RDONLY)
        found, below = subvolume.place_in_subvolume(fd)
        assert os.fstat(found).st_ino == 256
        assert os.stat(below or b".", dir_fd=found).st_ino == os.fstat(fd).st_ino
        os.close(found)
        os.close(fd)
    other = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError):
        subvolume.place_in_subvolume(other)
    os.close(other)


def toml(folder: Path, **keys: str | float | list[str]) -> Path:
    """A file with one group."""
    path = folder / "groups.toml"
    lines = [f"{key.replace('_', '-')} = {value!r}" for key, value in keys.items()]
    path.write_text("\n".join(["[[group]]", *lines, ""]))
    return path


def test_a_program_that_is_made_to_hold_still(here: Pair, tmp_path: Path):
    """Both commands run once, in turn, with the directory's path; between them all is read."""
    a, b = here
    turn(a, 1)
    said = tmp_path / "said"
    words = (
        "--groups",
        toml(
            tmp_path,
            directory="db",
            freeze=f'echo "freeze $BISYNC_GROUP" >> {said}; echo flushed > "$BISYNC_GROUP/always"',
            thaw=f"cat {b}/db/always >> {said} 2>&1; echo thaw >> {said}",
        ),
    )
    sync(a, b, *words)
    first, *middle, last = said.read_text().splitlines()
    assert (first, last) == (f"freeze {a}/db", "thaw")
    if not _has_clones(a):
        assert middle == ["flushed"]  # it was applied before it went on
    assert look(b)["db/always"] == b"flushed\n"
    assert look(a) == look(b)


def _has_clones(root: Path) -> bool:
    words = ["cp", "--reflink=always", root / "db/always", root.parent / "probe"]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("how", ["freeze", "thaw", "slow"])
def test_a_command_that_fails(here: Pair, tmp_path: Path, how: str):
    """It is a problem that is said; what could not be frozen is not taken."""
    a, b = here
    turn(a, 1)
    (a / "beside").write_bytes(b"1")
    said = tmp_path / "said"
    commands = {"freeze": "true", "thaw": f"echo thaw >> {said}"}
    commands[how if how != "slow" else "freeze"] = "false" if how != "slow" else "sleep 60"
    done = sync(a, b, "--groups", toml(tmp_path, directory="db", limit=0.5, **commands), check=23)
    assert f"to {'freeze' if how == 'slow' else how} it failed" in done.said
    assert bool(whole(b)) == (how == "thaw")
    assert look(b)["beside"] == b"1"
    if how != "thaw":
        assert set(said.read_text().splitlines()) == {"thaw"}  # whatever it had frozen


def test_it_may_not_hold_still_for_long(here: Pair, tmp_path: Path):
    """After its time it goes on; if it writes, what was read of it does not count."""
    a, b = here
    old = turn(a, 1)
    sync(a, b)
    turn(a, 2)
    script = """
import sys, time, bisync
from bisync.fs import contents, instant
read, take = contents.Contents.read, instant.Taker.take
runs = 0
def taken(self):
    global runs
    runs = open(sys.argv[3]).read().count("thaw")
    return take(self)
def slow(self, *words, **more):
    deadline = time.monotonic() + 30
    while open(sys.argv[3]).read().count("thaw") <= runs and time.monotonic() < deadline:
        time.sleep(0.01)
    return read(self, *words, **more)
contents.Contents.read, instant.Taker.take = slow, taken
config = bisync.Config(groups=bisync.read_groups(sys.argv[4]))
print(bisync.sync(sys.argv[1], sys.argv[2], config).exit_code)
"""
    said = tmp_path / "said"
    said.touch()
    groups = toml(
        tmp_path,
        directory="db",
        limit=0.5,
        freeze="true",
        thaw=f"echo written > {a}/db/base/1/4; echo thaw >> {said}",
    )
    line = [sys.executable, "-c", script, a, b, said, groups]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True)
    if not _has_clones(a):
        assert done.stdout == "24\n"
        assert whole(b) == old
    else:
        assert done.stdout == "0\n"


def test_killed_while_it_holds_still(here: Pair, tmp_path: Path):
    """Nothing stays frozen: who froze it lives longer than the engine."""
    a, b = here
    turn(a, 1)
    said = tmp_path / "said"
    os.mkfifo(said)
    groups = toml(tmp_path, directory="db", limit=300, freeze="true", thaw=f"echo thaw > {said}")
    script = """
import os, signal, sys, bisync
from bisync.fs import instant
instant.Taker.take = lambda self: os.kill(os.getpid(), signal.SIGKILL)
bisync.sync(sys.argv[1], sys.argv[2], bisync.Config(groups=bisync.read_groups(sys.argv[3])))
"""
    line = [sys.executable, "-c", script, a, b, groups]
    assert subprocess.run(line, env=environment(), check=False).returncode == -9
    assert said.read_text() == "thaw\n"


def test_a_snapshot_of_somebody_elses(file_system: Callable[[str], Path], tmp_path: Path):
    """An ext4 that never rests, read from a snapshot below it; a copy is no snapshot."""
    with contextlib.ExitStack() as cleanup:
        a, b = _below_a_snapshot(cleanup, file_system, tmp_path)
        old = turn(a, 1)
        subprocess.run(["sync", "-f", a], check=True)
        mount = (
            f"cp --sparse=always {tmp_path}/disk {tmp_path}/frozen && "
            f"mount -o loop,ro,noload {tmp_path}/frozen {tmp_path}/snapshot && "
            f"echo later > {a}/db/base/1/4"
        )
        words = {"directory": "db", "freeze": mount, "read_from": f"{tmp_path}/snapshot/A/db"}
        words["root"] = str(a)
        groups = toml(tmp_path, thaw=f"umount {tmp_path}/snapshot", limit=60, **words)
        sync(a, b, "--groups", groups)
        assert whole(b) == old
        assert look(a)["db/base/1/4"] == b"later\n"
        assert not os.path.ismount(tmp_path / "snapshot")
        subprocess.run(["cp", "-a", a / "db", tmp_path / "copy"], check=True)
        (a / "db/always").write_bytes(b"changed")
        groups = toml(tmp_path, directory="db", root=str(a), read_from=f"{tmp_path}/copy")
        done = sync(a, b, "--groups", groups, check=(23, 24))
        assert "another file" in done.said
        assert whole(b) == old


def _below_a_snapshot(
    cleanup: contextlib.ExitStack, file_system: Callable[[str], Path], folder: Path
) -> Pair:
    file_system("ext4")  # skips where nothing can be mounted
    for name in ("mount", "snapshot", "B"):
        (folder / name).mkdir()
    with (folder / "disk").open("wb") as disk:
        disk.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", folder / "disk"], check=True)
    subprocess.run(["mount", "-o", "loop", folder / "disk", folder / "mount"], check=True)
    cleanup.callback(subprocess.run, ["umount", "-l", folder / "mount"], check=False)
    (folder / "mount/A").mkdir()
    return folder / "mount/A", folder / "B"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[group]]", "needs its directory"),
        ("[[group]]\ndirectroy = 'x'", "directory?"),
        ("[group]\ndirectory = 'x'", "[[group]]"),
        ("[[group]]\ndirectory = 1", "not understood"),
        ("[[group]]\ndirectory = 'x'\nkind = 'oracle'", "postgresql"),
        ("[[group]]\ndirectory = 'x'\nlast = 'y'", "needs a stamp"),
        ("[[group]]\ndirectory = 'x'\nstamp = '../y'\n", "no path below"),
        ("[[group]]\ndirectory = 'x'\nkind = 'postgresql'\nstamp = 'y'", "its own"),
        ("[[group]]\ndirectory = 'x'\nthaw = 'y'", "needs a freeze"),
        ("[[group]]\ndirectory = 'x'\nread-from = 'y'", "from / on"),
        ("[[group]]\ndirectory = 'x'\nread-from = '/y'", "needs root"),
        ("[[group]]\ndirectory = 'x'\nfreeze = \"a\\u0000b\"", "NUL"),
        ("[[group]]\ndirectory = '.bisync'", "engine's own"),
        ("[[group]]\ndirectory = 'x'\nfreeze = 'y'\nlimit = 0", "seconds"),
        ("[[group]]\ndirectory = 'x'\nexclude = [1]", "exclude"),
        ("[[groups]]\ndirectory = 'x'", "groups is not known"),
        ("directory", "groups.toml"),
    ],
)
def test_a_file_that_is_not_understood(here: Pair, tmp_path: Path, text: str, said: str):
    (tmp_path / "groups.toml").write_text(text)
    assert said in run("sync", "--groups", tmp_path / "groups.toml", *here, check=2).said


def test_what_is_left_out_of_it(here: Pair, tmp_path: Path):
    a, b = here
    turn(a, 1)
    for name in ("server.pid", "base/1/deep.pid", "top", "base/top"):
        (a / "db" / name).write_bytes(b"1")
    left_out = ["*.pid", "!deep.pid", "base/1/?", "/top"]
    sync(a, b, "--groups", toml(tmp_path, directory="/db/", exclude=left_out))
    assert not (b / "db/server.pid").exists()
    assert {path.name for path in (b / "db/base/1").iterdir()} == {"deep.pid", "old1"}
    assert not (b / "db/top").exists()
    assert (b / "db/base/top").exists()
    assert (b / "db" / CONTROL).exists()


def _before_apply(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something once, when all of a batch is staged and nothing of it is done."""
    bind, once = Applier._bind, iter([True])

    def bound(self: Applier, *words: Any) -> None:
        bind(self, *words)
        if next(once, False):
            act()

    monkeypatch.setattr(Applier, "_bind", bound)


@pytest.mark.parametrize("what", ["write", "writer", "new", "gone", "link"])
def test_somebody_works_with_it_there_meanwhile(
    here: Pair, monkeypatch: pytest.MonkeyPatch, what: str
):
    """Between the scan and the first step: also in what would stay as it is."""
    a, b = here
    (a / "db").mkdir()
    (a / "db/link").symlink_to("one")
    for name in ("one", "two", "three"):
        (a / "db" / name).write_bytes(b"old")
    config = bisync.Config(groups=(WHOLE,), conflict=bisync.Policy.NEWEST)
    assert bisync.sync(a, b, config).exit_code == 0
    for name in ("one", "two"):
        (a / "db" / name).write_bytes(b"new")
    with contextlib.ExitStack() as cleanup:

        def work() -> None:
            match what:
                case "write":
                    (b / "db/three").write_bytes(b"theirs")
                case "writer":
                    file = cleanup.enter_context((b / "db/three").open("r+b", buffering=0))
                    file.write(b"theirs")
                case "new":
                    (b / "db/four").write_bytes(b"theirs")
                case "gone":
                    (b / "db/three").unlink()
                case _:
                    (b / "db/link").unlink()
                    (b / "db/link").symlink_to("two")

        _before_apply(monkeypatch, work)
        bisync.sync(a, b, config)
        mine = {"one": b"new", "two": b"new", "three": b"old"}
        for root in here:
            found = {path[3:]: data for path, data in whole(root).items() if path != "db/link"}
            target = (root / "db/link").readlink().name
            assert (found == mine and target == "one") or "new" not in map(str, found.values())
            assert (found == mine) == (found["one"] == b"new")


def test_a_link_changes_before_it_is_taken(disks: Pair, monkeypatch: pytest.MonkeyPatch):
    """Which file counts, a link says: it belongs to the same instant."""
    a, b = disks
    (a / "db").mkdir()
    for name in ("one", "two"):
        (a / "db" / name).write_bytes(b"good")
    (a / "db/current").symlink_to("one")
    config = bisync.Config(groups=(WHOLE,))
    assert bisync.sync(a, b, config).exit_code == 0
    (a / "db/two").write_bytes(b"good 2")
    take, once = instant.Taker.take, iter([True])

    def taken(self: instant.Taker) -> object:
        if next(once, False):
            (a / "db/current").unlink()
            (a / "db/current").symlink_to("two")
            (a / "db/one").write_bytes(b"of no use")
        return take(self)

    monkeypatch.setattr(instant.Taker, "take", taken)
    assert bisync.sync(a, b, config).exit_code == 0
    assert (b / "db/current").read_bytes() == b"good 2"
    assert look(a) == look(b)


def _link(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return make


def _change(db: Path, shape: str) -> None:
    def new(*names: str) -> None:
        for name in names:
            (db / name).write_bytes(b"new " + name.encode() * 9)

    match shape:
        case "link changed":
            _link("b")(db / "current")
        case "link new":
            _link("b")(db / "other")
        case "file to link":
            _link("b")(db / "c")
        case "file to folder":
            (db / "c").unlink()
            (db / "c/deep").mkdir(parents=True)
            new("c/x", "c/deep/y")
        case "another name":
            os.link(db / "c", db / "c2")
        case "a name less":
            (db / "d2").unlink()
        case "swapped":
            (db / "c").rename(db / "t")
            (db / "d").rename(db / "c")
            (db / "t").rename(db / "d")
        case "rotated":
            (db / "c").rename(db / "e")
            (db / "b").rename(db / "c")
            new("b")
        case "folder gone":
            subprocess.run(["rm", "-r", db / "sub"], check=True)
        case "saved":
            (db / "c").rename(db / "c~")
            new("c")
        case "folders":
            (db / "n/m").mkdir(parents=True)
            (db / "c").rename(db / "n/m/c")
            new("n/m/f", "n/g")
    new("a", "b2")


SHAPES = [
    "link changed", "link new", "file to link", "file to folder", "another name", "a name less",
    "swapped", "rotated", "folder gone", "saved", "folders",
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_killed_between_two_names(here: Pair, shape: str):
    """Whatever its steps are: the command and the next run make it the old state or the new one."""
    a, b = here
    db, other = a / "db", a.parent / "C"
    (db / "sub").mkdir(parents=True)
    for name in ("a", "b", "b2", "c", "d", "e", "sub/x", "sub/y"):
        (db / name).write_bytes(b"old " + name.encode() * 9)
    os.link(db / "d", db / "d2")
    (db / "current").symlink_to("a")
    config = bisync.Config(groups=(bisync.Declared(b"db", stamp=b"a"),))
    crash = CRASH.replace('stamp=b"global/control", last=b"log"', 'stamp=b"a"')
    killed = 0
    for count in range(40):
        for root in (b, other):
            subprocess.run(["rm", "-rf", root], check=True)
            root.mkdir()
        subprocess.run(["rm", "-rf", a / ".bisync", a / "rsync-rollback"], check=True)
        copy = a.parent / "copy"
        if count == 0:
            subprocess.run(["cp", "-a", db, copy], check=True)
        subprocess.run(["rm", "-rf", db], check=True)
        subprocess.run(["cp", "-a", copy, db], check=True)
        assert bisync.sync(a, b, config).exit_code == 0
        old = whole(b)
        _change(db, shape)
        line = [sys.executable, "-c", crash, "bisync.linux.rename.check", str(count), a, b]
        done = subprocess.run(line, env=environment(), capture_output=True, check=False)
        if done.returncode != -9:
            assert done.stdout == b"0\n", done.stderr
            assert look(a) == look(b)
            break
        killed += 1
        if count % 2:
            bisync.recover(b)
        else:
            bisync.sync(b, other, config)
        assert whole(b) in (old, whole(a)), count
        assert bisync.sync(a, b, config).exit_code == 0
        assert look(a) == look(b)
    assert killed >= 3
    assert done.returncode == 0


@pytest.mark.parametrize("policy", [bisync.Policy.NEWEST, bisync.Policy.BETA, bisync.Policy.MANUAL])
@pytest.mark.parametrize("where", ["here", "there", "top"])
def test_a_directory_of_it_is_renamed(here: Pair, policy: bisync.Policy, where: str):
    """A crash could leave that in part: nothing of it is done, and it is said."""
    a, b = here
    turn(a, 1)
    (a / "beside").write_bytes(b"1")
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    mover = b if where == "there" else a
    if where == "top":
        (a / "db").rename(a / "db2")
        (a / "db2/always").write_bytes(b"edited")
    else:
        (mover / "db/base").rename(mover / "db/bases")
        (a / "db" / CONTROL).write_bytes(b"checkpoint 9")
    (a / "beside").write_bytes(b"2")
    mine, theirs = look(a), look(b)
    if where == "top":  # that is a rename like any other; what is in it waits
        theirs = {path.replace("db", "db2", 1): data for path, data in theirs.items()}
    theirs["beside"] = b"2"
    config = bisync.Config(groups=(SERVER,), conflict=policy)
    for _ in range(1 if where == "top" else 2):
        assert bisync.sync(a, b, config).exit_code == 23
        assert (look(a), look(b)) == (mine, theirs)


@pytest.mark.parametrize("seed", range(12))
def test_never_files_of_each(here: Pair, seed: int):
    """Whatever both do, and whatever the policy: it is that of one side, or untouched."""
    a, b = here
    chance = random.Random(seed)
    for root in here:
        (root / "db/sub").mkdir(parents=True)
    for name in ("a", "b", "c", "sub/x", "sub/y"):
        (a / "db" / name).write_bytes(name.encode())
    config = bisync.Config(groups=(WHOLE,))
    while bisync.sync(a, b, config).exit_code:
        pass
    for number in range(3):
        for root in here:
            for _ in range(chance.randint(0, 3)):
                _something(root, chance, b"%d" % number)
        before = [whole(root) for root in here]
        policy = chance.choice(list(bisync.Policy))
        report = bisync.sync(a, b, bisync.Config(groups=(WHOLE,), conflict=policy))
        after = [whole(root) for root in here]
        if report.exit_code == 0:
            assert after[0] == after[1]
        for mine, was in zip(after, before, strict=True):
            assert mine == was or mine in before, (policy, report.met)


def _something(root: Path, chance: random.Random, mark: bytes) -> None:
    db = root / "db"
    there = sorted(path for path in db.rglob("*") if path.is_file())
    one = chance.choice(there) if there else db / "a"
    match chance.randrange(6):
        case 0 | 1:
            one.parent.mkdir(exist_ok=True)
            one.write_bytes(one.name.encode() + mark + root.name.encode())
        case 2:
            one.unlink(missing_ok=True)
        case 3:
            (one.parent / f"n{chance.randrange(3)}").write_bytes(mark + root.name.encode())
        case 4:
            if there:
                one.rename(db / f"m{chance.randrange(3)}")
        case _:
            folder = db / f"d{chance.randrange(2)}"
            folder.mkdir(exist_ok=True)
            (folder / "f").write_bytes(mark + root.name.encode())


def test_a_directory_of_it_goes_while_others_wait_for_a_person(here: Pair):
    """Its deletions are part of its new state; those beside it are not."""
    a, b = here
    turn(a, 1)
    (a / "many").mkdir()
    for number in range(60):
        (a / f"many/{number}").write_bytes(b"1")
    assert bisync.sync(a, b, CONFIG).exit_code == 0
    subprocess.run(["rm", "-r", a / "many", a / "db/base/101"], check=True)
    (a / "db" / CONTROL).write_bytes(b"checkpoint 7")
    assert bisync.sync(a, b, CONFIG).exit_code == 25
    assert whole(a) == whole(b)
    assert not (b / "db/base/101").exists()
    assert (b / "many/59").exists()


def test_in_a_quota_project(file_system: Callable[[str], Path], tmp_path: Path):
    """No rename leads into it, so its files cannot change together: nothing of it is done."""
    base = file_system("xfs") / tmp_path.name
    a, b = base / "A", base / "B"
    (b / "db").mkdir(parents=True)
    a.mkdir()
    done = subprocess.run(["chattr", "-p", "42", "+P", b / "db"], check=False)
    if done.returncode:
        pytest.skip("chattr knows no projects")
    turn(a, 1)
    report = bisync.sync(a, b, CONFIG)
    assert report.exit_code == 23
    assert any("quota project" in met.reason for met in report.met)
    assert not whole(b)


@pytest.mark.parametrize("path", ["nowhere", "d b"])
def test_a_group_that_is_not_there(here: Pair, path: str):
    """Its name may be wrong: then its files are not kept together, and a person has to know."""
    a, b = here
    turn(a, 1)
    assert "neither side has" in sync(a, b, "--postgresql", path, check=23).said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_keeper_is_stopped_too(here: Pair, tmp_path: Path, number: int):
    """A service manager stops all its processes: what is frozen thaws all the same."""
    a, b = here
    turn(a, 1)
    said = tmp_path / "said"
    groups = toml(tmp_path, directory="db", limit=60, freeze="true", thaw=f"echo thaw >> {said}")
    script = """
import os, signal, sys, bisync
from bisync.fs import freezing, instant
take = instant.Taker.take
def taken(self):
    os.kill(freezing.LAST.pid, int(sys.argv[4]))
    return take(self)
start = freezing.Freeze.__init__
def started(self, *words):
    start(self, *words)
    freezing.LAST = self._keeper
freezing.Freeze.__init__ = started
instant.Taker.take = taken
config = bisync.Config(groups=bisync.read_groups(sys.argv[3]))
print(bisync.sync(sys.argv[1], sys.argv[2], config).exit_code)
"""
    line = [sys.executable, "-c", script, a, b, groups, str(int(number))]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert set(said.read_text().splitlines()) == {"thaw"}
    assert whole(a) == whole(b)
