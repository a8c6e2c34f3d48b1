"""Build new objects in the stage: complete, dressed, and verified before they get a name."""

import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from bisync.core.method import Apply
from bisync.core.node import Attributes, Content, Kind, Node, NodeId, XAttrs
from bisync.delta.digest import BLOCK_SIZE
from bisync.errors import BusyError, EndpointError, Interrupted, NoSpaceError, StaleError
from bisync.fs.content import BIG, Chunk, ContentSource, Version
from bisync.fs.copying import write_chunk
from bisync.fs.look import Looker
from bisync.fs.meta import apply_attributes, attributes_of, read_xattrs
from bisync.fs.soften import soft
from bisync.fs.stage import Stage
from bisync.linux.holes import punch

if TYPE_CHECKING:
    from bisync.delta.blocks import Blocks
    from bisync.fs.apart import Apart
    from bisync.fs.bigfile import Patch
    from bisync.fs.blocklist import BlockLists

log = logging.getLogger(__name__)
_SETID = 0o6000
_CAPABILITY = b"security.capability"
LARGE = 64 << 20  # bytes; of a file with so many, a cut run's work is worth keeping


Arrived: TypeAlias = Callable[[bytes, int, int, int], None]
"""Told how far one large file is: its name, bytes done, bytes in all, bytes that had to come."""


def not_told(_name: bytes, _done: int, _total: int, _literal: int) -> None:
    """Nobody wants to know."""


class _Watch(Struct, frozen=True):
    """Who is asked whether to go on, and told how far a file is."""

    stop: Callable[[], None]
    arrived: Callable[[int, int], None]  # bytes done, bytes that had to come


class Staged(Struct):
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
    apart: "Apart | None" = None  # of a file that is to be written into: only what is new is here
    shown: bool = False  # it may have had its name for a moment

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
        apply: Apply,
        may_be_written: Callable[[Node], bool],
    ) -> None:
        self.look = look
        self.stage = stage
        self.source = source
        self.lists = lists
        self.workers = workers
        self.stop = stop
        self.arrived = arrived
        self.apply = apply
        self.may_be_written = may_be_written

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
        into: dict[str, Any] | None = None,
    ) -> Staged:
        """Build one object with its attributes; a file's content comes from ``source``.

        Args:
            trace: the same in the next run, to find what this one leaves if it is cut.
            name: of the file, to tell how far it is.
            new: nobody has this file here yet, so it waits until its writer has closed it.
            old: a file here that it may be made from.
            into: that one may be written into; what the store is to say of its old version.

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
            if old is not None and content.size >= BIG:
                staged = self._from_old(content, attributes, source, watch, old=old, into=into)
                if staged is not None:
                    return staged
            return self._fetch(content, attributes, source, watch, trace=trace, new=new)
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
    ) -> Staged:
        if content.size >= LARGE:
            from bisync.fs.bigfile import BasisError  # noqa: PLC0415 -- loads numpy

            fill = partial(_go_on, self.source, source, watch, new=new, workers=self.workers)
            try:
                return self._finish(content, attributes, fill, trace)
            except BasisError as error:
                log.info("partial-not-used node=%d reason=%s", source, error)
        fill = partial(_as_a_whole, self.source, source, watch, size=content.size, new=new)
        return self._finish(content, attributes, fill, trace if content.size >= LARGE else None)

    def _from_old(
        self,
        content: Content,
        attributes: Attributes,
        source: NodeId,
        watch: _Watch,
        *,
        old: NodeId,
        into: dict[str, Any] | None,
    ) -> Staged | None:
        """The new version from the old one; ``None`` if that one does not serve."""
        from bisync.fs.bigfile import BasisError  # noqa: PLC0415 -- loads numpy

        try:
            with self._basis(old) as basis:
                if basis is None:
                    return None
                apply, row = Apply.REPLACE, self.look.index.node(old)
                if into is not None and row is not None and self._may_be_written(row, attributes):
                    apply = self.apply
                fill = partial(_by_changes, self.source, source, watch, basis=basis, apply=apply)
                apart = None
                if into is not None and row is not None:
                    apart = partial(self._set_apart, row, basis[0], attributes.mtime_ns, into)
                return self._finish(content, attributes, fill, apart=apart)
        except BasisError as error:
            log.info("basis-not-used node=%d reason=%s", old, error)
            return None

    def _may_be_written(self, row: Node, attributes: Attributes) -> bool:
        """Whether the next version of a file may be written into it.

        What is kept then is only what was written over. That will do for a version which the
        other side had as well and has replaced itself, never for somebody's own work.
        """
        large = row.content.size >= LARGE or self.apply is Apply.IN_PLACE
        same = replace(row.attributes, mtime_ns=attributes.mtime_ns) == attributes
        # The kernel takes such powers away from a file that is written to.
        armed = attributes.mode & _SETID or _CAPABILITY in dict(attributes.xattrs)
        theirs = self.look.index.is_installed(row) and self.may_be_written(row)
        return large and same and not armed and theirs

    def _set_apart(
        self, row: Node, basis: int, mtime_ns: int, record: dict[str, Any], fd: int, patch: "Patch"
    ) -> "Apart | None":
        """Prepare the writing into a file; ``None``, and the new one whole, if it is no use."""
        from bisync.delta.reverse import About  # noqa: PLC0415 -- loads numpy
        from bisync.fs.apart import MOST, MOST_BYTES, Apart, write_undo  # noqa: PLC0415

        if patch.overwritten > MOST_BYTES or (
            self.apply is not Apply.IN_PLACE and patch.overwritten * MOST > row.content.size
        ):
            patch.fill(fd, basis)
            return None
        known, digest, blocks = self.look.index.identity(row.id), row.content.digest, patch.blocks()
        if known is None or digest is None:
            raise StaleError("it is not known any more")
        new, places = blocks.digest(), self.look.index.places(row.id)
        about = About(
            row.id,
            self.look.index.place_path(places[0]).decode("latin-1"),
            known[0].hex(),
            row.content.size,
            row.attributes.mtime_ns,
            digest.hex(),
            blocks.size,
            mtime_ns,
            new.hex(),
            {**record, "digest": digest.hex(), "installed": True, "size": row.content.size,
             "delta": True, "base": new.hex()},
        )  # fmt: skip
        undo = write_undo(self.stage, fd, basis, patch, about, row.attributes)
        return Apart(patch, undo)

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
        apart: Callable[[int, "Patch"], "Apart | None"] | None = None,
    ) -> Staged:
        """A new file in the stage: filled, verified, dressed.

        Args:
            trace: of a file so large that what arrived stays for the next run if this one is cut.
            apart: sees to a file of which only what is new was filled in.
        """
        stage = self.stage
        name, fd = stage.create() if trace is None else stage.partial(trace)
        try:
            filled = fill(fd)
            if trace is not None:
                name, trace = stage.complete(name), None
            version = filled.version
            if content.digest is not None and version.digest != content.digest:
                raise StaleError("its content is not what was observed")
            os.ftruncate(fd, version.size)
            split = None
            if filled.patch is not None and filled.patch.apart and apart is not None:
                split = apart(fd, filled.patch)
            missed = self._dress(fd, b"", Kind.FILE, attributes)
            handle = self.look.root.handles.read(fd, b"")
            info, found = os.fstat(fd), read_xattrs(fd, b"")
        except BaseException as error:
            os.close(fd)
            if trace is None or not may_go_on(error):
                stage.discard(name)
            raise
        if split is None:
            stage.finish(fd)
        else:
            os.close(fd)  # it is never seen, and made durable if it has to be made whole
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
            split,
        )

    def _dress(self, fd: int, name: bytes, kind: Kind, wanted: Attributes) -> tuple[str, ...]:
        """A new inode gets its attributes before it becomes visible."""
        info = os.fstat(fd) if not name else self.look.stat(fd, name)
        inherited = read_xattrs(fd, name)
        return tuple(apply_attributes(fd, name, kind, attributes_of(info, *inherited), wanted))


class _Filled(Struct, frozen=True):
    """How a file got its content."""

    version: Version
    literal: int  # bytes that came
    blocks: "Blocks | None" = None
    patch: "Patch | None" = None


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
    again, finder = False, None
    if size >= BIG:
        from bisync.fs.bigfile import Finder  # noqa: PLC0415 -- loads numpy

        finder = Finder()

    def sink(chunk: Chunk) -> None:
        watch.stop()
        if chunk.data is None and again:
            punch(fd, chunk.offset, chunk.length)
        else:
            write_chunk(fd, chunk)
        watch.arrived(chunk.offset + chunk.length, chunk.offset + chunk.length)
        if finder is not None:
            finder.take(chunk)

    def restart() -> None:
        nonlocal again
        again = True  # what came stays: if this try fails, too, the next round goes on from it
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

    if isinstance(error, BasisError | NoSpaceError):
        return False
    return isinstance(error, Interrupted | BusyError | StaleError | EndpointError)


def _by_changes(
    source: ContentSource,
    node: NodeId,
    watch: _Watch,
    fd: int,
    *,
    basis: tuple[int, "Blocks"],
    new: bool = False,
    apply: Apply = Apply.REPLACE,
) -> _Filled:
    from bisync.fs.bigfile import BasisError, Patch  # noqa: PLC0415 -- loads numpy

    patch = Patch(fd, *basis, apply=apply, stop=watch.stop, arrived=watch.arrived)
    version = source.supply_changes(node, patch, refuse_writer=new)
    blocks = patch.blocks()
    if blocks.digest() != version.digest:
        raise BasisError("what was made is not what was sent")
    return _Filled(version, patch.literal, blocks, patch)
