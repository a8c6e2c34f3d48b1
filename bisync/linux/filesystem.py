"""What a file system is, and what it can do: identity, flushing, cloning, flags."""

import ctypes
import errno
import fcntl
import os
import struct

from bisync.linux.libc import check, function

_FS_IOC_GETFSUUID = 0x80111500
_BTRFS_IOC_FS_INFO = 0x8400941F
_BTRFS_IOC_GET_SUBVOL_INFO = 0x81F8943C
_FICLONE = 0x40049409
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_IOC_FSGETXATTR = 0x801C581F
_PROJECT_INHERIT = 0x200
_ENCRYPTED = 0x800
_FS_NODUMP_FL = 0x40
_NO_COW = 0x800000  # chattr +C
IMMUTABLE = 0x10  # chattr +i
APPEND_ONLY = 0x20  # chattr +a
_XFS, _BTRFS, _FUSE = 0x58465342, 0x9123683E, 0x65735546  # f_type
_syncfs = function("syncfs", ctypes.c_int)
_sync_file_range = function(
    "sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
)
_SYNC_FILE_RANGE_WRITE = 2
_fstatfs = function("fstatfs", ctypes.c_int, ctypes.c_void_p)
_UNSUPPORTED = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM)


def fs_uuid(fd: int) -> str:
    """The file system's own uuid as hex, or "" where it has none or does not tell.

    Never ``f_fsid`` (XFS: the device number) nor ``st_dev`` (btrfs: made up at mount).
    """
    buffer = bytearray(17)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFSUUID, buffer)
        uuid = bytes(buffer[1 : 1 + min(buffer[0], 16)])
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        info = bytearray(1024)
        try:
            fcntl.ioctl(fd, _BTRFS_IOC_FS_INFO, info)
        except OSError as inner:
            if inner.errno not in _UNSUPPORTED:
                raise
            return ""
        uuid = bytes(info[16:32])
    return uuid.hex() if any(uuid) else ""


def subvolume(fd: int) -> str:
    """Number and uuid of the btrfs subvolume ``fd`` is in, "" elsewhere."""
    info = bytearray(504)
    try:
        fcntl.ioctl(fd, _BTRFS_IOC_GET_SUBVOL_INFO, info)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return ""
    (number,) = struct.unpack_from("=Q", info)
    return f"{number}-{bytes(info[296:312]).hex()}"


def tells_extents(fd: int) -> bool:
    """Whether ``fd`` is on XFS or btrfs: clones are instants, and extents say where bytes are."""
    return _kind(fd) in (_XFS, _BTRFS)


def is_fuse(fd: int) -> bool:
    """Whether a program of some user is the file system of ``fd``."""
    return _kind(fd) == _FUSE


def _kind(fd: int) -> int:
    buffer = ctypes.create_string_buffer(256)
    check(_fstatfs(fd, buffer))
    (kind,) = struct.unpack_from("=q", buffer)
    return int(kind)


def syncfs(fd: int) -> None:
    """Make everything written so far to the file system of ``fd`` durable."""
    check(_syncfs(fd))


def begin_flush(fd: int, offset: int, length: int) -> None:
    """Let the kernel begin to write a stretch out, so that a later fsync finds little to do.

    Promises nothing, and takes no error away from that fsync.
    """
    _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def clone(source: int, target: int) -> bool:
    """Let ``target``, an empty file, share all blocks of ``source``; ``False`` if it cannot."""
    if (get_flags(source) or 0) & _NO_COW:  # btrfs: both or none
        change_flags(target, add=_NO_COW)
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in (*_UNSUPPORTED, errno.EXDEV, errno.ETXTBSY):
            return False
        raise
    return True


def set_nodump(fd: int) -> None:
    """Ask backup tools to skip a directory; nothing where flags are unknown."""
    change_flags(fd, add=_FS_NODUMP_FL)


def get_flags(fd: int) -> int | None:
    """The inode flags of an open object; ``None`` where there are none."""
    flags = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EACCES):
            raise
        return None
    return int(struct.unpack_from("=L", flags)[0])


def change_flags(fd: int, *, add: int = 0, remove: int = 0) -> bool:
    """Set and clear inode flags; ``False`` where that is not possible or not allowed."""
    value = get_flags(fd)
    if value is None:
        return False
    wanted = (value | add) & ~remove
    if wanted == value:
        return True
    try:
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("=L4x", wanted))
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EACCES):
            raise
        return False
    return True


def may_rename(source: int, target: int) -> bool:
    """Whether what is made in one directory can be renamed into another of its file system.

    A directory that hands down its quota project takes nothing of another one (``xfs_rename``,
    ``ext4_rename``), and an encrypted one nothing that is not encrypted alike.
    """
    if (get_flags(target) or 0) & _ENCRYPTED != (get_flags(source) or 0) & _ENCRYPTED:
        return False
    hands_down, project = _project(target)
    return not hands_down or project == _project(source)[1]


def _project(fd: int) -> tuple[bool, int]:
    """Whether what is made in a directory gets its quota project, and which one it has."""
    buffer = bytearray(28)
    try:
        fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, buffer)
    except OSError as error:
        if error.errno not in (*_UNSUPPORTED, errno.EACCES):
            raise
        return False, 0
    flags, _, _, project = struct.unpack_from("=IIII", buffer)
    hands_down = bool(flags & _PROJECT_INHERIT)
    return hands_down, project if hands_down else 0


def free_bytes(fd: int) -> int:
    """Bytes an unprivileged writer could still use."""
    info = os.fstatvfs(fd)
    return info.f_bavail * info.f_frsize
