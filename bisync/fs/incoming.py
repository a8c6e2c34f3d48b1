"""Build new objects in the stage: complete, dressed, and verified before they get a name."""

import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from bisync.core.node import Attributes, Content, Kind, NodeId, XAttrs
from bisync.delta.digest import BLOCK_SIZE
from bisync.errors import BusyError, Interrupted, StaleError
from bisync.fs.content import BIG, Chunk, ContentSource, Version
from bisync.fs.copying import write_chunk
from bisync.fs.look import Looker
from bisync.fs.meta import apply_attributes, attributes_of, read_xattrs
from bisync.fs.soften import soft
from bisync.fs.stage import Stage

if TYPE_CHECKING:
    from bisync.delta.blocks import Blocks
    from bisync.fs.blocklist import BlockLists

log = logging.getLogger(__name__)
LARGE = 64 << 20  # bytes; of a file with so many, a cut run's work is worth keeping


Arrived: TypeAlias = Callable[[bytes, int, int, int], None]
"""Told how far one large file is: its name, bytes done, bytes in all, bytes that had to come."""


def not_told(_name: bytes, _done: int, _total: int, _literal: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class _Watch:
    """Who is asked whether to go on, and told how far a file is."""

    stop: Callable[[], None]
    arrived: Callable[[int, int], None]  # bytes done, bytes that had to come


@dataclass(slots=True)
class Staged:
    """A new object waiting for its name: in the stage, or beside its target (see ``near``)."""

    dir_fd: int
    name: bytes
    handle: bytes
    content: Content
    info: os.stat_result  # as it was when it was complete
    found: tuple[XAttrs, XAttrs] = ((), ())  # its extended attributes and ACLs then
    size: int = 0  # content bytes that came from the other side
    missed: tuple[str, ...] = ()  # attributes that could not be set
    matched: int = 0  # content bytes that were here already
    blocks: "Blocks | None" = None  # of a big file

    @property
    def spot(self) -> tuple[int, bytes]:
        """Where it is now, and what came out of the tree after an exchange."""
        return self.dir_fd, self.name


def link_beside(name: bytes, number: int) -> bytes:
    """The name of a hard-link group's ``number``-th link beside a waiting object's name."""
    return name[:-4] + b"%04x" % number


class Builder:
    """Builds the new objects of one batch."""

    def __init__(
        self,
        look: Looker,
        stage: Stage,
        source: ContentSource,
        lists: Callable[[], "BlockLists"],
        workers: int,
        stop: Callable[[], None],
        arrived: Arrived,
    ) -> None:
        self.look = look
        self.stage = stage
        self.source = source
        self.lists = lists
        self.workers = workers
        self.stop = stop
        self.arrived = arrived

    def build(
        self,
        content: Content,
        attributes: Attributes,
        source: NodeId | None,
        *,
        trace: bytes,
        name: bytes,
        new: bool,
        old: NodeId | None = None,
    ) -> Staged:
        """Build one object with its attributes; a file's content comes from ``source``.

        Args:
            trace: the same in the next run, to find what this one leaves if it is cut.
            name: of the file, to tell how far it is.
            new: nobody has this file here yet, so it waits until its writer has closed it.
            old: a file here that it may be made from.

        Raises:
            PathError: stale, busy, or it cannot be read or made.
        """
        stage, folder = self.stage, self.stage.incoming
        if content.kind is Kind.FILE:
            assert source is not None

            def arrived(done: int, literal: int) -> None:
                if content.size >= LARGE:
                    self.arrived(name, done, content.size, literal)

            watch = _Watch(self.stop, arrived)
            return self._fetch(content, attributes, source, watch, trace=trace, new=new, old=old)
        name = Stage.name()
        match content.kind:
            case Kind.DIR:
                attributes = replace(attributes, mode=soft(attributes.mode))  # while it is filled
                os.mkdir(name, 0o700, dir_fd=folder)
            case Kind.SYMLINK:
                os.symlink(content.target, name, dir_fd=folder)
            case Kind.FIFO:
                os.mkfifo(name, 0o600, dir_fd=folder)
            case Kind.SOCKET:
                os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=folder)
            case Kind.CHAR:
                os.mknod(name, stat.S_IFCHR | 0o600, content.rdev, dir_fd=folder)
            case Kind.BLOCK:
                os.mknod(name, stat.S_IFBLK | 0o600, content.rdev, dir_fd=folder)
        try:
            missed = self._dress(folder, name, content.kind, attributes)
            info, found = self.look.stat(folder, name), read_xattrs(folder, name)
            handle = self.look.handle(folder, name)
            return Staged(folder, name, handle, content, info, found, 0, missed)
        except BaseException:
            stage.discard(name)
            raise

    def _fetch(
        self,
        content: Content,
        attributes: Attributes,
        source: NodeId,
        watch: _Watch,
        *,
        trace: bytes,
        new: bool,
        old: NodeId | None,
    ) -> Staged:
        if old is not None and content.size >= BIG:
            from bisync.fs.bigfile import BasisError  # noqa: PLC0415 -- loads numpy

            try:
                with self._basis(old) as basis:
                    if basis is not None:
                        fill = partial(_by_changes, self.source, source, watch, basis=basis)
                        return self._finish(content, attributes, fill)
            except BasisError as error:
                log.info("basis-not-used node=%d reason=%s", old, error)
        if content.size >= LARGE:
            from bisync.fs.bigfile import BasisError  # noqa: PLC0415 -- loads numpy

            fill = partial(_go_on, self.source, source, watch, new=new, workers=self.workers)
            try:
                return self._finish(content, attributes, fill, trace)
            except BasisError as error:
                log.info("partial-not-used node=%d reason=%s", source, error)
        fill = partial(_as_a_whole, self.source, source, watch, size=content.size, new=new)
        return self._finish(content, attributes, fill, trace if content.size >= LARGE else None)

    @contextmanager
    def _basis(self, old: NodeId) -> Iterator[tuple[int, "Blocks"] | None]:
        """The present version of a big file, open, and its list; ``None`` if it cannot serve."""
        from bisync.fs.bigfile import list_blocks  # noqa: PLC0415 -- loads numpy

        index = self.look.index
        places, known = index.places(old), index.known(old)
        if not places or known is None or known[1].size < BIG or known[0].kind is not Kind.FILE:
            yield None
            return
        row, seen = known
        dir_fd, name = self.look.directories.at(places[0])
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(name, flags, dir_fd=dir_fd)
        except OSError as error:
            log.info("basis-not-opened node=%d reason=%s", old, error)
            yield None
            return
        try:
            info = os.fstat(fd)
            if not (seen.fits(info) and stat.S_ISREG(info.st_mode)):
                raise StaleError("it changed since it was observed")
            lists = self.lists()
            blocks = lists.of(old, row.content.digest)
            if blocks is None:
                blocks = list_blocks(fd, seen.size, lists.known(old), workers=self.workers)
            yield None if blocks is None else (fd, blocks)
        finally:
            os.close(fd)

    def _finish(
        self,
        content: Content,
        attributes: Attributes,
        fill: Callable[[int], "_Filled"],
        trace: bytes | None = None,
    ) -> Staged:
        """A new file in the stage: filled, verified, dressed.

        Args:
            trace: of a file so large that what arrived stays for the next run if this one is cut.
        """
        stage = self.stage
        name, fd = stage.create() if trace is None else stage.partial(trace)
        try:
            filled = fill(fd)
            if trace is not None:
                name = stage.complete(name)
            version = filled.version
            if content.digest is not None and version.digest != content.digest:
                raise StaleError("its content is not what was observed")
            os.ftruncate(fd, version.size)
            missed = self._dress(fd, b"", Kind.FILE, attributes)
            handle = self.look.root.handles.read(fd, b"")
            info, found = os.fstat(fd), read_xattrs(fd, b"")
        except BaseException as error:
            os.close(fd)
            if trace is None or not may_go_on(error):
                stage.discard(name)
            raise
        stage.finish(fd)
        verified = Content(Kind.FILE, version.size, version.digest)
        return Staged(
            stage.incoming,
            name,
            handle,
            verified,
            info,
            found,
            filled.literal,
            missed,
            version.size - filled.literal,
            filled.blocks,
        )

    def _dress(self, fd: int, name: bytes, kind: Kind, wanted: Attributes) -> tuple[str, ...]:
        """A new inode gets its attributes before it becomes visible."""
        info = os.fstat(fd) if not name else self.look.stat(fd, name)
        inherited = read_xattrs(fd, name)
        return tuple(apply_attributes(fd, name, kind, attributes_of(info, *inherited), wanted))


@dataclass(frozen=True, slots=True)
class _Filled:
    """How a file got its content."""

    version: Version
    literal: int  # bytes that came
    blocks: "Blocks | None" = None


def _as_a_whole(
    source: ContentSource,
    node: NodeId,
    watch: _Watch,
    fd: int,
    *,
    size: int,
    new: bool,
) -> _Filled:
    os.ftruncate(fd, 0)
    finder = None
    if size >= BIG:
        from bisync.fs.bigfile import Finder  # noqa: PLC0415 -- loads numpy

        finder = Finder()

    def sink(chunk: Chunk) -> None:
        watch.stop()
        write_chunk(fd, chunk)
        watch.arrived(chunk.offset + chunk.length, chunk.offset + chunk.length)
        if finder is not None:
            finder.take(chunk)

    def restart() -> None:
        os.ftruncate(fd, 0)
        if finder is not None:
            finder.restart()

    version = source.supply(node, sink, restart, refuse_writer=new)
    proven = version.blocks
    blocks = finder.blocks(proven) if finder is not None and proven is not None else None
    return _Filled(version, version.size, blocks)


def _go_on(
    source: ContentSource,
    node: NodeId,
    watch: _Watch,
    fd: int,
    *,
    new: bool,
    workers: int,
) -> _Filled:
    """Go on with what a cut run left, if it did."""
    from bisync.delta.blocks import Blocks  # noqa: PLC0415 -- loads numpy
    from bisync.fs.bigfile import BasisError, list_blocks  # noqa: PLC0415 -- loads numpy

    size = os.fstat(fd).st_size // BLOCK_SIZE * BLOCK_SIZE
    os.ftruncate(fd, size)
    if size == 0:
        return _as_a_whole(source, node, watch, fd, size=LARGE, new=new)
    fresh = Blocks(0, secrets.randbits(64))
    blocks = list_blocks(fd, size, fresh, workers=workers, stop=watch.stop)
    if blocks is None:
        raise StaleError("what had arrived became shorter")
    filled = _by_changes(source, node, watch, fd, basis=(fd, blocks), new=new)
    # What was changed in place is looked at: its list must not be all that says what it is.
    assert filled.blocks is not None
    made = list_blocks(fd, filled.version.size, filled.blocks, workers=workers, stop=watch.stop)
    if made is None or made.digest() != filled.version.digest:
        raise BasisError("what was made of a cut copy is not what was sent")
    return filled


def may_go_on(error: BaseException) -> bool:
    """Whether what arrived until an error is of use for another try."""
    from bisync.fs.bigfile import BasisError  # noqa: PLC0415 -- loads numpy

    if isinstance(error, BasisError):
        return False
    return isinstance(error, Interrupted | BusyError | StaleError)


def _by_changes(
    source: ContentSource,
    node: NodeId,
    watch: _Watch,
    fd: int,
    *,
    basis: tuple[int, "Blocks"],
    new: bool = False,
) -> _Filled:
    from bisync.fs.bigfile import BasisError, Patch  # noqa: PLC0415 -- loads numpy

    patch = Patch(fd, *basis, stop=watch.stop, arrived=watch.arrived)
    version = source.supply_changes(node, patch, refuse_writer=new)
    blocks = patch.blocks()
    if blocks.digest() != version.digest:
        raise BasisError("what was made is not what was sent")
    return _Filled(version, patch.literal, blocks)
