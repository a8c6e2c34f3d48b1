"""Give the space of a stretch of a file back."""

import ctypes
import errno
import os

from bisync.linux.libc import check, function

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate = function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(fd: int, offset: int, length: int) -> None:
    """Make a stretch read as zeros; it takes no space where the file system can do that."""
    try:
        check(_fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        zeros = memoryview(bytes(min(length, 1 << 20)))
        while length:
            done = os.pwrite(fd, zeros[:length], offset)
            offset, length = offset + done, length - done


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve the space of a stretch; the file grows if it ends before. Bytes stay as they are.

    Raises:
        OSError: there is no room.
    """
    try:
        check(_fallocate(fd, 0, offset, length))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
