"""The operation log: what was found before each agreed change, so that time can be rewound.

Append-only. Of a pair it is fed by the archive's commits, keyed by archive numbers; of the
mirrors into a root (pair 0) by what they applied, keyed by node numbers.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct

from bisync.core.node import ROOT, Content, Kind
from bisync.core.past import Past, State
from bisync.core.rows import (
    attributes_from_list,
    attributes_from_text,
    attributes_to_list,
    content_from_list,
    content_to_list,
    places_from_list,
    places_to_list,
)
from bisync.fs.database import Database
from bisync.fs.index import Index

MIRRORS = 0  # the pair number of what mirrors did


class Operation(Struct, frozen=True):
    """One change of one node, as it was found before."""

    time_ns: int
    pair: int
    epoch: int
    key: int
    before: Past | None
    reason: str = ""  # what was decided, and by which rule


class OperationLog:
    """The log of one replica."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def began(self, pair: int) -> int | None:
        """Since when everything is in the log (ns); ``None``: it holds nothing."""
        found = self.db.get(f"log_began_{pair}")
        return None if found is None else int(found)

    def begin(self, pair: int, time_ns: int) -> None:
        """From now on everything is logged; no commit."""
        if self.began(pair) is None:
            self.db.put(f"log_began_{pair}", time_ns)

    def record(
        self,
        pair: int,
        epoch: int,
        rows: Iterable[tuple[int, Past | None]],
        reasons: Mapping[int, str],
    ) -> None:
        """Log what changes now, with the reasons by key; no commit.

        Nothing is logged before :meth:`begin`.
        """
        if self.began(pair) is None:
            return
        now = time.time_ns()
        self.db.many(
            "INSERT INTO operation(pair, epoch, time_ns, key, before, reason) VALUES(?,?,?,?,?,?)",
            [(pair, epoch, now, k, _to_text(past), reasons.get(k, "")) for k, past in rows],
        )

    def since(self, pair: int, time_ns: int) -> Iterator[tuple[int, Past | None]]:
        """What was found by each operation after a time, the newest first."""
        for key, text in self.db.execute(
            "SELECT key, before FROM operation WHERE pair=? AND time_ns>? ORDER BY seq DESC",
            (pair, time_ns),
        ):
            yield key, _from_text(text)

    def backwards(self, pair: int) -> Iterator[Operation]:
        """All operations, the newest first."""
        for t, p, e, k, text, reason in self.db.execute(
            "SELECT time_ns, pair, epoch, key, before, reason FROM operation WHERE pair=? "
            "ORDER BY seq DESC",
            (pair,),
        ):
            yield Operation(t, p, e, k, _from_text(text), reason)

    def ever_named(self, pair: int, name: bytes) -> list[int]:
        """The keys of nodes that once had a name (its last component)."""
        text = json.dumps(name.decode("latin-1"))[1:-1]
        rows = self.db.execute(
            "SELECT DISTINCT key FROM operation WHERE pair=? AND instr(before, ?)>0",
            (pair, f'"{text}"]'),
        )
        return [row[0] for row in rows.fetchall()]

    def forget_before(self, time_ns: int) -> None:
        """Drop what is older than the store keeps versions; no commit."""
        self.db.execute("DELETE FROM operation WHERE time_ns<?", (time_ns,))
        rows = self.db.execute("SELECT key, value FROM meta WHERE key LIKE 'log_began_%'")
        for key, value in rows.fetchall():
            if int(value) < time_ns:
                self.db.put(key, time_ns)


def _to_text(past: Past | None) -> str | None:
    if past is None:
        return None
    row = [
        places_to_list(past.names),
        content_to_list(past.content),
        attributes_to_list(past.attributes),
    ]
    return json.dumps(row, separators=(",", ":"))


def _from_text(text: str | None) -> Past | None:
    if text is None:
        return None
    names, content, attributes = json.loads(text)
    found = content_from_list(content)
    return Past(
        places_from_list(names), found or Content(Kind.DIR), attributes_from_list(attributes)
    )


def observed_now(index: Index) -> State:
    """The tree as the index has it."""
    names: dict[int, set[tuple[int, bytes]]] = {}
    for node, parent, name in index.db.execute("SELECT node, parent, name FROM name"):
        names.setdefault(node, set()).add((parent, name))
    return {
        key: Past(frozenset(names.get(key, ())), node.content, node.attributes)
        for key, node in index.nodes([ROOT, *names]).items()
    }


def agreed_now(db: Database, pair: int, column: int) -> State:
    """The tree as a pair agreed on it, with one side's attributes."""
    names: dict[int, set[tuple[int, bytes]]] = {}
    for key, parent, name in db.execute(
        "SELECT key, parent, name FROM agreed_name WHERE pair=?", (pair,)
    ):
        names.setdefault(key, set()).add((parent, name))
    state: State = {}
    for key, kind, size, rdev, digest, target, text in db.execute(
        f"SELECT key, kind, size, rdev, digest, target, attributes{column} FROM agreed "
        "WHERE pair=?",
        (pair,),
    ):
        content = Content(Kind(kind), size, digest, target, rdev)
        state[key] = Past(frozenset(names.get(key, ())), content, attributes_from_text(text))
    return state
