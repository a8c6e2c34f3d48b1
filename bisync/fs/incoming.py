"""Build new objects in the stage: complete, dressed, and verified before they get a name."""

import os
import stat
from dataclasses import dataclass, replace

from bisync.core.node import Attributes, Content, Kind, NodeId, XAttrs
from bisync.errors import StaleError
from bisync.fs.content import ContentSource
from bisync.fs.copying import write_chunk
from bisync.fs.look import Looker
from bisync.fs.meta import apply_attributes, attributes_of, read_xattrs
from bisync.fs.soften import soft
from bisync.fs.stage import Stage


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

    @property
    def spot(self) -> tuple[int, bytes]:
        """Where it is now, and what came out of the tree after an exchange."""
        return self.dir_fd, self.name


def link_beside(name: bytes, number: int) -> bytes:
    """The name of a hard-link group's ``number``-th link beside a waiting object's name."""
    return name[:-4] + b"%04x" % number


class Builder:
    """Builds the new objects of one batch."""

    def __init__(self, look: Looker, stage: Stage, source: ContentSource) -> None:
        self.look = look
        self.stage = stage
        self.source = source

    def build(
        self, content: Content, attributes: Attributes, source: NodeId | None, *, new: bool
    ) -> Staged:
        """Build one object with its attributes; a file's content comes from ``source``.

        Args:
            new: nobody has this file here yet, so it waits until its writer has closed it.

        Raises:
            PathError: stale, busy, or it cannot be read or made.
        """
        stage, folder = self.stage, self.stage.incoming
        if content.kind is Kind.FILE:
            assert source is not None
            return self._fetch(content, attributes, source, new=new)
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
        self, content: Content, attributes: Attributes, source: NodeId, *, new: bool
    ) -> Staged:
        stage = self.stage
        name, fd = stage.create()
        try:
            version = self.source.supply(
                source,
                lambda chunk: write_chunk(fd, chunk),
                lambda: os.ftruncate(fd, 0),
                refuse_writer=new,
            )
            if content.digest is not None and version.digest != content.digest:
                raise StaleError("its content is not what was observed")
            os.ftruncate(fd, version.size)
            missed = self._dress(fd, b"", Kind.FILE, attributes)
            handle = self.look.root.handles.read(fd, b"")
            info, found = os.fstat(fd), read_xattrs(fd, b"")
        except BaseException:
            os.close(fd)
            stage.discard(name)
            raise
        stage.finish(fd)
        verified = Content(Kind.FILE, version.size, version.digest)
        return Staged(stage.incoming, name, handle, verified, info, found, version.size, missed)

    def _dress(self, fd: int, name: bytes, kind: Kind, wanted: Attributes) -> tuple[str, ...]:
        """A new inode gets its attributes before it becomes visible."""
        info = os.fstat(fd) if not name else self.look.stat(fd, name)
        inherited = read_xattrs(fd, name)
        return tuple(apply_attributes(fd, name, kind, attributes_of(info, *inherited), wanted))
