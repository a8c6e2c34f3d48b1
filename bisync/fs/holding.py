"""Hold a database's files still for reading: the content of all of them at one instant.

Where files can be cloned, each is cloned, and the clones count if nothing moved from before the
first to after the last. Elsewhere nothing can be held: what was read counts if nothing moved until
all of it was read. The shared memory of SQLite's log moves with every reader and counts for
nothing: who opens the copy makes it anew.
"""

import os
import stat
from collections.abc import Callable

from msgspec import Struct

from bisync.core.groups import SHARED
from bisync.core.node import NodeId
from bisync.errors import BusyError, StaleError
from bisync.fs.bases import Bases
from bisync.fs.freezing import Freeze
from bisync.fs.instant import HeldFile, Known, Stamp, Still, Taker, are_still, stamp, waits
from bisync.linux.lease import Lease, probed

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Group(Struct, frozen=True):
    parent: NodeId
    names: list[bytes]
    nodes: dict[bytes, NodeId]
    stamps: dict[bytes, Stamp]


class Holds:
    """What is held of one replica."""

    def __init__(
        self, bases: Callable[[], Bases], directory: Callable[[NodeId], int], index: Known
    ) -> None:
        self._bases, self._directory, self._index = bases, directory, index
        self._files: dict[NodeId, HeldFile] = {}
        self._groups: list[_Group] = []
        self._still: list[Still] = []
        self._frozen: list[Freeze] = []
        self._trouble: list[str] = []

    def get(self, node: NodeId) -> HeldFile | None:
        """What is held of a node."""
        return self._files.get(node)

    def take(
        self, parent: NodeId, names: list[bytes], nodes: dict[bytes, NodeId]
    ) -> dict[NodeId, HeldFile]:
        """Hold the files of one group.

        Args:
            parent: their directory.
            names: all names that files of the group may have.
            nodes: those it has, by the index.

        Raises:
            StaleError: it has other files than that; observe again.
            BusyError: it moved during every try.
        """
        if any(node in self._files for node in nodes.values()):
            raise BusyError("it is part of two databases")
        for _ in waits():
            files = self._try(parent, names, nodes)
            if files is not None:
                self._files |= files
                return files
        if not _are(stamps(self._directory(parent), names), nodes):
            raise StaleError("files of the database came or went")
        raise BusyError("the database was written to, at every try")

    def take_declared(self, taker: Taker, where: bytes) -> dict[NodeId, HeldFile]:
        """Hold a declared directory.

        Args:
            where: its path, for commands.

        Raises:
            PathError: stale, busy, or it cannot be done.
        """
        if any(node in self._files for node in taker.nodes.values()):
            raise BusyError("it is part of two databases")
        hooks = taker.rule.hooks
        freeze = None if hooks is None else Freeze(hooks, where)
        done = False
        try:
            files, still = taker.take()
            done = still is None and (hooks is None or hooks.read_from is None)
        except BaseException:
            done = True
            raise
        finally:
            if freeze is not None and done:
                self._trouble.append(freeze.thaw())
            elif freeze is not None:
                self._frozen.append(freeze)
        self._files |= files
        if still is not None:
            self._still.append(still)
        return files

    def _try(
        self, parent: NodeId, names: list[bytes], nodes: dict[bytes, NodeId]
    ) -> dict[NodeId, HeldFile] | None:
        dir_fd = self._directory(parent)
        before = stamps(dir_fd, names)
        if not _are(before, nodes):
            return None
        files: dict[NodeId, HeldFile] = {}
        try:
            # A clone costs a descriptor, and is of use only against somebody who may write.
            act = self._freeze if any(_has_writer(dir_fd, name) for name in nodes) else _look
            for name, node in nodes.items():
                if node not in files:
                    files[node] = act(dir_fd, name)
        except FileNotFoundError:
            pass
        except BaseException:
            for file in files.values():
                file.close()
            raise
        else:
            if telling(before) == telling(stamps(dir_fd, names)):
                self._groups.append(_Group(parent, names, nodes, before))
                return files
        for file in files.values():
            file.close()
        return None

    def _freeze(self, dir_fd: int, name: bytes) -> HeldFile:
        fd = os.open(name, _READ, dir_fd=dir_fd)
        try:
            frozen = self._bases().freeze(fd)
            if frozen is None:
                os.fsync(fd)
                return HeldFile(-1, os.fstat(fd))
            self._bases().discard(frozen[1])  # it lives as long as it is open
            return HeldFile(frozen[0], os.fstat(fd))
        finally:
            os.close(fd)

    def moved(self, nodes: set[NodeId]) -> bool:
        """Whether anything moved, of a group with these nodes, that is read where it is."""
        for group in self._groups:
            mine = set(group.nodes.values())
            if not mine & nodes or all(self._files[node].fd >= 0 for node in mine):
                continue
            try:
                now = stamps(self._directory(group.parent), group.names)
            except StaleError:
                return True
            if not are_still(telling(group.stamps), telling(now), group.nodes, self._index):
                return True
        return any(still.nodes() & nodes and still.moved() for still in self._still)

    def release(self) -> list[str]:
        """Let go of everything; what a person should hear of it."""
        for file in self._files.values():
            file.close()
        self._files, self._groups, self._still = {}, [], []
        self._trouble += [freeze.thaw() for freeze in self._frozen]
        trouble, self._frozen, self._trouble = self._trouble, [], []
        return [text for text in trouble if text]


def _has_writer(dir_fd: int, name: bytes) -> bool:
    with probed(dir_fd, name) as (_, lease):
        return lease is not Lease.GRANTED


def _look(dir_fd: int, name: bytes) -> HeldFile:
    return HeldFile(-1, os.stat(name, dir_fd=dir_fd, follow_symlinks=False))


def stamps(dir_fd: int, names: list[bytes]) -> dict[bytes, Stamp]:
    """What is there under some names: inode, size, times."""
    found = {}
    for name in names:
        try:
            info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if stat.S_ISREG(info.st_mode):
            found[name] = stamp(info)
    return found


def _are(there: dict[bytes, Stamp], nodes: dict[bytes, NodeId]) -> bool:
    """Whether the files that are there are those that are known, but for the shared memory."""
    return telling(there).keys() == {n for n in nodes if not n.endswith(SHARED)}


def telling(files: dict[bytes, Stamp]) -> dict[bytes, Stamp]:
    """All but the shared memory."""
    return {name: each for name, each in files.items() if not name.endswith(SHARED)}
