"""Leases: whether anybody can write to a file, or has it open, and a hold on those who want to.

A read lease is refused while anyone has the file open for writing, also through a memory
map whose descriptor is closed; a write lease while anyone else has it open at all. A later opener
waits until the lease is given back.
"""

import errno
import fcntl
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

_MARGIN_S = 5.0  # before the kernel lets somebody in


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


def is_breaking(fd: int) -> bool:
    """Whether somebody waits in ``open`` for our read lease to end."""
    return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK


class WriteHold:
    """A write lease that was granted, and how long it still holds everybody off.

    Whoever opens the file makes the lease *break*: he waits, and after some seconds (45, see
    ``/proc/sys/fs/lease-break-time``) the kernel lets him in. Nothing may be written then. When a
    breaking began is not told: at the last look that saw the lease intact, at the earliest.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        with open("/proc/sys/fs/lease-break-time", "rb") as file:
            self._patience_s = float(file.read()) or math.inf  # 0: he waits for ever
        self._intact = time.monotonic()
        self.breaking = False

    def left_s(self) -> float:
        """Seconds for which nobody else has it open for certain; endless while nobody waits."""
        now = time.monotonic()
        if not self.breaking:
            if fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK:
                self._intact = now
                return math.inf
            self.breaking = True
        return max(0.0, self._patience_s - _MARGIN_S - (now - self._intact))


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
