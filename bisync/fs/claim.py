"""Who drives a pair in real time: a lock that lasts as long as a session, whoever works meanwhile.

A turn at a root (:mod:`bisync.fs.turns`) goes to and fro between sessions and commands. A claim
says that one session already watches a pair and carries everything: a second one would only do
the same work again. The kernel takes it from a process that ends, however it ends.
"""

import contextlib
import fcntl
import os

from bisync.core.path import display
from bisync.delta.digest import digest_of
from bisync.linux.closing import close

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Claim:
    """A pair that is ours to drive, until :meth:`close`."""

    def __init__(self, fd: int = -1) -> None:
        """``fd``: has the lock; none if another process holds it for us."""
        self._fd = fd

    def close(self) -> None:
        """Let somebody else drive."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close(fd)


def claim(folder_fd: int, peer: str, who: str) -> Claim | str:
    """Claim a pair of a root.

    Args:
        folder_fd: the root's state folder.
        peer: the other replica of the pair.
        who: drives, for people.

    Returns:
        The claim, or who has it.

    Raises:
        OSError: the lock cannot be had here.
    """
    name = b"driver." + digest_of(peer.encode())[:8].hex().encode()  # an id may hold anything
    fd = os.open(name, _FLAGS, 0o600, dir_fd=folder_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.closing(Claim(fd)):
            return display(os.pread(fd, 200, 0)) or "another session"
    except BaseException:
        os.close(fd)
        raise
    os.ftruncate(fd, 0)
    os.pwrite(fd, os.fsencode(who)[:200], 0)
    return Claim(fd)
