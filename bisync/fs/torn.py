"""After a crash: files that were being written into become their old or their new version again.

Nothing that somebody wrote since is written over: such a file is neither, and leaves the tree for
the store, so that the other side's version can be fetched.
"""

import logging
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bisync.core.node import NodeId
from bisync.core.path import STATE_DIR, display
from bisync.errors import HaltError, PathError, StaleError
from bisync.fs.look import Looker
from bisync.fs.restore import parent_of
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.linux.lease import Lease, probed, release, take_write_lease

if TYPE_CHECKING:
    from bisync.delta.reverse import About

log = logging.getLogger(__name__)
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(slots=True)
class Mended:
    """What became of the files that a crash had left half-written."""

    old: list[bytes] = field(default_factory=list)  # paths: the old version again
    new: list[bytes] = field(default_factory=list)  # the new version
    edited: list[bytes] = field(default_factory=list)  # written to since: to the store with it
    damaged: set[NodeId] = field(default_factory=set)  # numbers of those


class Mender:
    """Settles the undos of one replica."""

    def __init__(self, look: Looker, stage: Stage, store: Store, *, take_out: bool) -> None:
        """
        Args:
            take_out: whether a file that was written to since leaves the tree; else it stays, and
                so does its undo.
        """
        self._look, self._stage, self._store = look, stage, store
        self._take_out = take_out
        self.done = Mended()

    def run(self) -> Mended:
        """Settle all.

        Raises:
            HaltError: a program has such a file open for writing.
        """
        for name in self._stage.torn_names():
            self._settle(name)
        return self.done

    def _settle(self, name: bytes) -> None:
        from bisync.fs.inplace import open_delta  # noqa: PLC0415 -- loads numpy

        folder = self._stage.torn
        undo = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            delta = open_delta(undo)
            if delta is None:
                # It was durable before the first byte was written: this one was never in use.
                log.warning("undo-not-readable name=%s", display(name))
                self._keep(name, b"recovered/" + name, {"reason": "recovered after a crash"})
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
            self._mend(spot, name, undo, path, sure=sure)
        finally:
            os.close(undo)

    def _mend(self, spot: "_Spot", name: bytes, undo: int, path: bytes, *, sure: bool) -> None:
        from bisync.fs.inplace import Overwriting, State, open_delta  # noqa: PLC0415

        delta = open_delta(undo)
        assert delta is not None
        try:
            with probed(spot.fd, spot.name) as (_, lease):
                if lease is Lease.REFUSED:
                    raise HaltError(
                        f"{display(path)}: a crash left it half-written, and a program has it open "
                        "for writing; stop that program, then run again"
                    )
            fd = os.open(spot.name, _OPEN, dir_fd=spot.fd)
            try:
                held = take_write_lease(fd) is Lease.GRANTED
                try:
                    state = Overwriting(fd, undo, delta).settle()
                finally:
                    if held:
                        release(fd)
            finally:
                os.close(fd)
            if state is State.OLD:
                self.done.old.append(path)
                os.unlink(name, dir_fd=self._stage.torn)
                os.fsync(self._stage.torn)
                return
            if state is State.NEW:
                self.done.new.append(path)
                self._keep_delta(name, delta.about)
                return
            if sure:
                self._edited(spot, name, path, delta.about)
            else:
                self._keep_delta(name, delta.about)  # another file has its name
        finally:
            spot.close()

    def _edited(self, spot: "_Spot", name: bytes, path: bytes, about: "About") -> None:
        self.done.edited.append(path)
        if not self._take_out:
            return
        record = {"reason": "torn by a crash and written to since", "conflict": False}
        self._store.keep(spot.fd, spot.name, path, {**record, "digest": None}, copy=False)
        self._store.flush()
        os.fsync(spot.fd)
        self._keep_delta(name, about)
        self.done.damaged.add(about.node)

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


@dataclass(frozen=True, slots=True)
class _Spot:
    """A held directory and a name in it."""

    fd: int
    name: bytes
    close: Callable[[], None]
