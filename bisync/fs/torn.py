"""After a crash: files that were being written into become their old or their new version again.

Nothing that somebody wrote since is written over: such a file is neither, and leaves the tree for
the store, so that the other side's version can be fetched.
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from bisync.core.node import NodeId
from bisync.core.path import STATE_DIR, display
from bisync.errors import HaltError, PathError, StaleError
from bisync.fs.displaced import evidence
from bisync.fs.look import Looker
from bisync.fs.restore import parent_of
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.linux.lease import Lease, WriteHold, release, take_write_lease

if TYPE_CHECKING:
    from bisync.delta.reverse import About, ReverseDelta

_STOP = "stop that program, then run again"
_PATIENCE_S = 2.0  # who only reads is soon done
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Mended(Struct):
    """What became of the files that a crash had left half-written."""

    old: list[bytes] = field(default_factory=list)  # paths: the old version again
    new: list[bytes] = field(default_factory=list)  # the new version
    edited: list[bytes] = field(default_factory=list)  # written to since: to the store with it
    damaged: set[NodeId] = field(default_factory=set)  # numbers of those
    taken: list[tuple[bytes, bytes, Any]] = field(default_factory=list)  # kept, path, evidence


class Mender:
    """Settles the undos of one replica."""

    def __init__(
        self,
        look: Looker,
        stage: Stage,
        store: Store,
        about: dict[bytes, tuple[NodeId, bytes, str]],
        *,
        take_out: bool,
    ) -> None:
        """
        Args:
            about: which files undos are about, by the log: number, handle, path as Latin-1.
            take_out: whether a file that was written to since leaves the tree; else it stays, and
                so does its undo.
        """
        self._look, self._stage, self._store = look, stage, store
        self._about = about
        self._take_out = take_out
        self.done = Mended()

    def run(self) -> Mended:
        """Settle all.

        Raises:
            HaltError: a program has such a file open, or it may not be written, or nobody knows
                which one it is.
        """
        for name in self._stage.torn_names():
            self._settle(name)
        return self.done

    def _settle(self, name: bytes) -> None:
        from bisync.fs.overwriting import open_delta  # noqa: PLC0415 -- loads numpy

        folder = self._stage.torn
        undo = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            delta = open_delta(undo)
            if delta is None:
                self._without(name)
                return
            about = delta.about
            handle, path = bytes.fromhex(about.handle), about.path.encode("latin-1")
            spot, sure = self._find(about.node, handle, path), True
            if spot is None:
                # Deleted since; or all of the tree is a copy, where everything has another handle.
                spot, sure = self._at(path, None), False
            if spot is None:
                self._keep_delta(name, about)
                return
            try:
                self._mend(spot, name, undo, delta, sure=sure)
            finally:
                spot.close()
        finally:
            os.close(undo)

    def _without(self, name: bytes) -> None:
        """An undo that decayed: its file is half-written, and cannot be made whole from here."""
        known = self._about.get(name)
        spot = None
        if known is not None:
            node, handle, text = known
            path = text.encode("latin-1")
            spot = self._find(node, handle, path)
        if known is None or spot is None:
            raise HaltError(
                f"{display(self._look.root.path)}/{STATE_DIR.decode()}/undo/{display(name)} cannot "
                "be read; the file that it is about is half-written: restore that from a backup "
                "or the other side, then move this one away"
            )
        try:
            with self._held(spot, path) as (_, hold):
                self._take(spot, path, node, hold)
        finally:
            spot.close()
        if self._take_out:
            record = {"reason": "an undo that cannot be read", "conflict": False, "digest": None}
            self._keep(name, path, record)

    def _mend(
        self, spot: "_Spot", name: bytes, undo: int, delta: "ReverseDelta", *, sure: bool
    ) -> None:
        from bisync.fs.overwriting import LeaseLostError, Overwriting, State  # noqa: PLC0415

        about = delta.about
        path = about.path.encode("latin-1")
        with self._held(spot, path) as (fd, hold):
            target = Overwriting(fd, undo, delta, hold.left_s)
            what = f"{display(path)}: a crash left it half-written, and"
            try:
                state = target.settle()
            except LeaseLostError as error:
                text = f"{what} a program opened it before it was whole again"
                raise HaltError(f"{text}; {_STOP}") from error
            except OSError as error:
                text = f"{what} it cannot be mended ({error.strerror})"
                raise HaltError(f"{text}; make that possible, then run again") from error
            if state is State.EDITED and (sure or target.resembles()):
                self._take(spot, path, about.node, hold)
                if not self._take_out:
                    return
        if state is State.OLD:
            self.done.old.append(path)
            os.unlink(name, dir_fd=self._stage.torn)
            os.fsync(self._stage.torn)
            return
        if state is State.NEW:
            self.done.new.append(path)
        self._keep_delta(name, about)  # of an edited one; or another file has its name

    @contextlib.contextmanager
    def _held(self, spot: "_Spot", path: bytes) -> Iterator[tuple[int, WriteHold]]:
        """The file, open for writing, while nobody else can open it.

        Raises:
            HaltError: somebody has it open, or it may not be written.
        """
        what = f"{display(path)}: a crash left it half-written, and"
        try:
            fd = os.open(spot.name, _OPEN, dir_fd=spot.fd)
        except OSError as error:
            text = f"{what} it cannot be opened to mend it ({error.strerror})"
            raise HaltError(f"{text}; make that possible, then run again") from error
        try:
            until = time.monotonic() + _PATIENCE_S
            while (lease := take_write_lease(fd)) is Lease.REFUSED and time.monotonic() < until:
                time.sleep(0.05)
            if lease is Lease.REFUSED:
                raise HaltError(f"{what} a program has it open; {_STOP}")
            if lease is not Lease.GRANTED:
                raise HaltError(f"{what} only its owner or root can mend it; run as one of them")
            try:
                yield fd, WriteHold(fd)
            finally:
                release(fd)
        finally:
            os.close(fd)

    def _take(self, spot: "_Spot", path: bytes, node: NodeId, hold: WriteHold) -> None:
        """A file that is neither version leaves the tree, as it is.

        Who is caught in ``open`` then has what is kept: that is looked at again later.
        """
        if not self._take_out:
            self.done.edited.append(path)
            return
        hold.left_s()
        if hold.breaking:
            what = f"{display(path)}: a crash left it half-written, and it was written to since"
            raise HaltError(f"{what}; a program wants to open it; {_STOP}")
        self.done.edited.append(path)
        before = evidence(spot.fd, spot.name)
        record = {"reason": "half-written, and written to since", "conflict": False}
        kept = self._store.keep(spot.fd, spot.name, path, {**record, "digest": None}, copy=False)
        self._store.flush()
        os.fsync(spot.fd)
        self.done.damaged.add(node)
        self.done.taken.append((kept.path, path, before))

    def _keep_delta(self, name: bytes, about: "About") -> None:
        self._keep(name, about.path.encode("latin-1"), about.record)

    def _keep(self, name: bytes, path: bytes, record: dict[str, object]) -> None:
        self._store.keep(self._stage.torn, name, path, record, copy=False, delta=True)
        self._store.flush()
        os.fsync(self._stage.torn)

    # -- where it is now -----------------------------------------------------

    def _find(self, node: NodeId, handle: bytes, path: bytes) -> "_Spot | None":
        """Where the file of a handle is: where it was, else wherever its inode is found."""
        for place in self._look.index.places(node):
            known = self._look.index.place_path(place)
            spot = self._at(known, handle)
            if spot is not None:
                return spot
        return self._at(path, handle) or self._search(handle)

    def _at(self, path: bytes, handle: bytes | None) -> "_Spot | None":
        try:
            with parent_of(self._look.root.fd, path) as (fd, name):
                return self._is(fd, name, handle)
        except (PathError, OSError):
            return None

    def _is(self, fd: int, name: bytes, handle: bytes | None) -> "_Spot | None":
        try:
            info = self._look.stat(fd, name)
            if stat.S_ISREG(info.st_mode) and handle in (None, self._look.handle(fd, name)):
                copy = os.dup(fd)
                return _Spot(copy, name, lambda: os.close(copy))
        except (StaleError, OSError):
            return None
        return None

    def _search(self, handle: bytes) -> "_Spot | None":
        top = os.fspath(b".")
        for _, folders, files, fd in os.fwalk(top, dir_fd=self._look.root.fd):
            if STATE_DIR in folders:
                folders.remove(STATE_DIR)
            for name in files:
                spot = self._is(fd, name, handle)
                if spot is not None:
                    return spot
        return None


class _Spot(Struct, frozen=True):
    """A held directory and a name in it."""

    fd: int
    name: bytes
    close: Callable[[], None]
