"""Digests of blocks as bytes, to be carried to where the other version is."""

import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from bisync.delta.backend import Offsets, Sums
from bisync.delta.blocks import FIND_SIZE, Blocks, Collector, Group, rows_in
from bisync.delta.digest import DIGEST_SIZE
from bisync.delta.search import Anchors

_U64 = np.dtype(">u8")


def proofs_of(blocks: Blocks) -> Iterator[tuple[int, bytes]]:
    """The proving digests by group; groups of zeros are left out."""
    for number in sorted(blocks.groups):
        yield number, blocks.groups[number].prove.tobytes()


def blocks_of(size: int, proofs: Mapping[int, bytes]) -> Blocks:
    """A list that knows proving digests only.

    Raises:
        ValueError: they are not those of a file of so many bytes.
    """
    groups = {}
    for number, data in proofs.items():
        rows = rows_in(size, number) if number >= 0 else 0
        if rows == 0 or len(data) != rows * DIGEST_SIZE:
            raise ValueError("digests of blocks that are not there")
        prove = np.frombuffer(data, np.uint8).reshape(rows, DIGEST_SIZE)
        groups[number] = Group(np.zeros((rows, FIND_SIZE), np.uint8), prove)
    return Blocks(size, 0, groups, finds=False)


def blocks_proven(size: int, proofs: Mapping[int, bytes]) -> Blocks:
    """A list that knows proving digests only, by block; those left out are zeros."""
    collector = Collector(0)
    for block in sorted(proofs):
        collector.add(block, bytes(FIND_SIZE), proofs[block])
    return replace(Blocks(0, 0).changed(size, collector.entries()), finds=False)


def numbers_to_bytes(numbers: Offsets) -> bytes:
    """Whole numbers from 0 on, 8 bytes each."""
    return numbers.astype(_U64).tobytes()


def numbers_from_bytes(data: bytes | memoryview) -> Offsets:
    """Undo :func:`numbers_to_bytes`.

    Raises:
        ValueError: they are none.
    """
    found = np.frombuffer(data, _U64)
    if len(found) and int(found.max()) > sys.maxsize:
        raise ValueError("a number is too large")
    return found.astype(np.int64)


def ascending(numbers: Offsets) -> bool:
    """Whether each number is larger than the one before."""
    return bool((np.diff(numbers) > 0).all())


def sums_to_bytes(sums: Sums | Sequence[int]) -> bytes:
    """Sums or digests, 8 bytes each."""
    return np.asarray(sums, np.uint64).astype(_U64).tobytes()


def sums_from_bytes(data: bytes | memoryview) -> NDArray[np.uint64]:
    """Undo :func:`sums_to_bytes`.

    Raises:
        ValueError: they are none.
    """
    return np.frombuffer(data, _U64).astype(np.uint64)


def anchors_to_bytes(anchors: Anchors) -> bytes:
    """All offsets, then all prints."""
    return numbers_to_bytes(anchors.offset) + sums_to_bytes(anchors.print)


def anchors_from_bytes(data: bytes | memoryview) -> Anchors:
    """Undo :func:`anchors_to_bytes`.

    Raises:
        ValueError: they are none.
    """
    half, odd = divmod(len(data), 2)
    if odd or half % 8:
        raise ValueError("anchors without prints")
    return Anchors(numbers_from_bytes(data[:half]), sums_from_bytes(data[half:]))
