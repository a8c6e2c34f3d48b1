"""The stage: complete new objects waiting on the tree's own file system.

``in/`` holds incoming objects. Before one is exchanged with a name in the tree, the
result log names it durably; so an entry the log does not know was never used. ``out/``
holds what was displaced and is on its way to the store, and parked nodes. ``undo/`` holds what
undoes the writing into files that is under way.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor

from bisync.core.path import STATE_DIR, display
from bisync.errors import HaltError, PathError
from bisync.fs.copying import remove_object
from bisync.fs.root import OPEN_DIR
from bisync.linux.closing import close
from bisync.linux.filesystem import may_rename, syncfs
from bisync.linux.rename import rename_noreplace

log = logging.getLogger(__name__)
PARTIAL = b"part-"  # begins the names of files that have not arrived whole
_FORGOTTEN_NS = 7 * 86_400 * 10**9
_FSYNC_EACH = 64  # up to this many files one by one, more by one flush of the file system


class Stage:
    """The stage of one replica."""

    def __init__(self, state_fd: int, *, workers: int) -> None:
        self.incoming = subfolder(state_fd, b"in")
        self.displaced = subfolder(state_fd, b"out")
        self._state, self._torn = state_fd, -1
        self._workers = workers
        self._unflushed: list[int] = []
        self._written = 0
        self._open: dict[bytes, int] = {}

    @property
    def torn(self) -> int:
        """``undo/``: what undoes the writing into files that is under way; made on first use."""
        if self._torn < 0:
            self._torn = subfolder(self._state, b"undo")
            os.fsync(self._state)
        return self._torn

    def torn_names(self) -> list[bytes]:
        """The undos that a crash left."""
        return torn_names(self._state)

    @staticmethod
    def name() -> bytes:
        """A fresh random name."""
        return os.urandom(16).hex().encode()

    def create(self) -> tuple[bytes, int]:
        """A new empty file, open for writing, readable by nobody else."""
        name = self.name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, 0o600, dir_fd=self.incoming)
        return name, fd

    def partial(self, trace: bytes) -> tuple[bytes, int]:
        """The file for what arrives of a large file, with what a cut run left in it.

        Args:
            trace: who wants to make the same file finds it by that.
        """
        name = PARTIAL + hashlib.blake2b(trace, digest_size=16).hexdigest().encode()
        try:
            info = os.stat(name, dir_fd=self.incoming, follow_symlinks=False)
            if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
                remove_object(self.incoming, name)
        except FileNotFoundError:
            pass
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return name, os.open(name, flags, 0o600, dir_fd=self.incoming)

    def complete(self, name: bytes) -> bytes:
        """A partial file is whole now: it gets a name like all others."""
        new = self.name()
        os.rename(name, new, src_dir_fd=self.incoming, dst_dir_fd=self.incoming)
        return new

    def set_aside(self, name: bytes) -> None:
        """An incoming object that was somebody's waits where nothing is removed, durably."""
        rename_noreplace(self.incoming, name, self.displaced, name)
        os.fsync(self.displaced)

    def reaches(self, folder: int) -> None:
        """Make sure that a rename leads from here into a directory, and back.

        Raises:
            PathError: none does: another quota project, or encryption.
        """
        if may_rename(self.incoming, folder) and may_rename(folder, self.displaced):
            return
        raise PathError(
            "a part of it cannot be reached by renaming (a quota project, or encryption): "
            "nothing of it is done"
        )

    def tidy(self, *, room: bool, now_ns: int) -> None:
        """Remove partial files that nobody came back for, or all when there is no room."""
        for name in map(os.fsencode, os.listdir(self.incoming)):
            if not name.startswith(PARTIAL):
                continue
            try:
                info = os.stat(name, dir_fd=self.incoming, follow_symlinks=False)
                if not room or now_ns - info.st_mtime_ns > _FORGOTTEN_NS:
                    remove_object(self.incoming, name)
            except OSError as error:
                log.info("part-not-removed name=%s reason=%s", name, error)

    def finish(self, fd: int) -> None:
        """The file is complete; it becomes durable with the next :meth:`flush`."""
        self._written += 1
        if self._written <= _FSYNC_EACH:
            self._unflushed.append(fd)
        else:
            os.close(fd)

    def flush(self, *, durable: bool = True) -> None:
        """Make every finished file durable, if it has to be; we do not write to them any more."""
        fds, count = self._unflushed, self._written
        self._unflushed, self._written = [], 0
        try:
            if not durable:
                return
            if count > _FSYNC_EACH:
                syncfs(self.incoming)
            elif len(fds) > 1 and self._workers > 1:
                with ThreadPoolExecutor(self._workers) as pool:
                    list(pool.map(os.fsync, fds))
            else:
                for fd in fds:
                    os.fsync(fd)
        finally:
            for fd in fds:
                os.close(fd)

    def discard(self, name: bytes) -> None:
        """Remove an incoming object that was not used."""
        try:
            os.unlink(name, dir_fd=self.incoming)
        except IsADirectoryError:
            os.rmdir(name, dir_fd=self.incoming)
        except FileNotFoundError:
            return

    def close(self) -> None:
        """Close all descriptors."""
        for fd in [*self._unflushed, self.incoming, self.displaced, self._torn]:
            if fd >= 0:
                close(fd)
        self._unflushed.clear()


def torn_names(state_fd: int) -> list[bytes]:
    """The undos in a state folder: each file that they are about is half-written."""
    try:
        fd = os.open(b"undo", OPEN_DIR, dir_fd=state_fd)
    except FileNotFoundError:
        return []
    try:
        return sorted(map(os.fsencode, os.listdir(fd)))
    finally:
        os.close(fd)


def refuse_torn(root: bytes, state_fd: int, *, locked: bool = False) -> None:
    """Let nobody read the files of a root that a crash left half-written.

    Args:
        locked: we have its lock, so nobody is at work.

    Raises:
        HaltError: there are some.
    """
    if torn_names(state_fd) and (locked or not _is_at_work(state_fd)):
        raise HaltError(
            f"{display(root)}: a crash left files half-written here; first run "
            f"'bisync recover {display(root)}'"
        )


def refuse_torn_above(folder: bytes) -> None:
    """See :func:`refuse_torn`, for the root that a folder is, or is in."""
    while folder != b"/":
        try:
            state = os.open(folder + b"/" + STATE_DIR, OPEN_DIR)
        except OSError:
            state = -1
        if state >= 0:
            try:
                refuse_torn(folder, state)
            finally:
                os.close(state)
        folder = os.path.dirname(folder)


def _is_at_work(state_fd: int) -> bool:
    """Whether an engine has the lock: what it writes to just now nobody else can open."""
    try:
        fd = os.open(b"lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=state_fd)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def subfolder(parent: int, name: bytes) -> int:
    """A folder of the state, made where it is missing, open for listing and for what is in it."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    return os.open(name, OPEN_DIR, dir_fd=parent)
