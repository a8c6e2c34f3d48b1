"""Native file system encryption (fscrypt): whether a directory's names are readable now.

A locked directory lists other names than it has, with the same inodes; most operations fail
there, but unlink works. So it must never be compared with anything.
"""

import errno
import fcntl
import struct

_FS_IOC_GETFLAGS = 0x80086601
_ENCRYPT_FL = 0x800
_GET_POLICY_EX = 0xC0096616
_GET_KEY_STATUS = 0xC080661A
_SPEC = {0: (1, 4, 8), 2: (2, 8, 16)}  # policy version -> (key kind, offset, length)
_STATUS_OFFSET = 64
_PRESENT = 2
_NO_FLAGS = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS)


def can_encrypt(fd: int) -> bool:
    """Whether the file system of ``fd`` was made with encryption."""
    try:
        fcntl.ioctl(fd, _GET_KEY_STATUS, bytearray(struct.pack("=II", 2, 0) + bytes(120)))
    except OSError as error:
        return error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS)
    return True


def is_encrypted(fd: int) -> bool:
    """Whether a directory is encrypted by its file system."""
    flags = bytearray(8)
    try:
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
    except OSError as error:
        if error.errno in _NO_FLAGS:
            return False
        raise
    (value,) = struct.unpack_from("=L", flags)
    return bool(value & _ENCRYPT_FL)


def is_locked(fd: int) -> bool:
    """Whether the key of an encrypted directory is absent, so that its names are not real.

    A key that only some process's keyring has (first policy version) counts as absent.
    """
    policy = bytearray(struct.pack("=Q", 24) + bytes(24))
    fcntl.ioctl(fd, _GET_POLICY_EX, policy)
    kind, offset, length = _SPEC[policy[8]]
    key = bytes(policy[8 + offset : 8 + offset + length])
    status = bytearray(struct.pack("=II", kind, 0) + key.ljust(32, b"\0") + bytes(88))
    fcntl.ioctl(fd, _GET_KEY_STATUS, status)
    (found,) = struct.unpack_from("=I", status, _STATUS_OFFSET)
    return bool(found != _PRESENT)
