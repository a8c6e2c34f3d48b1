"""The conflict list of one replica: what was decided, what waits for a person, what they chose.

Both sides of a pair keep the same rows. A choice is only recorded here; the next run of the
pair carries it out, because the version that is wanted may lie at the other side.
"""

import json
from collections.abc import Iterable
from enum import Enum
from typing import Any

from msgspec import Struct

from bisync.core.path import display, parse
from bisync.errors import UsageError
from bisync.fs.database import Database


class Take(Enum):
    """What a person may choose for a conflict."""

    LIVE = "live"  # the version at the name; of a conflict that waits: this root's version
    KEPT = "kept"  # the loser; of a conflict that waits: the other root's version
    BOTH = "both"  # the loser beside the winner, under a conflict name


class Quarrel(Struct, frozen=True, kw_only=True):
    """One conflict as the list keeps it."""

    id: str
    kind: str  # ConflictKind.value
    path: bytes
    time_ns: int
    reason: str
    detail: str = ""
    waiting: bool = False  # nobody decided yet
    winner: str | None = None  # path of the root whose version is live
    loser: str | None = None  # path of the root that lost
    loser_replica: str = ""  # replica id of the side whose store has the loser
    kept: bytes | None = None  # the loser's path below that store
    kept_as: bytes | None = None  # the loser's path in the tree, where it stayed there
    mtime_ns: int = 0  # of the loser
    digest: str | None = None  # of the loser, hex

    def to_json(self) -> dict[str, Any]:
        """The row for programs."""
        return {
            "type": "conflict",
            "id": self.id,
            "kind": self.kind,
            "path": display(self.path),
            "time_ns": self.time_ns,
            "reason": self.reason,
            "detail": self.detail,
            "waiting": self.waiting,
            "winner": self.winner,
            "loser": self.loser,
            "loser_replica": self.loser_replica,
            "kept": None if self.kept is None else display(self.kept),
            "kept_as": None if self.kept_as is None else display(self.kept_as),
            "mtime_ns": self.mtime_ns,
            "digest": self.digest,
        }


def _from_json(row: dict[str, Any]) -> Quarrel:
    values = {name: value for name, value in row.items() if name != "type"}
    for name in ("path", "kept", "kept_as"):
        if values[name] is not None:
            values[name] = parse(values[name])
    return Quarrel(**values)


class Choice(Struct, frozen=True):
    """What a person chose for one conflict."""

    quarrel: Quarrel
    take: Take


class ConflictList:
    """The rows of one replica's database. Transactions are the caller's."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def rows(self, pair: int | None = None) -> list[Quarrel]:
        """All conflicts, oldest first; of one pair if given."""
        where, values = ("", ()) if pair is None else (" WHERE pair=?", (pair,))
        found = self.db.execute(f"SELECT payload FROM conflict{where} ORDER BY time_ns, id", values)
        return [_from_json(json.loads(row[0])) for row in found.fetchall()]

    def find(self, which: str) -> Quarrel:
        """The conflict with this id, or the newest one at this path.

        Raises:
            UsageError: there is none.
        """
        path = parse(which.removeprefix("./"))
        fits = [q for q in self.rows() if q.id == which or q.path == path]
        if not fits:
            raise UsageError(f"{which}: no such conflict; 'bisync conflicts' lists them")
        return fits[-1]

    def add(self, pair: int, rows: Iterable[Quarrel]) -> None:
        """Add conflicts; one that waits replaces its own row of an earlier run."""
        self.db.many(
            "INSERT OR REPLACE INTO conflict VALUES(?,?,?,?)",
            [(row.id, pair, row.time_ns, json.dumps(row.to_json())) for row in rows],
        )

    def choose(self, quarrel: Quarrel, take: Take) -> None:
        """Record a person's choice."""
        self.db.execute("INSERT OR REPLACE INTO choice VALUES(?,?)", (quarrel.id, take.value))

    def choices(self, pair: int) -> list[Choice]:
        """What was chosen and is still to be carried out."""
        taken = dict(self.db.execute("SELECT id, take FROM choice").fetchall())
        return [Choice(q, Take(taken[q.id])) for q in self.rows(pair) if q.id in taken]

    def forget(self, ids: Iterable[str]) -> None:
        """Take conflicts off the list."""
        for each in ids:
            self.db.execute("DELETE FROM conflict WHERE id=?", (each,))
            self.db.execute("DELETE FROM choice WHERE id=?", (each,))
