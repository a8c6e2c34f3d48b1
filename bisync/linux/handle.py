"""File handles: the kernel's own identity of an object, never given out twice.

An inode number is given out again by the next create (ext4: every time); the handle has
the generation in it. Where a file system has no handles, the birth time takes its place. A FUSE
file system gives numbers out of its program's memory for handles: others after the next mount, or
when it forgot. They are none.
"""

import ctypes
import errno
import os
import struct

from bisync.linux.filesystem import is_fuse
from bisync.linux.libc import check, function

_AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100
_STATX_BTIME = 0x800
_STATX_MNT_ID = 0x1000
_MAX_HANDLE = 128
_HEADER = struct.Struct("=Ii")
_BORN = b"born"
_FALLBACK = struct.Struct("=4sQqI")

_name_to_handle_at = function(
    "name_to_handle_at",
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
)
_open_by_handle_at = function("open_by_handle_at", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_statx = function(
    "statx", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p
)


class HandleReader:
    """Reads file handles with buffers of its own; one per thread."""

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(_HEADER.size + _MAX_HANDLE)
        self._address = ctypes.addressof(self._buffer)
        self._mount = ctypes.c_int()
        self._mount_address = ctypes.addressof(self._mount)
        self._statx = ctypes.create_string_buffer(256)
        self._known_mount, self._volatile = -1, False

    def read(self, dir_fd: int, name: bytes) -> bytes:
        """The handle of ``name`` in a directory, links not followed; of ``dir_fd`` if empty.

        Where the file system has none: inode number and birth time, marked as such.
        """
        _HEADER.pack_into(self._buffer, 0, _MAX_HANDLE, 0)
        flags = 0 if name else _AT_EMPTY_PATH
        try:
            check(_name_to_handle_at(dir_fd, name, self._address, self._mount_address, flags))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EOVERFLOW):
                return self._by_birth(dir_fd, name)
            raise
        if self._mount.value != self._known_mount:
            self._known_mount, self._volatile = self._mount.value, is_fuse(dir_fd)
        if self._volatile:
            return self._by_birth(dir_fd, name)
        length, kind = _HEADER.unpack_from(self._buffer)
        return struct.pack("=i", kind) + self._buffer.raw[_HEADER.size : _HEADER.size + length]

    def _by_birth(self, dir_fd: int, name: bytes) -> bytes:
        self._call_statx(dir_fd, name, _STATX_BTIME)
        raw = self._statx.raw
        (ino,) = struct.unpack_from("=Q", raw, 32)
        seconds, nanoseconds = struct.unpack_from("=qI", raw, 80)
        return _FALLBACK.pack(_BORN, ino, seconds, nanoseconds)

    def mount_id(self, dir_fd: int, name: bytes) -> int:
        """The mount an object is reached through; tells a bind mount from a directory."""
        self._call_statx(dir_fd, name, _STATX_MNT_ID)
        (mount,) = struct.unpack_from("=Q", self._statx.raw, 144)
        return int(mount)

    def _call_statx(self, dir_fd: int, name: bytes, mask: int) -> None:
        flags = _AT_SYMLINK_NOFOLLOW | (0 if name else _AT_EMPTY_PATH)
        check(_statx(dir_fd, name, flags, mask, ctypes.addressof(self._statx)))


def is_guess(handle: bytes) -> bool:
    """Whether a file system has no handles, and this is an inode number and a time of birth."""
    return handle.startswith(_BORN)


def open_by_handle(mount_fd: int, handle: bytes) -> int | None:
    """Open an object by its handle, for looking only.

    Returns:
        A descriptor (``O_PATH``), or ``None`` where the object no longer exists.

    Raises:
        PermissionError: handles may not be opened here (needs CAP_DAC_READ_SEARCH).
        OSError: the handle is a fallback, or the file system cannot open handles.
    """
    if is_guess(handle):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    (kind,) = struct.unpack_from("=i", handle)
    body = handle[4:]
    buffer = ctypes.create_string_buffer(_HEADER.pack(len(body), kind) + body)
    try:
        return check(_open_by_handle_at(mount_fd, buffer, os.O_PATH | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.ESTALE, errno.ENOENT):
            return None
        raise
