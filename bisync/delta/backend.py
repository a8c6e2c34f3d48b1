"""The arithmetic of searching moved content: anchors, and a rolling sum at every offset.

A ``Backend`` does it for whole buffers; the NumPy one is what a right answer is. Nothing it says
is believed: a place that looks like a known block is proven with BLAKE3 before it is used.

*Anchors* are places that the content itself chooses, so that they move with it (Manber, "Finding
Similar Files in a Large File System", 1994): an offset is one if the 32 bits there, times an odd
constant, are large. Runs of zeros have none. A *print* is 64 bits of the 32 bytes from an anchor.

The *rolling sum* of a block is the polynomial of its bytes at a fixed odd number, modulo 2**64
(Karp and Rabin, "Efficient Randomized Pattern-Matching Algorithms", 1987). The sums at all offsets
are differences of one running sum: ``sum(i) = (P[i + n] - P[i]) / M**i``. The lowest bits of such a
sum say little; its upper 56 are used.
"""

from functools import lru_cache
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from bisync.delta.digest import BLOCK_SIZE

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]
Sums = NDArray[np.uint64]

PRINT_SPAN = 32  # bytes from an anchor on that its print is made of
ANCHOR_FACTOR = 0x9E3779B1  # 2**32 divided by the golden ratio, made odd
ANCHOR_LIMIT = 2**32 - 2**32 // 4096  # one offset of 4 096 is above it
PRINT_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)
SUM_FACTOR = 0xD6E8FEB86659FD93
SUM_SHIFT = 8  # bits at the lower end of a sum that are not used
_TILE = 1 << 19  # offsets per step: what a step needs stays in the cache
_SPARSE = 20  # bits of the table that sorts out offsets with no known sum


class SumTable(Struct, frozen=True):
    """Rolling sums of known blocks, ready to be looked up.

    Attributes:
        sums: (n), ascending, each once.
        seen: (2**20) whether any sum has these upper bits.
    """

    sums: Sums
    seen: NDArray[np.bool_]

    @staticmethod
    def of(sums: Sums) -> "SumTable":
        """Of the sums of some blocks."""
        seen = np.zeros(1 << _SPARSE, np.bool_)
        seen[sums >> np.uint64(64 - _SPARSE)] = True
        return SumTable(np.unique(sums), seen)


class Backend(Protocol):
    """Whole buffers in, values out; all backends give the same answers, bit by bit."""

    def anchors(self, data: Bytes) -> Offsets:
        """The offsets of all anchors whose 32 bytes are in ``data``, ascending."""
        ...

    def prints(self, data: Bytes, at: Offsets) -> Sums:
        """The prints of the anchors at some offsets."""
        ...

    def block_sums(self, data: Bytes) -> Sums:
        """The rolling sums of the whole blocks of ``data``, one after the other."""
        ...

    def find(self, data: Bytes, table: SumTable) -> tuple[Offsets, Sums]:
        """All offsets of ``data`` at which a block with a known sum begins, and those sums."""
        ...


class NumpyBackend:
    """The definition of a right answer."""

    def anchors(self, data: Bytes) -> Offsets:
        """See :class:`Backend`."""
        count = len(data) - PRINT_SPAN + 1
        found = []
        for start in range(0, max(count, 0), _TILE):
            end = min(start + _TILE, count)
            # Four views, shifted by a byte each, are all offsets without an unaligned read.
            for shift in range(4):
                words = (end - start - shift + 3) // 4
                if words <= 0:
                    continue
                at = start + shift
                view = np.frombuffer(data[at : at + 4 * words].tobytes(), np.dtype("<u4"))
                hits = np.flatnonzero(view * np.uint32(ANCHOR_FACTOR) > np.uint32(ANCHOR_LIMIT))
                found.append(hits * 4 + at)
        return np.sort(np.concatenate(found), kind="stable") if found else np.zeros(0, np.int64)

    def prints(self, data: Bytes, at: Offsets) -> Sums:
        """See :class:`Backend`."""
        spans = data[at[:, np.newaxis] + np.arange(PRINT_SPAN)]
        words = np.ascontiguousarray(spans).view(np.dtype("<u8"))
        mixed = (words ^ (words >> np.uint64(29))) * np.array(PRINT_FACTORS, np.uint64)
        total: Sums = np.bitwise_xor.reduce(mixed ^ (mixed >> np.uint64(32)), axis=1)
        return total

    def block_sums(self, data: Bytes) -> Sums:
        """See :class:`Backend`."""
        powers = _powers(SUM_FACTOR, BLOCK_SIZE)
        count = len(data) // BLOCK_SIZE
        sums = np.zeros(count, np.uint64)
        for number in range(count):
            block = data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]
            sums[number] = np.dot(block.astype(np.uint64), powers)
        return sums >> np.uint64(SUM_SHIFT) << np.uint64(SUM_SHIFT)

    def find(self, data: Bytes, table: SumTable) -> tuple[Offsets, Sums]:
        """See :class:`Backend`."""
        count = len(data) - BLOCK_SIZE + 1
        offsets, sums = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        if len(table.sums) == 0:
            return offsets[0], sums[0]
        for start in range(0, max(count, 0), _TILE):
            width = min(_TILE, count - start)
            found = _rolling(data[start : start + width + BLOCK_SIZE - 1])
            maybe = np.flatnonzero(table.seen[found >> np.uint64(64 - _SPARSE)])
            some = found[maybe] >> np.uint64(SUM_SHIFT) << np.uint64(SUM_SHIFT)
            at = np.searchsorted(table.sums, some)
            at[at == len(table.sums)] = 0
            true = table.sums[at] == some
            offsets.append(maybe[true] + start)
            sums.append(some[true])
        return np.concatenate(offsets), np.concatenate(sums)


def _rolling(data: Bytes) -> Sums:
    """The sums at all offsets of ``data`` at which a whole block begins, with all their bits."""
    width = len(data) - BLOCK_SIZE + 1
    running = np.zeros(len(data) + 1, np.uint64)
    np.multiply(data, _powers(SUM_FACTOR, len(data)), out=running[1:])
    np.cumsum(running[1:], out=running[1:])
    sums = running[BLOCK_SIZE:] - running[:width]
    sums *= _powers(pow(SUM_FACTOR, -1, 2**64), width)
    return sums


def _powers(factor: int, count: int) -> Sums:
    """The first powers of a number, modulo 2**64; ``count`` is at most a tile and a block."""
    return _all_powers(factor)[:count]


@lru_cache(maxsize=2)
def _all_powers(factor: int) -> Sums:
    powers = np.full(_TILE + BLOCK_SIZE, factor, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


BACKEND: Backend = NumpyBackend()
