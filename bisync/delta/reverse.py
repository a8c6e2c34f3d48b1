"""Reverse deltas: what a file had where its next version was written over it.

While such a file is being written it is what undoes that; afterwards it is the kept old version.
Layout: magic, the old bytes of all stretches one after the other, what it is about (JSON), the
proving digests of the old version's blocks (:mod:`bisync.delta.listfile`), the stretches, digests
of their new pages, the lengths of these four parts, and BLAKE2b of all that. Integers are
little-endian.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from bisync.delta.blocks import Blocks
from bisync.delta.listfile import from_proofs, proofs
from bisync.delta.pages import PAGE_SIZE

STRETCH = 1 << 20  # bytes at most
_MAGIC = b"bisyncU1"
_ROW = struct.Struct("<QIIB")
_LENGTHS = struct.Struct("<QQQQ")
_PAGE_DIGEST = 16  # bytes
_SEAL = 32  # bytes
_END = _LENGTHS.size + _SEAL


class About(Struct, frozen=True):
    """Which version of which file this restores, and what it has to be applied to.

    Attributes:
        node: number of the file in the replica's index.
        path: below the root, as latin-1.
        handle: identity of the file, hex.
        size, mtime_ns, digest: of the version it restores; the digest is hex.
        new_size, new_mtime_ns, new_digest: of its base, the version that was written over it.
        record: what the store's manifest is to say.
    """

    node: int
    path: str
    handle: str
    size: int
    mtime_ns: int
    digest: str
    new_size: int
    new_mtime_ns: int
    new_digest: str
    record: dict[str, Any]


class Stretch(Struct, frozen=True):
    """One stretch that was written over.

    Attributes:
        offset: in the file.
        old: bytes that the old version had there; less than ``new`` at its end.
        new: bytes that the new version has there; less than ``old`` at its end.
        hole: the new bytes are zeros that take no space.
        at: where the old bytes are in the delta.
        pages: digests of the new bytes, by :func:`pages_in`.
    """

    offset: int
    old: int
    new: int
    hole: bool
    at: int
    pages: tuple[bytes, ...]


class ReverseDelta(Struct, frozen=True):
    """A delta that was read; ``blocks`` proves the version it restores, and finds nothing."""

    about: About
    blocks: Blocks
    stretches: tuple[Stretch, ...]


def page_digest(page: bytes | memoryview) -> bytes:
    """What tells a page of the new version."""
    return hashlib.blake2b(page, digest_size=_PAGE_DIGEST).digest()


def _new_seal() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=_SEAL)


def pages_in(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of a stretch by pages of the file, (start, end) from its beginning.

    A page reaches the disk as a whole, so each part is of one version even after a power cut.
    """
    start = 0
    while start < length:
        end = min(start + PAGE_SIZE - (offset + start) % PAGE_SIZE, length)
        yield start, end
        start = end


class Writer:
    """Writes a delta, one stretch after the other, in ascending order."""

    def __init__(self, write: Callable[[bytes | memoryview], object]) -> None:
        self._write, self._seal = write, _new_seal()
        self._rows: list[bytes] = []
        self._pages: list[bytes] = []
        self._out(_MAGIC)

    def _out(self, data: bytes | memoryview) -> None:
        self._write(data)
        self._seal.update(data)

    def add(self, offset: int, old: bytes | memoryview, new: bytes | memoryview | int) -> None:
        """Take a stretch of at most ``STRETCH`` bytes.

        Args:
            new: the bytes that will be there, or the length of a hole.
        """
        hole = isinstance(new, int)
        length = new if isinstance(new, int) else len(new)
        pages = []
        if not isinstance(new, int):
            view = memoryview(new)
            pages = [page_digest(view[start:end]) for start, end in pages_in(offset, length)]
        self._out(old)
        self._rows.append(_ROW.pack(offset, len(old), length, hole))
        self._pages += pages

    def finish(self, about: About, blocks: Blocks) -> None:
        """Write what is behind the stretches; ``blocks`` is the list of the old version."""
        parts = [
            json.dumps(asdict(about), separators=(",", ":")).encode(),
            proofs(blocks),
            b"".join(self._rows),
            b"".join(self._pages),
        ]
        for part in parts:
            self._out(part)
        self._out(_LENGTHS.pack(*map(len, parts)))
        self._write(self._seal.digest())


def read_delta(read: Callable[[int, int], bytes], size: int) -> ReverseDelta | None:
    """Read a delta but for its old bytes; ``None`` if it is none, or damaged.

    Args:
        read: gives bytes of it by offset and length.
        size: bytes of all of it.
    """
    if size < len(_MAGIC) + _END or read(0, len(_MAGIC)) != _MAGIC:
        return None
    seal = _new_seal()
    for start in range(0, size - _SEAL, STRETCH):
        seal.update(read(start, min(STRETCH, size - _SEAL - start)))
    if seal.digest() != read(size - _SEAL, _SEAL):
        return None
    lengths = _LENGTHS.unpack(read(size - _END, _LENGTHS.size))
    at = size - _END - sum(lengths)
    if at < len(_MAGIC):
        return None
    parts = []
    for length in lengths:
        parts.append(read(at, length))
        at += length
    about, listed, rows, pages = parts
    try:
        what = About(**json.loads(about))
        return ReverseDelta(what, from_proofs(what.size, listed), _stretches(rows, pages))
    except (ValueError, TypeError, struct.error):
        return None  # sealed, so by another version of this program


def _stretches(rows: bytes, pages: bytes) -> tuple[Stretch, ...]:
    found, at, page = [], len(_MAGIC), 0
    for offset, old, new, hole in _ROW.iter_unpack(rows):
        last = (offset + new - 1) // PAGE_SIZE  # as pages_in() has it
        count = 0 if hole else last - offset // PAGE_SIZE + 1
        digests = tuple(
            pages[start : start + _PAGE_DIGEST]
            for start in range(page, page + count * _PAGE_DIGEST, _PAGE_DIGEST)
        )
        found.append(Stretch(offset, old, new, bool(hole), at, digests))
        at, page = at + old, page + count * _PAGE_DIGEST
    return tuple(found)


def joined(
    deltas: Sequence[tuple[ReverseDelta, Callable[[int, int], bytes]]],
    write: Callable[[bytes | memoryview], object],
) -> None:
    """Write one delta that does what several do one after the other.

    Args:
        deltas: each leads to what the one before it has to be applied to; the first one's version
            is what the result restores. With each, what gives its bytes by offset and length.
    """
    first, last = deltas[0][0].about, deltas[-1][0].about
    covered: list[tuple[int, int, int, int]] = []  # start, end, which delta, where in it
    for number, (delta, _) in enumerate(deltas):
        fresh = [
            (s.offset, min(s.offset + s.old, first.size), number, s.at)
            for s in delta.stretches
            if s.old and s.offset < first.size
        ]
        covered = sorted(covered + list(_outside(fresh, covered)))
    writer = Writer(write)
    for start, end, number, at in covered:
        writer.add(start, deltas[number][1](at, end - start), b"")
    about = replace(
        first,
        new_size=last.new_size,
        new_mtime_ns=last.new_mtime_ns,
        new_digest=last.new_digest,
        record={**first.record, "base": last.new_digest},
    )
    writer.finish(about, deltas[0][0].blocks)


def _outside(
    fresh: Sequence[tuple[int, int, int, int]], covered: Sequence[tuple[int, int, int, int]]
) -> Iterator[tuple[int, int, int, int]]:
    """The parts of some stretches that others leave free; both in order, without overlaps."""
    at = 0
    for start, end, number, where in fresh:
        begin = start
        while at < len(covered) and covered[at][1] <= start:
            at += 1
        here = at
        while here < len(covered) and covered[here][0] < end:
            if covered[here][0] > start:
                yield start, covered[here][0], number, where + start - begin
            start = max(start, covered[here][1])
            here += 1
        if start < end:
            yield start, end, number, where + start - begin
