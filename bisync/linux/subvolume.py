"""btrfs subvolumes: a read-only snapshot, and how to get rid of it (``linux/btrfs.h``)."""

import fcntl
import os
import struct

_SNAP_CREATE_V2 = 0x50009417
_SNAP_DESTROY = 0x5000940F
_INO_LOOKUP = 0xD0009412
_READ_ONLY = 2
_CREATE = struct.Struct("=qQQ32s4040s")  # fd, transid, flags, unused, name
_DESTROY = struct.Struct("=q4088s")  # fd, name
_LOOKUP = struct.Struct("=QQ4080s")  # tree, object, path
_TOP = 256  # the inode number of each subvolume's directory
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def place_in_subvolume(fd: int) -> tuple[int, bytes]:
    """The subvolume that an open directory is in, opened, and the directory's path in it.

    Raises:
        OSError: that cannot be told: not on btrfs, no right to ask, or the way up ends before.
    """
    number = os.fstat(fd).st_ino
    path = b""
    if number != _TOP:
        answer = bytearray(_LOOKUP.pack(0, number, b""))
        fcntl.ioctl(fd, _INO_LOOKUP, answer)
        path = _LOOKUP.unpack(answer)[2].split(b"\0", 1)[0].rstrip(b"/")
    top = os.open(b"/".join([b".."] * (path.count(b"/") + 1)) if path else b".", _DIR, dir_fd=fd)
    try:
        if os.fstat(top).st_ino != _TOP or os.fstat(top).st_dev != os.fstat(fd).st_dev:
            raise OSError(f"{os.fsdecode(path)}: the subvolume cannot be reached from there")
        if path and os.stat(path, dir_fd=top).st_ino != number:
            raise OSError(f"{os.fsdecode(path)}: moved meanwhile")
    except BaseException:
        os.close(top)
        raise
    return top, path


def snapshot(subvolume: int, dir_fd: int, name: bytes) -> None:
    """Make a read-only snapshot of a subvolume."""
    fcntl.ioctl(
        dir_fd, _SNAP_CREATE_V2, bytearray(_CREATE.pack(subvolume, 0, _READ_ONLY, b"", name))
    )


def destroy(dir_fd: int, name: bytes) -> None:
    """Remove a snapshot; who has files of it open goes on reading them."""
    fcntl.ioctl(dir_fd, _SNAP_DESTROY, bytearray(_DESTROY.pack(0, name)))
