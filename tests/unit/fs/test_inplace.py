"""Writing into a file: whatever part of it reached the disk, it is made old or new again."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bisync.core.method import Apply
from bisync.core.node import Attributes
from bisync.delta.backend import BACKEND
from bisync.delta.blocks import Blocks
from bisync.delta.changes import send_changes
from bisync.delta.reverse import About, pages_in
from bisync.fs import overwriting
from bisync.fs.apart import write_undo
from bisync.fs.bigfile import Patch, Reader, list_blocks
from bisync.fs.meta import attributes_of
from bisync.fs.overwriting import Overwriting, State, open_delta
from bisync.fs.stage import Stage
from tests.unit.delta.test_search import edited

ROUNDS = int(os.environ.get("BISYNC_ROUNDS", "0"))
SEED = int(os.environ.get("BISYNC_SEED", "1"))
MIB = 1 << 20
OLD_NS, NEW_NS = 10**18, 10**18 + 5


class _Disk:
    """Takes what is done to a file apart into steps that reach the disk alone, or not."""

    def __init__(self, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fd = fd
        self.phases: list[list[Callable[[], object]]] = [[]]
        real = {name: getattr(os, name) for name in ("ftruncate", "fsync", "fdatasync", "utime")}
        allocate, punch = overwriting.allocate, overwriting.punch
        self._pwrite = os.pwrite

        def note(name: str, act: Callable[..., object]) -> Callable[..., object]:
            def noted(target: int, *args: int, **more: object) -> object:
                if target != fd:
                    return act(target, *args, **more)
                if name in ("fsync", "fdatasync"):
                    self.phases.append([])
                else:
                    self.phases[-1].append(lambda: act(target, *args, **more))
                return None

            return noted

        for name, act in real.items():
            monkeypatch.setattr(overwriting.os, name, note(name, act))
        monkeypatch.setattr(overwriting, "allocate", note("allocate", allocate))
        monkeypatch.setattr(overwriting, "punch", note("punch", punch))
        monkeypatch.setattr(Overwriting, "_put", self._put)

    def _put(self, offset: int, data: memoryview) -> None:
        for at, end in pages_in(offset, len(data)):
            page, where = bytes(data[at:end]), offset + at
            self.phases[-1].append(lambda page=page, where=where: self._write(page, where))

    def _write(self, page: bytes, where: int) -> None:
        self._pwrite(self.fd, page, where)


def _undo(folder: Path, old: bytes, new: bytes) -> tuple[int, int, int]:
    """The file with its old version, what is new of it, and the undo: descriptors."""
    (folder / "file").write_bytes(old)
    (folder / "new").write_bytes(new)
    file = os.open(folder / "file", os.O_RDWR)
    source = os.open(folder / "new", os.O_RDONLY)
    spool = os.open(folder / "spool", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    state = os.open(folder, os.O_RDONLY)
    os.utime(file, ns=(OLD_NS, OLD_NS))
    blocks = [
        list_blocks(fd, len(data), Blocks(0, SEED)) for fd, data in ((file, old), (source, new))
    ]
    assert blocks[0] is not None and blocks[1] is not None
    patch = Patch(spool, file, blocks[0], apply=Apply.IN_PLACE)
    send_changes(blocks[1], patch, Reader(source), lambda _length: None, BACKEND)
    stage = Stage(state, workers=1)
    digests = blocks[0].digest().hex(), blocks[1].digest().hex()
    about = About(1, "file", "", len(old), OLD_NS, digests[0], len(new), NEW_NS, digests[1], {})
    attributes: Attributes = attributes_of(os.fstat(file), (), ())
    name = write_undo(stage, spool, file, patch, about, attributes)
    undo = os.open(name, os.O_RDONLY, dir_fd=stage.incoming)
    stage.discard(name)
    stage.close()
    os.close(state)
    os.close(source)
    return file, spool, undo


def _read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


def test_any_part_of_it_reached_the_disk(tmp_path: Path):
    """Of what was not flushed yet, any pages, lengths and holes: old or new, exactly, or edited.

    Three seconds here; ``BISYNC_ROUNDS=2000`` does so many.
    """
    chance = random.Random(SEED)
    until, done = time.monotonic() + 3, 0
    seen: set[State] = set()
    while done < ROUNDS or (not ROUNDS and time.monotonic() < until):
        done += 1
        size = chance.choice([1, 5000, 131_072, 400_000, MIB + 1])
        old = chance.randbytes(size) if chance.random() < 0.8 else bytes(size)
        new, _ = edited(chance, old)
        file, spool, undo = _undo(tmp_path, old, new)
        delta = open_delta(undo)
        assert delta is not None
        target = Overwriting(file, undo, delta)
        assert target.is_old()
        assert target.state() is State.OLD or old == new
        with pytest.MonkeyPatch.context() as patched:
            disk = _Disk(file, patched)
            target.write_new(spool)
            target.finish_new()
        last = chance.randrange(len(disk.phases))
        for phase in disk.phases[:last]:
            for step in phase:
                step()
        for step in disk.phases[last]:
            if chance.random() < 0.5:
                step()
        between = _read(file)
        by_hand = chance.random() < 0.3 and len(between) > 0
        if by_hand:
            at = chance.randrange(len(between))
            os.pwrite(file, bytes([between[at] ^ 1]), at)
            between = _read(file)
        found = Overwriting(file, undo, delta).settle()
        seen.add(found)
        where = (SEED, done)
        if found is State.EDITED:
            assert by_hand, where
            assert _read(file) == between, where
        elif not by_hand:
            assert _read(file) == (old if found is State.OLD else new), where
            wanted = OLD_NS if found is State.OLD else NEW_NS
            assert os.fstat(file).st_mtime_ns == wanted, where
        else:
            # A whole version, and the byte that somebody wrote in it.
            result = _read(file)
            assert result == between or result in (old, new), where
        for fd in (file, spool, undo):
            os.close(fd)
    assert done >= 20
    assert seen == set(State) - {State.BETWEEN, State.NEARLY}
