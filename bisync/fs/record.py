"""Keep the index true after the engine's own operations, so that no scan takes them for edits.

The database transaction is opened here and ended by the batch.
"""

import contextlib
import os

from msgspec.structs import replace

from bisync.core.node import ROOT, Attributes, Kind, Node, NodeId, Place
from bisync.core.plan import Remove, Replace
from bisync.errors import StaleError
from bisync.fs.database import Database
from bisync.fs.incoming import Staged
from bisync.fs.index import NO_STAMP
from bisync.fs.look import Looker, stamp
from bisync.fs.meta import attributes_of, read_xattrs

_NEVER = -1  # a change time that no object has: look again


class Recorder:
    """Writes what one batch did into the index."""

    def __init__(self, look: Looker, db: Database) -> None:
        self.look = look
        self.db = db
        self.index = look.index
        self.directories = look.directories
        self.touched: set[NodeId] = set()  # directories whose names changed

    def made(self, node: NodeId, place: Place, staged: Staged) -> None:
        """A new node got its first name."""
        self.db.begin()
        row = self._row_of(node, staged, version=1)
        self._record(row, staged.handle, staged.info.st_ino, [place])
        self._installed(row)
        self.touched.add(place[0])

    def replaced(self, step: Replace, staged: Staged) -> None:
        """A node got a new object under all its names."""
        self.db.begin()
        version = 1
        if step.keep is not None:
            for place in step.places:
                self.index.drop_name(place)
            self.refresh(step.keep_node, [step.keep])
        else:
            old = self.index.node(step.node)
            version = 1 if old is None else old.version + 1
        row = self._row_of(step.node, staged, version=version)
        self._record(row, staged.handle, staged.info.st_ino, list(step.places))
        self._installed(row)
        self.touched.update(parent for parent, _ in step.places)

    def _installed(self, row: Node) -> None:
        if row.kind is Kind.FILE:
            self.index.set_installed(row.id, row.version)

    @staticmethod
    def _row_of(node: NodeId, staged: Staged, *, version: int) -> Node:
        """What a staged object really was when nobody but us could reach it."""
        info = staged.info
        nlink = 1 if staged.content.kind is Kind.DIR else info.st_nlink
        attributes = attributes_of(info, *staged.found)
        return Node(node, staged.content, attributes, info.st_ctime_ns, version, nlink=nlink)

    def refresh(self, node: NodeId, places: list[Place]) -> None:
        """A node got names or lost some: new times and stamps, same content."""
        row, identity = self.index.node(node), self.index.identity(node)
        if row is None or identity is None:
            raise StaleError("it is not known any more")
        handle, seen = identity
        self._record(row, handle, seen.ino, [*places, *self.index.places(node)])

    def attributes(self, row: Node, attributes: Attributes, *, time_is_set: bool = False) -> None:
        """A node's attributes were set to these; ``time_is_set``: a directory's time too."""
        identity = self.index.identity(row.id)
        if identity is not None:
            fresh, places = replace(row, attributes=attributes), self.index.places(row.id)
            handle, seen = identity
            self._record(fresh, handle, seen.ino, places, time_is_set=time_is_set)

    def _record(
        self,
        row: Node,
        handle: bytes,
        ino: int,
        places: list[Place],
        *,
        time_is_set: bool = False,
    ) -> None:
        """Write down what we did; if anything else is found there, somebody did it since.

        Then the row says what *we* left, and the next scan takes the difference for the
        user's change that it is. Likewise if nothing can be seen there now: what was done
        is done, and a number that got lost would make a stranger of the object.
        """
        index, info = self.index, None
        with contextlib.suppress(StaleError, OSError):
            info = self._as_left(row, handle, places, time_is_set=time_is_set)
        if info is None:
            index.put_node(replace(row, ctime_ns=_NEVER), handle, ino)
            index.mark(row.id)
        else:
            nlink = 1 if row.kind is Kind.DIR else info.st_nlink
            index.put_node(replace(row, ctime_ns=info.st_ctime_ns, nlink=nlink), handle, ino)
        sure = info is not None and (row.kind is not Kind.DIR or time_is_set)
        seen = stamp(info) if info is not None and sure else NO_STAMP
        for place in places:
            index.put_name(place, row.id, seen)

    def _as_left(
        self, row: Node, handle: bytes, places: list[Place], *, time_is_set: bool
    ) -> os.stat_result | None:
        """Look at an object; ``None`` if it is not what we left.

        A directory's time says nothing, unless it was just set.
        """
        dir_fd, name = self._first(row.id, places)
        info = self.look.stat(dir_fd, name) if name else os.fstat(dir_fd)
        found = attributes_of(info, *read_xattrs(dir_fd, name))
        wanted = row.attributes
        if row.kind is Kind.DIR and not time_is_set:
            found = replace(found, mtime_ns=wanted.mtime_ns)
        ours = (
            found == wanted
            and (row.kind is not Kind.FILE or info.st_size == row.content.size)
            and self.look.handle(dir_fd, name) == handle
        )
        return info if ours else None

    def _first(self, node: NodeId, places: list[Place]) -> tuple[int, bytes]:
        if node == ROOT:
            return self.directories.root.fd, b""
        return self.directories.at(places[0])

    def forget_tree(self, removal: Remove, place: Place) -> None:
        index = self.index
        self.db.begin()
        if index.at([place]).get(place) == removal.node:
            index.drop_name(place)
        for _, node in removal.members:
            for below in index.places(node):
                index.drop_name(below)
            index.drop_node(node)
            self.directories.drop(node)
        if not index.places(removal.node):
            index.drop_node(removal.node)
        self.directories.drop(removal.node)
        self.touched.add(place[0])
