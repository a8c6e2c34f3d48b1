"""Big files that are written into: the same inode, an undo, and old versions as what was there."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import bisync
from bisync.core.ignore import Matcher
from bisync.core.retention import Retention
from bisync.fs.overwriting import Overwriting
from bisync.fs.replica import Options, Replica
from bisync.fs.retention import tend
from bisync.fs.walk import ScanRules
from bisync.linux.lease import Lease
from tests.trees import environment, kept, look, run, sync

Pair = tuple[Path, Path]
MIB = 1 << 20
SIZE = 5 * MIB + 777
HOUR = 3600 * 10**9
IN_PLACE = ("--apply", "in-place")


def _image(path: Path, size: int = SIZE, seed: int = 1) -> bytes:
    data = random.Random(seed).randbytes(size)
    path.write_bytes(data)
    return data


def _write(path: Path, *changes: tuple[int, bytes], size: int | None = None) -> bytes:
    with path.open("r+b") as file:
        for at, text in changes:
            file.seek(at)
            file.write(text)
        if size is not None:
            file.truncate(size)
    return path.read_bytes()


def _deltas(root: Path) -> list[Path]:
    return sorted((root / "rsync-rollback").rglob("*.bisync-delta"))


def _restored(root: Path, name: str, tmp: Path) -> list[bytes]:
    """Each earlier version of a file that history tells of, the oldest first."""
    found = []
    rows = [json.loads(line) for line in run("history", "--json", root / name).stdout.splitlines()]
    for number, row in enumerate(row for row in rows if row["action"] == "modified"):
        assert row["complete"], row
        bisync.restore(root, name, row["time_ns"] - 1, tmp / f"{name}-{number}")
        found.append((tmp / f"{name}-{number}").read_bytes())
        (tmp / f"{name}-{number}").unlink()
    return found


def test_written_into(pair: Pair, tmp_path: Path):
    """It grows, shrinks, gets a hole; each version comes back from what was written over."""
    a, b = pair
    versions = [_image(a / "f")]
    sync(a, b)
    inode = (b / "f").stat().st_ino
    for change in (
        lambda f: _write(f, (3 * MIB + 5, b"hello"), (7, b"x" * 9000)),
        lambda f: _write(f, (SIZE, b"tail" * 3000), (MIB, b"y")),
        lambda f: _write(f, (5, b"z"), size=SIZE - 400_001),
        lambda f: _write(f, (2 * MIB, bytes(MIB))),
        lambda f: _write(f, size=6 * MIB),
        lambda f: _write(f, (MIB, versions[0][MIB : MIB + 10])),
    ):
        versions.append(change(a / "f"))
        done = sync(a, b, *IN_PLACE).summary
        assert (done["updated"], done["kept"]) == (1, 1)
        assert look(b)["f"] == versions[-1]
        assert (b / "f").stat().st_ino == inode
        assert (b / "f").stat().st_mtime_ns == (a / "f").stat().st_mtime_ns
    assert len(_deltas(b)) == 6
    assert sum(path.stat().st_size for path in _deltas(b)) < 2 * MIB
    assert not list((b / ".bisync/undo").iterdir())
    assert not list((b / ".bisync/in").iterdir())
    assert _restored(b, "f", tmp_path) == versions[:-1]
    assert sync(a, b).summary["updated"] == 0
    # From there to where it was, and back again.
    bisync.restore(b, "f", None)
    assert look(b)["f"] == versions[-2]
    sync(a, b, *IN_PLACE)
    assert look(a)["f"] == versions[-2]


def test_auto(pair: Pair, request: pytest.FixtureRequest):
    """From 64 MiB on, where it cannot be cloned, if little of it changes."""
    a, b = pair
    with (a / "f").open("wb") as file:
        file.truncate(70 * MIB)
        file.write(random.Random(2).randbytes(3 * MIB))
    sync(a, b)
    inode = (b / "f").stat().st_ino
    _write(a / "f", (MIB, b"hello"))
    sync(a, b)
    clones = request.node.callspec.params["fsmount"] in ("xfs", "btrfs")
    assert ((b / "f").stat().st_ino == inode) is not clones
    assert len(_deltas(b)) == (0 if clones else 1)
    _write(a / "f", (0, random.Random(3).randbytes(18 * MIB)))  # more than a quarter
    inode = (b / "f").stat().st_ino
    sync(a, b)
    assert (b / "f").stat().st_ino != inode
    assert look(a)["f"] == look(b)["f"]
    _write(a / "f", (MIB, b"again"))
    inode = (b / "f").stat().st_ino
    sync(a, b, "--apply", "replace")
    assert (b / "f").stat().st_ino != inode
    assert look(a)["f"] == look(b)["f"]


def test_only_what_the_other_side_has_replaced_itself(pair: Pair):
    """An edit, a conflict's loser: kept whole, whatever was asked for."""
    a, b = pair
    first = _image(a / "f")
    _image(a / "g", seed=2)
    sync(a, b)
    mine = _write(b / "f", (MIB, b"mine"))
    sync(a, b, *IN_PLACE)  # written into at alpha? no: nobody installed that one
    assert [content for _, content in kept(a)] == [first]
    os.utime(b / "g", ns=(1, 1))
    loser = _write(b / "g", (5, b"older"))
    os.utime(b / "g", ns=(10**18, 10**18))
    _write(a / "g", (5, b"newer"))
    sync(a, b, *IN_PLACE)
    assert [content for _, content in kept(b)] == [loser]
    _write(a / "f", (0, b"next"))
    sync(a, b, *IN_PLACE)
    assert mine in [content for _, content in kept(b)]
    assert not _deltas(a)
    assert not _deltas(b)


def test_somebody_has_it_open(pair: Pair):
    """Who reads keeps the old version; who can write makes it busy."""
    a, b = pair
    old = _image(a / "f")
    sync(a, b)
    new = _write(a / "f", (MIB, b"hello"))
    with (b / "f").open("rb") as file:
        sync(a, b, *IN_PLACE)
        assert file.read() == old
    assert look(b)["f"] == new
    assert [content for _, content in kept(b)] == [old]
    newer = _write(a / "f", (MIB, b"world"))
    with (b / "f").open("r+b"):
        assert sync(a, b, *IN_PLACE, check=24).summary["busy"] == 1
        assert look(b)["f"] == new
    sync(a, b, *IN_PLACE)
    assert look(b)["f"] == newer
    assert len(_deltas(b)) == 1


def test_nobody_reads_a_mix(here: Pair):
    """Whoever opens it while it is written waits, and reads one version."""
    a, b = here
    pages = 6 * MIB // 4096
    (a / "f").write_bytes(b"\0" * 4096 * pages)
    sync(a, b)
    mixed: list[set[int]] = []
    seen: set[int] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            found = set((b / "f").read_bytes()[::4096])
            seen.update(found)
            if len(found) != 1:
                mixed.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(1, 9):
            _write(a / "f", (0, bytes([number]) * 4096 * pages))
            sync(a, b, *IN_PLACE)
    finally:
        done.set()
        reader.join()
    assert not mixed
    assert len(seen) >= 2


def test_no_room(here: Pair, mount: Callable[..., None]):
    """A file that cannot grow is what it was."""
    a, b = here
    mount(b, "-t", "tmpfs", "-o", "size=16m", "none")
    _image(a / "f")
    sync(a, b)
    before = (look(b)["f"], (b / "f").stat().st_mtime_ns)
    _write(a / "f", (0, b"x" * 4096), (SIZE, random.Random(4).randbytes(6 * MIB)))
    with (b / "filler").open("wb") as file:
        file.write(bytes(4 * MIB))
    sync(a, b, *IN_PLACE, check=23)
    assert (look(b)["f"], (b / "f").stat().st_mtime_ns) == before
    assert not list((b / ".bisync/undo").iterdir())
    (b / "filler").unlink()
    (a / "filler").unlink(missing_ok=True)
    _write(a / "f", size=SIZE + MIB)
    sync(a, b, *IN_PLACE)
    assert look(a)["f"] == look(b)["f"]


CRASH = """
import importlib, os, sys
from bisync.cli.main import main
module, cls, name = sys.argv[1].split(":")
owner, left, after = getattr(importlib.import_module(module), cls), int(sys.argv[2]), sys.argv[3]
real = getattr(owner, name)

def some(self, *args, **more):
    global left
    left -= 1
    if left < 0 and after == "half":
        offset, data = args
        real(self, offset, data[:len(data) // 2 // 4096 * 4096])
    elif left >= 0 or after == "after":
        done = real(self, *args, **more)
    if left < 0:
        os.kill(os.getpid(), 9)
    return done

setattr(owner, name, some)
sys.exit(main(sys.argv[4:]))
"""
PUT = "bisync.fs.overwriting:Overwriting:_put"


def _killed(where: str, count: int, how: str, *words: str | Path) -> None:
    """Kill a run at a call of a method: before it, after it, or when half of it was written."""
    line = [sys.executable, "-c", CRASH, where, str(count), how, *words]
    done = subprocess.run(line, check=False, env=environment(), stdout=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL


def _changed(a: Path, b: Path) -> tuple[bytes, bytes]:
    old = _image(a / "f")
    sync(a, b)
    return old, _write(a / "f", *((n * 512 * 1024 + 4096, b"%d" % n * 20000) for n in range(10)))


def _crashed(a: Path, b: Path, after: int) -> tuple[bytes, bytes]:
    """A pair of which a crash left beta's file half-written: the old and the new version."""
    old, new = _changed(a, b)
    _killed(PUT, after, "half", "sync", *IN_PLACE, a, b)
    assert len(list((b / ".bisync/undo").iterdir())) == 1
    torn = (b / "f").read_bytes()
    assert torn not in (old, new)
    return old, new


@pytest.mark.parametrize("how", ["recover", "sync", "mirror"])
def test_a_crash_in_the_middle(here: Pair, how: str):
    """It is the old version again, whichever command comes first."""
    a, b = here
    old, new = _crashed(a, b, 4)
    if how == "recover":
        done = run("recover", "--json", b).summary
        assert (done["old"], done["new"], done["edited"], done["exit_code"]) == (["f"], [], [], 0)
        assert look(b)["f"] == old
        assert run("recover", b).stdout.strip() == "nothing was left half-written"
    if how == "mirror":
        run("mirror", "-a", f"{a}/", f"{b}/")
    sync(a, b)
    assert look(a)["f"] == look(b)["f"] == new
    assert old in [content for _, content in kept(b)] or _deltas(b)
    assert not list((b / ".bisync/undo").iterdir())


@pytest.mark.parametrize("what", ["{b}/", "{b}", "{b}/f", "{above}/"])
def test_nobody_mirrors_a_half_written_file(here: Pair, tmp_path: Path, what: str):
    """As a source, a root has to be made whole first; the source of a mirror is not written to."""
    a, b = here
    old, _ = _crashed(a, b, 4)
    source = what.format(b=b, above=b.parent)
    assert "bisync recover" in run("mirror", "-a", source, tmp_path / "to", check=25).said
    assert not [path for path in tmp_path.rglob("*") if path.name in ("f", "to") and path.is_file()]
    run("recover", b)
    run("mirror", "-a", source, tmp_path / "to")
    copied = [
        path.read_bytes() for path in (tmp_path / "to", *tmp_path.rglob("f")) if path.is_file()
    ]
    assert old in copied


def test_recovery_never_overwrites_a_write(here: Pair):
    """Somebody wrote to the half-written file: it is kept as it is, and the peer's comes."""
    a, b = here
    _, new = _crashed(a, b, 4)
    torn = _write(b / "f", (4 * MIB + 5000, b"written since the crash"))
    assert run("recover", "--json", b, check=23).summary["edited"] == ["f"]
    assert look(b)["f"] == torn
    sync(a, b)
    assert look(a)["f"] == look(b)["f"] == new
    assert torn in [content for _, content in kept(b)]
    assert sync(a, b).summary["updated"] == 0


@pytest.mark.parametrize("command", ["recover", "sync"])
def test_a_program_was_faster(here: Pair, command: str):
    """A program that has the half-written file open for writing has to be stopped first."""
    a, b = here
    _, new = _crashed(a, b, 4)
    with (b / "f").open("r+b"):
        done = run(*((command, b) if command == "recover" else (command, a, b)), check=25)
        assert "stop that program" in done.said
    sync(a, b)
    assert look(a)["f"] == look(b)["f"] == new


def test_it_was_renamed_before_recovery(here: Pair):
    """The file is found by its inode, wherever it is now."""
    a, b = here
    old, new = _crashed(a, b, 4)
    (b / "sub").mkdir()
    (b / "f").rename(b / "sub/g")
    assert run("recover", "--json", b).summary["old"] == ["f"]
    assert look(b)["sub/g"] == old
    sync(a, b)
    assert look(a)["sub/g"] == look(b)["sub/g"] == new


def _become_a_copy(root: Path) -> None:
    """Let everything in a root be another object, state and all."""
    other = root.with_name("other")
    subprocess.run(["cp", "-a", root, other], check=True)
    for path in root.iterdir():
        subprocess.run(["rm", "-rf", path], check=True)
    for path in other.iterdir():
        path.rename(root / path.name)


def test_the_tree_was_copied_before_recovery(here: Pair):
    """A half-written file in a copy of everything, where each object is another one."""
    a, b = here
    _, new = _crashed(a, b, 4)
    _become_a_copy(b)
    sync(a, b)
    assert look(a)["f"] == look(b)["f"] == new
    assert len(kept(a)) == 0


def test_thinning_leads_past_what_goes(here: Pair, tmp_path: Path):
    """Of many versions of an hour the last stays; it, and those before, are made without them."""
    a, b = here
    chance = random.Random(5)
    versions = [_image(a / "f")]
    sync(a, b)
    for number in range(12):
        size = SIZE + chance.randrange(-90_000, 90_000) if number % 3 == 0 else None
        at = chance.randrange(SIZE - 100_000)
        versions.append(_write(a / "f", (at, chance.randbytes(9000)), size=size))
        sync(a, b, *IN_PLACE, "--keep-every", "all")
        if number == 5:
            _age(b, 5 * HOUR)  # the first ones were in other hours
    replica = Replica(os.fsencode(b), Options(rules=ScanRules(Matcher(()))))
    with_age = replica.database
    with_age.begin()
    for version in replica.store.versions():
        fd, name = replica.store.open_kept(version.kept)
        info = os.stat(name, dir_fd=fd)
        os.close(fd)
        row = (version.path, version.kept, version.time_ns, info.st_ino, info.st_size,
               info.st_mtime_ns)  # fmt: skip
        with_age.execute("INSERT INTO thinned VALUES(?,?,?,?,?,?)", row)
    with_age.commit()
    last = max(version.time_ns for version in replica.store.versions())
    tend(replica.store, replica.database, Retention(recent=0), last + 3 * HOUR)
    replica.close()
    left = _deltas(b)
    assert 2 <= len(left) <= 4, left
    rows = [json.loads(line) for line in run("history", "--json", b / "f").stdout.splitlines()]
    complete = [row for row in rows if row["action"] == "modified" and row["complete"]]
    assert len(complete) == len(left)
    for row in complete:
        bisync.restore(b, "f", row["time_ns"] - 1, tmp_path / "f")
        assert (tmp_path / "f").read_bytes() in versions[:-1]
        (tmp_path / "f").unlink()


def _age(root: Path, by_ns: int) -> None:
    """Let all that was kept until now be older."""
    for path in (root / "rsync-rollback/.manifest").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["time_ns"] -= by_ns
        path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def test_the_base_was_written_to(here: Pair, tmp_path: Path):
    """What a delta needs is gone here: the other side has it, and history says so."""
    a, b = here
    versions = [_image(a / "f")]
    sync(a, b)
    for at in (MIB, 2 * MIB):
        versions.append(_write(a / "f", (at, b"hello")))
        sync(a, b, *IN_PLACE)
    _write(b / "f", (MIB + 4096, b"mine"), (2 * MIB, b"mine, too"))
    rows = [json.loads(line) for line in run("history", "--json", b / "f").stdout.splitlines()]
    assert [(r["complete"], r["needs_peer"]) for r in rows if r["action"] == "modified"] == [
        (True, True)
    ] * 2
    assert _restored(b, "f", tmp_path) == versions[:-1]
    a.rename(a.with_name("away"))
    rows = [json.loads(line) for line in run("history", "--json", b / "f").stdout.splitlines()]
    assert not any(r["complete"] for r in rows if r["action"] == "modified")
    run("restore", b / "f", "--to", tmp_path / "f", check=23)
    assert not (tmp_path / "f").exists()


def test_a_day_is_pruned(here: Pair, tmp_path: Path):
    """Versions of older days do without the one that goes."""
    a, b = here
    versions = [_image(a / "f")]
    sync(a, b)
    days = ["2026-01-01", "2026-01-02", "2026-01-03"]
    for number, day in enumerate(days):
        versions.append(_write(a / "f", (number * MIB + 9, b"day %d" % number)))
        sync(a, b, *IN_PLACE)
        today = next(p for p in (b / "rsync-rollback").iterdir() if p.name > "2026-01-99")
        _call_it(b, today, day)
    run("rollback", "prune", "--day", days[1], "--root", b)
    assert [path.parent.name for path in _deltas(b)] == [days[0], days[2]]
    for number, time in ((0, "2026-01-01 06:00"), (2, "2026-01-03 06:00")):
        del time
        rows = [json.loads(line) for line in run("history", "--json", b / "f").stdout.splitlines()]
        row = [row for row in rows if row["action"] == "modified"][number]
        assert row["complete"]
        bisync.restore(b, "f", row["time_ns"] - 1, tmp_path / f"{number}")
        assert (tmp_path / f"{number}").read_bytes() == versions[number]


def _call_it(root: Path, today: Path, day: str) -> None:
    """Let what was kept today have been kept on another day."""
    for path in (root / "rsync-rollback/.manifest").iterdir():
        path.write_text(path.read_text().replace(f'"kept":"{today.name}/', f'"kept":"{day}/'))
    today.rename(today.with_name(day))


def test_a_reader_while_it_is_made_whole(here: Pair):
    """Recovery needs the file for itself: who reads it has to be done first."""
    a, b = here
    old, _ = _crashed(a, b, 4)
    with (b / "f").open("rb") as file:
        torn = file.read()
        assert "has it open" in run("recover", b, check=25).said
        assert (b / "f").read_bytes() == torn
    run("recover", b)
    assert look(b)["f"] == old


@pytest.mark.parametrize("command", ["plan", "mirror"])
def test_a_dry_run_does_not_guess(here: Pair, command: str):
    """A plan with a half-written file would be a plan for an edit that nobody made."""
    a, b = here
    _crashed(a, b, 4)
    words = ("plan", a, b) if command == "plan" else ("mirror", "-n", "-a", f"{a}/", f"{b}/")
    assert "bisync recover" in run(*words, check=25).said


def test_an_undo_that_decayed(here: Pair):
    """The log says which file is half-written: it is kept as it is, and the peer's comes."""
    a, b = here
    _, new = _crashed(a, b, 4)
    torn = (b / "f").read_bytes()
    undo = next((b / ".bisync/undo").iterdir())
    _write(undo, (100, b"rot"))
    assert run("recover", "--json", b, check=23).summary["edited"] == ["f"]
    assert look(b)["f"] == torn
    sync(a, b)
    assert look(a)["f"] == look(b)["f"] == new
    assert torn in [content for _, content in kept(b)]


def test_an_undo_that_decayed_and_nobody_knows(here: Pair):
    """Without the log nobody can tell which file is half-written: a person has to."""
    a, b = here
    old, _ = _crashed(a, b, 4)
    undo = next((b / ".bisync/undo").iterdir())
    undo.rename(undo.with_name("other"))
    _write(undo.with_name("other"), (100, b"rot"))
    for words in (("recover", b), ("sync", a, b)):
        assert "cannot be read" in run(*words, check=25).said
    assert look(a)["f"] != old


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("bisync.fs.overwriting:Overwriting:finish_new", "after"),
        ("bisync.fs.store:Store:_record", "before"),
        ("bisync.fs.store:Store:_record", "after"),
        ("bisync.fs.store:Store:keep", "after"),
        ("bisync.fs.apply:Applier:_conclude", "before"),
    ],
)
def test_killed_when_all_is_written(here: Pair, tmp_path: Path, where: str, how: str):
    """What was written counts as done: it is nobody's edit, and what was kept is found."""
    a, b = here
    old, new = _changed(a, b)
    _killed(where, 0, how, "sync", *IN_PLACE, a, b)
    assert look(b)["f"] == new
    newer = _write(a / "f", (MIB, b"newer"))
    done = sync(a, b, "--conflict", "beta").summary
    assert look(a)["f"] == look(b)["f"] == newer
    assert done["conflicts"] == 0
    assert old in _restored(b, "f", tmp_path)


def test_killed_when_all_is_written_and_deleted_since(here: Pair):
    """What was written counts as done: a deletion of it is no conflict."""
    a, b = here
    _changed(a, b)
    _killed("bisync.fs.overwriting:Overwriting:finish_new", 0, "after", "sync", *IN_PLACE, a, b)
    (a / "f").unlink()
    sync(a, b, "--yes")
    assert not (b / "f").exists()
    assert not (a / "f").exists()


def test_a_locked_day_is_made_from_another(here: Pair):
    """A day is not pruned whose versions a locked one is made from."""
    a, b = here
    _image(a / "f")
    sync(a, b)
    days = ["2026-01-01", "2026-01-02"]
    for number, day in enumerate(days):
        _write(a / "f", (number * MIB + 9, b"day %d" % number))
        sync(a, b, *IN_PLACE)
        today = next(p for p in (b / "rsync-rollback").iterdir() if p.name > "2026-01-99")
        _call_it(b, today, day)
    run("rollback", "lock", "--root", b)
    flags = subprocess.run(["chattr", "-R", "-ia", b / "rsync-rollback" / days[1]], check=False)
    if flags.returncode:
        pytest.skip("no such flags here")
    try:
        said = run("rollback", "prune", "--day", days[1], "--root", b, check=None)
        assert len(_deltas(b)) == 2, said
        rows = [json.loads(x) for x in run("history", "--json", b / "f").stdout.splitlines()]
        assert all(row["complete"] for row in rows)
    finally:
        run("rollback", "unlock", "--root", b)


@pytest.mark.parametrize("order", [(1, 3), (3, 1)])
def test_not_by_what_is_gone_or_goes_first(here: Pair, tmp_path: Path, order: tuple[int, int]):
    """A file had one content twice: a chain relies on what was kept later, not on the first."""
    a, b = here
    x = _image(a / "f")
    sync(a, b)
    p = bytes(random.Random(7).randbytes(SIZE))
    for day, (content, method) in enumerate(
        [(p, "replace"), (x, "in-place"), (x[:-9] + b"different", "in-place")], 1
    ):
        _write(a / "f", (0, content))
        sync(a, b, "--apply", method)
        today = next(f for f in (b / "rsync-rollback").iterdir() if f.name > "2026-01-99")
        _call_it(b, today, f"2026-01-0{day}")
    for day in order:
        run("rollback", "prune", "--day", f"2026-01-0{day}", "--root", b)
    rows = [json.loads(line) for line in run("history", "--json", b / "f").stdout.splitlines()]
    row = [row for row in rows if row["action"] == "modified"][1]
    assert row["complete"]
    bisync.restore(b, "f", row["time_ns"] - 1, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == p


def test_restored_from_the_other_store(here: Pair, tmp_path: Path):
    """The base was edited here and replaced there: its content is in the other side's store."""
    a, b = here
    first = _image(a / "f")
    sync(a, b)
    _write(a / "f", (MIB, b"two"))
    sync(a, b, *IN_PLACE)
    _write(b / "f", (MIB - 9, b"three, over it"), (MIB + 5000, b"x"))
    sync(a, b, "--apply", "replace")
    assert _restored(b, "f", tmp_path)[0] == first


def test_powers_are_not_lost(here: Pair):
    """The kernel takes set-id bits from a file that is written to: such a one is replaced."""
    if os.geteuid():
        pytest.skip("needs root")
    a, b = here
    _image(a / "f")
    (a / "f").chmod(0o6755)
    sync(a, b)
    new = _write(a / "f", (MIB, b"two"))
    (a / "f").chmod(0o6755)
    sync(a, b, *IN_PLACE)
    assert (b / "f").stat().st_mode & 0o7777 == 0o6755
    assert look(b)["f"] == new
    assert not _deltas(b)


def test_it_cannot_be_opened(here: Pair):
    """An immutable half-written file: the run halts and says what is wrong."""
    if os.geteuid():
        pytest.skip("needs root")
    a, b = here
    _, new = _crashed(a, b, 4)
    if subprocess.run(["chattr", "+i", b / "f"], check=False, capture_output=True).returncode:
        pytest.skip("no such flag here")
    try:
        for words in (("recover", b), ("sync", a, b)):
            assert "cannot be opened" in run(*words, check=25).said
    finally:
        subprocess.run(["chattr", "-i", b / "f"], check=True)
    sync(a, b)
    assert look(b)["f"] == new


def test_a_copy_of_the_tree_that_was_written_to(here: Pair):
    """Everything has another handle, and the half-written file was written to: it is known."""
    a, b = here
    _, new = _crashed(a, b, 4)
    torn = _write(b / "f", (4 * MIB + 5000, b"written since the crash"))
    _become_a_copy(b)
    sync(a, b)
    assert look(a)["f"] == look(b)["f"] == new
    assert torn in [content for _, content in kept(b)]


class _Opener:
    """A program that opens a file for writing, waits as long as it has to, and writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = threading.Thread(target=self._run)
        self.text = b"somebody wrote this"

    def _run(self) -> None:
        with self._path.open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), self.text, 3 * MIB + 11)

    def start(self, fd: int) -> None:
        """Begin to open; return when the holder of ``fd`` can see that somebody waits."""
        self._thread.start()
        while fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK:
            pass

    def join(self) -> None:
        self._thread.join()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits may have been let in at once, as far as anybody knows."""
    monkeypatch.setattr("bisync.linux.lease._MARGIN_S", 1e9)


@pytest.mark.usefixtures("impatient")
def test_somebody_is_let_in_while_it_is_made_whole(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """Nothing is written after that: what he writes stays, and is never written over."""
    a, b = here
    _, new = _crashed(a, b, 4)
    torn = (b / "f").read_bytes()
    opener, real = _Opener(b / "f"), Overwriting.rest_is_old

    def look_through(self: Overwriting) -> bool:
        found = real(self)
        opener.start(self.fd)
        return found

    monkeypatch.setattr(Overwriting, "rest_is_old", look_through)
    with pytest.raises(bisync.HaltError, match="stop that program"):
        bisync.recover(b)
    opener.join()
    monkeypatch.undo()
    written = (b / "f").read_bytes()
    assert opener.text in written
    assert written.replace(opener.text, torn[3 * MIB + 11 :][: len(opener.text)]) == torn
    sync(a, b)
    assert look(a)["f"] == look(b)["f"] == new
    assert written in [content for _, content in kept(b)]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("when", ["is_old", "_put", "_end"])
def test_somebody_is_let_in_while_it_is_written(
    here: Pair, monkeypatch: pytest.MonkeyPatch, when: str
):
    """Before: nothing is written. In the middle: it is half-written, the run ends, and what he
    writes is kept. At the end: it is an edit."""
    a, b = here
    _changed(a, b)
    opener, real, calls = _Opener(b / "f"), getattr(Overwriting, when), [0]

    def opened(self: Overwriting, *args: object) -> object:
        calls[0] += 1
        if calls[0] == (4 if when == "_put" else 1):
            opener.start(self.fd)
        return real(self, *args)

    monkeypatch.setattr(Overwriting, when, opened)
    monkeypatch.setattr("bisync.fs.overwriting._STEP", 4096)
    config = bisync.Config(apply=bisync.Apply.IN_PLACE)
    old = (b / "f").read_bytes()
    with bisync.Session(a, b, config) as session:
        if when == "_put":
            with pytest.raises(bisync.HaltError, match="half-written"):
                session.run()
        else:
            session.run()
        opener.join()
        monkeypatch.undo()
        found = (b / "f").read_bytes()
        assert opener.text in found
        if when == "is_old":
            assert found.replace(opener.text, old[3 * MIB + 11 :][: len(opener.text)]) == old
        if when == "_put":
            assert (a / "f").read_bytes() != found
        session.run()
        session.run()
    assert look(a) == look(b)
    everywhere = [*(content for _, content in (*kept(a), *kept(b))), look(b)["f"]]
    assert any(opener.text in content for content in everywhere if isinstance(content, bytes))


def test_nobody_may_hold_it(here: Pair, monkeypatch: pytest.MonkeyPatch):
    """Without the right to a lease nothing is written."""
    a, b = here
    _crashed(a, b, 4)
    torn = (b / "f").read_bytes()
    monkeypatch.setattr("bisync.fs.torn.take_write_lease", lambda _fd: Lease.UNKNOWN)
    with pytest.raises(bisync.HaltError, match="only its owner or root"):
        bisync.recover(b)
    assert (b / "f").read_bytes() == torn


def test_a_decayed_undo_and_a_program_at_work(here: Pair):
    """What a program writes to is not taken away from it."""
    a, b = here
    _, new = _crashed(a, b, 4)
    _write(next((b / ".bisync/undo").iterdir()), (100, b"rot"))
    with (b / "f").open("r+b"):
        assert "has it open" in run("sync", a, b, check=25).said
        assert (b / "f").exists()
    sync(a, b)
    assert look(b)["f"] == new


def test_a_mirror_from_another_source(here: Pair, tmp_path: Path):
    """A version that this source never had is kept whole."""
    a, b = here
    first = _image(a / "f")
    run("mirror", "-a", f"{a}/", f"{b}/")
    second = _write(a / "f", (MIB, b"two"))
    run("mirror", "-a", *IN_PLACE, f"{a}/", f"{b}/")
    assert len(_deltas(b)) == 1
    assert look(b)["f"] == second
    other = tmp_path / "other"
    other.mkdir()
    _image(other / "f", seed=9)
    _write(other / "f", (0, second[: SIZE - MIB]))
    run("mirror", "-a", *IN_PLACE, f"{other}/", f"{b}/")
    assert second in [content for _, content in kept(b)]
    assert len(_deltas(b)) == 1
    assert first not in [content for _, content in kept(b)]


def test_recovery_uses_the_store_of_the_run(here: Pair):
    """Without being told: a second store would be content to the next run."""
    a, b = here
    old, new = _changed(a, b)
    store = ("--rollback-dir", "old")
    sync(a, b, *store)
    newer = _write(a / "f", (MIB, b"newer"))
    _killed(
        "bisync.fs.overwriting:Overwriting:finish_new", 0, "after", "sync", *IN_PLACE, *store, a, b
    )
    assert run("recover", "--json", b).summary["new"] == ["f"]
    assert not (b / "rsync-rollback").exists()
    assert list((b / "old").rglob("*.bisync-delta"))
    sync(a, b, *store)
    assert look(a)["f"] == look(b)["f"] == newer
    assert old != new


def test_what_the_store_does_not_take_waits(here: Pair):
    """A loser that recovery cannot bring to the store is a problem, and stays until it can."""
    if os.geteuid():
        pytest.skip("needs root")
    a, b = here
    (a / "x").write_bytes(b"one")
    (a / "other").write_bytes(b"1")
    sync(a, b)
    (a / "other").write_bytes(b"two")
    sync(a, b)  # beta has a folder of today
    (a / "x").write_bytes(b"loser")
    os.utime(a / "x", ns=(1, 1))
    (b / "x").write_bytes(b"winner")
    (day,) = (p for p in (b / "rsync-rollback").iterdir() if p.name > "2")
    (a / "rsync-rollback" / day.name).mkdir(parents=True)
    _killed("bisync.fs.store:Store:keep", 0, "before", "sync", a, b)
    (folder,) = (p for p in (a / "rsync-rollback").iterdir() if p.name == day.name)
    if subprocess.run(["chattr", "+i", folder], check=False, capture_output=True).returncode:
        pytest.skip("no such flag here")
    try:
        for _ in range(2):
            assert sync(a, b, check=23).summary["problems"] == 1
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    assert sync(a, b).summary["problems"] == 0
    assert (b"x", b"loser") in kept(a)


def test_killed_while_an_edited_file_is_taken_out(here: Pair):
    """It left the tree, and the run came no further: that is no deletion."""
    a, b = here
    _, new = _crashed(a, b, 4)
    torn = _write(b / "f", (4 * MIB + 5000, b"written since the crash"))
    _killed("bisync.fs.store:Store:keep", 0, "after", "sync", a, b)
    assert not (b / "f").exists()
    sync(a, b)
    assert look(a)["f"] == look(b)["f"] == new
    assert torn in [content for _, content in kept(b)]
    assert sync(a, b).summary["updated"] == 0
