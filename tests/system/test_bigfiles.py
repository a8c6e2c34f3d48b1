"""Big files: what differs crosses, what is the same stays, on every file system."""

import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bisync
from bisync.delta.blocks import Blocks
from bisync.endpoint.connect import Reach
from bisync.errors import Interrupted
from bisync.fs import bigfile, incoming
from bisync.fs.bigfile import Patch, Sender, list_blocks
from bisync.fs.content import Chunk, chunks_of
from tests.trees import ELSEWHERE, command, edit, kept, look, put, run, sync

Pair = tuple[Path, Path]
MIB = 1 << 20
ROUNDS = int(os.environ.get("BISYNC_ROUNDS", "0"))
SEED = int(os.environ.get("BISYNC_SEED", "1"))


def _image(path: Path, size: int = 9 * MIB, seed: int = 1) -> bytearray:
    """A new file with bytes and holes; return what is in it."""
    data = bytearray(random.Random(seed).randbytes(size))
    data[MIB : 3 * MIB] = bytes(2 * MIB)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data[:MIB])
        file.seek(3 * MIB)
        file.write(data[3 * MIB :])
    return data


def _write(path: Path, at: int, text: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(text)


def test_a_small_write_to_a_big_file(pair: Pair):
    """Only the page that changed crosses; the old version is kept as a whole."""
    a, b = pair
    data = _image(a / "image")
    first = sync(a, b).summary
    assert (first["literal_bytes"], first["matched_bytes"]) == (len(data), 0)
    _write(a / "image", 5 * MIB + 7, b"hello")
    done = sync(a, b).summary
    assert (done["literal_bytes"], done["matched_bytes"]) == (4096, len(data) - 4096)
    assert look(b)["image"] == look(a)["image"]
    assert [content for _, content in kept(b)] == [bytes(data)]
    _write(b / "image", 9 * MIB - 1, b"and back")  # beyond the end
    back = sync(a, b).summary
    assert back["bytes_received"] <= 2 * 4096
    assert look(a)["image"] == look(b)["image"]
    assert sync(a, b).summary["literal_bytes"] == 0


def test_holes(pair: Pair):
    """What became zeros is a hole again, what is a hole takes no room."""
    a, b = pair
    _image(a / "image")
    sync(a, b)
    with (a / "image").open("r+b") as file:
        file.truncate(4 * MIB)
        file.truncate(300 * MIB)
        file.seek(299 * MIB)
        file.write(b"end")
    done = sync(a, b).summary
    assert done["literal_bytes"] <= 4096
    assert look(a)["image"] == look(b)["image"]
    assert (b / "image").stat().st_blocks * 512 < 4 * MIB


def test_touch_and_rename(pair: Pair):
    """New times and names carry no content."""
    a, b = pair
    _image(a / "image")
    sync(a, b)
    os.utime(a / "image")
    (a / "image").rename(a / "renamed")
    done = sync(a, b).summary
    assert (done["literal_bytes"], done["moves"]) == (0, 1)
    assert (a / "renamed").stat().st_mtime_ns == (b / "renamed").stat().st_mtime_ns


def test_save_by_rename_and_by_backup(pair: Pair):
    """The new object of a save is made from the old one at the other side."""
    a, b = pair
    data = _image(a / "image")
    _image(a / "other", seed=2)
    sync(a, b)
    data[6 * MIB] ^= 1
    (a / "image.tmp").write_bytes(data)
    (a / "image.tmp").replace(a / "image")
    assert sync(a, b).summary["literal_bytes"] == 4096
    data[7 * MIB] ^= 1
    (a / "image").rename(a / "image~")
    (a / "image").write_bytes(data)
    done = sync(a, b).summary
    assert (done["literal_bytes"], done["moves"]) == (4096, 1)
    assert look(a) == look(b)


def test_a_hard_link_group(pair: Pair):
    a, b = pair
    _image(a / "image")
    (a / "link").hardlink_to(a / "image")
    sync(a, b)
    _write(a / "link", 4 * MIB, b"through the link")
    assert sync(a, b).summary["literal_bytes"] == 4096
    assert look(a) == look(b)
    assert (b / "image").stat().st_ino == (b / "link").stat().st_ino


def test_conflict(pair: Pair):
    """Both versions survive: the loser is kept whole."""
    a, b = pair
    data = _image(a / "image")
    sync(a, b)
    _write(a / "image", 5 * MIB, b"mine")
    _write(b / "image", 5 * MIB, b"yours")
    os.utime(b / "image", (1, 1))
    assert sync(a, b).summary["conflicts"] == 1
    data[5 * MIB : 5 * MIB + 5] = b"yours"
    assert bytes(data) in [content for _, content in kept(b)]
    assert look(a) == look(b)


def test_a_basis_that_decayed(pair: Pair):
    """A block that rotted at the target is never passed on: the file comes whole, and is right."""
    a, b = pair
    _image(a / "image")
    sync(a, b)
    before = (b / "image").stat()
    with (b / "image").open("r+b") as file:  # as a disk would: no times move in the index
        file.seek(5 * MIB + 99)
        file.write(b"rot")
    os.utime(b / "image", ns=(before.st_atime_ns, before.st_mtime_ns))
    _pretend_unchanged(b)
    _write(a / "image", 5 * MIB + 50_000, b"edit in the same block")
    sync(a, b)
    assert look(a) == look(b)


def _pretend_unchanged(root: Path) -> None:
    """Make the index believe that what a file looks like now is what it looked like then."""
    info = (root / "image").stat()
    db = sqlite3.connect(root / ".bisync/state.db")
    db.execute("UPDATE node SET ctime=? WHERE ino=?", (info.st_ctime_ns, info.st_ino))
    db.commit()
    db.close()


@pytest.mark.parametrize("damage", ["gone", "cut", "garbage"])
def test_a_list_that_is_damaged(pair: Pair, damage: str):
    """A block list is a cache: without it the file is read once more."""
    a, b = pair
    _image(a / "image")
    sync(a, b)
    for root in pair:
        (path,) = (root / ".bisync/blocks").iterdir()
        if damage == "gone":
            path.unlink()
        elif damage == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.write_bytes(random.Random(1).randbytes(5000))
    _write(a / "image", 8 * MIB, b"x")
    assert sync(a, b).summary["literal_bytes"] == 4096
    assert look(a) == look(b)
    _write(b / "image", 8 * MIB, b"y")
    assert sync(a, b).summary["literal_bytes"] == 4096
    assert look(a) == look(b)


def test_lists_go_with_their_files(pair: Pair):
    a, b = pair
    _image(a / "image")
    _image(a / "goes")
    sync(a, b)
    assert len(list((a / ".bisync/blocks").iterdir())) == 2
    (a / "goes").unlink()
    _write(a / "image", 8 * MIB, b"x")
    sync(a, b)
    assert [len(list((root / ".bisync/blocks").iterdir())) for root in pair] == [1, 1]


def test_plan_writes_nothing(pair: Pair):
    """A dry run reads a big file, and remembers nothing of it."""
    a, b = pair
    _image(a / "image")
    sync(a, b)
    _write(a / "image", 8 * MIB, b"x")
    (known,) = (a / ".bisync/blocks").iterdir()
    before = known.read_bytes()
    assert "image" in run("plan", a, b).stdout
    assert known.read_bytes() == before


def test_mirror(pair: Pair):
    """A mirror's destination is made from its old version as well; -W sends all of it."""
    a, b = pair
    data = _image(a / "image")
    run("mirror", "-a", f"{a}/", b)
    _write(a / "image", 5 * MIB, b"x" * 5000)
    done = run("mirror", "-a", "--json", f"{a}/", b).objects[-1]
    assert done["literal_bytes"] <= 3 * 4096
    assert done["matched_bytes"] == len(data) - done["literal_bytes"]
    assert (a / "image").read_bytes() == (b / "image").read_bytes()
    assert not (a / ".bisync").exists()
    _write(a / "image", 5 * MIB, b"y" * 6000)
    done = run("mirror", "-aW", "--json", f"{a}/", b).objects[-1]
    assert done["literal_bytes"] == len(data)
    assert (a / "image").read_bytes() == (b / "image").read_bytes()


def _change(path: Path, chance: random.Random) -> int:
    """One random edit of a file; return how many bytes of it may have changed in place."""
    size = path.stat().st_size
    at, length = chance.randrange(max(size, 1)), chance.choice([1, 100, 5000, 200_000])
    kind = chance.choice(
        ["write", "write", "write", "cut", "grow", "hole", "insert", "delete", "move"]
    )
    with path.open("r+b") as file:
        if kind == "write":
            file.seek(at)
            file.write(chance.randbytes(length))
            return length
        if kind == "cut":
            file.truncate(at)
            return 0
        if kind == "grow":
            file.truncate(min(size + length, 14 * MIB))
            return 0
        if kind == "hole":
            file.seek(at)
            file.write(bytes(min(length, size - at)))
            return length
    data = path.read_bytes()
    piece = data[at : at + length]
    rest = data[:at] + data[at + len(piece) :]
    to = chance.randrange(max(len(rest), 1))
    new = {"insert": data[:at] + piece + data[at:], "delete": rest}.get(
        kind, rest[:to] + piece + rest[to:]
    )
    path.write_bytes(new[: 14 * MIB])
    return 1 << 60


def test_random_edits(pair: Pair):
    """Whatever is done to either file, both are equal after a run; writes cost about their size.

    Five seconds here; ``BISYNC_ROUNDS=2000`` does so many on each file system.
    """
    a, b = pair
    chance = random.Random(SEED)
    rules = bisync.Retention(days=None, recent=1)
    _image(a / "f", 6 * MIB)
    bisync.sync(a, b)
    began, rounds = time.monotonic(), 0
    while rounds < ROUNDS or (not ROUNDS and time.monotonic() - began < 5):
        rounds += 1
        side = chance.choice(pair)
        edits = [_change(side / "f", chance) for _ in range(chance.randint(1, 3))]
        apply = chance.choice(list(bisync.Apply))
        report = bisync.sync(a, b, bisync.Config(retention=rules, yes=True, apply=apply))
        assert report.exit_code == 0, report
        assert (a / "f").read_bytes() == (b / "f").read_bytes(), f"seed {SEED}, round {rounds}"
        bound = sum(edits) + 3 * 4096 * len(edits) + 128 * 1024 * len(edits)
        size = (a / "f").stat().st_size
        if size >= 5 * MIB:
            assert report.literal_bytes <= bound, f"seed {SEED}, round {rounds}"
    assert rounds >= 3


CUT = """
import os, sys
from bisync.cli.main import main
from bisync.fs import incoming
left, write = int(sys.argv[1]), incoming.write_chunk

def some(fd, chunk):
    global left
    left -= chunk.length
    if left < 0:
        os.kill(os.getpid(), int(sys.argv[2]))
    write(fd, chunk)

incoming.write_chunk = some
sys.exit(main(sys.argv[3:]))
"""


def _cut(size: int, signum: int, *words: str | Path) -> int:
    """Run a command that gets a signal when it has written so many bytes; its exit status."""
    command = [sys.executable, "-c", CUT, str(size), str(int(signum)), *words]
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.parametrize("command", ["sync", "mirror"])
def test_a_cut_copy_goes_on(here: tuple[Path, Path], how: str, command: str):
    """What had arrived of a large file is not sent again."""
    a, b = here
    size = 256 << 20
    with (a / "image").open("wb") as file:
        for _ in range(size >> 20):
            file.write(random.randbytes(1 << 20))
    words = [command, "--json", f"{a}/", b]
    code = _cut(size // 4, signal.SIGINT if how == "stopped" else signal.SIGKILL, *words)
    assert code == (130 if how == "stopped" else -9)
    incoming = b / ".bisync/in"
    assert list(incoming.glob("part-*"))
    assert not (b / "image").exists()
    report = run(*words)
    assert (b / "image").read_bytes() == (a / "image").read_bytes()
    assert report.summary["literal_bytes"] < size * 4 // 5
    assert not list(incoming.iterdir())


def test_a_part_of_another_file(here: tuple[Path, Path]):
    """The source was made anew since the copy was cut: what fits is used, all is right."""
    a, b = here
    data = random.randbytes(80 << 20)
    (a / "image").write_bytes(data)
    assert _cut(len(data) // 4, signal.SIGKILL, "sync", a, b) == -9
    incoming = b / ".bisync/in"
    (a / "image").write_bytes(b"other" * 1000 + data[:70_000_000])
    sync(a, b)
    assert (b / "image").read_bytes() == (a / "image").read_bytes()
    assert not list(incoming.iterdir())


def test_parts_do_not_stay_for_ever(here: tuple[Path, Path]):
    """Nobody came back for a week."""
    a, b = here
    sync(a, b)
    old, new = b / ".bisync/in/part-old", b / ".bisync/in/part-new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    (a / "f").write_bytes(b"x")
    sync(a, b)
    assert not old.exists()
    assert new.exists()


@pytest.mark.parametrize("command", ["sync", "mirror"])
def test_how_far_a_large_file_is(here: tuple[Path, Path], command: str):
    """Its name, bytes done of all, what had not to come."""
    a, b = here
    (a / "image").write_bytes(random.randbytes(80 << 20))
    words = [sys.executable, "-m", "bisync", command, "--progress", f"{a}/", b]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stderr
    assert "image: " in shown
    assert " of 80.0 MiB, 0 B matched" in shown
    told: list[bisync.Progress] = []
    (a / "image").write_bytes(random.randbytes(80 << 20))
    bisync.Session(a, b, listener=lambda e: isinstance(e, bisync.Progress) and told.append(e)).run()
    of_file = [event for event in told if event.phase == "file"]
    assert (of_file[-1].name, of_file[-1].bytes) == ("image", 80 << 20)
    assert of_file[-1].literal == of_file[-1].total == 80 << 20
    assert [event.bytes for event in of_file] == sorted(event.bytes for event in of_file)


def _cut_copy(a: Path, b: Path, size: int, *words: str) -> Path:
    """A copy of ``a/image`` that is killed after a part of it; the part."""
    (a / "image").write_bytes(random.randbytes(size))
    assert _cut(size // 4, signal.SIGKILL, *words, f"{a}/", b) == -9
    incoming = b / ".bisync/in"
    (part,) = incoming.glob("part-*")
    return part


@pytest.mark.parametrize("command", ["sync", "mirror"])
def test_a_source_that_changes_while_a_cut_copy_goes_on(here: tuple[Path, Path], command: str):
    """What a first try wrote over the part is no basis for a second one."""
    a, b = here
    _cut_copy(a, b, 80 << 20, command)
    changes: list[str] = []

    def change(event: object) -> None:
        far = (
            isinstance(event, bisync.Progress) and event.phase == "file" and event.bytes > 72 << 20
        )
        if isinstance(event, bisync.Progress) and far and not changes:
            changes.append(event.name)
            with (a / "image").open("r+b") as file:
                file.seek(69 << 20)
                file.write(bytes(2 << 20))  # was sent already
                file.seek(0, os.SEEK_END)
                file.write(b"one line more")

    if command == "sync":
        bisync.Session(a, b, listener=change).run()
    else:
        bisync.mirror([f"{a}/"], b, listener=change)
    assert changes
    if (b / "image").exists():
        assert (b / "image").read_bytes() == (a / "image").read_bytes()
    run(command, "--json", f"{a}/", b)
    assert (b / "image").read_bytes() == (a / "image").read_bytes()


@pytest.mark.parametrize("far", ["", "alpha", "beta"])
def test_a_source_that_changes_again_and_again(
    here: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, far: str
):
    """What came of a large file stays while it changes; then only what it wrote comes."""
    a, b = here
    size = 80 * MIB
    (a / "image").write_bytes(random.randbytes(size))
    changes = iter(range(1, 4))
    ends: list[str | Path] = [a, b]
    if far:
        ends[far == "beta"] = f"host:{ends[far == 'beta']}"

    def change(done: int) -> None:
        if done > 72 * MIB and (page := next(changes, 0)):
            _write(a / "image", page * 4 * MIB, b"a page")

    def told(event: object) -> None:
        if isinstance(event, bisync.Progress) and event.phase == "file" and far != "beta":
            change(event.bytes)

    def reading(*words: Any) -> Iterator[Chunk]:
        for chunk in chunks_of(*words):
            yield chunk
            change(chunk.offset)

    if far == "beta":
        monkeypatch.setattr(bigfile, "chunks_of", reading)
    came: list[int] = []
    write = incoming.write_chunk

    def counted(fd: int, chunk: Chunk) -> None:
        came.append(chunk.length)
        write(fd, chunk)

    monkeypatch.setattr(incoming, "write_chunk", counted)
    reach = Reach(rsh=str(ELSEWHERE), agent_command=shlex.join(map(str, command())))
    with bisync.Session(*ends, listener=told, reach=reach) as session:
        report = session.run()
    assert report.exit_code == 0
    assert next(changes, 0) == 0
    assert (b / "image").read_bytes() == (a / "image").read_bytes()
    crossed = report.bytes_sent + report.bytes_received if far else sum(came)
    assert size <= crossed < size + 4 * MIB


@pytest.mark.parametrize("size", [1, 65_536, 131_072, 131_073])
def test_a_part_of_any_size(here: tuple[Path, Path], size: int):
    """Where the source has a hole now, nothing of the part shines through."""
    a, b = here
    part = _cut_copy(a, b, 80 << 20, "mirror")
    os.truncate(part, size)
    with (a / "image").open("r+b") as file:
        file.write(bytes(1 << 20))
    subprocess.run(["fallocate", "-d", a / "image"], check=False)
    run("mirror", "--json", f"{a}/", b)
    assert (b / "image").read_bytes() == (a / "image").read_bytes()


@pytest.mark.parametrize("kind", ["dir", "symlink", "dangling", "fifo", "hard link"])
def test_a_part_that_is_no_file_of_ours(here: tuple[Path, Path], tmp_path: Path, kind: str):
    """It is removed, and nothing is written through it."""
    a, b = here
    part = _cut_copy(a, b, 80 << 20, "sync")
    other = tmp_path / "other" if kind != "hard link" else b.parent / "other"
    other.write_bytes(b"precious")
    part.unlink()
    match kind:
        case "dir":
            (part / "below").mkdir(parents=True)
        case "symlink":
            part.symlink_to(other)
        case "dangling":
            part.symlink_to(tmp_path / "nowhere")
        case "fifo":
            os.mkfifo(part)
        case _:
            os.link(other, part)
    sync(a, b)
    assert (b / "image").read_bytes() == (a / "image").read_bytes()
    assert other.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_busy_source_does_not_cost_the_part(here: tuple[Path, Path]):
    """Somebody has the new file open for writing: next time it goes on where it was."""
    a, b = here
    part = _cut_copy(a, b, 80 << 20, "sync")
    before = part.stat().st_size
    with (a / "image").open("r+b"):
        sync(a, b, check=24)
    assert part.stat().st_size >= before // (128 << 10) * (128 << 10)
    assert sync(a, b).summary["literal_bytes"] < 80 << 20


def test_each_try_has_a_list_of_its_own(tmp_path: Path):
    """What an earlier try read may be of two instants."""
    path, target = tmp_path / "new", tmp_path / "made"
    path.write_bytes(random.randbytes(5 << 20))
    with (
        path.open("r+b") as file,
        target.open("w+b") as made,
        (tmp_path / "old").open("w+b") as old,
    ):
        patch = Patch(made.fileno(), old.fileno(), Blocks(0, 1))
        sender = Sender(patch, None, workers=1, pace=lambda _length: None)
        assert sender(file.fileno(), 5 << 20) is not None
        os.pwrite(file.fileno(), b"changed", 0)
        digest = sender(file.fileno(), 5 << 20)
        found = list_blocks(file.fileno(), 5 << 20, Blocks(0, 2))
        assert found is not None
        assert digest == found.digest()
    assert target.read_bytes() == path.read_bytes()


def test_what_arrived_before_a_stop_is_there(here: tuple[Path, Path]):
    """Two large files are whole when a stop is asked for in the third: they are put in place."""
    a, b = here
    for number in range(3):
        (a / f"image{number}").write_bytes(random.randbytes(70 << 20))
    told: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, bisync.Progress) and event.phase == "file":
            told.append(event.name)

    def stop() -> None:
        if len(set(told)) == 3:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        bisync.Session(a, b, bisync.Config(stop=stop), listener=listen).run()
    assert len(list(b.glob("image*"))) == 2
    assert sync(a, b).summary["literal_bytes"] <= 70 << 20
    assert look(a) == look(b)


@pytest.mark.parametrize("slice_", [1, 3, 1 << 30])
def test_slices(here: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, slice_: int):
    """Steps of one file in different slices: done in order, agreed on once, quiet after."""
    a, b = here
    monkeypatch.setattr("bisync.session.batches._SLICE", slice_)
    for number in range(6):
        put(a / f"d{number}/f", b"%d" % number)
    os.link(a / "d0/f", a / "link")
    assert bisync.sync(a, b).exit_code == 0
    (a / "d1").rename(a / "d9")
    edit(a / "d9/f", b"edited")
    (a / "d9/f").chmod(0o600)
    (a / "d2/f").rename(a / "d3/moved")
    put(a / "d2/f", b"new")
    (b / "d4/f").unlink()
    put(b / "d4/f/below", b"x")
    assert bisync.sync(a, b).exit_code == 0
    assert look(a) == look(b)
    report = bisync.sync(a, b)
    assert (report.created, report.updated, report.moves, report.conflicts) == (0, 0, 0, 0)
