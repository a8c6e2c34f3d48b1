"""Where a file's bytes are on the disk (FIEMAP), as raw extent records.

A record (56 bytes): logical offset, physical offset, length (8 bytes each), 16 reserved bytes,
flags (4), 12 reserved bytes; the kernel's ``struct fiemap_extent``.
"""

import errno
import fcntl
import struct

_FIEMAP = 0xC020660B
_SYNC = 1  # flush first: what is only in memory has no place yet
_HEADER = struct.Struct("=QQIIII")
EXTENT_SIZE = 56
_BATCH = 4096  # records per call
_LAST = 1
_MAXIMUM = (1 << 64) - 1


def extents(fd: int, limit: int) -> bytes | None:
    """All extent records of an open file; ``None`` where they cannot be had, or are too many."""
    found, start = b"", 0
    buffer = bytearray(_HEADER.size + _BATCH * EXTENT_SIZE)
    while True:
        _HEADER.pack_into(buffer, 0, start, _MAXIMUM - start, _SYNC, 0, _BATCH, 0)
        try:
            fcntl.ioctl(fd, _FIEMAP, buffer)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EBADR):
                return None
            raise
        count = _HEADER.unpack_from(buffer)[3]
        if count == 0:
            return found
        end = _HEADER.size + count * EXTENT_SIZE
        found += buffer[_HEADER.size : end]
        if len(found) > limit * EXTENT_SIZE:
            return None
        logical, _, length = struct.unpack_from("=QQQ", buffer, end - EXTENT_SIZE)
        (flags,) = struct.unpack_from("=I", buffer, end - 16)
        if flags & _LAST:
            return found
        start = logical + length
