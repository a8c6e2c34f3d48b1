"""Giving descriptors back."""

import errno
import os


def close(fd: int) -> None:
    """Close a file whose content nobody has to be told of any more.

    The kernel takes the descriptor back whatever it says: an error is the file system's, which
    may be dead (a FUSE program that was killed, a server that is gone), about writing that was
    left to do. What has to be durable was flushed before.
    """
    try:
        os.close(fd)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise
