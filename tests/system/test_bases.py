"""Where a big file was written to, told by its extents: always a superset, on XFS and btrfs."""

import mmap
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import bisync
from bisync.delta.digest import BLOCK_SIZE
from bisync.delta.extents import changed_blocks
from bisync.fs import bigfile, incoming
from bisync.linux.fiemap import extents
from bisync.linux.filesystem import clone
from tests.trees import look, sync

MIB = 1 << 20
SEED = int(os.environ.get("BISYNC_SEED", "1"))
SECONDS = float(os.environ.get("BISYNC_SECONDS", "0"))
ROUNDS = int(os.environ.get("BISYNC_ROUNDS", "40"))


@pytest.fixture(name="folder", params=["xfs", "btrfs"])
def _folder(request: pytest.FixtureRequest, file_system: Callable[[str], Path]) -> Path:
    folder = file_system(request.param) / "bases"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _fallocate(path: Path, *words: str) -> None:
    """What the file system refuses is not done; the comparison is right either way."""
    subprocess.run(["fallocate", *words, path], check=False, capture_output=True)


def _through_memory(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[at : at + len(data)] = data


def _share(path: Path, at: int, chance: random.Random) -> None:
    """Let a stretch share its extents with another stretch of the file."""
    size = path.stat().st_size
    source = chance.randrange(max(1, size // 4096)) * 4096
    with path.open("r+b") as file:
        length, to = min(1 << 18, size - source), at // 4096 * 4096
        if source + length <= to or to + length <= source:  # the kernel refuses an overlap
            os.copy_file_range(file.fileno(), file.fileno(), length, source, to)


def _change(path: Path, chance: random.Random) -> str:
    size = path.stat().st_size
    at, length = chance.randrange(max(size, 1)), chance.choice([1, 4096, 70_000, 400_000])
    pages = ("-o", str(at // 4096 * 4096), "-l", str(-(-length // 4096) * 4096))
    kind = chance.choice(
        ["write", "same", "memory", "punch", "zero", "reserve", "insert", "collapse", "share",
         "cut", "grow", "end"]
    )  # fmt: skip
    with path.open("r+b") as file:
        match kind:
            case "write" | "end":
                file.seek(at if kind == "write" else max(0, size - 3))
                file.write(chance.randbytes(length))
            case "same":
                file.seek(at)
                data = file.read(length)
                file.seek(at)
                file.write(data)
            case "cut":
                file.truncate(max(at, MIB))
            case "grow":
                file.truncate(size + length)
    match kind:
        case "memory":
            _through_memory(path, at, chance.randbytes(min(length, size - at)))
        case "punch":
            _fallocate(path, "-p", *pages)
        case "zero":
            _fallocate(path, "-z", *pages)
        case "reserve":
            _fallocate(path, *pages)
        case "insert":
            _fallocate(path, "-i", *pages)
        case "collapse":
            _fallocate(path, "-c", *pages)
        case "share":
            _share(path, at, chance)
    return kind


def test_what_differs_is_told(folder: Path):
    """Whatever was done to a file, each block that differs from its clone is among those told."""
    chance = random.Random(SEED)
    path, base = folder / "file", folder / "base"
    path.write_bytes(chance.randbytes(6 * MIB))
    told_in_vain = rounds = 0
    for number in range(ROUNDS):
        with path.open("r+b") as live, base.open("w+b") as frozen:
            assert clone(live.fileno(), frozen.fileno())
        kinds = [_change(path, chance) for _ in range(chance.randint(0, 4))]
        if path.stat().st_size > 16 * MIB:
            os.truncate(path, 5 * MIB)
        with path.open("rb") as live, base.open("rb") as frozen:
            maps = [extents(file.fileno(), 10_000) for file in (frozen, live)]
            old, new = frozen.read(), live.read()
        assert maps[0] is not None and maps[1] is not None
        told = set(changed_blocks(maps[0], maps[1], len(old), len(new)).tolist())
        padded = old[: len(new)].ljust(len(new), b"\0")
        differ = {
            at // BLOCK_SIZE
            for at in range(0, len(new), BLOCK_SIZE)
            if padded[at : at + BLOCK_SIZE] != new[at : at + BLOCK_SIZE]
        }
        if len(new) != len(old):
            differ |= {len(new) // BLOCK_SIZE} & set(range(-(-len(new) // BLOCK_SIZE)))
        assert differ <= told, f"seed {SEED}, round {number}: {kinds}"
        told_in_vain += len(told - differ)
        rounds += 1
    assert told_in_vain < rounds * 20, "it tells nearly everything: of no use"


def test_only_that_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """From the second change on a big image is not read; only blocks that may differ are."""
    a, b = folder / "A", folder / "B"
    a.mkdir()
    b.mkdir()
    chance = random.Random(SEED)
    with (a / "image").open("wb") as file:
        for _ in range(66):
            file.write(chance.randbytes(MIB))
    sync(a, b)
    read: list[int] = []
    original = bigfile._list_some

    def counted(fd: int, size: int, old: bigfile.Blocks, numbers: list[int]) -> object:
        read.append(len(numbers))
        return original(fd, size, old, numbers)

    monkeypatch.setattr(bigfile, "_list_some", counted)
    for number in range(3):
        for _ in range(10):
            with (a / "image").open("r+b") as file:
                file.seek(chance.randrange(60) * MIB)
                file.write(chance.randbytes(4096))
        report = bisync.sync(a, b)
        assert report.exit_code == 0 and report.literal_bytes <= 10 * 2 * 4096
        assert (a / "image").read_bytes() == (b / "image").read_bytes()
        assert len(read) == number
    assert max(read) <= 80
    (base,) = (a / ".bisync/bases").iterdir()
    assert base.read_bytes() == (a / "image").read_bytes()
    base.write_bytes(b"somebody was here")  # it is not believed any more
    with (a / "image").open("r+b") as file:
        file.write(b"one more")
    bisync.sync(a, b)
    assert look(a)["image"] == look(b)["image"]
    assert len(read) == 2
    assert len(list((a / ".bisync/bases").iterdir())) == 1
    os.truncate(a / "image", 10 * MIB)  # a base keeps the room of its version: it has to go
    bisync.sync(a, b)
    assert list((a / ".bisync/bases").iterdir()) == []


def test_so_many_bases(folder: Path):
    """Those of the versions that came last stay; none where none are wanted."""
    a, b = folder / "A", folder / "B"
    a.mkdir()
    b.mkdir()
    for number in range(3):
        with (a / f"image{number}").open("wb") as file:
            file.truncate(80 * MIB)
    sync(a, b)
    inodes = []
    for number in (2, 0, 1):
        image = a / f"image{number}"
        with image.open("r+b") as file:
            file.seek(number * MIB)
            file.write(b"changed")
        while time.time_ns() - image.stat().st_ctime_ns < 10**8:
            time.sleep(0.01)  # what is read in the moment of a change is read again by the next run
        sync(a, b, "--base-clones", "2")
        inodes.append({path.name for path in (a / ".bisync/bases").iterdir()})
    assert [len(names) for names in inodes] == [1, 2, 2]
    assert inodes[0] < inodes[1] and not inodes[0] <= inodes[2]
    with (a / "image0").open("r+b") as file:
        file.write(b"once more")
    sync(a, b, "--base-clones", "0")
    assert not list((a / ".bisync/bases").iterdir())
    assert look(a) == look(b)


def test_compressed_images(mount: Callable[..., None], tmp_path: Path):
    """Where extents do not tell where bytes are, all is read, and right."""
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed")
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.truncate(600 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", disk], check=True)
    root = tmp_path / "mounted"
    mount(root, "-o", "loop,compress-force=zstd", disk)
    a, b = root / "A", root / "B"
    a.mkdir()
    b.mkdir()
    (a / "image").write_bytes(b"compress me " * (70 * MIB // 12))
    sync(a, b)
    for number in range(3):
        with (a / "image").open("r+b") as file:
            file.seek(number * 9 * MIB)
            file.write(b"here")
        assert sync(a, b).summary["literal_bytes"] == 4096
        assert look(a) == look(b)


def test_a_file_that_is_being_made_is_no_instant(folder: Path):
    """A big file that grows while it is looked at is busy, and what the replica has stays."""
    a, b = folder / "A", folder / "B"
    a.mkdir()
    b.mkdir()
    (a / "image").write_bytes(bytes(range(256)) * 4096 * 8)
    sync(a, b)
    before = (b / "image").read_bytes()
    stop = threading.Event()

    def grow() -> None:
        with (a / "image").open("wb", buffering=0) as file:
            while not stop.is_set():
                file.write(b"half of it" * 500)
                if file.tell() > 100 * MIB:
                    file.truncate(5 * MIB)
                    file.seek(5 * MIB)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        while (a / "image").stat().st_size < 5 * MIB:
            pass
        report = bisync.sync(a, b)
    finally:
        stop.set()
        writer.join()
    assert report.exit_code == 24
    assert (b / "image").read_bytes() == before
    assert bisync.sync(a, b).exit_code == 0
    assert look(a) == look(b)


class _Guest:
    """Writes to an image without a pause: its number into one block after the other, for ever."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rounds = 0

    def _run(self) -> None:
        with self._path.open("r+b", buffering=0) as file:
            count = self._path.stat().st_size // BLOCK_SIZE
            while not self._stop.is_set():
                self.rounds += 1
                for block in range(count):
                    os.pwrite(
                        file.fileno(), self.rounds.to_bytes(8, "little") * 512, block * BLOCK_SIZE
                    )

    def __enter__(self) -> "_Guest":
        self._thread.start()
        return self

    def __exit__(self, *_what: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_running_image_at_first_sight(folder: Path):
    """It is taken by its name: one instant of it, and then on as every other; else it waits."""
    a, b = folder / "A", folder / "B"
    a.mkdir()
    b.mkdir()
    (a / "run").mkdir()
    (a / "run/image").write_bytes(bytes(8 * MIB))
    with _Guest(a / "run/image"):
        assert bisync.sync(a, b).exit_code == 24
        assert not (b / "run/image").exists()
        sync(a, b, "--hot", "*.img", check=24)
        assert not (b / "run/image").exists()
        seen = set()
        for _ in range(6):
            sync(a, b, "--hot", "run/image", check=(0, 24))
            stamps = _stamps(b / "run/image")
            assert stamps == sorted(stamps, reverse=True), "torn"
            assert stamps[0] - stamps[-1] <= 1, "torn"
            seen.add(tuple(stamps))
    assert len(seen) > 3
    assert sync(a, b).summary["busy"] == 0
    assert look(a) == look(b)


def test_who_writes_is_spared(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A version of a hot file is taken when the last one is paid off; of a closed one at once."""
    a, b = folder / "A", folder / "B"
    a.mkdir()
    b.mkdir()
    (a / "image").write_bytes(bytes(8 * MIB))
    sync(a, b)
    config = bisync.Config(allowance=bisync.Allowance(burst_s=0, slow_clone_s=1000))
    later = 0
    now = time.time_ns
    monkeypatch.setattr("bisync.fs.debts.time.time_ns", lambda: now() + later)
    with _Guest(a / "image") as guest:
        assert bisync.sync(a, b, config).exit_code == 24
        first, rounds = _stamps(b / "image"), guest.rounds
        assert first[-1] > 0
        while guest.rounds < rounds + 3:
            pass
        report = bisync.sync(a, b, config)
        assert (report.exit_code, report.busy) == (24, 1)
        assert any("to spare who writes" in met.reason for met in report.met)
        assert _stamps(b / "image") == first
        later = 10**9 * 600
        assert bisync.sync(a, b, config).exit_code == 24
        assert _stamps(b / "image") != first
        second = _stamps(b / "image")
        assert bisync.sync(a, b, config).exit_code == 24
        assert _stamps(b / "image") == second
        assert bisync.sync(a, b, bisync.Config(allowance=None)).exit_code == 24
    assert bisync.sync(a, b, config).exit_code == 0
    assert look(a) == look(b)


def test_a_running_image_that_is_large(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What a first try brought of it is no reason to wait for a rest that never comes."""
    monkeypatch.setattr(incoming, "LARGE", 4 * MIB)
    a, b = folder / "A", folder / "B"
    a.mkdir()
    b.mkdir()
    (a / "image").write_bytes(bytes(8 * MIB))
    with _Guest(a / "image"):
        for _ in range(6):
            bisync.sync(a, b, bisync.Config(hot=bisync.Ignore(("image",))))
            if (b / "image").exists():
                break
        stamps = _stamps(b / "image")
    assert stamps == sorted(stamps, reverse=True), "torn"
    assert stamps[0] - stamps[-1] <= 1, "torn"


def _stamps(path: Path) -> list[int]:
    data = path.read_bytes()
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), BLOCK_SIZE)]


def test_an_image_that_never_rests_without_clones(here: tuple[Path, Path]):
    """It is busy, and the replica stays at the version it had: nothing fuzzy is ever seen."""
    a, b = here
    (a / "image").write_bytes(bytes(8 * MIB))
    sync(a, b)
    runs, until = 0, time.monotonic() + SECONDS
    with _Guest(a / "image"):
        while runs < 3 or time.monotonic() < until:
            runs += 1
            report = bisync.sync(a, b)
            assert (report.exit_code, report.busy) == (24, 1)
            assert set(_stamps(b / "image")) == {0}
    print(f"{runs} runs, each of them busy")
    assert bisync.sync(a, b).exit_code == 0
    assert look(a) == look(b)


def test_an_image_that_never_rests(folder: Path):
    """Each version that becomes visible is one instant: a prefix of blocks is one round ahead.

    Twelve runs here; ``BISYNC_SECONDS=120`` for as long as that.
    """
    a, b = folder / "A", folder / "B"
    a.mkdir()
    b.mkdir()
    (a / "image").write_bytes(bytes(8 * MIB))
    sync(a, b)
    seen = set()
    runs, until = 0, time.monotonic() + SECONDS
    with _Guest(a / "image") as guest:
        while runs < 12 or time.monotonic() < until:
            runs += 1
            report = bisync.sync(a, b, bisync.Config(retention=bisync.Retention(recent=1)))
            assert report.exit_code in (0, 24), report
            assert report.exit_code == 24 or report.busy == 0
            stamps = _stamps(b / "image")
            assert stamps == sorted(stamps, reverse=True), "torn"
            assert stamps[0] - stamps[-1] <= 1, "torn"
            seen.add(tuple(stamps))
    print(f"{runs} runs, {len(seen)} versions, {guest.rounds} rounds of the writer")
    assert len(seen) > 6, "it hardly ever got through"
    assert bisync.sync(a, b).exit_code == 0
    assert look(a) == look(b)
