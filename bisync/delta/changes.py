"""What crosses for a big file: the blocks that differ; of them what did not move, in pages.

The source has the list of its version, the receiver that of its own old one; both are lists of
proving digests, so nothing but the blocks that differ is read on either side. Where many in a row
differ, content may have moved: see :mod:`bisync.delta.search`.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Protocol, TypeAlias

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bisync.delta.backend import Backend
from bisync.delta.blocks import Blocks, differing, is_zero_block
from bisync.delta.digest import BLOCK_SIZE, block_digest
from bisync.delta.pages import PAGE_SIZE, differing_pages, page_digests
from bisync.delta.search import Copy, Holder, Search
from bisync.errors import StaleError

SHORTEST_RUN = 4  # blocks in a row that differ before moved content is looked for


class Moved(Struct, frozen=True):
    """A piece that the old version has: ``length`` bytes from ``old`` on."""

    old: int
    length: int


Piece: TypeAlias = memoryview | Moved
Pieces = list[tuple[int, Piece]]
"""Stretches of a block, ascending, none over another: (offset in it, what is there)."""


class ChangeSink(Holder, Protocol):
    """The receiver: it has the old version and makes the new one of it."""

    key: int
    """Of the page digests; one per session."""

    old: Blocks
    """What it has; the finding digests are its own business."""

    @property
    def searchable(self) -> bool:
        """Whether moved content may be taken from its version."""
        ...

    def begin(self, size: int, changed: NDArray[np.int64]) -> None:
        """The new version has ``size`` bytes. Called once, before anything else.

        Args:
            changed: the blocks that will be put or zeroed, ascending; all others are as they were.
        """
        ...

    def pages(self, block: int) -> Sequence[int]:
        """The digests of the pages of one of its blocks."""
        ...

    def put(self, block: int, proof: bytes, pieces: Pieces) -> None:
        """A block that differs: what to write over the old one, and what must come out."""
        ...

    def zero(self, block: int, proof: bytes) -> None:
        """A block that differs and is zeros."""
        ...


def send_changes(
    new: Blocks,
    sink: ChangeSink,
    read: Callable[[int, int], memoryview],
    pace: Callable[[int], None],
    backend: Backend,
) -> None:
    """Tell a receiver all that makes its version the new one.

    Args:
        new: the list of the version to send.
        read: gives a stretch of it: (offset, length). Valid until the next one.
        pace: called before so many bytes are sent, and with 0 now and then; may wait, or end
            it all.

    Raises:
        StaleError: what was read is not what the list says.
    """
    _Changes(new, sink, read, pace, backend).send()


class _Changes:
    """The changes between two versions."""

    def __init__(
        self,
        new: Blocks,
        sink: ChangeSink,
        read: Callable[[int, int], memoryview],
        pace: Callable[[int], None],
        backend: Backend,
    ) -> None:
        self._new, self._old, self._sink = new, sink.old, sink
        self._read, self._pace, self._backend = read, pace, backend
        self._copies: list[Copy] = []

    def send(self) -> None:
        changed = np.fromiter(differing(self._old, self._new), np.int64)
        self._sink.begin(self._new.size, changed)
        stretches: list[range] = []
        if self._sink.searchable:
            stretches = [run for run in self._runs(changed.tolist()) if self._may_have_moved(run)]
        if stretches:
            search = Search(self._new, self._old, self._read, self._backend, self._pace)
            self._copies = self._refined(search.run(stretches, self._sink))
        for block in changed.tolist():
            self._pace(0)
            proof = self._new.prove(block)
            if is_zero_block(proof, self._new.length(block)):
                self._sink.zero(block, proof)
            else:
                self._sink.put(block, proof, self._pieces(block, proof))

    def _runs(self, changed: list[int]) -> Iterator[range]:
        """Blocks in a row that differ and are not zeros."""
        start = end = -1
        for block in changed:
            if is_zero_block(self._new.prove(block), self._new.length(block)):
                continue
            if block != end:
                if end > start:
                    yield range(start, end)
                start = block
            end = block + 1
        if end > start:
            yield range(start, end)

    def _may_have_moved(self, run: range) -> bool:
        """Whether a run is worth a search: long, and not the old one with other pages in it."""
        if len(run) < SHORTEST_RUN or run.start >= self._old.count - 1:
            return False  # short; or it grew only
        last = min(run.stop, self._old.count) - 1
        return not all(
            self._is_in_place(block) for block in {(run.start + last) // 2, last - (last > run[0])}
        )

    def _is_in_place(self, block: int) -> bool:
        """Whether half the pages of a block are where they were."""
        length = self._new.length(block)
        data = self._read(block * BLOCK_SIZE, length)
        other = differing_pages(data, self._sink.pages(block), self._sink.key)
        return sum(len(piece) for _, piece in other) * 2 <= length

    def _refined(self, copies: list[Copy]) -> list[Copy]:
        """Moved blocks, and what moved with them of the blocks before and behind."""
        found = list(copies)
        for copy in copies:
            end = copy.old + copy.length
            for block in (copy.old // BLOCK_SIZE - 1, -(-end // BLOCK_SIZE)):
                if 0 <= block < self._old.count:
                    self._take_pages(block, copy.shift, found)
        return found

    def _take_pages(self, block: int, shift: int, found: list[Copy]) -> None:
        """Add the pages of an old block that are in the new version, as far as nothing else is."""
        digests = self._sink.pages(block)
        for number, digest in enumerate(digests):
            old = block * BLOCK_SIZE + number * PAGE_SIZE
            length = min(PAGE_SIZE, self._old.size - old)
            start, end = old + shift, old + shift + length
            place = bisect.bisect(found, Copy(start, start, 0))
            if start < 0 or end > self._new.size:
                continue
            if place and found[place - 1].end > start:
                continue
            if place < len(found) and found[place].start < end:
                continue
            if page_digests(self._read(start, length), self._sink.key) == [digest]:
                found.insert(place, Copy(start, end, old))

    def _pieces(self, block: int, proof: bytes) -> Pieces:
        """What makes a block; what is not said is where it was."""
        begin, length = block * BLOCK_SIZE, self._new.length(block)
        pieces: Pieces = []
        gaps, at = [], begin
        first = bisect.bisect(self._copies, Copy(begin, begin, 0))
        first -= first > 0 and self._copies[first - 1].end > begin
        for copy in self._copies[first:]:
            if copy.start >= begin + length:
                break
            start, end = max(copy.start, begin), min(copy.end, begin + length)
            pieces.append((start - begin, Moved(start - copy.shift, end - start)))
            if start > at:
                gaps.append((at - begin, start - begin))
            at = end
        if at < begin + length:
            gaps.append((at - begin, length))
        if gaps:
            pieces += self._literals(block, proof, gaps)
            pieces.sort(key=itemgetter(0))
        return pieces

    def _literals(self, block: int, proof: bytes, gaps: list[tuple[int, int]]) -> Pieces:
        """What of some stretches of a block is neither moved nor where it was."""
        begin, length = block * BLOCK_SIZE, self._new.length(block)
        digests = self._sink.pages(block) if block < self._old.count else []
        data = self._read(begin, length)
        if block_digest(data) != proof:
            raise StaleError("it changed while it was read")
        literals: Pieces = []
        for start, piece in differing_pages(data, digests, self._sink.key):
            for low, high in gaps:
                low, high = max(low, start), min(high, start + len(piece))
                if low < high:
                    literals.append((low, piece[low - start : high - start]))
        self._pace(sum(len(piece) for _, piece in literals if isinstance(piece, memoryview)))
        return literals
