"""Frozen clones of big files: the version whose blocks are known, to compare the live one with.

``.bisync/bases/NODE`` shares its extents with the file, so a comparison of both extent maps tells
where the file was written to since, without reading it. A base belongs to one version: an attribute
on it names the content, and its own size and time when it was made; else it is not believed.
"""

import contextlib
import logging
import os
import secrets
import stat

from bisync.core.node import NodeId
from bisync.fs.root import OPEN_DIR
from bisync.fs.stage import subfolder
from bisync.fs.store import has_room
from bisync.linux.filesystem import clone, tells_extents
from bisync.linux.subvolume import destroy, snapshot

log = logging.getLogger(__name__)
_MARK = "user.bisync.base"
SMALLEST = 64 << 20  # bytes; a smaller file is read faster than it is compared


class Bases:
    """All bases of one replica."""

    def __init__(self, state_fd: int) -> None:
        self._dir = -1
        if not tells_extents(state_fd):
            return  # elsewhere extents may mean something else, and clones be no instants
        try:
            self._dir = subfolder(state_fd, b"bases")
        except OSError as error:
            log.info("no-bases reason=%s", error)

    def open(self, node: NodeId, digest: bytes) -> int | None:
        """A node's base, open for reading, if it holds this content."""
        if self._dir < 0:
            return None
        try:
            fd = os.open(_name(node), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._dir)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.info("base-not-opened node=%d reason=%s", node, error)
            return None
        try:
            if os.getxattr(fd, _MARK) == _mark(digest, os.fstat(fd)):
                return fd
        except OSError as error:
            log.info("base-not-used node=%d reason=%s", node, error)
        os.close(fd)
        return None

    def freeze(self, fd: int) -> tuple[int, bytes] | None:
        """A clone of an open file as it is now: its descriptor and name; ``None`` if impossible."""
        if self._dir < 0 or not has_room(self._dir):
            return None
        name = b"new." + secrets.token_hex(8).encode()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            frozen = os.open(name, flags, 0o600, dir_fd=self._dir)
        except OSError as error:
            log.info("not-frozen reason=%s", error)
            return None
        try:
            info = os.fstat(fd)
            if os.geteuid() == 0:
                os.fchown(frozen, info.st_uid, info.st_gid)  # whoever's quota it was
            if clone(fd, frozen):
                return frozen, name
        except OSError as error:
            log.info("not-frozen reason=%s", error)
        os.close(frozen)
        self.discard(name)
        return None

    def keep(self, node: NodeId, frozen: tuple[int, bytes], digest: bytes) -> None:
        """What was frozen becomes the node's base; the descriptor stays open."""
        fd, name = frozen
        try:
            os.setxattr(fd, _MARK, _mark(digest, os.fstat(fd)))
            os.rename(name, _name(node), src_dir_fd=self._dir, dst_dir_fd=self._dir)
        except OSError as error:
            log.info("base-not-kept node=%d reason=%s", node, error)
            self.discard(name)

    def discard(self, name: bytes) -> None:
        """Remove what was frozen and did not become a base."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._dir)

    def snapshot(self, subvolume: int) -> bytes | None:
        """Take a snapshot of a subvolume; its name, ``None`` where we may not or cannot."""
        if self._dir < 0:
            return None
        name = b"new." + secrets.token_hex(8).encode()
        try:
            snapshot(subvolume, self._dir, name)
        except OSError as error:
            log.info("no-snapshot reason=%s", error)
            return None
        return name

    def open_snapshot(self, name: bytes, path: bytes) -> int:
        """A directory in a snapshot, opened."""
        top = os.open(name, OPEN_DIR, dir_fd=self._dir)
        try:
            return os.open(path or b".", OPEN_DIR, dir_fd=top)
        finally:
            os.close(top)

    def destroy(self, name: bytes) -> None:
        """Remove a snapshot; who has files of it open goes on reading them."""
        try:
            destroy(self._dir, name)
        except OSError as error:
            log.warning("snapshot-left name=%s reason=%s", os.fsdecode(name), error)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._dir >= 0:
            os.close(self._dir)


def may_serve(folder: int, name: bytes, digest: bytes | None) -> bool:
    """Whether a base is of the version the index has, or of one before an unread change."""
    if digest is None:
        return True
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return False
    try:
        return os.getxattr(fd, _MARK).startswith(digest.hex().encode())
    except OSError:
        return False
    finally:
        os.close(fd)


def remove_base(folder: int, name: bytes) -> None:
    """Remove a base, or what a crash left of a snapshot."""
    if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        destroy(folder, name)
    else:
        os.unlink(name, dir_fd=folder)


def remove_oldest(folder: int, most: int) -> None:
    """Leave so many bases, of those versions that came last."""
    names = [name for name in map(os.fsencode, os.listdir(folder)) if name.isdigit()]
    ages = {name: os.stat(name, dir_fd=folder, follow_symlinks=False).st_ctime_ns for name in names}
    for name in sorted(names, key=ages.__getitem__, reverse=True)[most:]:
        os.unlink(name, dir_fd=folder)


def _name(node: NodeId) -> bytes:
    return b"%d" % node


def _mark(digest: bytes, info: os.stat_result) -> bytes:
    return b"%s %d %d %d" % (
        digest.hex().encode(),
        info.st_size,
        info.st_mtime_ns,
        info.st_ino,
    )
