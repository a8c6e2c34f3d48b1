"""Renames that never overwrite: refuse where something is, or swap two names."""

import ctypes
import errno
import os
import re

from bisync.linux.libc import check, function

ASIDE = b"-aside"
_STAGED = re.compile(rb"[0-9a-f]{32}")
_NOREPLACE = 1
_EXCHANGE = 2
_renameat2 = function(
    "renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
)


def rename_noreplace(old_dir: int, old: bytes, new_dir: int, new: bytes) -> None:
    """Rename; ``FileExistsError`` if the new name is taken."""
    check(_renameat2(old_dir, old, new_dir, new, _NOREPLACE))


def exchange(a_dir: int, a: bytes, b_dir: int, b: bytes) -> None:
    """Swap two names in one step. Both must exist."""
    check(_renameat2(a_dir, a, b_dir, b, _EXCHANGE))


def swap(a_dir: int, a: bytes, b_dir: int, b: bytes) -> None:
    """Swap two names, in one step where the file system can.

    Elsewhere (NFS, some FUSE) ``b`` never misses a moment, but ``a`` does: ``b``'s object is
    linked aside, ``a`` renamed over it, and the link renamed to ``a``. A directory cannot be
    linked: it is renamed aside. Beside an object of the stage the link has its name and
    ``ASIDE``, by which recovery knows that it may be the only copy.
    """
    try:
        exchange(a_dir, a, b_dir, b)
        return
    except OSError as error:
        if not is_unsupported(error):
            raise
    aside = a + ASIDE if _STAGED.fullmatch(a) else b".bisync-" + os.urandom(16).hex().encode()
    try:
        os.link(b, aside, src_dir_fd=b_dir, dst_dir_fd=a_dir, follow_symlinks=False)
    except PermissionError:  # a directory
        os.rename(b, aside, src_dir_fd=b_dir, dst_dir_fd=a_dir)
    os.rename(a, b, src_dir_fd=a_dir, dst_dir_fd=b_dir)
    os.rename(aside, a, src_dir_fd=a_dir, dst_dir_fd=a_dir)


def is_unsupported(error: OSError) -> bool:
    """Whether a file system refused the flags themselves (NFS, some FUSE)."""
    return error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
