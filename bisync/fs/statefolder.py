"""The folder that a root's state lives in: where it is, whose it is, and who works with it."""

import errno
import json
import os
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import asdict

from bisync.core.path import STATE_DIR
from bisync.delta.digest import digest_of
from bisync.errors import (
    EndpointError,
    NoSpaceError,
    RootLockedError,
    StateFormatError,
    UsageError,
)
from bisync.fs.database import FORMAT, no_space
from bisync.fs.meta import owned_like
from bisync.fs.root import OPEN_DIR, Root
from bisync.fs.turns import Patience, Turn
from bisync.linux.filesystem import set_nodump

_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# bisync keeps its state here.\n"
PATIENCE = Patience()
_NOW = Patience(seconds=0)
_ACLS = ("system.posix_acl_default", "system.posix_acl_access")


class Marker(Struct, frozen=True):
    """``.bisync/replica``: who this replica is, and which root it was made for."""

    format: int
    replica: str  # 32 hex digits
    incarnation: str
    host: str
    root: str  # RootIdentity.text()
    nonce: str
    given: str = ""  # how the root was spelled last, and whether a link stood there
    link: bool = False


class StateFolder:
    """``ROOT/.bisync``, or a folder of its own below ``--state-dir``. Opening makes nothing."""

    def __init__(
        self,
        root: Root,
        state_dir: str | None,
        patience: Patience = PATIENCE,
        wanted: Callable[[], None] | None = None,
    ) -> None:
        """Open and lock the folder if it is there.

        Args:
            root: whose state it is.
            state_dir: holds the state folders instead of the roots.
            patience: how to wait for another engine that works with it.
            wanted: called, on another thread, when somebody else waits for it.

        Raises:
            UsageError: what is there is no state folder, or somebody else's.
            RootLockedError: another engine works with it, and we did not get it in time.
        """
        self.root = root
        self.fd = -1
        self.damaged = ""  # what could not be understood of the marker
        self._state_dir = state_dir
        self._patience, self._wanted = patience, wanted
        self._turn: Turn | None = None
        self._text = os.fsdecode(root.path)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def exists(self) -> bool:
        """Whether there is a folder."""
        return self.fd >= 0

    @property
    def database_path(self) -> bytes:
        """SQLite needs a path; the descriptor knows where its folder is now."""
        return os.readlink(b"/proc/self/fd/%d" % self.fd) + b"/state.db"

    @property
    def token_path(self) -> bytes | None:
        """A folder that watchers look at, to know when they have heard all there was."""
        if self.fd >= 0:
            return os.readlink(b"/proc/self/fd/%d" % self.fd) + b"/watch"
        return self.root.path + b"/.bisync/watch" if self._state_dir is None else None

    def _base(self, *, make: bool) -> tuple[int, bytes]:
        """(directory, name) of the folder; the descriptor is the caller's to close."""
        if self._state_dir is None:
            return os.dup(self.root.fd), STATE_DIR
        if make:
            os.makedirs(self._state_dir, 0o700, exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return os.open(self._state_dir, flags), state_name(self.root.path)

    def _open(self) -> None:
        try:
            base, name = self._base(make=False)
        except FileNotFoundError:
            return
        try:
            try:
                self.fd = os.open(name, OPEN_DIR, dir_fd=base)
            except FileNotFoundError:
                return
            except OSError as error:
                text = os.fsdecode(self.root.path + b"/" + name)
                if error.errno in (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
                    raise EndpointError(f"{text}: {error.strerror}") from error
                raise UsageError(f"{text} is not a state folder: {error.strerror}") from error
        finally:
            os.close(base)
        owner = os.fstat(self.fd).st_uid
        if owner not in (os.geteuid(), 0) and not self._is_for_the_owner(owner):
            raise UsageError(f"{self._text}: its state belongs to another user")
        self._lock(self._patience)

    def _is_for_the_owner(self, uid: int) -> bool:
        """Whether root works for the user who owns both the tree and its state."""
        return os.geteuid() == 0 and os.fstat(self.root.fd).st_uid == uid

    def _lock(self, patience: Patience) -> None:
        self._turn = Turn(self.fd, self._text, patience, self._wanted)

    def check(self) -> None:
        """Make sure that this folder is still the root's.

        Raises:
            EndpointError: somebody moved it away, and another engine may make another one.
        """
        if self.fd < 0:
            return
        try:
            base, name = self._base(make=False)
            try:
                there = os.stat(name, dir_fd=base, follow_symlinks=False)
            finally:
                os.close(base)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self.fd)):
            raise EndpointError(f"{self._text}: its state folder was taken away")

    @property
    def is_wanted(self) -> bool:
        """Whether somebody else waits for this root."""
        return self._turn is not None and self._turn.is_wanted

    def make(self) -> None:
        """Make the folder, or complete it; idempotent."""
        if self.fd < 0:
            self._make()
        for acl in _ACLS:  # a default ACL of the root is not for secrets
            try:
                os.removexattr(self.fd, acl)
            except OSError as error:
                if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise

    def _make(self) -> None:
        before = os.fstat(self.root.fd)
        base, name = self._base(make=True)
        try:
            try:
                os.mkdir(name, 0o700, dir_fd=base)
            except FileExistsError as error:
                raise RootLockedError(f"{self._text}: another bisync starts there") from error
            except OSError as error:
                text = f"{self._text}: cannot make state: {error.strerror}"
                raise EndpointError(text) from error
            self.fd = os.open(name, OPEN_DIR, dir_fd=base)
            os.fsync(base)
        finally:
            os.close(base)
        self._lock(_NOW)  # who was faster makes the marker, and we read it when we come again
        if exists(self.fd, b"replica"):
            raise RootLockedError(f"{self._text}: another bisync has just been there")
        set_nodump(self.fd)
        self.write(b"CACHEDIR.TAG", _TAG)
        os.utime(self.root.fd, ns=(before.st_atime_ns, before.st_mtime_ns))

    # -- small files ---------------------------------------------------------

    def read_marker(self) -> Marker | None:
        """Who this replica is; ``None`` if nobody or nothing legible says so.

        Raises:
            StateFormatError: a newer version wrote it.
            EndpointError: the disk does not let us read it; that is no reason to forget it.
        """
        if self.fd < 0:
            return None
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(b"replica", flags, dir_fd=self.fd), encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EndpointError(f"{self._text}: cannot read its state: {error}") from error
        except ValueError as error:
            self.damaged = f"replica: {error}"
            return None
        try:
            found = json.loads(text)
            if found["format"] > FORMAT:
                raise StateFormatError(
                    f"{self._text}: its state was written by a newer bisync (format "
                    f"{found['format']}); use that version, nothing was touched"
                )
            return Marker(**found)
        except (ValueError, KeyError, TypeError) as error:
            self.damaged = f"replica: {error}"
            return None

    def write_marker(self, marker: Marker) -> None:
        """Replace the marker."""
        self.write(b"replica", json.dumps(asdict(marker), indent=1).encode() + b"\n")

    def write(self, name: bytes, data: bytes) -> None:
        """Replace a small file, durably.

        Raises:
            NoSpaceError, EndpointError: it cannot be written; the old one is still there.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(name + b".new", flags, 0o600, dir_fd=self.fd)
            try:
                owned_like(fd, self.fd)
                if os.write(fd, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(name + b".new", name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            os.fsync(self.fd)
        except OSError as error:
            text = f"{self._text}: cannot write its state: {error.strerror}"
            raise (NoSpaceError if no_space(error) else EndpointError)(text) from error

    def close(self) -> None:
        """Give the lock and the folder back."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.close()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


def exists(folder: int, name: bytes) -> bool:
    """Whether there is something of that name."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def find_root(start: bytes, state_dir: str | None = None) -> bytes:
    """The root that a path lies in: the nearest directory at or above it with state.

    Raises:
        UsageError: there is none.
    """
    path = os.path.realpath(start)
    while True:
        if state_dir is None:
            marker = path + b"/" + STATE_DIR + b"/replica"
        else:
            marker = os.fsencode(state_dir) + b"/" + state_name(path) + b"/replica"
        if os.path.lexists(marker):
            return path
        if path == b"/":
            text = os.fsdecode(start)
            raise UsageError(f"{text}: not inside a root of bisync; go there, or say --root DIR")
        path = os.path.dirname(path)


def state_name(root: bytes) -> bytes:
    """The name of a root's state folder below ``--state-dir``."""
    return digest_of(root)[:16].hex().encode()
