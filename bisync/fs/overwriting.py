"""A file that is written into, and its undo: which version it is, and how it becomes one.

Nobody else may have the file open while it is written; see :class:`bisync.linux.lease.WriteHold`.
"""

import os
import time
from collections.abc import Callable, Iterator
from enum import Enum
from math import inf

from bisync.delta.blocks import Blocks, is_zero_block
from bisync.delta.digest import BLOCK_SIZE, GROUP_BLOCKS, block_digest
from bisync.delta.reverse import (
    STRETCH,
    ReverseDelta,
    Stretch,
    page_digest,
    pages_in,
    read_delta,
)
from bisync.errors import StaleError
from bisync.fs.bigfile import Reader
from bisync.fs.content import chunks_of
from bisync.linux.holes import allocate, punch

_STEP = 8 << 20  # bytes between two looks whether somebody waits
_PATIENCE_S = 10.0  # to go on takes no longer than that: who opens the file can wait


class State(Enum):
    """What a file is, going by what its undo says of the stretches that are written."""

    OLD = "old"
    NEW = "new"
    NEARLY = "nearly"  # new but for holes and its length
    BETWEEN = "between"
    EDITED = "edited"  # somebody wrote to it since


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
        self.touched = False  # anything was done to it
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
            self._may()
            self.touched = True
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
                more_s = spent_s * (total - done) / done
                if left_s < inf and more_s > min(left_s, max(_PATIENCE_S, spent_s)):
                    raise StaleError("somebody opened it while it was written to")
        self._written = len(self.delta.stretches)

    def finish_new(self) -> None:
        """Holes, length and time: what is left when all bytes are written; all is durable then.

        Raises:
            LeaseLostError: nothing may be written any more.
        """
        about = self.delta.about
        holes = [stretch for stretch in self.delta.stretches if stretch.hole]
        self.touched = True
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
        for stretch in self.delta.stretches[: self._written]:
            old = self._old(stretch.at, stretch.old)
            if old != bytes(len(old)):
                self._put(stretch.offset, old)
            elif stretch.old:
                self._may()
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
            self._may()
            done = os.pwrite(self.fd, data, offset)
            data, offset = data[done:], offset + done
