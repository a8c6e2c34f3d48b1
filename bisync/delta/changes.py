"""What crosses for a big file: the blocks that differ, of them the pages that differ.

The source has the list of its version, the receiver that of its own old one; both are lists of
proving digests, so nothing but the blocks that differ is read on either side.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from bisync.delta.blocks import Blocks, differing, is_zero_block
from bisync.delta.digest import BLOCK_SIZE, block_digest
from bisync.delta.pages import differing_pages
from bisync.errors import StaleError

Pieces = list[tuple[int, memoryview]]
"""Stretches of a block: (offset in it, bytes)."""


class ChangeSink(Protocol):
    """The receiver: it has the old version and makes the new one of it."""

    key: int
    """Of the page digests; one per session."""

    old: Blocks
    """What it has; the finding digests are its own business."""

    def begin(self, size: int) -> None:
        """The new version has ``size`` bytes. Called once, before anything else."""
        ...

    def pages(self, block: int) -> Sequence[int]:
        """The digests of the pages of its old block, cut or zero-extended to the new length."""
        ...

    def put(self, block: int, proof: bytes, pieces: Pieces) -> None:
        """A block that differs: what to write into the old one, and what must come out."""
        ...

    def zero(self, block: int, proof: bytes) -> None:
        """A block that differs and is zeros."""
        ...


def send_changes(
    new: Blocks,
    sink: ChangeSink,
    read: Callable[[int, int], memoryview],
    pace: Callable[[int], None],
) -> None:
    """Tell a receiver all that makes its version the new one.

    Args:
        new: the list of the version to send.
        read: gives a stretch of it: (offset, length). Valid until the next one.
        pace: called before so many bytes are sent; may wait, or end it all.

    Raises:
        StaleError: what was read is not what the list says.
    """
    sink.begin(new.size)
    for block in differing(sink.old, new):
        proof, length = new.prove(block), new.length(block)
        if is_zero_block(proof, length):
            sink.zero(block, proof)
            continue
        data = read(block * BLOCK_SIZE, length)
        if block_digest(data) != proof:
            raise StaleError("it changed while it was read")
        pieces = differing_pages(data, sink.pages(block), sink.key)
        pace(sum(len(piece) for _, piece in pieces))
        sink.put(block, proof, pieces)
