"""Look at what is really at a place, and take things out of the tree under that look."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from bisync.core.ignore import Matcher, reserved
from bisync.core.node import ROOT, Kind, Node, NodeId, Place
from bisync.errors import BusyError, StaleError
from bisync.fs.index import Index, stamp_of
from bisync.fs.meta import kind_of
from bisync.fs.root import OPEN_DIR, Directories, Root
from bisync.linux.lease import Lease, is_breaking, probed

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class Looked(Struct, frozen=True):
    """A name in a held directory and what stood there."""

    dir_fd: int
    name: bytes
    info: os.stat_result
    handle: bytes


def stamp(info: os.stat_result) -> bytes:
    """The stamp of a stat result."""
    return stamp_of(
        info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_mode,
        info.st_uid, info.st_gid, info.st_nlink,
    )  # fmt: skip


class Looker:
    """Compares places with the index, by identity and by what can be seen."""

    def __init__(self, root: Root, index: Index, directories: Directories) -> None:
        self.root = root
        self.index = index
        self.directories = directories

    def stat(self, dir_fd: int, name: bytes) -> os.stat_result:
        """Stat a name, links not followed.

        Raises:
            StaleError: nothing is there.
        """
        try:
            return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except OSError as error:
            if error.errno in _GONE:
                raise StaleError("it is not there any more") from error
            raise

    def at(self, place: Place, node: NodeId, *, content: bool = False) -> Looked:
        """Look at a place that should hold ``node``.

        Args:
            content: also insist on size, mtime and ctime: nothing happened to its content
                since it was observed.

        Raises:
            StaleError: it holds something else.
        """
        known = self.index.identity(node)
        if known is None:
            raise StaleError("it is not known any more")
        if node == ROOT:
            return Looked(self.root.fd, b"", os.fstat(self.root.fd), known[0])
        dir_fd, name = self.directories.at(place)
        info = self.stat(dir_fd, name)
        handle, seen = known
        if info.st_ino != seen.ino or self.handle(dir_fd, name) != handle:
            raise StaleError("something else has its name")
        if content and stat.S_ISREG(info.st_mode) and not seen.fits(info):
            raise StaleError("it changed since it was observed")
        return Looked(dir_fd, name, info, handle)

    def handle(self, dir_fd: int, name: bytes) -> bytes:
        """The handle of a name; nothing there is stale."""
        try:
            return self.root.handles.read(dir_fd, name)
        except OSError as error:
            if error.errno in _GONE:
                raise StaleError("it is not there any more") from error
            raise

    def same_object(self, dir_fd: int, name: bytes, looked: Looked) -> bool:
        """Whether what came out is what was looked at, unwritten since. Not the ctime: the
        exchange itself moves it on most file systems."""
        info = self.stat(dir_fd, name)
        before = looked.info
        if info.st_ino != before.st_ino or self.handle(dir_fd, name) != looked.handle:
            return False
        if not stat.S_ISREG(info.st_mode):
            return True
        return (info.st_size, info.st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    @contextmanager
    def guarded(self, place: Place, node: NodeId) -> Iterator["Guard"]:
        """Look at an object that is about to be displaced, under a read lease if it is a file.

        Raises:
            BusyError: somebody can write to it.
            StaleError: it is not what was observed.
        """
        looked = self.at(place, node, content=True)
        with hold(looked.dir_fd, looked.name) as held:
            if held.lease is Lease.REFUSED:
                raise BusyError("somebody has it open for writing")
            if held.fd >= 0:
                looked = self.at(place, node, content=True)
                if os.fstat(held.fd).st_ino != looked.info.st_ino:
                    raise StaleError("something else has its name")
            yield Guard(looked, held)

    def unchanged(self, top: NodeId, matcher: Matcher) -> None:
        """Make sure that a directory holds what the index says, and nothing else, far down.

        Raises:
            StaleError: it does not.
        """
        todo = [(top, self.index.path(top) or b"")]
        while todo:
            node, path = todo.pop()
            fd = self.directories.open(node)
            known = dict(self.index.children([node])[node])
            for name in map(os.fsencode, os.listdir(fd)):
                child, info = known.pop(name, None), self.stat(fd, name)
                is_dir = stat.S_ISDIR(info.st_mode)
                below = path + b"/" + name
                if child is None:
                    if not reserved(name, at_root=False) and not matcher.ignores(
                        below, is_dir=is_dir
                    ):
                        raise StaleError("something new is in it")
                    continue
                looked = self.at((node, name), child, content=True)
                if stat.S_ISDIR(looked.info.st_mode):
                    todo.append((child, below))
            if known:
                raise StaleError("something of it is gone")


class Held(Struct, frozen=True):
    """The lease on a name's object; no descriptor where it is no file or not readable."""

    fd: int
    lease: Lease


@contextmanager
def hold(dir_fd: int, name: bytes) -> Iterator[Held]:
    """Hold writers off the object of a name, if it is a regular file."""
    if not stat.S_ISREG(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        yield Held(-1, Lease.UNKNOWN)
        return
    with probed(dir_fd, name) as (fd, lease):
        yield Held(fd, lease)


class Guard(Struct, frozen=True):
    """An object about to be displaced, and the lease that holds writers off."""

    looked: Looked
    held: Held

    @property
    def is_weak(self) -> bool:
        """Whether there may be a writer of the file: nobody could be held off, or asked for."""
        return stat.S_ISREG(self.looked.info.st_mode) and self.held.lease is Lease.UNKNOWN

    def somebody_waits(self) -> bool:
        """Whether a writer was caught in ``open``; it would end up on the displaced object."""
        return self.held.lease is Lease.GRANTED and is_breaking(self.held.fd)


def look_through(
    looker: Looker, dir_fd: int, name: bytes, node: NodeId, members: set[NodeId]
) -> None:
    """Make sure that a displaced directory holds what the index says, and no writer.

    Raises:
        StaleError: it holds a surprise.
        BusyError: somebody can write to a file in it.
        PathError: it cannot be looked through.
    """
    fd = os.open(name, OPEN_DIR, dir_fd=dir_fd)
    try:
        known = looker.index.listing(node)
        for entry in os.listdir(fd):
            child_name = os.fsencode(entry)
            row = known.pop(child_name, None)
            if row is None or row[0] not in members:
                raise StaleError("something new is in it")
            child = looker.index.node(row[0])
            identity = looker.index.identity(row[0])
            info = looker.stat(fd, child_name)
            if child is None or identity is None or kind_of(info.st_mode) is not child.kind:
                raise StaleError("something in it changed")
            if looker.handle(fd, child_name) != identity[0]:
                raise StaleError("something in it was replaced")
            if child.kind is Kind.FILE:
                _look_at_file(fd, child_name, info, child)
            elif child.kind is Kind.DIR:
                look_through(looker, fd, child_name, child.id, members)
        # It may have been moved out without our knowing; its row would lead to no directory.
        if any(row[0] not in members for row in known.values()):
            raise StaleError("something in it is somewhere else now")
    finally:
        os.close(fd)


def _look_at_file(fd: int, name: bytes, info: os.stat_result, node: Node) -> None:
    seen = (info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    if seen != (node.content.size, node.attributes.mtime_ns, node.ctime_ns):
        raise StaleError("a file in it changed")
    if info.st_nlink > 1:
        raise StaleError("a file in it has another name")
    with probed(fd, name) as (_, lease):
        if lease is Lease.REFUSED:
            raise BusyError("somebody has a file in it open for writing")


def uncovered(matcher: Matcher, fd: int, old: bytes, new: bytes) -> bytes | None:
    """A path that a filter hides in a directory at its old path, and would not at the new one."""
    for name in map(os.fsencode, os.listdir(fd)):
        info = os.stat(name, dir_fd=fd, follow_symlinks=False)
        is_dir = stat.S_ISDIR(info.st_mode)
        one, two = old + b"/" + name, new + b"/" + name
        if matcher.ignores(one, is_dir=is_dir):
            if not matcher.ignores(two, is_dir=is_dir):
                return one
        elif is_dir:
            below = os.open(name, OPEN_DIR, dir_fd=fd)
            try:
                found = uncovered(matcher, below, one, two)
            finally:
                os.close(below)
            if found is not None:
                return found
    return None
