"""Read a file's content so that what was read is one state that existed.

fsync (so that stores through a memory map move the times), stat, read, stat: the version counts
only if nothing moved in between, nor a moment before if somebody can write to it. Holes are found,
not read.
"""

import errno
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from msgspec import Struct

from bisync.core.node import NodeId
from bisync.delta.digest import BLOCK_SIZE, ContentHasher
from bisync.errors import BusyError, PathError, StaleError
from bisync.linux.lease import Lease, probed, release

if TYPE_CHECKING:
    from bisync.delta.blocks import Blocks
    from bisync.delta.changes import ChangeSink

BIG = 4 << 20  # bytes; of a file with so many, what its blocks are is remembered
LARGEST = 64 << 40  # bytes; even of holes, more takes minutes to list
_BUFFER = 8 * BLOCK_SIZE
_TRIES = 4
_TICK_NS = (
    20_000_000  # times of files may be so coarse (two ticks of 10 ms, on kernels before 6.13)
)
_FIRST_WAIT = 0.02  # seconds between tries, doubled each time


class Chunk(Struct, frozen=True):
    """A stretch of a file: bytes, or a hole of ``length`` zeros. Valid until the next one."""

    offset: int
    length: int
    data: memoryview | None


class Version(Struct, frozen=True):
    """One state of a file that was read as a whole."""

    size: int
    digest: bytes
    writer: bool  # somebody had it open for writing
    blocks: "Blocks | None" = None  # of a big file
    instant: bool = False  # of a file that was being written to


class Expected(Struct, frozen=True):
    """A small file that will be asked for."""

    node: NodeId
    size: int  # bytes, when it was observed
    refuse_writer: bool


Scan: TypeAlias = Callable[[int, int], bytes | None]
"""Reads an open file of a size; the content digest, or ``None`` if it ended too early."""


class ContentSource(Protocol):
    """Where new content comes from: the other side."""

    def supply(
        self,
        node: NodeId,
        sink: Callable[[Chunk], None],
        restart: Callable[[], None],
        *,
        refuse_writer: bool,
    ) -> Version:
        """Read one whole version of a node into ``sink``.

        Raises:
            PathError: busy, stale or unreadable; what the sink got is void.
        """
        ...

    def supply_changes(
        self, node: NodeId, sink: "ChangeSink", *, refuse_writer: bool = False
    ) -> Version:
        """Tell a receiver with an older version of a big file all that differs.

        Raises:
            PathError: as for :meth:`supply`, or the receiver's version is not what it says.
        """
        ...

    def expect(self, files: "Sequence[Expected]") -> None:
        """These will be asked for whole, in this order, if nothing comes between.

        Replaces what was expected before. A source that is far away sends them ahead.
        """
        ...

    def moved(self, nodes: set[NodeId]) -> bool:
        """Whether files that are to be read at one instant moved on while they were read."""
        ...


def chunks_of(fd: int, size: int, buffer: bytearray, start: int = 0) -> Iterator[Chunk]:
    """The content of an open file from ``start`` to ``size``, in order.

    Chunks start at multiples of the block size, as ``start`` does. Ends early where the file does.
    """
    view = memoryview(buffer)
    offset = start
    while offset < size:
        start = _next_data(fd, offset, size)
        aligned = start - start % BLOCK_SIZE if start < size else size
        if aligned > offset:
            yield Chunk(offset, aligned - offset, None)
            offset = aligned
            continue
        end = min(_next_hole(fd, start, size), size)
        end = min(-(-end // BLOCK_SIZE) * BLOCK_SIZE, size)
        while offset < end:
            want = min(len(buffer), end - offset)
            got = 0
            while got < want:
                n = os.preadv(fd, [view[got:want]], offset + got)
                if n == 0:
                    break
                got += n
            if got:
                yield Chunk(offset, got, view[:got])
            offset += got
            if got < want:
                return


def _next_data(fd: int, offset: int, size: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return offset
        raise


def _next_hole(fd: int, offset: int, size: int) -> int:
    try:
        return os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENXIO):
            return size
        raise


def read_version(
    dir_fd: int,
    name: bytes,
    sink: Callable[[Chunk], None] | None = None,
    *,
    expect: Callable[[os.stat_result], bool] = lambda _info: True,
    restart: Callable[[], None] = lambda: None,
    refuse_writer: bool = False,
    buffer: bytearray | None = None,
    scan: Scan | None = None,
) -> Version:
    """Read one whole version of a regular file.

    Args:
        dir_fd: the held directory.
        name: the file in it; links are not followed.
        sink: gets every chunk in order.
        expect: whether the file is still the one that was observed.
        restart: called before another try: what the sink got so far is void.
        refuse_writer: do not read a file that somebody can write to.
        buffer: scratch space to reuse.
        scan: does the reading instead of reading all of it in order.

    Raises:
        StaleError: it is not what was observed; observe again.
        BusyError: it changed during every try, or a writer is refused.
        PathError: it cannot be read.
    """
    if scan is None:
        space = buffer if buffer is not None else bytearray(_BUFFER)
        scan = functools.partial(read_all, sink=sink, space=space)
    wait = _FIRST_WAIT
    for attempt in range(_TRIES):
        if attempt:
            restart()
            time.sleep(wait)
            wait *= 2
        version = _read_once(dir_fd, name, expect, scan, refuse_writer=refuse_writer)
        if version is not None:
            return version
    raise BusyError("it changed while it was read, every time")


def _read_once(
    dir_fd: int,
    name: bytes,
    expect: Callable[[os.stat_result], bool],
    scan: Scan,
    *,
    refuse_writer: bool,
) -> Version | None:
    try:
        with probed(dir_fd, name) as (fd, lease):
            if fd < 0:
                raise PathError("cannot read: permission denied")
            if lease is Lease.GRANTED:
                release(fd)  # the question is answered; nobody has to wait for us
            writer = lease is Lease.REFUSED
            if writer and refuse_writer:
                raise BusyError("somebody is still writing it")
            if writer:
                os.fsync(fd)
            before, now_ns = os.fstat(fd), time.time_ns()
            if not expect(before):
                raise StaleError("it changed since it was observed")
            if before.st_size > LARGEST:
                raise PathError("it is larger than 64 TiB")
            digest = scan(fd, before.st_size)
            after = os.fstat(fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            raise StaleError("it was moved or replaced") from error
        if error.errno == errno.EWOULDBLOCK:
            raise BusyError("somebody holds a lease on it") from error
        raise PathError(f"cannot read: {error.strerror}") from error
    same = all(
        getattr(before, f) == getattr(after, f) for f in ("st_size", "st_mtime_ns", "st_ctime_ns")
    )
    if not same or digest is None:
        return None
    if writer and 0 <= now_ns - before.st_ctime_ns < _TICK_NS:
        return None  # written to just before: a write just after may have left the same times
    return Version(before.st_size, digest, writer)


def read_all(
    fd: int,
    size: int,
    *,
    sink: Callable[[Chunk], None] | None = None,
    space: bytearray | None = None,
) -> bytes | None:
    """Read an open file in order; its content digest, ``None`` if it ended before ``size``."""
    hasher = ContentHasher()
    for chunk in chunks_of(fd, size, space if space is not None else bytearray(_BUFFER)):
        if chunk.data is None:
            hasher.update_zeros(chunk.length)
        else:
            hasher.update(chunk.data)
        if sink is not None:
            sink(chunk)
        if hasher.size % BLOCK_SIZE and hasher.size != size:
            return None
    return hasher.digest() if hasher.size == size else None
