"""Landlock: a process gives up all of the file system but what it names, for good.

See "Landlock: unprivileged access control", Linux kernel documentation, 2024. It holds for the
thread that asks, and for those that it starts.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from bisync.linux.libc import check, function

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_VERSION = 1
_PATH_BENEATH = 1
_NO_NEW_PRIVS = 38
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES = _EXECUTE | 1 << 1 | _READ_FILE | 1 << 14  # the rights that a file can have
_KNOWN = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # all rights, by version
_LEAST = 2  # before, no file could be moved from one directory to another
_syscall = function("syscall", *[ctypes.c_long] * 5)
_prctl = function("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)


def confine(writable: Iterable[bytes | str], readable: Iterable[bytes | str]) -> bool:
    """Give up everything but some directories and files, and what is below them.

    Returns:
        Whether the kernel can do that; if not, nothing was given up.

    Raises:
        OSError: it can, and it failed.
    """
    try:
        version = check(_syscall(_CREATE_RULESET, 0, 0, _VERSION, 0))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return False
        raise
    if version < _LEAST:
        return False
    rights = _KNOWN[min(version, max(_KNOWN))]
    handled = ctypes.create_string_buffer(struct.pack("=Q", rights), 8)
    ruleset = check(_syscall(_CREATE_RULESET, ctypes.addressof(handled), 8, 0, 0))
    try:
        for path in readable:
            _allow(ruleset, path, rights & _READ)
        for path in writable:
            _allow(ruleset, path, rights)
        check(_prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
        check(_syscall(_RESTRICT_SELF, ruleset, 0, 0, 0))
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, path: bytes | str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(f"/proc/self/fd/{fd}"):
            rights &= _ON_FILES
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
        check(_syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.addressof(rule), 0))
    finally:
        os.close(fd)
