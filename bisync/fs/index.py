"""The index of one replica: its nodes and names as last observed, and what changed since.

It answers the lookups of a closure and is written by the scan (what users did) and by
apply (what the engine did). Marks are a queue of nodes that may have changed; each pair
remembers how far it has read.
"""

import os
import struct
from collections.abc import Iterable, Iterator

from msgspec import Struct

from bisync.core.node import ROOT, Attributes, Content, Kind, Node, NodeId, Place
from bisync.core.rows import xattrs_from_text, xattrs_to_text
from bisync.fs.database import COMPANION, Database

_STAMP = struct.Struct("<QqqqIIII")
_WIDE_STAMP = struct.Struct("<QqQQIIII")
_U64 = (1 << 64) - 1
_I64 = 1 << 63
_PATHS = 1000  # directories whose paths are remembered
NO_STAMP = b""  # never equal to a real one: look again next time
_COLUMNS = (
    "id, kind, size, rdev, digest, target, mode, uid, gid, mtime, ctime, xattrs, version, "
    "nlink, foreigners"
)


class Seen(Struct, frozen=True):
    """What the kernel says about one object: enough to tell whether it is the same.

    ``ctime_ns`` moves with renames and attribute changes, so it proves nothing after our
    own operations; ``handle`` is the identity.
    """

    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    def fits(self, info: os.stat_result) -> bool:
        """Whether an object still looks as it did: nothing happened to its content."""
        now = (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        return now == (self.ino, self.size, self.mtime_ns, self.ctime_ns)


def stamp_of(
    ino: int, size: int, mtime: int, ctime: int, mode: int, uid: int, gid: int, nlink: int
) -> bytes:
    """The evidence that nothing about an object changed, as one comparable value."""
    try:
        return _STAMP.pack(ino, size, mtime, ctime, mode, uid, gid, nlink)
    except struct.error:  # a time before 1678 or after 2261: its low 64 bits will do
        return _WIDE_STAMP.pack(ino, size, mtime & _U64, ctime & _U64, mode, uid, gid, nlink)


class Index:
    """Nodes, names and marks of one replica. Lookups come in batches (``View``)."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self._next = int(db.get("next_node") or ROOT + 1)
        self._paths: dict[NodeId, bytes] = {ROOT: b""}  # of directories; until a name goes

    # -- numbers -------------------------------------------------------------

    def new_node(self) -> NodeId:
        """A number never used before on this replica."""
        number = self._next
        self._next += 1
        return number

    @property
    def next_number(self) -> NodeId:
        """The first number that no node has had."""
        return self._next

    def numbers(self) -> Iterator[NodeId]:
        """An endless supply of fresh numbers."""
        while True:
            yield self.new_node()

    def reserve(self, count: int) -> NodeId:
        """The first of so many fresh numbers, for nodes that somebody else decides on."""
        first = self._next
        self._next += count
        return first

    def save_numbers(self) -> None:
        """Write the counter; part of every commit."""
        self.db.put("next_node", self._next)

    # -- lookups (View) ------------------------------------------------------

    def nodes(self, ids: Iterable[NodeId]) -> dict[NodeId, Node]:
        """The nodes that are in the index."""
        found = {}
        for row in self._each(f"SELECT {_COLUMNS} FROM node WHERE id", ids):
            found[row[0]] = _node(row)
        return found

    def names_of(self, ids: Iterable[NodeId]) -> dict[NodeId, frozenset[Place]]:
        """All names of each node."""
        found: dict[NodeId, set[Place]] = {}
        for node, parent, name in self._each("SELECT node, parent, name FROM name WHERE node", ids):
            found.setdefault(node, set()).add((parent, name))
        return {node: frozenset(names) for node, names in found.items()}

    def at(self, places: Iterable[Place]) -> dict[Place, NodeId]:
        """What is at each place; free places are left out."""
        found = {}
        run = self.db.execute
        for place in places:
            row = run("SELECT node FROM name WHERE parent=? AND name=?", place).fetchone()
            if row is not None:
                found[place] = row[0]
        return found

    def companions(self) -> list[Place]:
        """The places of all journals of databases, by an index of their own."""
        return self.db.execute(f"SELECT parent, name FROM name WHERE {COMPANION}").fetchall()

    def children(self, ids: Iterable[NodeId]) -> dict[NodeId, list[tuple[bytes, NodeId]]]:
        """What each directory holds."""
        run = self.db.execute
        return {
            parent: run("SELECT name, node FROM name WHERE parent=?", (parent,)).fetchall()
            for parent in ids
        }

    def links_below(self, top: NodeId) -> tuple[set[bytes], dict[bytes, tuple[int, int]]]:
        """The directories and symbolic links below a directory, by their paths below it.

        Returns:
            Directories, itself (empty) included; and links: inode and time (ns).
        """
        rows = self.db.execute(
            """WITH RECURSIVE below(node, path, kind) AS (
                   VALUES(?, CAST('' AS BLOB), ?) UNION ALL
                   SELECT n.node, CAST(
                       CASE below.path WHEN x'' THEN n.name ELSE below.path || '/' || n.name END
                       AS BLOB), node.kind
                   FROM below JOIN name n ON n.parent=below.node
                   JOIN node ON node.id=n.node WHERE below.kind=? AND node.kind<>?)
               SELECT node, path, kind FROM below""",
            (top, int(Kind.DIR), int(Kind.DIR), int(Kind.FILE)),
        ).fetchall()
        directories = {bytes(path) for _, path, kind in rows if kind == Kind.DIR}
        links = {}
        for node, path, kind in rows:
            known = self.identity(node) if kind == Kind.SYMLINK else None
            if known is not None:
                links[bytes(path)] = known[1].ino, known[1].mtime_ns
        return directories, links

    def forgotten(self, ids: Iterable[NodeId]) -> set[NodeId]:
        """Those that a filter hides now."""
        return {row[0] for row in self._each("SELECT node FROM forgotten WHERE node", ids)}

    def _each(self, sql: str, ids: Iterable[NodeId]) -> Iterator[tuple]:  # type: ignore[type-arg]
        todo = list(ids)
        for start in range(0, len(todo), 200):
            batch = todo[start : start + 200]
            marks = ",".join("?" * len(batch))
            yield from self.db.execute(f"{sql} IN ({marks})", batch)

    # -- single rows ---------------------------------------------------------

    def node(self, node: NodeId) -> Node | None:
        """One node, whether it has names or not."""
        row = self.db.execute(f"SELECT {_COLUMNS} FROM node WHERE id=?", (node,)).fetchone()
        return None if row is None else _node(row)

    def by_handle(self, handle: bytes) -> Node | None:
        """The node with this identity."""
        row = self.db.execute(f"SELECT {_COLUMNS} FROM node WHERE handle=?", (handle,)).fetchone()
        return None if row is None else _node(row)

    def places_of_handle(self, handle: bytes) -> list[Place]:
        """The names of the node with this identity."""
        node = self.by_handle(handle)
        return [] if node is None else list(self.places(node.id))

    def identity(self, node: NodeId) -> tuple[bytes, Seen] | None:
        """The handle of a node, and what was seen of it last."""
        row = self.db.execute(
            "SELECT handle, ino, size, mtime, ctime FROM node WHERE id=?", (node,)
        ).fetchone()
        if row is None:
            return None
        handle, ino, size, mtime, ctime = row
        return handle, Seen(ino, size, int(mtime), int(ctime))

    def known(self, node: NodeId) -> tuple[Node, Seen] | None:
        """One node and what was seen of it last."""
        row = self.db.execute(f"SELECT {_COLUMNS}, ino FROM node WHERE id=?", (node,)).fetchone()
        if row is None:
            return None
        found = _node(row[:-1])
        return found, Seen(row[-1], row[2], found.attributes.mtime_ns, found.ctime_ns)

    def places(self, node: NodeId) -> list[Place]:
        """The names of one node."""
        return self.db.execute("SELECT parent, name FROM name WHERE node=?", (node,)).fetchall()

    def path(self, node: NodeId) -> bytes | None:
        """A path of a node below the root, "" for the root; ``None`` if it has none.

        While a tree is seen a part at a time, directories may look as if each were in the other.
        """
        parts: list[bytes] = []
        seen = set[NodeId]()
        while node != ROOT:
            if node in seen:
                return None
            seen.add(node)
            row = self.db.execute(
                "SELECT parent, name FROM name WHERE node=? ORDER BY name LIMIT 1", (node,)
            ).fetchone()
            if row is None:
                return None
            node = row[0]
            parts.append(row[1])
        return b"/".join(reversed(parts))

    def place_path(self, place: Place) -> bytes:
        """The path of a place, for output."""
        parent = self._paths.get(place[0])
        if parent is None:
            parent = self.path(place[0])
            if parent is None:
                return b"?/" + place[1]
            if len(self._paths) > _PATHS:
                self._paths = {ROOT: b""}
            self._paths[place[0]] = parent
        return parent + b"/" + place[1] if parent else place[1]

    def find(self, path: bytes) -> NodeId | None:
        """The node at a path below the root; ``None`` if there is none."""
        node = ROOT
        for name in path.split(b"/") if path else ():
            row = self.db.execute(
                "SELECT node FROM name WHERE parent=? AND name=?", (node, name)
            ).fetchone()
            if row is None:
                return None
            node = row[0]
        return node

    def nearest_directory(self, path: bytes) -> NodeId:
        """The directory at a path, or the nearest one above it that the index knows."""
        node = ROOT
        for name in path.split(b"/") if path else ():
            row = self.db.execute(
                "SELECT node FROM name JOIN node ON node.id=name.node "
                "WHERE name.parent=? AND name.name=? AND node.kind=?",
                (node, name, int(Kind.DIR)),
            ).fetchone()
            if row is None:
                break
            node = row[0]
        return node

    def stamp(self, place: Place) -> bytes:
        """What was seen of the object at a place."""
        sql = "SELECT stamp FROM name WHERE parent=? AND name=?"
        row = self.db.execute(sql, place).fetchone()
        return NO_STAMP if row is None else bytes(row[0])

    def listing(self, parent: NodeId) -> dict[bytes, tuple[NodeId, bytes]]:
        """name -> (node, stamp) of one directory."""
        return {
            name: (node, stamp)
            for name, node, stamp in self.db.execute(
                "SELECT name, node, stamp FROM name WHERE parent=?", (parent,)
            )
        }

    def count(self) -> int:
        """How many names the tree has."""
        row = self.db.execute("SELECT count(*) FROM name").fetchone()
        return int(row[0])

    # -- changes -------------------------------------------------------------

    def insert_node(self, node: Node, handle: bytes, ino: int) -> bool:
        """Insert a new node; ``False`` if another node has this identity already."""
        cursor = self.db.execute(f"INSERT OR IGNORE {_VALUES}", _row(node, handle, ino))
        return cursor.rowcount == 1

    def put_node(self, node: Node, handle: bytes, ino: int) -> None:
        """Insert or replace a node's row."""
        self.db.execute(f"INSERT OR REPLACE {_VALUES}", _row(node, handle, ino))

    def disown(self, node: NodeId) -> None:
        """Take a node's identity away: another object has it. It is to be looked at again."""
        self.db.execute("UPDATE node SET handle=CAST(handle||'-'||id AS BLOB) WHERE id=?", (node,))
        self.db.execute("UPDATE name SET stamp=? WHERE node=?", (NO_STAMP, node))

    def put_name(self, place: Place, node: NodeId, stamp: bytes) -> None:
        """Insert or replace a name."""
        self.db.execute("INSERT OR REPLACE INTO name VALUES(?,?,?,?)", (*place, node, stamp))

    def set_stamp(self, place: Place, stamp: bytes) -> None:
        """Record the evidence under which the name was found unchanged."""
        self.db.execute("UPDATE name SET stamp=? WHERE parent=? AND name=?", (stamp, *place))

    def drop_name(self, place: Place) -> None:
        """Remove a name; the node stays until it is proven gone."""
        self.db.execute("DELETE FROM name WHERE parent=? AND name=?", place)
        if len(self._paths) > 1:
            self._paths = {ROOT: b""}

    def drop_node(self, node: NodeId) -> None:
        """Remove a node's row: its object is gone or no longer ours."""
        self.db.execute("DELETE FROM node WHERE id=?", (node,))
        self.db.execute("DELETE FROM installed WHERE node=?", (node,))

    def set_digest(self, node: NodeId, version: int, size: int, digest: bytes | None) -> None:
        """Record what a version's bytes are."""
        self.db.execute(
            "UPDATE node SET digest=?, size=? WHERE id=? AND version=?",
            (digest, size, node, version),
        )

    def set_installed(self, node: NodeId, version: int) -> None:
        """The engine itself put this version of a file there."""
        self.db.execute("INSERT OR REPLACE INTO installed VALUES(?,?)", (node, version))

    def is_installed(self, node: Node) -> bool:
        """Whether a file is as the engine put it there, and nobody's own work."""
        row = self.db.execute("SELECT version FROM installed WHERE node=?", (node.id,)).fetchone()
        return row is not None and row[0] == node.version

    def distrust(self, node: NodeId) -> None:
        """Look at a node again next time, whatever its times say."""
        self.db.execute("UPDATE name SET stamp=? WHERE node=?", (NO_STAMP, node))

    def is_trusted(self, node: NodeId) -> bool:
        """Whether the times of a file tell what happened to it."""
        row = self.db.execute(
            "SELECT 1 FROM name WHERE node=? AND stamp=? LIMIT 1", (node, NO_STAMP)
        ).fetchone()
        return row is None

    def mark(self, node: NodeId, pair: int = 0) -> None:
        """Queue a node for every pair, but for the one that did it itself."""
        self.db.execute("INSERT INTO mark(node, pair) VALUES(?, ?)", (node, pair))

    def last_mark(self) -> int:
        """The number of the newest mark."""
        row = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name='mark'").fetchone()
        return 0 if row is None else int(row[0])

    def marks_after(self, seq: int, pair: int) -> tuple[list[NodeId], int]:
        """The next marked nodes, oldest first, but for those a pair marked itself.

        Returns:
            The nodes, and how far the queue is read then; equal to ``seq`` at its end.
        """
        rows = self.db.execute(
            "SELECT seq, node, pair FROM mark WHERE seq>? ORDER BY seq LIMIT 5000", (seq,)
        ).fetchall()
        nodes = dict.fromkeys(node for _, node, owner in rows if owner != pair)
        return list(nodes), rows[-1][0] if rows else seq

    def forget(self, node: NodeId) -> None:
        """A filter hides the node from now on."""
        self.db.execute("INSERT OR IGNORE INTO forgotten VALUES(?)", (node,))

    def trim_marks(self, seq: int) -> None:
        """Drop marks every pair has read."""
        self.db.execute("DELETE FROM mark WHERE seq<=?", (seq,))


_VALUES = "INTO node VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"


def _time(ns: int) -> int | bytes:
    """A time as SQLite can hold it: 64 bits end in the year 2262, ext4 goes on to 2446."""
    return ns if -_I64 <= ns < _I64 else b"%d" % ns


def _row(node: Node, handle: bytes, ino: int) -> tuple[object, ...]:
    c, a = node.content, node.attributes
    return (
        node.id, c.kind, handle, ino, c.size, c.rdev, c.digest, c.target, a.mode, a.uid,
        a.gid, _time(a.mtime_ns), _time(node.ctime_ns), xattrs_to_text(a.xattrs, a.acl),
        node.version, node.nlink, int(node.foreign),
    )  # fmt: skip


def _node(row: tuple) -> Node:  # type: ignore[type-arg]
    (node, kind, size, rdev, digest, target, mode, uid, gid, mtime, ctime, xattrs, version, nlink,
     foreigners) = row  # fmt: skip
    names, acl = xattrs_from_text(xattrs)
    return Node(
        node,
        Content(Kind(kind), size, digest, target, rdev),
        Attributes(mode, uid, gid, int(mtime), names, acl),
        int(ctime),
        version,
        bool(foreigners),
        nlink,
    )
