"""Keep the index true after the engine's own operations, so that no scan takes them for edits.

The database transaction is opened here and ended by the batch.
"""

import os
from collections.abc import Iterable
from dataclasses import replace

from bisync.core.node import Attributes, Kind, Node, NodeId, Place
from bisync.core.plan import Remove, Replace
from bisync.errors import StaleError
from bisync.fs.database import Database
from bisync.fs.incoming import Staged
from bisync.fs.look import Looked, Looker, stamp
from bisync.fs.meta import attributes_of, read_xattrs


class Recorder:
    """Writes what one batch did into the index."""

    def __init__(self, look: Looker, db: Database) -> None:
        self.look = look
        self.db = db
        self.index = look.index
        self.directories = look.directories
        self.touched: set[NodeId] = set()  # directories whose names changed

    def made(self, node: NodeId, place: Place, staged: Staged, wanted: Attributes) -> None:
        dir_fd, name = self.directories.at(place)
        info = self.look.stat(dir_fd, name)
        if staged.missed:
            xattrs, acl = read_xattrs(dir_fd, name)
        else:
            xattrs, acl = wanted.xattrs, wanted.acl
        row = Node(
            node,
            staged.content,
            attributes_of(info, xattrs, acl),
            info.st_ctime_ns,
            version=1,
            nlink=1 if staged.content.kind is Kind.DIR else info.st_nlink,
        )
        self.db.begin()
        self.index.put_node(row, staged.handle, info.st_ino)
        self.index.put_name(place, node, stamp(info))
        self.touched.add(place[0])

    def replaced(self, step: Replace, staged: Staged) -> None:
        index = self.index
        dir_fd, name = self.directories.at(step.places[0])
        info = self.look.stat(dir_fd, name)
        wanted = step.attributes
        found = (wanted.xattrs, wanted.acl)
        if staged.missed:
            found = read_xattrs(dir_fd, name)
        self.db.begin()
        version = 1
        if step.keep is not None:
            for place in step.places:
                index.drop_name(place)
            self.refresh(step.keep_node, [step.keep])
        else:
            row = index.node(step.node)
            version = 1 if row is None else row.version + 1
        node = Node(
            step.node,
            staged.content,
            attributes_of(info, *found),
            info.st_ctime_ns,
            version,
            nlink=info.st_nlink,
        )
        index.put_node(node, staged.handle, info.st_ino)
        for place in step.places:
            index.put_name(place, step.node, stamp(info))
            self.touched.add(place[0])

    def refresh(self, node: NodeId, places: Iterable[Place]) -> None:
        """After our own operation: new times and stamps, same content."""
        index = self.index
        row, identity = index.node(node), index.identity(node)
        if row is None or identity is None:
            raise StaleError("it is not known any more")
        info = None
        for place in places:
            dir_fd, name = self.directories.at(place)
            info = self.look.stat(dir_fd, name)
            index.put_name(place, node, stamp(info))
        assert info is not None
        for place in index.places(node):
            index.set_stamp(place, stamp(info))
        fresh = replace(
            row,
            attributes=replace(row.attributes, mtime_ns=info.st_mtime_ns),
            ctime_ns=info.st_ctime_ns,
            nlink=1 if row.kind is Kind.DIR else info.st_nlink,
        )
        if row.kind is Kind.FILE and (info.st_size, info.st_mtime_ns) != (
            row.content.size,
            row.attributes.mtime_ns,
        ):
            index.distrust(node)  # somebody wrote to it meanwhile: look again next time
            return
        index.put_node(fresh, identity[0], info.st_ino)

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

    def attributes(
        self, row: Node, looked: Looked, places: list[Place], *, keep_time: bool
    ) -> None:
        info = (
            os.fstat(looked.dir_fd)
            if not looked.name
            else self.look.stat(looked.dir_fd, looked.name)
        )
        found = read_xattrs(looked.dir_fd, looked.name)
        attributes = attributes_of(info, *found)
        if keep_time:
            attributes = replace(attributes, mtime_ns=row.attributes.mtime_ns)
        fresh = replace(row, attributes=attributes, ctime_ns=info.st_ctime_ns)
        self.index.put_node(fresh, looked.handle, info.st_ino)
        if not keep_time:
            for place in places:
                self.index.set_stamp(place, stamp(info))
