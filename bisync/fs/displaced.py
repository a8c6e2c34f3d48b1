"""Whether somebody wrote to what was displaced: a writer caught in ``open`` holds the kept object.

So does a shell that stands in a displaced directory. Evidence is taken when an object goes to
the store, and compared with what is there a moment later.

The same may happen to a new object that an exchange showed and that was taken back.
"""

import errno
import hashlib
import os
import stat
from typing import Any

from msgspec import Struct

from bisync.core.node import Place
from bisync.fs.copying import remove_object
from bisync.fs.root import OPEN_DIR, Directories
from bisync.linux.lease import Lease, probed
from bisync.linux.rename import rename_noreplace

STILL_NS = 60 * 10**9  # for so long nobody may write to what could not be leased


class Probed(Struct, frozen=True):
    """What came of a look at what was displaced.

    Attributes:
        back: paths of what somebody wrote to, and has again.
        weak: how many could not be leased and were not still for long enough yet.
    """

    back: tuple[bytes, ...] = ()
    weak: int = 0


def edited(name: bytes) -> bytes:
    """A name beside one, for what somebody has open under that."""
    return name[:200] + b".edited-" + os.urandom(4).hex().encode()


def remove_unused(dir_fd: int, name: bytes, state: tuple[int, int]) -> bool:
    """Remove a new object, unless somebody used it while an exchange showed it.

    Args:
        state: size and time (ns) of a file when it was complete.

    Returns:
        Whether it is gone: no file that is open or changed, no directory with something in it.

    Raises:
        OSError: it cannot be looked at or removed.
    """
    info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    if stat.S_ISDIR(info.st_mode):
        try:
            os.rmdir(name, dir_fd=dir_fd)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    elif stat.S_ISREG(info.st_mode):
        with probed(dir_fd, name) as (_, lease):
            info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)  # now that nobody writes
            if lease is Lease.REFUSED or (info.st_size, info.st_mtime_ns) != state:
                return False
            remove_object(dir_fd, name)
    else:
        remove_object(dir_fd, name)
    return True


def leave_beside(directories: Directories, spot: tuple[int, bytes], place: Place) -> Place:
    """What somebody used goes beside the name that it had for a moment; that place.

    Raises:
        StaleError: the directory of that name is gone.
        OSError: it cannot be renamed there.
    """
    dir_fd, name = directories.at(place)
    beside = edited(name)
    rename_noreplace(*spot, dir_fd, beside)
    return place[0], beside


def evidence(dir_fd: int, name: bytes) -> list[Any] | None:
    """What would change if somebody wrote to an object; ``None`` where nobody can."""
    info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    if stat.S_ISREG(info.st_mode):
        return [info.st_size, info.st_mtime_ns]
    if stat.S_ISDIR(info.st_mode):
        digest = hashlib.blake2b(digest_size=16)
        _add(digest, dir_fd, name)
        return [digest.hexdigest()]
    return None


def _add(digest: Any, dir_fd: int, name: bytes) -> None:
    fd = os.open(name, OPEN_DIR, dir_fd=dir_fd)
    try:
        for child in sorted(map(os.fsencode, os.listdir(fd))):
            info = os.stat(child, dir_fd=fd, follow_symlinks=False)
            seen = (info.st_ino, info.st_size, info.st_mtime_ns)
            is_dir = stat.S_ISDIR(info.st_mode)
            digest.update(b"%d:%s" % (len(child), child) + repr(is_dir or seen).encode())
            if is_dir:
                _add(digest, fd, child)
        digest.update(b"/")
    finally:
        os.close(fd)


def was_written(dir_fd: int, name: bytes, before: list[Any]) -> bool:
    """Whether an object is not what it was, or a writer holds it."""
    if not stat.S_ISREG(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        return evidence(dir_fd, name) != before
    with probed(dir_fd, name) as (_, lease):  # who writes and closes now is seen by what follows
        return lease is Lease.REFUSED or evidence(dir_fd, name) != before
