"""Pipes."""

import contextlib
import fcntl


def widen(fd: int, size: int) -> bool:
    """Give a pipe room for so many bytes; whether it is one, and has it."""
    with contextlib.suppress(OSError):
        return fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size) >= size
    return False
