"""The destination of a mirror: a tree on this machine with a memory of its source."""

from collections.abc import Callable, Sequence

from bisync.core.groups import Together
from bisync.core.node import ROOT, Node, NodeId
from bisync.core.past import Past
from bisync.core.plan import Transition, nodes_of
from bisync.core.safety import HOUR_NS
from bisync.core.wish import Held
from bisync.endpoint.local import LocalEndpoint
from bisync.errors import PathError, UsageError
from bisync.fs.content import ContentSource
from bisync.fs.memory import Lesson, Memory
from bisync.fs.oplog import MIRRORS, OperationLog
from bisync.fs.recovery import recover
from bisync.fs.replica import Options
from bisync.fs.result import Result
from bisync.fs.store import Store
from bisync.fs.walk import ScanResult

_NO_PAIR = 0  # a mirror's steps belong to no pair: every pair has to hear of them


class Destination:
    """A folder of one local root as the destination of a mirror."""

    def __init__(self, root: bytes, below: bytes, options: Options, *, dry: bool) -> None:
        """``below`` is the folder's path in the root; "" is the root itself."""
        self.side = LocalEndpoint(root, options, dry=dry)
        self.dry = dry
        self.below = below
        self.base: NodeId = ROOT
        self.memory: Memory | None = None
        self.messages: list[str] = []
        self.problems: list[tuple[bytes, str]] = []  # that it was opened with

    def open(self) -> None:
        """Make the state, and settle what an earlier run left half done."""
        hello = self.side.hello()
        moved = hello.known and hello.recorded != hello.root
        self.side.establish(new_incarnation=moved)
        if moved:
            self.messages.append("the destination was moved or restored; it is looked at anew")
        if not self.dry:
            found = recover(self.side.replica, _NO_PAIR)
            self.messages += found.said
            self.problems += found.stuck
            db = self.side.replica.database
            db.begin()
            db.execute("DELETE FROM result WHERE pair=?", (_NO_PAIR,))
            db.commit()

    def scan(self, progress: Callable[[int], None]) -> ScanResult:
        """Observe the whole root."""
        found = self.side.scan(None, progress)
        node = self.side.replica.index.find(self.below)
        if node is None:
            raise UsageError(f"{self.below.decode(errors='replace')}: it is no directory")
        self.base = node
        return found

    def remember(self, location: str, identity: str) -> str:
        """Open the memory of a source; return the identity it had last time."""
        r = self.side.replica
        self.memory = Memory(r.database, r.index, self.base, location)
        before = self.memory.identity
        self.memory.open(identity)
        self.side.may_be_written = self._came_from_there
        return before

    def _came_from_there(self, node: Node) -> bool:
        """Whether a file's version is one that this source had: it knows what it replaced."""
        assert self.memory is not None
        known = self.memory.held(node.id).memory
        return known is not None and known.version == node.version

    def entries(self) -> int:
        """How many names the root has."""
        return self.side.replica.index.count()

    def deleted_since(self, time_ns: int) -> int:
        """Entries deleted by mirrors since a time."""
        row = self.side.replica.database.execute(
            "SELECT coalesce(sum(count), 0) FROM deletion WHERE pair=? AND time_ns>?",
            (_NO_PAIR, time_ns),
        ).fetchone()
        return int(row[0])

    def digest(self, held: Held) -> bytes | None:
        """The digest of a file of the destination; ``None`` if it cannot be read now."""
        try:
            return self.side.replica.contents.read(held.node.id).digest
        except PathError:
            return None

    def apply(
        self,
        steps: list[Transition],
        source: ContentSource,
        together: Sequence[Together] = (),
    ) -> list[Result]:
        """Perform transitions."""
        nodes = {node for step in steps for node in nodes_of(step)}
        before = self._past(nodes)
        results = self.side.apply_for(_NO_PAIR, steps, {}, source, together)
        after = self._past(nodes)
        changed = [n for n in sorted(nodes) if before.get(n) != after.get(n)]
        log = OperationLog(self.side.replica.database)
        self.side.replica.database.begin()
        reasons = {step.node: f"mirror: {step.reason or 'as the source'}" for step in steps}
        log.record(MIRRORS, 0, [(node, before.get(node)) for node in changed], reasons)
        return results

    def _past(self, nodes: set[NodeId]) -> dict[NodeId, Past]:
        index = self.side.replica.index
        names = index.names_of(nodes)
        found = index.nodes(nodes)
        return {
            node: Past(names.get(node, frozenset()), row.content, row.attributes)
            for node, row in found.items()
            if node == ROOT or names.get(node)
        }

    def finish(self, lessons: list[Lesson], deletions: int, now_ns: int) -> None:
        """Remember what is equal now, and make all of it durable."""
        assert self.memory is not None
        db = self.side.replica.database
        self.memory.learn(lessons)
        self.memory.tidy()
        db.execute("DELETE FROM deletion WHERE time_ns<?", (now_ns - HOUR_NS,))
        if deletions:
            db.execute(
                "INSERT INTO deletion VALUES(?,?,?,?,?)",
                (_NO_PAIR, 0, now_ns, deletions, self.entries()),
            )
        db.execute("DELETE FROM result WHERE pair=?", (_NO_PAIR,))
        OperationLog(db).begin(MIRRORS, now_ns)
        self.side.replica.index.save_numbers()
        db.commit()

    @property
    def store(self) -> Store:
        """Where displaced objects go."""
        return self.side.replica.store

    def close(self) -> None:
        """Give everything back."""
        self.side.close()
