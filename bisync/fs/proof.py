"""Proof that what vanished from a tree is gone, and not just somewhere else."""

import os
import stat
from collections.abc import Callable

from bisync.fs.root import Root
from bisync.linux.handle import open_by_handle


def is_gone(root: Root, handle: bytes, is_left_alone: Callable[[bytes], bool]) -> bool | None:
    """Whether an object was deleted or moved out of what is synchronised.

    ``None``: nobody can tell, because handles may not be opened here, or the kernel does
    not know the object's name just now and gives the path of something else.
    """
    try:
        fd = open_by_handle(root.fd, handle)
    except OSError:
        return None
    if fd is None:
        return True
    try:
        info = os.fstat(fd)
        if info.st_nlink == 0:
            return True
        where = os.readlink(b"/proc/self/fd/%d" % fd)
        top = os.readlink(b"/proc/self/fd/%d" % root.fd).rstrip(b"/") + b"/"
        if where.endswith(b" (deleted)"):
            return True if stat.S_ISDIR(info.st_mode) else None
        if not _leads_to(where, info):
            return None
        return not where.startswith(top) or is_left_alone(where[len(top) :])
    finally:
        os.close(fd)


def _leads_to(path: bytes, info: os.stat_result) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (info.st_dev, info.st_ino)
