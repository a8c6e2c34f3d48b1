"""Stage a new version of which only what is new is there, with the undo of writing it."""

import os

from msgspec import Struct

from bisync.core.node import Attributes, Kind
from bisync.delta.blocks import finding
from bisync.delta.digest import BLOCK_SIZE
from bisync.delta.reverse import STRETCH, About, Writer
from bisync.fs.bigfile import BasisError, Patch, Reader
from bisync.fs.meta import apply_attributes, attributes_of, read_xattrs
from bisync.fs.stage import Stage

MOST = 4  # of a file at most this part is written over; of more, a new file costs less
MOST_BYTES = 256 << 20  # nor more: who opens the file meanwhile has to wait so long


class Apart(Struct, frozen=True):
    """A new version of which the stage has only what is new, and the undo of writing it."""

    patch: Patch
    undo: bytes  # its name in the stage

    def fill(self, fd: int, basis: int) -> None:
        """Make the staged file whole after all, and durable.

        Raises:
            BasisError: the old version is not what was recorded.
        """
        before = os.fstat(fd)
        self.patch.fill(fd, basis)
        os.utime(fd, ns=(before.st_mtime_ns, before.st_mtime_ns))
        os.fsync(fd)


def write_undo(
    stage: Stage, fd: int, basis: int, patch: Patch, about: About, attributes: Attributes
) -> bytes:
    """Put what ``patch`` is going to write over into the stage, durably; return its name.

    Args:
        fd: what the stage has of the new version.
        basis: the old version, open for reading; looked at once more, block by block.
        attributes: of the old version.

    Raises:
        BasisError: the old version is not what was recorded.
    """
    name, out = stage.create()
    try:
        with open(out, "wb", buffering=STRETCH, closefd=False) as file:
            writer, old, new = Writer(file.write), _Old(basis, patch), Reader(fd)
            for offset, length, hole in patch.stretches:
                before = old.read(offset, length)
                writer.add(offset, before, length if hole else new(offset, length))
            end = about.size
            for start in range(about.new_size, end, STRETCH):
                writer.add(start, Reader(basis)(start, min(STRETCH, end - start)), b"")
            writer.finish(about, patch.old)
        now = attributes_of(os.fstat(out), *read_xattrs(out, b""))
        apply_attributes(out, b"", Kind.FILE, now, attributes)
        os.fsync(out)
    except BaseException:
        stage.discard(name)
        raise
    finally:
        os.close(out)
    return name


class _Old:
    """Reads the old version; a block that is not what was recorded ends it."""

    def __init__(self, basis: int, patch: Patch) -> None:
        self._old, self._read = patch.old, Reader(basis)
        self._known = -1
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """A stretch within one block; shorter where the old version ends."""
        block = offset // BLOCK_SIZE
        if block >= self._old.count:
            return b""
        if block != self._known:
            self._data = bytes(self._read(block * BLOCK_SIZE, self._old.length(block)))
            if finding(self._data, self._old.seed) != self._old.find(block):
                raise BasisError("the replica's own file is not what was recorded")
            self._known = block
        start = offset - block * BLOCK_SIZE
        return self._data[start : start + length]
