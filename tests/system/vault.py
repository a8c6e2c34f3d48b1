"""A folder that can be locked: ext4's own encryption."""

import fcntl
import os
import struct
from pathlib import Path


class Vault:
    """An ext4 file system with native encryption, and the key of one policy on it."""

    def __init__(self, mount_point: Path) -> None:
        self.root = mount_point
        self.key = os.urandom(64)
        self.identifier = b""

    def _ioctl(self, path: Path, number: int, data: bytearray | bytes) -> bytearray | bytes:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, number, data)
        finally:
            os.close(fd)
        return data

    def unlock(self) -> None:
        head = struct.pack("=II", 2, 0) + bytes(32) + struct.pack("=II", len(self.key), 0)
        data = self._ioctl(self.root, 0xC0506617, bytearray(head + bytes(32) + self.key))
        self.identifier = bytes(data[8:24])

    def lock(self) -> bool:
        """Take the key away; whether nobody has anything open any more."""
        os.sync()
        spec = struct.pack("=II", 2, 0) + self.identifier.ljust(32, b"\0")
        data = self._ioctl(self.root, 0xC0406618, bytearray(spec + bytes(24)))
        return bytes(data[40:44]) == bytes(4)

    def encrypt(self, folder: Path) -> None:
        policy = struct.pack("=BBBBB3x", 2, 1, 4, 3, 0) + self.identifier
        self._ioctl(folder, 0x800C6613, policy)
