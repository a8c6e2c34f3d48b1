"""4 KiB pages within a block that changed: which of them differ.

The side that has the old block says what its pages are, by 8-byte digests with a key of the
session (XXH3-64); the other one answers with the pages that are not so. That is a hint only: the
block's proving digest decides about the result.
"""

from collections.abc import Sequence

import xxhash

PAGE_SIZE = 4096  # bytes
DIGEST = 8  # bytes per page


def page_digests(block: memoryview, key: int) -> list[int]:
    """A 64-bit digest for each page of a block; the last page may be short."""
    return [
        xxhash.xxh3_64_intdigest(block[start : start + PAGE_SIZE], key)
        for start in range(0, len(block), PAGE_SIZE)
    ]


def differing_pages(
    block: memoryview, digests: Sequence[int], key: int
) -> list[tuple[int, memoryview]]:
    """The stretches of a block that its old version has not, as (offset, bytes) in order.

    Args:
        digests: of the old version's pages; it counts as zeros beyond its end.
    """
    zero = xxhash.xxh3_64_intdigest(bytes(PAGE_SIZE), key)
    found: list[tuple[int, memoryview]] = []
    start: int | None = None
    for number, offset in enumerate(range(0, len(block), PAGE_SIZE)):
        page = block[offset : offset + PAGE_SIZE]
        old = digests[number] if number < len(digests) else zero
        same = xxhash.xxh3_64_intdigest(page, key) == old
        if same and start is not None:
            found.append((start, block[start:offset]))
            start = None
        elif not same and start is None:
            start = offset
    if start is not None:
        found.append((start, block[start:]))
    return found
