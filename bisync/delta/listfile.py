"""Block lists as bytes: a header, then records, each of which takes the list one version further.

Header (16 bytes): magic, seed of the finding digests. Record: count, size of the file, content
digest, ``count`` entries (block, finding digest, proving digest), BLAKE3 of all that. Integers are
little-endian. A small change of a huge file costs 56 bytes per block that changed.

A list of proofs alone has for each group that is not zeros its number (8 bytes) and its proving
digests.
"""

import struct

import numpy as np
from msgspec import Struct

from bisync.delta.blocks import FIND_SIZE, Blocks, Entries, Group, rows_in
from bisync.delta.digest import BLOCK_SIZE, DIGEST_SIZE, block_digest

_MAGIC = b"bisyncB1"
_HEADER = struct.Struct("<8sQ")
_RECORD = struct.Struct("<QQ32s")
_ENTRY = np.dtype([("block", "<u8"), ("find", "u1", (16,)), ("prove", "u1", (32,))])
_LARGEST = 1 << 50  # bytes of a file; a list that speaks of more is damaged


class Listed(Struct, frozen=True):
    """A list that was read.

    Attributes:
        digest: of the content it describes.
        first: bytes of the header and the first record.
        end: bytes of all intact records; what follows is void.
    """

    blocks: Blocks
    digest: bytes
    first: int
    end: int


def header(blocks: Blocks) -> bytes:
    """The beginning of a list of its own."""
    return _HEADER.pack(_MAGIC, blocks.seed)


def record(size: int, digest: bytes, entries: Entries) -> bytes:
    """One version more: the entries that :meth:`Blocks.changed` takes."""
    rows = np.zeros(len(entries.block), _ENTRY)
    rows["block"], rows["find"], rows["prove"] = entries.block, entries.find, entries.prove
    body = _RECORD.pack(len(rows), size, digest) + rows.tobytes()
    return body + block_digest(body)


def parse(data: bytes) -> Listed | None:
    """Read a list up to its last intact record; ``None`` if there is none."""
    if len(data) < _HEADER.size:
        return None
    magic, seed = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        return None
    at, found = _HEADER.size, None
    blocks = Blocks(0, seed)
    while at + _RECORD.size <= len(data):
        count, size, digest = _RECORD.unpack_from(data, at)
        end = at + _RECORD.size + count * _ENTRY.itemsize
        if size > _LARGEST or end + DIGEST_SIZE > len(data):
            break
        if block_digest(memoryview(data)[at:end]) != data[end : end + DIGEST_SIZE]:
            break
        rows = np.frombuffer(data, _ENTRY, count, at + _RECORD.size)
        block = rows["block"].astype(np.int64)
        if count and (int(block[-1]) * BLOCK_SIZE >= size or (np.diff(block) <= 0).any()):
            break
        blocks = blocks.changed(size, Entries(block, rows["find"], rows["prove"]))
        at = end + DIGEST_SIZE
        found = Listed(blocks, digest, at if found is None else found.first, at)
    return found


def proofs(blocks: Blocks) -> bytes:
    """The proving digests of a list."""
    return b"".join(
        struct.pack("<Q", number) + group.prove.tobytes()
        for number, group in sorted(blocks.groups.items())
    )


def from_proofs(size: int, data: bytes) -> Blocks:
    """A list from its proving digests; its finding digests are those of no block.

    Raises:
        ValueError, struct.error: that is not what :func:`proofs` makes for that size.
    """
    groups, at = {}, 0
    while at < len(data):
        (number,) = struct.unpack_from("<Q", data, at)
        count, at = rows_in(size, number), at + 8
        rows = np.frombuffer(data, np.uint8, count * DIGEST_SIZE, at).reshape(count, DIGEST_SIZE)
        if not count:
            raise ValueError("a group behind the end")
        groups[number] = Group(np.zeros((count, FIND_SIZE), np.uint8), rows)
        at += count * DIGEST_SIZE
    return Blocks(size, 0, groups)
