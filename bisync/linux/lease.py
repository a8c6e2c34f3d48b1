"""Leases: whether anybody can write to a file, or has it open, and a hold on those who want to.

A read lease is refused while anyone has the file open for writing, also through a memory
map whose descriptor is closed; a write lease while anyone else has it open at all. A later opener
waits until the lease is given back.
"""

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum


class Lease(Enum):
    """What an attempt at a read lease told."""

    GRANTED = "granted"  # nobody can write to it
    REFUSED = "refused"  # somebody can
    UNKNOWN = "unknown"  # no right to ask, or the file system has no leases


def take_read_lease(fd: int) -> Lease:
    """Try to take a read lease on an open regular file."""
    return _take(fd, fcntl.F_RDLCK)


def take_write_lease(fd: int) -> Lease:
    """Try to take a write lease on a regular file that is open for writing."""
    return _take(fd, fcntl.F_WRLCK)


def _take(fd: int, kind: int) -> Lease:
    try:
        # The default signal of a broken lease ends the process; this one is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EBUSY):
            return Lease.REFUSED
        if error.errno in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOLCK, errno.ENOSYS):
            return Lease.UNKNOWN
        raise
    return Lease.GRANTED


def is_breaking(fd: int, *, write: bool = False) -> bool:
    """Whether somebody waits in ``open`` for our read (or write) lease to end."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) != (fcntl.F_WRLCK if write else fcntl.F_RDLCK)


def release(fd: int) -> None:
    """Give a lease back; nothing happens where there is none."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EINVAL, errno.EACCES, errno.EPERM):
            raise


@contextmanager
def probed(dir_fd: int, name: bytes) -> Iterator[tuple[int, Lease]]:
    """Open a regular file for reading and hold a read lease while the block runs.

    Yields the descriptor and what the attempt told; -1 and ``UNKNOWN`` where we may not read
    it. Never follows a link, never waits for a FIFO or for somebody else's lease.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=dir_fd)
    except PermissionError:
        fd = -1
    if fd < 0:
        yield fd, Lease.UNKNOWN
        return
    try:
        lease = take_read_lease(fd)
        try:
            yield fd, lease
        finally:
            if lease is Lease.GRANTED:
                release(fd)
    finally:
        os.close(fd)
