"""Find content that moved within a file: which stretches of the new version are old blocks.

The side with the new version searches, with the list of the old one. The other
side answers questions about what it has (:class:`Holder`). Cheap means first, each only for what
the one before left over:

1. Anchors near the places from where on nothing matches, and a sample of all: equal prints give the
   *shift* between old and new. One block proves a shift; it is then followed, block by block at
   hashing speed, forwards and back.
2. Anchors of every block, if the sample had less.
3. The rolling sum at every offset, for a bounded amount.

Tridgell, "Efficient Algorithms for Sorting and Synchronization", 1999, chapter 3, has the third;
anchors as in LBFS (Muthitacharoen et al., "A Low-bandwidth Network File System", 2001), but made on
demand and never stored. The work is linear in what is searched, whatever the content is: of equal
prints and sums one is kept, and what failed to prove is not tried again.
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from bisync.delta.backend import PRINT_SPAN, Backend, Offsets, Sums, SumTable
from bisync.delta.blocks import Blocks, finding, is_zero_block
from bisync.delta.digest import BLOCK_SIZE, GROUP_BLOCKS, block_digest
from bisync.errors import StaleError

FIRST_ANCHORS = 4_096  # 64 KiB of answer
ALL_ANCHORS = 65_536  # 1 MiB
MOST_SUMS = 4_096  # blocks of the old version whose rolling sums are asked for
MOST_ROLLED = 64 << 20  # bytes searched at every offset; more are sent faster than searched
_SAMPLE = 32 << 10  # bytes of a block in which an anchor is looked for
_TILE = 1 << 20  # bytes looked at in one step
_MOST_ANCHORS = 4_096  # looked at per step; 256 are to be expected
_FAILURES = 8  # proofs that may fail per block of the new version


class Anchors(Struct, frozen=True):
    """Anchors of the old version: ``offset`` (n) and ``print`` (n), one of each print."""

    offset: Offsets
    print: Sums


class Holder(Protocol):
    """The side that has the old version."""

    def anchors(self, near: Sequence[int], most: int) -> Anchors:
        """Anchors of its version.

        Args:
            near: blocks from which on anchors are wanted first.
            most: how many at most, those of a sample of the whole version included.
        """
        ...

    def sums(self, blocks: Sequence[int]) -> Sums:
        """The rolling sums of some of its whole blocks."""
        ...


def anchors_among(
    count: int,
    read: Callable[[int, int], memoryview],
    near: Sequence[int],
    most: int,
    backend: Backend,
) -> Anchors:
    """What a holder answers that has ``count`` blocks; see :meth:`Holder.anchors`."""
    starts, half = list(near[: most // 2]), most // 2
    each = half // max(len(starts), 1)
    some = [(block, each) for block in starts]
    some += [(block, 1) for block in range(0, count, max(-(-count // half), 1))]
    offsets, prints = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for block, wanted in some:
        length = BLOCK_SIZE if wanted > 1 else _SAMPLE
        data = np.frombuffer(read(block * BLOCK_SIZE, length), np.uint8)
        at = backend.anchors(data)[:wanted]
        offsets.append(at + block * BLOCK_SIZE)
        prints.append(backend.prints(data, at))
    once, first = np.unique(np.concatenate(prints), return_index=True)
    return Anchors(np.concatenate(offsets)[first], once)


def sums_of(
    blocks: Sequence[int], read: Callable[[int, int], memoryview], backend: Backend
) -> Sums:
    """The rolling sums of some whole blocks; see :meth:`Holder.sums`."""
    found = [np.zeros(0, np.uint64)]
    for block in blocks:
        data = np.frombuffer(read(block * BLOCK_SIZE, BLOCK_SIZE), np.uint8)
        if len(data) < BLOCK_SIZE:
            raise StaleError("it is shorter than its list says")
        found.append(backend.block_sums(data))
    return np.concatenate(found)


class Copy(Struct, frozen=True, order=True):
    """A stretch of the new version, ``start`` to ``end``, that the old one has at ``old``."""

    start: int
    end: int
    old: int

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def shift(self) -> int:
        """How far it moved towards the end."""
        return self.start - self.old


class _Tried(Struct):
    """What was tried and found not to be so, and how much more may fail."""

    pairs: set[tuple[int, int]] = field(default_factory=set)
    left: int = 0


class Search:
    """Searches the stretches of a new version that do not match the old one in place."""

    def __init__(
        self,
        new: Blocks,
        old: Blocks,
        read: Callable[[int, int], memoryview],
        backend: Backend,
        pace: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        """
        Args:
            new: the list of the version that is searched.
            old: the list of the other one.
            read: gives a stretch of the new version: (offset, length), valid until the next one.
            pace: called with 0 now and then; may end it all.
        """
        self.copies: list[Copy] = []  # in order, none over another
        self._new, self._old = new, old
        self._read, self._backend, self._pace = read, backend, pace

    def run(self, stretches: Sequence[range], holder: Holder) -> list[Copy]:
        """Search runs of blocks that do not match in place; see :attr:`copies`."""
        near = sorted({min(run.start, max(self._old.count - 1, 0)) for run in stretches})
        anchors = holder.anchors(near, FIRST_ANCHORS)
        spans = [self._span(run) for run in stretches]
        self._by_anchors(spans, anchors)
        if self._old.count > FIRST_ANCHORS // 2 and self._left(spans):
            self._by_anchors(self._left(spans), holder.anchors([], ALL_ANCHORS))
        left = self._left(spans)
        if left and sum(end - start for start, end in left) <= MOST_ROLLED:
            self._by_sums(left, holder)
        return self.copies

    def _span(self, run: range) -> tuple[int, int]:
        return run.start * BLOCK_SIZE, min(run.stop * BLOCK_SIZE, self._new.size)

    def _left(self, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What is not found yet, as far as a block would fit and it is not zeros."""
        left: list[tuple[int, int]] = []
        for start, end in spans:
            at = start
            first = max(bisect.bisect(self.copies, Copy(start, start, 0)) - 1, 0)
            for copy in itertools.chain(
                itertools.islice(self.copies, first, None), [Copy(end, end, 0)]
            ):
                if copy.end <= start:
                    continue
                stop = min(copy.start, end)
                if stop - at >= BLOCK_SIZE and not self._is_zero(at, stop):
                    left.append((at, stop))
                at = max(at, copy.end)
                if at >= end:
                    break
        return left

    def _is_zero(self, start: int, end: int) -> bool:
        """Whether the blocks that lie in a stretch from end to end are zeros."""
        first, last = -(-start // BLOCK_SIZE), end // BLOCK_SIZE
        return last > first and all(
            is_zero_block(self._new.prove(block), BLOCK_SIZE) for block in range(first, last)
        )

    def _by_anchors(self, spans: list[tuple[int, int]], anchors: Anchors) -> None:
        order = np.argsort(anchors.print)
        prints, offsets = anchors.print[order], anchors.offset[order]
        if len(prints) == 0:
            return

        def candidates(data: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
            found = self._backend.anchors(data)
            # Where many offsets are anchors the content repeats itself, and a few say as much.
            found = found[:: len(found) // _MOST_ANCHORS + 1]
            marks, first = np.unique(self._backend.prints(data, found), return_index=True)
            found = found[first]
            at = np.searchsorted(prints, marks)
            at[at == len(prints)] = 0
            hits = np.flatnonzero(prints[at] == marks)
            for hit in hits[np.argsort(found[hits])]:
                yield int(found[hit]), int(offsets[at[hit]])

        for start, end in spans:
            self._scan(start, end, PRINT_SPAN, candidates)

    def _by_sums(self, spans: list[tuple[int, int]], holder: Holder) -> None:
        used = {copy.old // BLOCK_SIZE for copy in self.copies}
        whole = self._old.size // BLOCK_SIZE
        unused = (
            block
            for group in sorted(self._old.groups)  # those that are missing hold zeros
            for block in range(group * GROUP_BLOCKS, min((group + 1) * GROUP_BLOCKS, whole))
            if block not in used
            and not (block < self._new.count and self._old.prove(block) == self._new.prove(block))
            and not is_zero_block(self._old.prove(block), BLOCK_SIZE)
        )
        blocks = list(itertools.islice(unused, MOST_SUMS))
        if not blocks:
            return
        first: dict[int, int] = {}
        for block, value in zip(blocks, holder.sums(blocks).tolist(), strict=True):
            first.setdefault(value, block)
        table = SumTable.of(np.fromiter(first, np.uint64, len(first)))

        def candidates(data: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
            at, values = self._backend.find(data, table)
            for offset, value in zip(at.tolist(), values.tolist(), strict=True):
                yield offset, first[value] * BLOCK_SIZE

        for start, end in spans:
            self._scan(start, end, BLOCK_SIZE, candidates)

    def _scan(
        self,
        start: int,
        end: int,
        window: int,
        candidates: Callable[[NDArray[np.uint8]], Iterator[tuple[int, int]]],
    ) -> None:
        """Try what ``candidates`` finds between ``start`` and ``end``, from the front.

        Args:
            window: bytes a candidate is recognised by.
        """
        at, tried = start, _Tried()
        while at + window <= end:
            self._pace(0)
            length = min(_TILE + window - 1, end - at)
            # A copy: proving reads through the same buffer.
            data = np.frombuffer(bytes(self._read(at, length)), np.uint8)
            if len(data) < length:
                return  # it is being cut; who sends finds out
            tried.left = _FAILURES * (-(-length // BLOCK_SIZE))
            base, at = at, at + length - window + 1
            reach = base
            for offset, old in candidates(data):
                if base + offset < reach:
                    continue
                if tried.left <= 0:
                    break
                copy = self._grown(base + offset, old, start, end, tried)
                if copy is not None:
                    reach = copy.end
            at = max(at, reach)

    def _grown(self, at: int, old: int, start: int, end: int, tried: _Tried) -> Copy | None:
        """The stretch around ``at`` that a shift explains, or nothing; it is noted."""
        shift = at - old
        # The stretch may reach over the ends of the span into what matches in place; nothing of
        # another copy is taken.
        place = bisect.bisect(self.copies, Copy(at, at, 0))
        low = max(self.copies[place - 1].end if place else 0, start - BLOCK_SIZE, 0)
        high = self.copies[place].start if place < len(self.copies) else self._new.size
        high = min(high, end + BLOCK_SIZE)
        block = old // BLOCK_SIZE
        for candidate in (block, block + 1):
            if self._proven(candidate, shift, low, high, tried):
                first = last = candidate
                while self._follows(first - 1, shift, low, high):
                    first -= 1
                while self._follows(last + 1, shift, low, high):
                    last += 1
                begin = first * BLOCK_SIZE
                stop = min((last + 1) * BLOCK_SIZE, self._old.size)
                copy = Copy(begin + shift, stop + shift, begin)
                bisect.insort(self.copies, copy)
                return copy
        return None

    def _proven(self, block: int, shift: int, low: int, high: int, tried: _Tried) -> bool:
        """Whether the new version has an old block, shifted, between two offsets."""
        if (block, shift) in tried.pairs:
            return False
        data = self._shifted(block, shift, low, high)
        if data is None:
            return False
        if block_digest(data) == self._old.prove(block):
            return True
        tried.pairs.add((block, shift))
        tried.left -= 1
        return False

    def _follows(self, block: int, shift: int, low: int, high: int) -> bool:
        """Whether a shift that one block proved goes on: who assembles proves each new block."""
        data = self._shifted(block, shift, low, high)
        if data is None:
            return False
        if not self._old.finds:
            return block_digest(data) == self._old.prove(block)
        return finding(data, self._old.seed) == self._old.find(block)

    def _shifted(self, block: int, shift: int, low: int, high: int) -> memoryview | None:
        """What the new version has where an old block would be; ``None`` outside of two offsets."""
        if not 0 <= block < self._old.count:
            return None
        length = self._old.length(block)
        at = block * BLOCK_SIZE + shift
        if at < low or at + length > high:
            return None
        self._pace(0)
        data = self._read(at, length)
        return data if len(data) == length else None
