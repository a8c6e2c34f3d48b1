"""fanotify: all events of a file system from one mark, each with its directory and name.

See fanotify(7) and fanotify_mark(2), Linux manual pages 6.9. Needs CAP_SYS_ADMIN for a mark on a
whole file system.
"""

import ctypes
import os
import struct
from collections.abc import Iterator

from msgspec import Struct

from bisync.linux.libc import check, function

MODIFY, ATTRIB, CLOSE_WRITE = 0x2, 0x4, 0x8
CREATE, DELETE, RENAME, ON_DIR = 0x100, 0x200, 0x10000000, 0x40000000
OVERFLOW = 0x4000
EVENTS = MODIFY | ATTRIB | CLOSE_WRITE | CREATE | DELETE | RENAME | ON_DIR

_CLOEXEC, _NONBLOCK = 0x1, 0x2
_REPORT = 0x200 | 0x400 | 0x800 | 0x1000  # the object, its directory, its name, the target of names
_ADD, _FILE_SYSTEM = 0x1, 0x100
_HERE = -100  # AT_FDCWD
_EVENT = struct.Struct("=IBBHQii")
_INFO = struct.Struct("=BBH")
_HANDLE = struct.Struct("=8xIi")  # behind the file system's id
_DIRECTORY_NAME, _OLD_NAME, _NEW_NAME = 2, 10, 12

_init = function("fanotify_init", ctypes.c_uint, ctypes.c_uint)
_mark = function(
    "fanotify_mark", ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p
)


class Event(Struct, frozen=True):
    """What happened to some names. Several things that happened to one may be one event."""

    mask: int
    pid: int  # who did it
    names: tuple[tuple[bytes, bytes], ...]  # (handle of the directory, name), the old one first


def open_group() -> int:
    """A descriptor that events are read from; its queue is bounded by the kernel (16 384).

    Raises:
        OSError: the kernel or our rights do not allow it.
    """
    flags = _CLOEXEC | _NONBLOCK | _REPORT
    return check(_init(flags, os.O_RDONLY | os.O_CLOEXEC))


def mark_file_system(group: int, fd: int) -> None:
    """Report what happens anywhere on the file system that a descriptor is on.

    Raises:
        OSError: EPERM without privilege, EXDEV in a subvolume, EOPNOTSUPP without handles.
    """
    path = b"/proc/self/fd/%d" % fd
    check(_mark(group, _ADD | _FILE_SYSTEM, EVENTS, _HERE, path))


def events(data: bytes) -> Iterator[Event]:
    """The events in what was read."""
    at = 0
    while at + _EVENT.size <= len(data):
        size, _, _, head, mask, _, pid = _EVENT.unpack_from(data, at)
        if size < _EVENT.size:
            return
        yield Event(mask, pid, tuple(_names(data[at + head : at + size])))
        at += size


def _names(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + _INFO.size <= len(data):
        kind, _, size = _INFO.unpack_from(data, at)
        if size < _INFO.size:
            return
        if kind in (_DIRECTORY_NAME, _OLD_NAME, _NEW_NAME):
            length, handle_kind = _HANDLE.unpack_from(data, at + _INFO.size)
            start = at + _INFO.size + _HANDLE.size
            handle = struct.pack("=i", handle_kind) + data[start : start + length]
            yield handle, data[start + length : at + size].split(b"\0", 1)[0]
        at += size
