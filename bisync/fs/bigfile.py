"""Read a big file block by block, and make a new version of one from an old one."""

import os
import secrets
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, pairwise

from bisync.core.method import Apply
from bisync.core.node import NodeId
from bisync.delta.backend import BACKEND, Backend, Offsets, Sums
from bisync.delta.blocks import Blocks, Collector, finding, is_zero_block
from bisync.delta.changes import ChangeSink, Moved, Piece, Pieces, send_changes
from bisync.delta.digest import BLOCK_SIZE, DIGEST_SIZE, GROUP_BLOCKS, block_digest
from bisync.delta.extents import changed_blocks
from bisync.delta.pages import page_digests
from bisync.delta.search import Anchors, anchors_among, sums_of
from bisync.errors import StaleError
from bisync.fs.bases import SMALLEST, Bases
from bisync.fs.content import Chunk, chunks_of
from bisync.fs.copying import write_at, write_chunk
from bisync.linux.fiemap import extents
from bisync.linux.filesystem import clone
from bisync.linux.holes import punch

_BUFFER = 8 * BLOCK_SIZE
_MOST_EXTENTS = 50_000  # of a file with more, comparing and cloning cost more than reading
_WORTH_THREADS = 32 << 20  # bytes
_FIND = 16  # bytes of a finding digest


class BasisError(StaleError):
    """The old version does not serve; the new one has to come whole."""


def list_blocks(
    fd: int,
    size: int,
    old: Blocks,
    *,
    workers: int = 1,
    sink: Callable[[Chunk], None] | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Blocks | None:
    """The list of an open file.

    The proving digest is computed only of blocks whose finding digest is not the one that ``old``
    has for their place.

    Args:
        old: a list of any earlier version, or an empty one; gives the seed.
        workers: threads; with a ``sink`` there is one.
        sink: gets every chunk, in order.
        stop: called now and then; may end it all by an exception.

    Returns:
        ``None`` if the file ended before ``size``.
    """
    if sink is not None or size < _WORTH_THREADS:
        workers = 1
    step = -(-size // (workers * BLOCK_SIZE)) * BLOCK_SIZE
    spans = [(start, min(start + step, size)) for start in range(0, size, step or 1)] or [(0, 0)]
    collectors = [Collector(old.seed) for _ in spans]

    def work(span: tuple[int, int], collector: Collector) -> bool:
        return _list_span(fd, span, old, collector, sink, stop)

    if len(spans) == 1:
        complete = work(spans[0], collectors[0])
    else:
        with ThreadPoolExecutor(len(spans)) as pool:
            complete = all(pool.map(work, spans, collectors))
    if not complete:
        return None
    whole = Collector(old.seed)
    for collector in collectors:
        whole.extend(collector)
    return Blocks(0, old.seed).changed(size, whole.entries())


def _list_some(fd: int, size: int, old: Blocks, numbers: list[int]) -> Blocks | None:
    """The list of a file that differs from its old version in some blocks at most."""
    collector, read = Collector(old.seed), Reader(fd)
    for block in numbers:
        length = min(BLOCK_SIZE, size - block * BLOCK_SIZE)
        data = read(block * BLOCK_SIZE, length)
        if len(data) < length:
            return None
        collector.add(block, finding(data, old.seed), block_digest(data))
    return old.changed(size, collector.entries())


def _list_span(
    fd: int,
    span: tuple[int, int],
    old: Blocks,
    collector: Collector,
    sink: Callable[[Chunk], None] | None,
    stop: Callable[[], None],
) -> bool:
    position, end = span
    known, find, prove = -1, b"", b""
    for chunk in chunks_of(fd, end, bytearray(_BUFFER), position):
        stop()
        if sink is not None:
            sink(chunk)
        position += chunk.length
        if chunk.data is None:
            continue
        for start in range(0, chunk.length, BLOCK_SIZE):
            data = chunk.data[start : start + BLOCK_SIZE]
            block = (chunk.offset + start) // BLOCK_SIZE
            group, row = divmod(block, GROUP_BLOCKS)
            if group != known:
                known = group
                rows = old.group(group) if group < old.group_count else None
                find, prove = (rows.find.tobytes(), rows.prove.tobytes()) if rows else (b"", b"")
            found = finding(data, old.seed)
            if found == find[row * _FIND : (row + 1) * _FIND]:
                proof = prove[row * DIGEST_SIZE : (row + 1) * DIGEST_SIZE]
            else:
                proof = block_digest(data)
            collector.add(block, found, proof)
    return position == end


class Lister:
    """Reads a big file and lists its blocks; ``blocks`` has the list then."""

    def __init__(
        self,
        old: Blocks,
        *,
        workers: int,
        sink: Callable[[Chunk], None] | None = None,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.blocks = old
        self._old, self._workers, self._sink, self._stop = old, workers, sink, stop

    @classmethod
    def fresh(cls, sink: Callable[[Chunk], None] | None, *, workers: int) -> "Lister":
        """One for a file of which nothing is known, and nothing remembered."""
        return cls(Blocks(0, 0), workers=workers, sink=sink)

    def __call__(self, fd: int, size: int) -> bytes | None:
        """The content digest; ``None`` if the file ended too early."""
        blocks = list_blocks(
            fd, size, self._old, workers=self._workers, sink=self._sink, stop=self._stop
        )
        if blocks is None:
            return None
        self.blocks = blocks
        return blocks.digest()

    def settle(self, *, proven: bool) -> None:
        """Nothing is left open."""


class Comparer:
    """Lists a big file that is known, by what its extents have not in common with its base."""

    def __init__(
        self,
        node: NodeId,
        old: Blocks,
        bases: Bases,
        *,
        workers: int,
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.blocks = old
        self._node, self._old, self._digest = node, old, old.digest()
        self._bases, self._workers, self._stop = bases, workers, stop
        self._waiting: tuple[int, bytes] | None = None
        self.clone_s = 0.0  # how long the last clone took
        self.many_extents = False

    def __call__(self, fd: int, size: int) -> bytes | None:
        """The content digest; ``None`` if the file ended too early."""
        self.settle(proven=False)  # an earlier try's
        known = self._old.size > 0 and size >= SMALLEST
        self._waiting = self._freeze(fd) if known else None
        if self._waiting is None:
            return self._list(fd, size, None)
        # The live file is read, whose pages are in memory. What was frozen waits for writes that
        # were under way; if both still share all extents afterwards, it is what was read.
        there = extents(self._waiting[0], _MOST_EXTENTS)
        self.many_extents = there is None
        digest = self._list(fd, size, there)
        if there is None:
            self.settle(proven=False)
            return digest
        now = extents(fd, _MOST_EXTENTS)
        if now is not None and len(changed_blocks(there, now, size, size)) == 0:
            return digest
        # That cannot be said for certain (btrfs compresses), or is not so: what is frozen counts.
        same = os.fstat(self._waiting[0]).st_size == size
        return self._list(self._waiting[0], size, there) if same else None

    def settle(self, *, proven: bool) -> None:
        """What was frozen becomes the base, if the file did not move from before it was read."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            if proven:
                self._bases.keep(self._node, waiting, self.blocks.digest())
            else:
                self._bases.discard(waiting[1])
            os.close(waiting[0])

    def instant(self, fd: int) -> bytes | None:
        """The digest of what the file is at this moment; ``None`` if it cannot be frozen."""
        frozen = self._freeze(fd)
        if frozen is None:
            return None
        try:
            size, there = os.fstat(frozen[0]).st_size, extents(frozen[0], _MOST_EXTENTS)
            self.many_extents = there is None
            digest = self._list(frozen[0], size, there)
            if digest is None:
                self._bases.discard(frozen[1])
            else:
                self._bases.keep(self._node, frozen, digest)
            return digest
        except BaseException:
            self._bases.discard(frozen[1])
            raise
        finally:
            os.close(frozen[0])

    def _freeze(self, fd: int) -> tuple[int, bytes] | None:
        began = time.monotonic()
        frozen = self._bases.freeze(fd)
        self.clone_s = time.monotonic() - began
        return frozen

    def _list(self, fd: int, size: int, there: bytes | None) -> bytes | None:
        only = self._candidates(there, size) if there is not None else None
        if only is None:
            blocks = list_blocks(fd, size, self._old, workers=self._workers, stop=self._stop)
        else:
            blocks = _list_some(fd, size, self._old, only)
        if blocks is None:
            return None
        self.blocks = blocks
        return blocks.digest()

    def _candidates(self, there: bytes, size: int) -> list[int] | None:
        """The blocks to look at; ``None``: all of them."""
        base = self._bases.open(self._node, self._digest)
        if base is None:
            return None
        try:
            here = extents(base, _MOST_EXTENTS)
            if here is None:
                return None
            found = changed_blocks(here, there, os.fstat(base).st_size, size)
            return [int(block) for block in found]
        finally:
            os.close(base)


class Sender:
    """Reads what a receiver has not, of a file whose list is known or made first."""

    def __init__(
        self,
        sink: ChangeSink,
        blocks: Blocks | None,
        *,
        workers: int,
        pace: Callable[[int], None],
        stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._blocks = blocks
        self._sink, self._workers, self._pace, self._stop = sink, workers, pace, stop

    def __call__(self, fd: int, size: int) -> bytes | None:
        """The content digest; ``None`` if the file ended too early."""
        blocks = self._blocks
        if blocks is None or blocks.size != size:
            # Made anew in each try: what an earlier one read may be of two instants.
            blocks = list_blocks(fd, size, Blocks(0, 0), workers=self._workers, stop=self._stop)
            if blocks is None:
                return None
        send_changes(blocks, self._sink, Reader(fd), self._pace, BACKEND)
        return blocks.digest()


class Reader:
    """Gives stretches of an open file in a buffer of its own."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray(BLOCK_SIZE)

    def __call__(self, offset: int, length: int) -> memoryview:
        """A stretch; shorter where the file ends."""
        if length > len(self._buffer):
            self._buffer = bytearray(length)
        view, got = memoryview(self._buffer)[:length], 0
        while got < length:
            n = os.preadv(self._fd, [view[got:]], offset + got)
            if n == 0:
                break
            got += n
        return view[:got]


class Finder:
    """Lists the blocks of a file that is written whole; the proofs come from who reads it."""

    def __init__(self) -> None:
        self._seed = secrets.randbits(64)
        self._found: dict[int, bytes] = {}

    def take(self, chunk: Chunk) -> None:
        """Take a chunk."""
        if chunk.data is not None:
            for start in range(0, chunk.length, BLOCK_SIZE):
                data = chunk.data[start : start + BLOCK_SIZE]
                self._found[(chunk.offset + start) // BLOCK_SIZE] = finding(data, self._seed)

    def restart(self) -> None:
        """Forget what was taken."""
        self._found.clear()

    def blocks(self, proven: Blocks) -> Blocks:
        """The list of what was taken."""
        collector = Collector(self._seed)
        for block in proven.entries().block.tolist():
            found = self._found.get(block) or finding(bytes(proven.length(block)), self._seed)
            collector.add(block, found, proven.prove(block))
        return Blocks(0, self._seed).changed(proven.size, collector.entries())


class Patch:
    """Makes the new version of a file from the old one: a ``ChangeSink``."""

    def __init__(
        self,
        fd: int,
        basis: int,
        old: Blocks,
        *,
        apply: Apply = Apply.REPLACE,
        backend: Backend = BACKEND,
        stop: Callable[[], None] = lambda: None,
        arrived: Callable[[int, int], None] = lambda _done, _literal: None,
    ) -> None:
        """
        Args:
            fd: an empty file, open for writing; or the old version itself, if nobody else has it.
            basis: the old version, open for reading.
            old: its list.
            apply: unless ``REPLACE``, what stays may stay where it is; then ``apart`` is true,
                and ``fd`` gets only what is new, until :meth:`fill`.
            stop: called now and then; may end it all by an exception.
            arrived: told how far it is: (bytes done, bytes that had to come).
        """
        self.key = secrets.randbits(64)
        self.old = old
        self.literal = 0  # bytes that came
        self.apart = False
        self.stretches: list[tuple[int, int, bool]] = []  # while apart: offset, length, if a hole
        self._apply, self._stays = apply, [-1, 0]  # edges of what both versions have in common
        self._fd, self._basis, self._backend, self._stop = fd, basis, backend, stop
        self._arrived = arrived
        self._size = old.size
        self._cloned = self._begun = False
        self._read = Reader(basis)
        self._space = bytearray(_BUFFER)
        self._before: tuple[int, bytes] = -1, b""  # the block pages() was asked for
        self._changed = Collector(old.seed)

    @property
    def searchable(self) -> bool:
        """Whether the old version stays what it is while the new one is made."""
        return self._fd != self._basis

    def begin(self, size: int, changed: Offsets) -> None:
        """Begin, or begin again: with what both versions have in common.

        Raises:
            BasisError: the old content is not what its list says.
        """
        if self._fd == self._basis:
            if self._begun:
                raise BasisError("the old version was overwritten by an earlier try")
            self._cloned = True
        else:
            if os.fstat(self._fd).st_size:
                # Never without need: what was cut to nothing ext4 writes out when it is closed.
                os.ftruncate(self._fd, 0)
            self._cloned = self._apply is not Apply.IN_PLACE and clone(self._basis, self._fd)
        os.ftruncate(self._fd, size)
        self._begun = True
        self._size, self.literal = size, 0
        self._before, self._changed = (-1, b""), Collector(self.old.seed)
        self.stretches.clear()
        end = min(self.old.count, -(-size // BLOCK_SIZE))
        self._stays = [-1, *(block for block in changed.tolist() if block < end), end]
        self.apart = not self._cloned and self._apply is not Apply.REPLACE
        if not (self._cloned or self.apart):
            self._bring_rest()

    def _bring_rest(self) -> None:
        for before, behind in pairwise(self._stays):
            self._copy(before + 1, behind)

    @property
    def overwritten(self) -> int:
        """Bytes of the old version that are not in the new one, or elsewhere."""
        cut = max(0, self.old.size - self._size)
        return cut + sum(length for _, length, _ in self.stretches)

    def fill(self, fd: int, basis: int) -> None:
        """Bring in what stays, from the old version: the new file is whole then.

        Args:
            fd: the new file, open for writing.
            basis: the old version, open for reading.

        Raises:
            BasisError: the old content is not what its list says.
        """
        self._fd, self._basis, self._read = fd, basis, Reader(basis)
        self._before = -1, b""
        self._bring_rest()
        common = min(self.old.size, self._size)
        edges = [end for block in self._stays[1:-1] for end in self._left(block)]
        for start, end in edges:
            block = start // BLOCK_SIZE
            if start < common:
                old = memoryview(self._old_block(block))
                at = block * BLOCK_SIZE
                write_at(self._fd, old[start - at : min(end, common) - at], start)
        self.apart = False

    def _left(self, block: int) -> Iterator[tuple[int, int]]:
        """The stretches of a block that nothing new was written to."""
        at, end = block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, self._size)
        first = bisect_left(self.stretches, (at,))
        for offset, length, _ in islice(self.stretches, first, None):
            if offset >= end:
                break
            if offset > at:
                yield at, offset
            at = offset + length
        if at < end:
            yield at, end

    def _copy(self, first: int, end: int) -> None:
        """Copy old blocks that stay; what is copied anyway is also looked at."""
        stop = min(end * BLOCK_SIZE, self._size, self.old.size)
        for chunk in chunks_of(self._basis, stop, self._space, first * BLOCK_SIZE):
            self._stop()
            if chunk.data is None:
                continue
            write_chunk(self._fd, chunk)
            for start in range(0, chunk.length, BLOCK_SIZE):
                found = finding(chunk.data[start : start + BLOCK_SIZE], self.old.seed)
                if found != self.old.find((chunk.offset + start) // BLOCK_SIZE):
                    raise BasisError("the replica's own file is not what was recorded")

    def pages(self, block: int) -> Sequence[int]:
        """Digests of the pages of an old block, which is proven to be what its list says.

        Raises:
            BasisError: somebody wrote to the file since it was recorded, or it decayed.
        """
        return page_digests(memoryview(self._old_block(block)), self.key)

    def _old_block(self, block: int) -> bytes:
        """An old block, proven; empty beyond the end."""
        if self._before[0] != block:
            data = b""
            if block < self.old.count:
                data = bytes(self._read(block * BLOCK_SIZE, self.old.length(block)))
                if block_digest(data) != self.old.prove(block):
                    raise BasisError("the replica's own file is not what was recorded")
            self._before = block, data
        return self._before[1]

    def anchors(self, near: Sequence[int], most: int) -> Anchors:
        """See :class:`bisync.delta.search.Holder`."""
        return anchors_among(self.old.count, self._read, near, most, self._backend)

    def sums(self, blocks: Sequence[int]) -> Sums:
        """See :class:`bisync.delta.search.Holder`."""
        return sums_of(blocks, self._read, self._backend)

    def put(self, block: int, proof: bytes, pieces: Pieces) -> None:
        """Write a block that differs.

        Raises:
            BasisError: the result is not what it has to be.
        """
        offset = block * BLOCK_SIZE
        length = min(BLOCK_SIZE, self._size - offset)
        ends = [0]
        for start, piece in pieces:
            if start < ends[-1] or _length(piece) < 0:
                raise BasisError("pieces that lie over each other")
            ends.append(start + _length(piece))
        if block < 0 or ends[-1] > length:
            raise BasisError("a block beyond the end")
        whole = sum(_length(piece) for _, piece in pieces) == length
        data = bytearray(length)
        if not whole:
            old = self._old_block(block)[:length]
            data[: len(old)] = old
        for start, piece in pieces:
            if isinstance(piece, Moved) and piece.old < 0:
                raise BasisError("a piece before the beginning")
            content = self._read(piece.old, piece.length) if isinstance(piece, Moved) else piece
            if len(content) < _length(piece):
                raise BasisError("the replica's own file is shorter than it was recorded")
            data[start : start + len(content)] = content
        if block_digest(data) != proof:
            raise BasisError("the pieces do not make the block")
        for start, end in (
            zip((start for start, _ in pieces), ends[1:], strict=True)
            if self._cloned or self.apart
            else [(0, length)]
        ):
            write_at(self._fd, memoryview(data)[start:end], offset + start)
            if self.apart:
                self.stretches.append((offset + start, end - start, False))
        self.literal += sum(len(piece) for _, piece in pieces if isinstance(piece, memoryview))
        self._arrived(offset + length, self.literal)
        self._changed.add(block, finding(data, self.old.seed), proof)

    def zero(self, block: int, proof: bytes) -> None:
        """Make a block a hole.

        Raises:
            BasisError: the digest is not that of zeros.
        """
        offset = block * BLOCK_SIZE
        length = min(BLOCK_SIZE, self._size - offset)
        if not is_zero_block(proof, length):
            raise BasisError("zeros that are none")
        punch(self._fd, offset, length)
        if self.apart:
            self.stretches.append((offset, length, True))
        self._changed.add(block, finding(bytes(length), self.old.seed), proof)

    def blocks(self) -> Blocks:
        """The list of the new version."""
        return self.old.changed(self._size, self._changed.entries())


def _length(piece: Piece) -> int:
    return piece.length if isinstance(piece, Moved) else len(piece)
