"""Write a file's next version into it, so that it can be undone at any moment.

The undo holds what will be written over, and is durable before the first byte is. While it lies in
``undo/`` the file counts as torn, and recovery makes it the old or the new version before anything
reads it. Afterwards the undo is what is kept of the old version. A write lease holds off everybody
who opens the file meanwhile: nobody ever reads a mix.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Any

from bisync.core.node import Attributes, Kind, NodeId, Place
from bisync.delta.blocks import Blocks, finding, is_zero_block
from bisync.delta.digest import BLOCK_SIZE, GROUP_BLOCKS, block_digest
from bisync.delta.reverse import (
    STRETCH,
    About,
    ReverseDelta,
    Stretch,
    Writer,
    page_digest,
    pages_in,
    read_delta,
)
from bisync.errors import PathError, StaleError
from bisync.fs.bigfile import BasisError, Patch, Reader
from bisync.fs.content import chunks_of
from bisync.fs.look import Looker
from bisync.fs.meta import apply_attributes, attributes_of, read_xattrs
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.linux.holes import allocate, punch
from bisync.linux.lease import Lease, WriteHold, release, take_write_lease

if TYPE_CHECKING:
    from bisync.fs.incoming import Staged

log = logging.getLogger(__name__)
MOST = 4  # of a file at most this part is written over; of more, a new file costs less
MOST_BYTES = 1 << 30  # nor more: who opens the file meanwhile has to wait so long
_STEP = 8 << 20  # bytes between two looks whether somebody waits
_PATIENCE_S = 10.0  # somebody who opens the file waits so long at most
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class State(Enum):
    """What a file is, going by what its undo says of the stretches that are written."""

    OLD = "old"
    NEW = "new"
    NEARLY = "nearly"  # new but for holes and its length
    BETWEEN = "between"
    EDITED = "edited"  # somebody wrote to it since


@dataclass(frozen=True, slots=True)
class Apart:
    """A new version of which the stage has only what is new, and the undo of writing it."""

    patch: Patch
    undo: bytes  # its name in the stage

    def fill(self, fd: int, basis: int) -> None:
        """Make the staged file whole after all, and durable.

        Raises:
            BasisError: the old version is not what was recorded.
        """
        before = os.fstat(fd)
        self.patch.fill(fd, basis)
        os.utime(fd, ns=(before.st_mtime_ns, before.st_mtime_ns))
        os.fsync(fd)


def write_undo(
    stage: Stage, fd: int, basis: int, patch: Patch, about: About, attributes: Attributes
) -> bytes:
    """Put what ``patch`` is going to write over into the stage, durably; return its name.

    Args:
        fd: what the stage has of the new version.
        basis: the old version, open for reading; looked at once more, block by block.
        attributes: of the old version.

    Raises:
        BasisError: the old version is not what was recorded.
    """
    name, out = stage.create()
    try:
        with open(out, "wb", buffering=STRETCH, closefd=False) as file:
            writer, old, new = Writer(file.write), _Old(basis, patch), Reader(fd)
            for offset, length, hole in patch.stretches:
                before = old.read(offset, length)
                writer.add(offset, before, length if hole else new(offset, length))
            end = about.size
            for start in range(about.new_size, end, STRETCH):
                writer.add(start, Reader(basis)(start, min(STRETCH, end - start)), b"")
            writer.finish(about, patch.old)
        now = attributes_of(os.fstat(out), *read_xattrs(out, b""))
        apply_attributes(out, b"", Kind.FILE, now, attributes)
        os.fsync(out)
    except BaseException:
        stage.discard(name)
        raise
    finally:
        os.close(out)
    return name


class _Old:
    """Reads the old version; a block that is not what was recorded ends it."""

    def __init__(self, basis: int, patch: Patch) -> None:
        self._old, self._read = patch.old, Reader(basis)
        self._known = -1
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """A stretch within one block; shorter where the old version ends."""
        block = offset // BLOCK_SIZE
        if block >= self._old.count:
            return b""
        if block != self._known:
            self._data = bytes(self._read(block * BLOCK_SIZE, self._old.length(block)))
            if finding(self._data, self._old.seed) != self._old.find(block):
                raise BasisError("the replica's own file is not what was recorded")
            self._known = block
        start = offset - block * BLOCK_SIZE
        return self._data[start : start + length]


def open_delta(fd: int) -> ReverseDelta | None:
    """Read a delta's index; ``None`` if it is none, or damaged."""
    return read_delta(lambda at, length: os.pread(fd, length, at), os.fstat(fd).st_size)


class LeaseLostError(Exception):
    """Somebody waited too long to open the file, or has it open: nothing may be written to it."""


class Overwriting:
    """A file, open for writing, and the undo of writing its next version into it."""

    def __init__(
        self, fd: int, undo: int, delta: ReverseDelta, left_s: Callable[[], float] = lambda: inf
    ) -> None:
        """
        Args:
            left_s: seconds for which nobody else has the file open for certain.
        """
        self.fd, self.undo, self.delta = fd, undo, delta
        self._read, self._old = Reader(fd), Reader(undo)
        self._left_s = left_s
        self._written = 0  # stretches that have new bytes
        self.is_new = False  # all is written, but for its time

    def _may(self) -> None:
        """
        Raises:
            LeaseLostError: nothing may be written any more.
        """
        if self._left_s() <= 0:
            raise LeaseLostError

    def state(self) -> State:
        """Look at every page that is written."""
        about = self.delta.about
        size = os.fstat(self.fd).st_size
        if not min(about.size, about.new_size) <= size <= max(about.size, about.new_size):
            return State.EDITED
        old, new, done = size == about.size, size >= about.new_size, size == about.new_size
        for stretch in self.delta.stretches:
            for is_old, is_new, is_done in self._pages(stretch, size):
                if not (is_old or is_new):
                    return State.EDITED
                old, new, done = old and is_old, new and is_new, done and is_done
        if old:
            return State.OLD
        if new:
            return State.NEW if done else State.NEARLY
        return State.BETWEEN

    def settle(self) -> State:
        """Make a file that a crash left the old or the new version; which of them it is.

        Nothing is written after somebody may have been let in: that raises ``LeaseLostError``.

        ``EDITED``: neither can be had, since somebody wrote to it; nothing was touched. One that is
        a whole version to begin with stays it, whatever was written to other places since.
        """
        state = self.state()
        if state is State.EDITED:
            return state
        rest = self.rest_is_old()
        self._written = len(self.delta.stretches)
        if state in (State.OLD, State.BETWEEN):
            if rest and state is State.OLD:
                self._end(self.delta.about.mtime_ns)
            elif rest:
                self.write_old()
            return State.OLD if rest or state is State.OLD else State.EDITED
        if rest:
            self.finish_new()
        return State.NEW if rest or state is State.NEW else State.EDITED

    def resembles(self) -> bool:
        """Whether it is this file at all, going by what is written to: most of it is old or new."""
        size = os.fstat(self.fd).st_size
        found = [
            is_old or is_new
            for stretch in self.delta.stretches
            for is_old, is_new, _ in self._pages(stretch, size)
        ]
        return sum(found) * 2 > len(found)

    def _pages(self, stretch: Stretch, size: int) -> Iterator[tuple[bool, bool, bool]]:
        """Whether each page is the old one, the new one, and as it is at the very end.

        Holes and the length come last: until then what they take away may be there.
        """
        length = max(stretch.old, stretch.new)
        here = bytes(self._read(stretch.offset, min(length, max(0, size - stretch.offset))))
        before = bytes(self._old(stretch.at, stretch.old))
        for number, (start, end) in enumerate(pages_in(stretch.offset, length)):
            page, old = here[start:end], before[start:end]
            zeros = page == bytes(len(page))
            if len(old) <= len(page):  # what it grew by reads as zeros until it is written
                is_old = page == old + bytes(len(page) - len(old))
            else:
                is_old = False
            if stretch.hole:
                yield is_old, is_old or zeros, zeros
            elif stretch.new:
                is_new = page_digest(page) == stretch.pages[number]
                yield is_old, is_new, is_new
            else:
                yield is_old, page == old[: len(page)], not page

    def is_old(self) -> bool:
        """Whether all that is going to be written over is what the undo has."""
        size = os.fstat(self.fd).st_size
        return size == self.delta.about.size and all(
            self._read(s.offset, s.old) == self._old(s.at, s.old) for s in self.delta.stretches
        )

    def rest_is_old(self) -> bool:
        """Whether each block that nothing is written to is what it was."""
        blocks, about = self.delta.blocks, self.delta.about
        ours: set[int] = set()
        for stretch in self.delta.stretches:
            length = max(stretch.old, stretch.new, 1)
            first = stretch.offset // BLOCK_SIZE
            ours.update(range(first, (stretch.offset + length - 1) // BLOCK_SIZE + 1))
        end = min(about.size, about.new_size)
        for chunk in chunks_of(self.fd, end, bytearray(STRETCH)):
            self._may()
            first = chunk.offset // BLOCK_SIZE
            count = -(-chunk.length // BLOCK_SIZE)
            if chunk.data is None:
                if not self._are_zeros(blocks, first, count, ours):
                    return False
                continue
            for number in range(count):
                if first + number not in ours:
                    data = chunk.data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
                    if block_digest(data) != blocks.prove(first + number):
                        return False
        return self._around_is_old(ours) and self._growth_is_empty()

    @staticmethod
    def _are_zeros(blocks: Blocks, first: int, count: int, ours: set[int]) -> bool:
        """Whether some blocks were zeros, but for those that are written to."""
        block, end = first, first + count
        while block < end:
            group, row = divmod(block, GROUP_BLOCKS)
            if group not in blocks.groups:  # nothing but zeros
                block += GROUP_BLOCKS - row
                continue
            length = blocks.length(block)
            if block not in ours and not is_zero_block(blocks.prove(block), length):
                return False
            block += 1
        return True

    def _growth_is_empty(self) -> bool:
        """Whether nothing is in what the file grows by but what we write there."""
        at, end = self.delta.about.size, os.fstat(self.fd).st_size
        edges = [(s.offset, s.offset + s.new) for s in self.delta.stretches if not s.hole]
        for start, stop in [*(edge for edge in edges if edge[1] > at), (end, end)]:
            for chunk in chunks_of(self.fd, min(start, end), bytearray(STRETCH), at):
                if chunk.data is not None and any(chunk.data):
                    return False
            at = max(at, stop)
        return True

    def _around_is_old(self, touched: set[int]) -> bool:
        """Whether, with the old stretches laid over it, each touched block is what it was."""
        blocks = self.delta.blocks
        by_block: dict[int, list[Stretch]] = {}
        for stretch in self.delta.stretches:
            if stretch.old:
                last = (stretch.offset + stretch.old - 1) // BLOCK_SIZE
                for block in range(stretch.offset // BLOCK_SIZE, last + 1):
                    by_block.setdefault(block, []).append(stretch)
        for block in sorted(touched):
            if block >= blocks.count:
                continue
            start, length = block * BLOCK_SIZE, blocks.length(block)
            data = bytearray(length)
            here = self._read(start, length)
            data[: len(here)] = here
            for stretch in by_block.get(block, ()):
                first = max(start, stretch.offset)
                end = min(start + length, stretch.offset + stretch.old)
                at = stretch.at + first - stretch.offset
                data[first - start : end - start] = self._old(at, end - first)
            if block_digest(data) != blocks.prove(block):
                return False
        return True

    def write_new(self, source: int) -> None:
        """Write the next version, from ``source`` where it has its place already.

        Raises:
            StaleError: somebody wants to open the file, and to go back takes less time.
            LeaseLostError: nothing may be written any more.
        """
        todo = [s for s in self.delta.stretches if s.new and not s.hole]
        for stretch in todo:
            allocate(self.fd, stretch.offset, stretch.new)  # no space: now, not half-way
        total, done, looked = sum(s.new for s in todo), 0, 0
        began, new = time.monotonic(), Reader(source)
        for number, stretch in enumerate(self.delta.stretches, 1):
            if stretch.new and not stretch.hole:
                self._written = number
                self._put(stretch.offset, new(stretch.offset, stretch.new))
                done += stretch.new
            if done - looked >= _STEP:
                looked = done
                left_s, spent_s = self._left_s(), time.monotonic() - began
                if left_s <= 0:
                    raise LeaseLostError
                more_s = spent_s * (total - done) / done
                if left_s < inf and more_s > max(_PATIENCE_S, spent_s):
                    raise StaleError("somebody opened it while it was written to")
        self._written = len(self.delta.stretches)
        self._may()

    def finish_new(self) -> None:
        """Holes, length and time: what is left when all bytes are written; all is durable then.

        Raises:
            LeaseLostError: nothing may be written any more.
        """
        about = self.delta.about
        holes = [stretch for stretch in self.delta.stretches if stretch.hole]
        if holes or about.new_size != os.fstat(self.fd).st_size:
            os.fdatasync(self.fd)  # what they take away comes back as long as bytes are missing
            for stretch in holes:
                self._may()
                punch(self.fd, stretch.offset, stretch.new)
            self._may()
            os.ftruncate(self.fd, about.new_size)
        self.is_new = True
        self._end(about.new_mtime_ns)

    def write_old(self) -> None:
        """Make it the old version again.

        Raises:
            LeaseLostError: nothing may be written any more.
        """
        about = self.delta.about
        for number, stretch in enumerate(self.delta.stretches[: self._written]):
            if number % 64 == 0:
                self._may()
            old = self._old(stretch.at, stretch.old)
            if old != bytes(len(old)):
                self._put(stretch.offset, old)
            elif stretch.old:
                punch(self.fd, stretch.offset, stretch.old)  # it may have been a hole: no space
        self._may()
        os.ftruncate(self.fd, about.size)
        self._end(about.mtime_ns)

    def _end(self, mtime_ns: int) -> None:
        """Set the time, and make all durable. The undo tells what it is, whatever its time is."""
        self._may()
        os.utime(self.fd, ns=(mtime_ns, mtime_ns))
        os.fsync(self.fd)

    def _put(self, offset: int, data: memoryview) -> None:
        while data:
            done = os.pwrite(self.fd, data, offset)
            data, offset = data[done:], offset + done


class InPlace:
    """Writes the next versions of one batch's files into them."""

    def __init__(self, look: Looker, stage: Stage, store: Store) -> None:
        self._look, self._stage, self._store = look, stage, store

    def write(self, place: Place, node: NodeId, staged: "Staged") -> bytes | None:
        """Write a staged version into the file at a place; where its old version is kept then.

        Returns:
            ``None`` if somebody else has it open, or may not be held off: it was not touched.

        Raises:
            StaleError: the file is not what was observed.
            PathError: it failed; the file is as it was, or the next run makes it so.
        """
        assert staged.apart is not None
        path = self._look.index.place_path(place)
        with self._opened(place, node) as opened:
            if opened is None:
                return None
            fd, hold = opened
            source = os.open(staged.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=staged.dir_fd)
            try:
                with self._written(opened, source, staged.apart.undo) as (folder, undo, record):
                    kept = self._store.keep(folder, undo, path, record, copy=False, delta=True)
            finally:
                os.close(source)
            self._stage.discard(staged.name)
            staged.handle = self._look.root.handles.read(fd, b"")
            staged.info, staged.found = os.fstat(fd), read_xattrs(fd, b"")
            if hold.left_s() <= 0:
                # What it looks like now may be somebody else's doing: the next scan tells.
                raise StaleError("somebody opened it while it was flushed")
            return kept.path

    def make_whole(self, place: Place, node: NodeId, staged: "Staged") -> None:
        """Give a staged version what stays of the old one, so that it can be exchanged with it.

        Raises:
            StaleError: the file is not what was observed.
        """
        assert staged.apart is not None
        looked = self._look.at(place, node, content=True)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        basis = os.open(looked.name, flags, dir_fd=looked.dir_fd)
        try:
            fd = os.open(staged.name, os.O_RDWR | os.O_CLOEXEC, dir_fd=staged.dir_fd)
            try:
                staged.apart.fill(fd, basis)
                staged.info = os.fstat(fd)
            finally:
                os.close(fd)
        finally:
            os.close(basis)
        self._stage.discard(staged.apart.undo)
        staged.apart = None

    @contextlib.contextmanager
    def _opened(self, place: Place, node: NodeId) -> Iterator[tuple[int, WriteHold] | None]:
        """The file, open for writing, held so that nobody else can open it; ``None``: impossible.

        Raises:
            StaleError: it is not what was observed.
        """
        looked = self._look.at(place, node, content=True)
        try:
            fd = os.open(looked.name, _OPEN, dir_fd=looked.dir_fd)
        except OSError as error:
            log.info("not-in-place node=%d reason=%s", node, error)
            yield None
            return
        try:
            if take_write_lease(fd) is not Lease.GRANTED:
                yield None
                return
            hold = WriteHold(fd)
            try:
                self._look.at(place, node, content=True)
                info = os.fstat(fd)
                if info.st_ino != looked.info.st_ino:
                    raise StaleError("something else has its name")
                yield (fd, hold) if info.st_nlink == 1 else None
            finally:
                release(fd)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _written(
        self, opened: tuple[int, WriteHold], source: int, undo: bytes
    ) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Write a version; if the block fails, or the writing itself, all is as it was.

        Yields the directory and the name of the undo, and what is to be said of it. What is done
        with it there must leave it where it is, or take it away as a last step.

        Args:
            opened: the file, held.
            source: what is new of it.
            undo: its name in the stage.

        Raises:
            StaleError: the file is not what the undo was made for.
            PathError: it failed, and could not be undone now; the next run does that.
        """
        stage = self._stage
        delta_fd = os.open(undo, os.O_RDONLY | os.O_CLOEXEC, dir_fd=stage.incoming)
        try:
            delta = open_delta(delta_fd)
            if delta is None:
                raise StaleError("its undo cannot be read")
            target = Overwriting(opened[0], delta_fd, delta, opened[1].left_s)
            if not target.is_old():
                raise StaleError("it changed since it was observed")
            os.rename(undo, undo, src_dir_fd=stage.incoming, dst_dir_fd=stage.torn)
            os.fsync(stage.torn)
            try:
                target.write_new(source)
                try:
                    target.finish_new()
                except LeaseLostError:
                    if not target.is_new:
                        raise
                    os.fsync(opened[0])
                yield stage.torn, undo, delta.about.record
            except BaseException as error:
                self._undo(target, undo, error)
                raise
        finally:
            os.close(delta_fd)

    def _undo(self, target: Overwriting, undo: bytes, why: BaseException) -> None:
        try:
            target.write_old()
        except (OSError, LeaseLostError) as error:
            what = error.strerror if isinstance(error, OSError) else "somebody else has it open"
            text = f"{why or 'somebody opened it'}; it is half-written, and cannot be undone now"
            raise PathError(f"{text} ({what}): the next run does it") from error
        os.unlink(undo, dir_fd=self._stage.torn)
        os.fsync(self._stage.torn)
