"""The content digest against its definition, for any way the bytes arrive."""

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from bisync.delta.digest import (
    BLOCK_SIZE,
    GROUP_BLOCKS,
    ContentHasher,
    block_digest,
    content_digest,
    digest_of,
)


def definition(data: bytes) -> bytes:
    """The format in ten lines."""
    blocks = [
        blake3(data[start : start + BLOCK_SIZE]).digest()
        for start in range(0, len(data), BLOCK_SIZE)
    ]
    groups = [
        blake3(b"".join(blocks[start : start + GROUP_BLOCKS])).digest()
        for start in range(0, len(blocks), GROUP_BLOCKS)
    ]
    return blake3(len(data).to_bytes(8, "little") + b"".join(groups)).digest()


@pytest.mark.parametrize("size", [0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 5 * BLOCK_SIZE])
def test_definition(size: int):
    data = bytes(range(256)) * (size // 256 + 1)
    assert digest_of(data[:size]) == definition(data[:size])


def test_many_groups():
    """More than one group, of holes and of bytes alike."""
    size = BLOCK_SIZE * GROUP_BLOCKS + 3 * BLOCK_SIZE + 17
    hasher = ContentHasher()
    hasher.update_zeros(size)
    assert hasher.digest() == definition(bytes(size))
    blocks = [block_digest(bytes(BLOCK_SIZE))] * (GROUP_BLOCKS + 3) + [block_digest(bytes(17))]
    assert content_digest(size, blocks) == hasher.digest()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=6), st.integers(0, 999))
def test_any_split(parts: list[tuple[int, bool]], tail: int):
    """However holes and chunks alternate, the digest is that of the bytes."""
    hasher, data = ContentHasher(), bytearray()
    for blocks, hole in parts:
        if hole:
            hasher.update_zeros(blocks * BLOCK_SIZE)
            data += bytes(blocks * BLOCK_SIZE)
        else:
            chunk = bytes([blocks]) * (blocks * BLOCK_SIZE)
            hasher.update(memoryview(chunk))
            data += chunk
    hasher.update(memoryview(b"t" * tail))
    data += b"t" * tail
    assert hasher.size == len(data)
    assert hasher.digest() == definition(bytes(data))


def test_chunk_after_a_partial_block():
    """Only the last chunk may end within a block."""
    hasher = ContentHasher()
    hasher.update(memoryview(b"x"))
    with pytest.raises(ValueError, match="within a block"):
        hasher.update(memoryview(b"y"))
