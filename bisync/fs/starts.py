"""Where the walk of a mirror's source begins: what stands on the command line, opened."""

import os
import stat

from msgspec import Struct

from bisync.errors import UsageError
from bisync.fs.stage import refuse_torn_above
from bisync.linux.filesystem import fs_uuid, subvolume
from bisync.linux.handle import HandleReader


class Start(Struct, frozen=True):
    """One source of the command line."""

    text: bytes
    only: bytes | None  # the one name in it that is meant; None: all it holds
    fd: int
    device: int
    identity: str
    folder: bytes  # the absolute path of the directory that is open


def read_rules(path: bytes, folder: int | None = None) -> bytes | None:
    """A file of filter rules; ``None`` if there is none that may be read. Links do not count."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, dir_fd=folder)
    except OSError:
        return None
    with open(fd, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(fd).st_mode) else None


def open_source(text: bytes) -> Start:
    """Open one source of the command line.

    Raises:
        OSError: it is not there, or may not be read.
        UsageError: the path makes no sense.
    """
    if not text:
        raise UsageError("an empty source; give a path")
    name = text.rstrip(b"/").rpartition(b"/")[2]
    all_of_it = text.endswith(b"/") or name in (b".", b"..", b"")
    info = os.stat(text) if all_of_it else os.lstat(text)
    if all_of_it and stat.S_ISDIR(info.st_mode):
        return _start(text, text, None)
    folder = text.rstrip(b"/")[: -len(name)] or b"."
    return _start(text, folder, name)


def _start(text: bytes, folder: bytes, only: bytes | None) -> Start:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        identity = identity_of(fd)
        device = os.fstat(fd).st_dev
        if only is not None:
            device = os.stat(only, dir_fd=fd, follow_symlinks=False).st_dev
        where = os.path.realpath(folder)
        refuse_torn_above(where)
        return Start(text, only, fd, device, identity, where)
    except BaseException:
        os.close(fd)
        raise


def identity_of(fd: int) -> str:
    """Which directory an open one is, wherever it is mounted."""
    return f"{fs_uuid(fd)}:{subvolume(fd)}:{HandleReader().read(fd, b'').hex()}"
