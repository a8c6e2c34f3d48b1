"""The root of one tree: opened once, everything else relative to its descriptor.

No path below the root is ever handed to the kernel: directories are opened one component
at a time from a held descriptor, links not followed, so nothing that local users rename
or link can lead an operation outside.
"""

import errno
import os
import resource
import stat
from collections import OrderedDict

from msgspec import Struct

from bisync.core.node import ROOT, NodeId, Place
from bisync.core.path import STATE_DIR
from bisync.errors import EndpointError, HaltError, StaleError, UsageError
from bisync.fs.index import Index
from bisync.linux.filesystem import fs_uuid, subvolume
from bisync.linux.handle import HandleReader

OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HELD_DIRS = 256
_MARKER = STATE_DIR + b"/replica"


class RootIdentity(Struct, frozen=True):
    """What a root is, wherever it is mounted. The marker's nonce is kept beside it."""

    fs: str  # file system uuid, "" where there is none
    subvolume: str
    handle: str

    def text(self) -> str:
        """One comparable line."""
        return f"{self.fs}:{self.subvolume}:{self.handle}"


class Root:
    """An opened root directory."""

    def __init__(self, path: bytes) -> None:
        """Open a root.

        Raises:
            UsageError: there is no directory at ``path``.
            EndpointError: the disk does not let us look.
        """
        self.path = os.path.realpath(path)
        self.given = os.path.abspath(path)  # as it was spelled, links not resolved
        self.is_link = False
        raise_descriptor_limit()
        try:
            self.is_link = stat.S_ISLNK(os.lstat(self.given).st_mode)
            if self.is_link:
                # A link given on the command line is the user's; it is resolved once, here.
                path = self.path
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            text = f"{os.fsdecode(path)}: {error.strerror}"
            if error.errno in (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                raise EndpointError(text) from error
            raise UsageError(f"{text}; give an existing directory") from error
        self.handles = HandleReader()
        info = os.fstat(self.fd)
        self.device = info.st_dev
        self.first_info = info
        self.mount = self.handles.mount_id(self.fd, b"")
        handle = self.handles.read(self.fd, b"")
        self.identity = RootIdentity(fs_uuid(self.fd), subvolume(self.fd), handle.hex())

    def check(self) -> None:
        """Make sure that the path still leads to this root.

        Raises:
            HaltError: it was unmounted, replaced, removed, or something is mounted over it.
        """
        try:
            info, mine = os.stat(self.path), os.fstat(self.fd)
        except OSError as error:
            text = os.fsdecode(self.path)
            raise HaltError(f"{text}: the root is gone ({error.strerror})") from error
        if (info.st_dev, info.st_ino) != (mine.st_dev, mine.st_ino) or mine.st_nlink == 0:
            raise HaltError(f"{os.fsdecode(self.path)}: another directory stands at the root now")

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.fd)


def is_a_root(fd: int) -> bool:
    """Whether a directory holds the state of a replica.

    Raises:
        OSError: the disk does not let us tell.
    """
    try:
        os.stat(_MARKER, dir_fd=fd, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise
    return True


def enclosing_root(path: bytes) -> bytes | None:
    """The nearest directory above ``path`` that is a root itself; ``None`` if there is none."""
    while path != b"/":
        path = os.path.dirname(path)
        if os.path.lexists(path + b"/" + _MARKER):
            return path
    return None


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as the system lets us; deep trees hold one per level."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Directories:
    """Descriptors of directories by node, opened on demand and held for a while."""

    def __init__(self, root: Root, index: Index) -> None:
        self.root = root
        self.index = index
        self._held: OrderedDict[NodeId, int] = OrderedDict()
        self._pinned: dict[NodeId, int] = {}  # of directories without a name just now

    def open(self, node: NodeId) -> int:
        """A descriptor of a directory; it belongs to this cache.

        Raises:
            StaleError: the directory is not where the index has it.
        """
        if node == ROOT:
            return self.root.fd
        if node in self._pinned:
            return self._pinned[node]
        fd = self._held.get(node)
        if fd is not None:
            self._held.move_to_end(node)
            return fd
        chain = []
        while node not in self._held and node not in self._pinned and node != ROOT:
            places = self.index.places(node)
            if not places:
                raise StaleError("its directory is gone")
            chain.append((node, places[0][1]))
            node = places[0][0]
        if node == ROOT:
            fd = self.root.fd
        else:
            fd = self._pinned[node] if node in self._pinned else self._held[node]
        for node, name in reversed(chain):
            fd = self._enter(fd, name, node)
        return fd

    def _enter(self, parent: int, name: bytes, node: NodeId) -> int:
        try:
            fd = os.open(name, OPEN_DIR, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise StaleError("its directory was moved or replaced") from error
            raise
        known = self.index.identity(node)
        if known is None or self.root.handles.read(fd, b"") != known[0]:
            os.close(fd)
            raise StaleError("another directory has its name")
        self._held[node] = fd
        if len(self._held) > _HELD_DIRS:
            _, oldest = self._held.popitem(last=False)
            if oldest == fd:
                raise AssertionError("the newest descriptor was evicted")
            os.close(oldest)
        return fd

    def pin(self, node: NodeId) -> None:
        """Hold a directory open while it has no name."""
        self._pinned[node] = os.dup(self.open(node))

    def unpin(self, node: NodeId) -> None:
        """It has a name again."""
        fd = self._pinned.pop(node, None)
        if fd is not None:
            os.close(fd)

    def drop(self, node: NodeId) -> None:
        """Forget a directory that was removed."""
        fd = self._held.pop(node, None)
        if fd is not None:
            os.close(fd)

    def at(self, place: Place) -> tuple[int, bytes]:
        """The directory descriptor and name of a place."""
        return self.open(place[0]), place[1]

    def let_go(self) -> None:
        """Close what was only held because it may be needed again soon."""
        while self._held:
            os.close(self._held.popitem()[1])

    def close(self) -> None:
        """Give all descriptors back."""
        self.let_go()
        while self._pinned:
            os.close(self._pinned.popitem()[1])
