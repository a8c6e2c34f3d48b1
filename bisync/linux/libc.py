"""The C library, loaded once, and the one way to call it."""

import ctypes
import os
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> int:
    """Return ``result``, or raise ``OSError`` for -1 with the number the call left."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def function(name: str, *argtypes: Any) -> Any:
    """A C function returning int, with its argument types declared."""
    found = getattr(libc, name)
    found.argtypes = argtypes
    found.restype = ctypes.c_int
    return found
