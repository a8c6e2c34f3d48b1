"""Block lists: what is known of each 128 KiB block of a file.

Two digests per block. The *finding* one is XXH3-128 with a secret seed of the replica: at memory
speed it answers one question only, "is this block what it was here?". The *proving* one is BLAKE3
and the only one that crosses between replicas. Sources: Collet, "xxHash", 2012-2024; O'Connor et
al., "BLAKE3", 2020.

Lists are kept in groups of 1 024 blocks (128 MiB), as content digests are made; a group of nothing
but zeros is not kept at all, so a huge file of holes has a small list.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import xxhash
from msgspec import Struct, field
from numpy.typing import NDArray

from bisync.delta.digest import (
    BLOCK_SIZE,
    DIGEST_SIZE,
    GROUP_BLOCKS,
    block_digest,
    digest_of_groups,
)

FIND_SIZE = 16  # bytes
Rows = NDArray[np.uint8]


class Group(Struct, frozen=True):
    """Up to 1 024 blocks: ``find`` is (n, 16) and ``prove`` (n, 32), one row per block."""

    find: Rows
    prove: Rows


class Entries(Struct, frozen=True):
    """Digests of some blocks: ``block`` (n) ascending, ``find`` (n, 16), ``prove`` (n, 32)."""

    block: NDArray[np.int64]
    find: Rows
    prove: Rows

    @staticmethod
    def none() -> "Entries":
        """Of no block."""
        return Entries(
            np.zeros(0, np.int64),
            np.zeros((0, FIND_SIZE), np.uint8),
            np.zeros((0, DIGEST_SIZE), np.uint8),
        )


class Blocks(Struct, frozen=True):
    """The digests of all blocks of one version of a file.

    Attributes:
        size: bytes of the file.
        seed: of the finding digests.
        groups: by number; one that is missing holds zeros only.
        finds: whether its finding digests are known; those of a peer are not.
    """

    size: int
    seed: int
    groups: Mapping[int, Group] = field(default_factory=dict)
    finds: bool = True

    @property
    def count(self) -> int:
        """Number of blocks; the last one may be short."""
        return -(-self.size // BLOCK_SIZE)

    @property
    def group_count(self) -> int:
        """Number of groups, missing ones included."""
        return -(-self.count // GROUP_BLOCKS)

    def length(self, block: int) -> int:
        """Bytes of a block."""
        return min(BLOCK_SIZE, self.size - block * BLOCK_SIZE)

    def group(self, number: int) -> Group:
        """A group's digests, missing ones included."""
        found = self.groups.get(number)
        return found if found is not None else zero_group(self.size, self.seed, number)

    def prove(self, block: int) -> bytes:
        """The proving digest of a block."""
        return bytes(self.group(block // GROUP_BLOCKS).prove[block % GROUP_BLOCKS])

    def find(self, block: int) -> bytes:
        """The finding digest of a block."""
        return bytes(self.group(block // GROUP_BLOCKS).find[block % GROUP_BLOCKS])

    def digest(self) -> bytes:
        """The content digest of the file; see :mod:`bisync.delta.digest`."""
        return digest_of_groups(
            self.size, (self.group(g).prove.tobytes() for g in range(self.group_count))
        )

    def changed(self, size: int, entries: "Entries") -> "Blocks":
        """The list of another version.

        Args:
            size: of that version.
            entries: all blocks that differ from this version's, and all that this one has not,
                or has with another length. Those left out are as here, beyond the end zeros.
        """
        fresh = Blocks(size, self.seed)
        where = entries.block // GROUP_BLOCKS
        bounds = np.searchsorted(where, np.arange(fresh.group_count + 1))
        groups: dict[int, Group] = {}
        for number in range(fresh.group_count):
            rows = slice(int(bounds[number]), int(bounds[number + 1]))
            old = self.groups.get(number)
            if rows.start == rows.stop and self._same_shape(fresh, number):
                if old is not None:
                    groups[number] = old
                continue
            group = self._regrouped(fresh, number)
            at = entries.block[rows] % GROUP_BLOCKS
            group.find[at], group.prove[at] = entries.find[rows], entries.prove[rows]
            if not fresh.is_zero(number, group):
                groups[number] = group
        return Blocks(size, self.seed, groups)

    def _same_shape(self, fresh: "Blocks", number: int) -> bool:
        """Whether a group has the same blocks in both, of the same lengths."""
        if fresh.size == self.size:
            return True
        return (number + 1) * GROUP_BLOCKS * BLOCK_SIZE <= min(fresh.size, self.size)

    def _regrouped(self, fresh: "Blocks", number: int) -> Group:
        zeros = zero_group(fresh.size, self.seed, number)
        find, prove = zeros.find.copy(), zeros.prove.copy()
        if number < self.group_count:
            old = self.group(number)
            kept = min(len(old.find), len(find))
            find[:kept], prove[:kept] = old.find[:kept], old.prove[:kept]
        return Group(find, prove)

    def entries(self) -> "Entries":
        """All blocks but for the groups of zeros: what makes this list from an empty one."""
        if not self.groups:
            return Entries.none()
        numbers = sorted(self.groups)
        return Entries(
            np.concatenate(
                [np.arange(len(self.groups[n].find)) + n * GROUP_BLOCKS for n in numbers]
            ),
            np.concatenate([self.groups[n].find for n in numbers]),
            np.concatenate([self.groups[n].prove for n in numbers]),
        )

    def is_zero(self, number: int, group: Group) -> bool:
        """Whether a group's blocks hold nothing but zeros."""
        return bool(np.array_equal(group.prove, zero_group(self.size, self.seed, number).prove))


def rows_in(size: int, group: int) -> int:
    """How many blocks of a file of ``size`` bytes are in a group."""
    return max(0, min(GROUP_BLOCKS, -(-size // BLOCK_SIZE) - group * GROUP_BLOCKS))


def finding(data: bytes | bytearray | memoryview, seed: int) -> bytes:
    """The finding digest of one block."""
    return xxhash.xxh3_128_digest(data, seed)


def differing(old: Blocks, new: Blocks) -> Iterator[int]:
    """The blocks in which a file differs from its old version, cut or zero-extended to its size.

    A last block whose length changed always counts as different.
    """
    known = old.changed(new.size, Entries.none())
    for number in range(new.group_count):
        if known.groups.get(number) is new.groups.get(number):
            continue  # both are zeros
        mine, theirs = known.group(number).prove, new.group(number).prove
        for row in np.flatnonzero((mine != theirs).any(axis=1)):
            yield number * GROUP_BLOCKS + int(row)


def is_zero_block(proof: bytes, length: int) -> bool:
    """Whether a proving digest is that of ``length`` zeros."""
    return proof == _zero_digests(length, 0)[1]


@lru_cache(maxsize=64)
def _zero_digests(length: int, seed: int) -> tuple[bytes, bytes]:
    zeros = bytes(length)
    return finding(zeros, seed), block_digest(zeros)


@lru_cache(maxsize=8)
def _full_zero_group(seed: int) -> Group:
    find, prove = _zero_digests(BLOCK_SIZE, seed)
    return Group(
        np.tile(np.frombuffer(find, np.uint8), (GROUP_BLOCKS, 1)),
        np.tile(np.frombuffer(prove, np.uint8), (GROUP_BLOCKS, 1)),
    )


def zero_group(size: int, seed: int, number: int) -> Group:
    """What a group of a file of ``size`` bytes looks like if all of it is zeros."""
    full = _full_zero_group(seed)
    count = rows_in(size, number)
    tail = size % BLOCK_SIZE
    if count == GROUP_BLOCKS and (tail == 0 or (number + 1) * GROUP_BLOCKS * BLOCK_SIZE <= size):
        return full
    find, prove = full.find[:count].copy(), full.prove[:count].copy()
    if tail and count and number * GROUP_BLOCKS + count == -(-size // BLOCK_SIZE):
        last = _zero_digests(tail, seed)
        find[-1] = np.frombuffer(last[0], np.uint8)
        prove[-1] = np.frombuffer(last[1], np.uint8)
    return Group(find, prove)


def apart(old: Blocks, new: Blocks) -> "Entries":
    """What :meth:`Blocks.changed` of ``old`` needs to give ``new``; both with one seed."""
    numbers = list(differing(old, new))
    collector = Collector(new.seed)
    for block in numbers:
        collector.add(block, new.find(block), new.prove(block))
    return collector.entries()


class Collector:
    """Makes a list, or what is new in one, from blocks as they come, in ascending order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._block: list[int] = []
        self._find: list[bytes] = []
        self._prove: list[bytes] = []

    def add(self, block: int, find: bytes, prove: bytes) -> None:
        """Take the digests of one block."""
        self._block.append(block)
        self._find.append(find)
        self._prove.append(prove)

    def extend(self, other: "Collector") -> None:
        """Take what another one took of the blocks behind."""
        self._block += other._block
        self._find += other._find
        self._prove += other._prove

    def entries(self) -> "Entries":
        """What was taken so far."""
        count = len(self._block)
        return Entries(
            np.array(self._block, np.int64),
            np.frombuffer(b"".join(self._find), np.uint8).reshape(count, FIND_SIZE),
            np.frombuffer(b"".join(self._prove), np.uint8).reshape(count, DIGEST_SIZE),
        )
