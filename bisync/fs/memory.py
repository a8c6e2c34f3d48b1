"""What the destination of a mirror remembers of its source: which object became which node.

It saves work and finds renames; losing it costs a comparison by size and time, never data.
"""

from collections.abc import Iterable

from msgspec import Struct

from bisync.core.node import Kind, Node, NodeId, Place
from bisync.core.wish import Held, Remembered, Seen
from bisync.fs.database import Database
from bisync.fs.index import Index

_JOINED = (
    "SELECT name.name, name.node, memory.handle, memory.ino, memory.size, memory.mtime, "
    "memory.ctime, memory.version, memory.digest FROM name LEFT JOIN memory ON "
    "memory.node=name.node AND memory.source=? WHERE name.parent=?"
)
_COLUMNS = "handle, ino, size, mtime, ctime, version, digest"


class Lesson(Struct, frozen=True):
    """One thing to remember: an entry of the source and the node it is equal to now."""

    seen: Seen
    node: Node


class Memory:
    """The rows of one source of one destination."""

    def __init__(self, db: Database, index: Index, base: NodeId, location: str) -> None:
        self.db = db
        self.index = index
        self._base = base
        self._location = location
        row = db.execute(
            "SELECT id, identity FROM source WHERE base=? AND location=?", (base, location)
        ).fetchone()
        self.source = 0 if row is None else int(row[0])
        self.identity = "" if row is None else str(row[1])  # of the source at the last run

    def open(self, identity: str) -> None:
        """Use the memory for a source; another one than last time begins anew."""
        self.db.begin()
        if not self.source:
            cursor = self.db.execute(
                "INSERT INTO source VALUES(NULL,?,?,?)", (self._base, self._location, identity)
            )
            self.source = int(cursor.lastrowid or 0)
        elif self.identity != identity:
            self.db.execute("DELETE FROM memory WHERE source=?", (self.source,))
            self.db.execute("UPDATE source SET identity=? WHERE id=?", (identity, self.source))
        self.identity = identity

    def forget(self) -> None:
        """The destination's nodes are not those that are remembered."""
        self.db.begin()
        self.db.execute("DELETE FROM memory")

    # -- lookups (Target) ----------------------------------------------------

    def listing(self, node: NodeId) -> dict[bytes, Held]:
        """What a directory of the destination holds, with what is remembered of it."""
        rows = self.db.execute(_JOINED, (self.source, node)).fetchall()
        nodes = self.index.nodes([row[1] for row in rows])
        return {row[0]: Held(nodes[row[1]], _remembered(row[2:])) for row in rows}

    def held(self, node: NodeId) -> Held:
        """One node of the destination."""
        row = self.db.execute(
            f"SELECT {_COLUMNS} FROM memory WHERE source=? AND node=?", (self.source, node)
        ).fetchone()
        found = self.index.node(node)
        if found is None:
            raise LookupError(f"node {node} is not in the index")
        return Held(found, None if row is None else _remembered(row))

    def remembered(self, handle: bytes) -> Held | None:
        """The node that came from a source object, if it is still there."""
        row = self.db.execute(
            "SELECT node FROM memory WHERE source=? AND handle=?", (self.source, handle)
        ).fetchone()
        if row is None or not self.index.places(row[0]):
            return None
        return self.held(row[0])

    def names(self, node: NodeId) -> frozenset[Place]:
        """All names of a node."""
        return frozenset(self.index.places(node))

    # -- learning ------------------------------------------------------------

    def learn(self, lessons: Iterable[Lesson]) -> None:
        """Remember what is equal now; no commit."""
        rows = []
        for lesson in lessons:
            seen, node = lesson.seen, lesson.node
            size = seen.content.size if seen.kind is Kind.FILE else 0
            rows.append(
                (self.source, seen.handle, node.id, seen.ino, size, seen.attributes.mtime_ns,
                 seen.ctime_ns, node.version, node.content.digest)
            )  # fmt: skip
        self.db.begin()
        self.db.many("INSERT OR REPLACE INTO memory VALUES(?,?,?,?,?,?,?,?,?)", rows)

    def tidy(self) -> None:
        """Forget what has no name any more; no commit."""
        self.db.begin()
        self.db.execute(
            "DELETE FROM memory WHERE source=? AND NOT EXISTS "
            "(SELECT 1 FROM name WHERE name.node=memory.node)",
            (self.source,),
        )


def _remembered(row: tuple) -> Remembered | None:  # type: ignore[type-arg]
    if row[0] is None:
        return None
    handle, ino, size, mtime, ctime, version, digest = row
    return Remembered(handle, ino, size, int(mtime), int(ctime), version, digest)
