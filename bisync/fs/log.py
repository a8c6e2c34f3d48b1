"""The result log: what a batch is about to do, and what came of it.

One row per transition: an intent before the first name is touched, a result behind the last
flush. It is what recovery reads after a crash, and it stays until the archive has committed.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

from bisync.core.groups import SHARED, names_of_group, stem
from bisync.core.node import Kind, NodeId, Place
from bisync.core.path import valid_name
from bisync.core.plan import (
    Exchange,
    Link,
    Make,
    Move,
    Park,
    Remove,
    Replace,
    SetAttributes,
    Transition,
    Unlink,
    keys_of,
)
from bisync.errors import EndpointError
from bisync.fs.database import Database
from bisync.fs.incoming import Staged
from bisync.fs.index import Index
from bisync.fs.soften import soft

FAILED = "Failed"  # in place of an operation
NOBODYS = "00"  # a handle that no object has: what is there was exchanged, and is not ours
STUCK_PAIR = -1  # its rows say where that belongs which the store did not take yet
_INSERT = "INSERT INTO result(pair, done, payload) VALUES(?, 0, ?)"


def place_to_row(place: Place) -> list[Any]:
    """A place as JSON: one byte is one character."""
    return [place[0], place[1].decode("latin-1")]


def place_from_row(row: list[Any]) -> Place:
    """Undo :func:`place_to_row`.

    Raises:
        EndpointError: nobody wrote that: a name leads nowhere else.
    """
    name = row[1].encode("latin-1")
    if not valid_name(name):
        raise EndpointError("the result log is damaged: a place that is none")
    return (row[0], name)


class ResultLog:
    """The rows of one pair. Transactions that :meth:`intend` and :meth:`conclude` end."""

    def __init__(self, db: Database, index: Index, pair: int) -> None:
        self.db = db
        self.index = index
        self.pair = pair
        self.rows: dict[int, int] = {}  # row numbers, by position in the batch

    def intend(
        self,
        todo: list[tuple[int, Transition]],
        staged: dict[int, Staged],
        outs: dict[int, bytes],
        updates: dict[int, str],
        softened: dict[NodeId, int],
        together: Sequence[Collection[int]] = (),
    ) -> None:
        """Write down durably what is about to be done.

        Args:
            todo: transitions with their positions.
            staged: new objects, by position.
            outs: names below ``out/`` for what is displaced, by position.
            updates: rows for the ancestor by archive number, as JSON.
            softened: directories that will be writable for a moment, with their modes.
            together: keys whose steps are done all, or none.
        """
        keys: set[int] = set()
        group_of = {key: number for number, group in enumerate(together) for key in group}
        self.db.begin()
        for i, step in todo:
            keys.update(keys_of(step))
            row = self._intent(step, staged.get(i), outs.get(i))
            if step.key in group_of:
                row["with"] = group_of[step.key]
                row["old"] = self._seen(step)
                row["gone"] = self._gone(step)
                row["before"] = self._group_before(step)
                if isinstance(step, Link):
                    row["linked"] = self._made(step.node, todo, staged) or self._state(step.node)
                elif isinstance(step, Remove):
                    row["members"] = [node for _, node in step.members]
                elif isinstance(step, SetAttributes):
                    row["mtime"] = step.attributes.mtime_ns
            text = json.dumps(row, separators=(",", ":"))
            self.rows[i] = self.db.execute(_INSERT, (self.pair, text)).lastrowid or 0
        self.db.many(_INSERT, [(self.pair, updates[key]) for key in sorted(keys & updates.keys())])
        self.db.many(
            "INSERT OR REPLACE INTO softened VALUES(?, ?)",
            [
                *softened.items(),
                *(
                    (step.node, step.attributes.mode)
                    for _, step in todo
                    if isinstance(step, Make)
                    and step.content.kind is Kind.DIR
                    and soft(step.attributes.mode) != step.attributes.mode
                ),
            ],
        )
        self.index.save_numbers()
        self.db.commit()

    def amend(self, i: int, **fields: Any) -> None:
        """Change an intent durably before its step goes on."""
        self.db.begin()
        (text,) = self.db.execute(
            "SELECT payload FROM result WHERE seq=?", (self.rows[i],)
        ).fetchone()
        row = {**json.loads(text), **fields}
        self.db.execute("UPDATE result SET payload=? WHERE seq=?", (json.dumps(row), self.rows[i]))
        self.db.commit()

    def stuck(self, path: bytes, where: dict[str, Any]) -> None:
        """Note what waits for the store, so that it is never taken for unused. No commit.

        Args:
            path: where it was.
            where: where it is: ``out``, ``in`` with a handle, or ``near``, as rows say it.
        """
        self.db.begin()
        note_stuck(self.db, path, where)

    def conclude(self, failed: dict[int, Transition]) -> None:
        """Turn intents into results; of those that failed, by position, only that. No commit."""
        self.db.many(
            "UPDATE result SET payload=? WHERE seq=?",
            [
                (json.dumps({"op": FAILED, "keys": list(keys_of(step))}), self.rows[i])
                for i, step in failed.items()
            ],
        )
        self.db.execute("UPDATE result SET done=1 WHERE pair=? AND done=0", (self.pair,))

    def _intent(self, step: Transition, staged: Staged | None, out: bytes | None) -> dict[str, Any]:
        """What recovery needs to tell whether the step was performed, and to finish it."""
        row: dict[str, Any] = {
            "op": type(step).__name__,
            "keys": list(keys_of(step)),
            "node": step.node,
        }
        if staged is not None:
            row["in"] = staged.name.decode()
            row["handle"] = staged.handle.hex()
            digest = staged.content.digest
            row["digest"] = None if digest is None else digest.hex()
            row["size"] = staged.content.size
            if not isinstance(step, Link):  # of which only the name is new
                is_file = staged.content.kind is Kind.FILE
                row["mtime"] = staged.info.st_mtime_ns if is_file else 0
            known = self.index.identity(step.node)
            if staged.apart is not None and known is not None:
                row["undo"] = staged.apart.undo.decode()
                row["into"] = known[0].hex()
        if out is not None:
            row["out"] = out.decode()
        match step:
            case Make() | Link():
                row["at"] = [place_to_row(step.place)]
                if step.displaces is not None:
                    row["displaces"] = step.displaces.node
                    row["path"] = self._path_text(step.place)
            case Move():
                row["at"] = [place_to_row(step.new)]
                row["was"] = None if step.old is None else place_to_row(step.old)
                if step.displaces is not None and step.old is not None:
                    row["displaces"] = step.displaces.node
                    row["displaced_at"] = place_to_row(step.old)
                    row["path"] = self._path_text(step.new)
            case Exchange():
                row["at"] = [place_to_row(step.new)]
                row["other"] = step.other
                row["other_at"] = place_to_row(step.old)
            case Replace():
                row["at"] = [place_to_row(p) for p in step.places]
                row["path"] = self._path_text(step.places[0])
                old = step.keep_node if step.keep is not None else step.node
                row["displaces"] = old
                if len(step.places) > 1:
                    row["old"] = self._seen(step)
                if step.keep is not None:
                    row["keep"] = place_to_row(step.keep)
                    row["keep_node"] = step.keep_node
            case Park():
                row["from"] = place_to_row(step.old)
            case Remove() | Unlink():
                row["from"] = place_to_row(step.place)
                row["path"] = self._path_text(step.place)
            case SetAttributes():
                pass
        return row

    def _group_before(self, step: Transition) -> list[Any]:
        """What is under all names of a database before anything is done: name, state or null."""
        match step:
            case Make() | Remove() | Link() | Unlink():
                at = [step.place]
            case Replace():
                at = [step.places[0]] if step.keep is None else [step.places[0], step.keep]
            case Move() | Exchange():
                at = [step.new] if step.old is None else [step.old, step.new]
            case _:
                return []
        places = {(p, n) for p, name in at for b in (name, stem(name)) for n in names_of_group(b)}
        there = self.index.at(places)
        return [
            [place_to_row(place), self._state(there[place]) if place in there else None]
            for place in sorted(places)
            if not place[1].endswith(SHARED)
        ]

    def _state(self, node: NodeId) -> list[Any] | None:
        known, row = self.index.identity(node), self.index.node(node)
        if known is None or row is None:
            return None
        if row.kind is not Kind.FILE:
            return [known[0].hex(), 0, 0]
        return [known[0].hex(), known[1].size, known[1].mtime_ns]

    def _seen(self, step: Transition) -> list[Any] | None:
        """What a step displaces, as it was when it was observed."""
        node = step.keep_node if isinstance(step, Replace) and step.keep is not None else step.node
        return None if node is None else self._state(node)

    @staticmethod
    def _made(
        node: NodeId, todo: list[tuple[int, Transition]], staged: dict[int, Staged]
    ) -> list[Any] | None:
        """The state that an object has once it is made, if it is to be."""
        for i, step in todo:
            if step.node == node and isinstance(step, Make | Replace) and i in staged:
                new = staged[i]
                if new.content.kind is not Kind.FILE:
                    return [new.handle.hex(), 0, 0]
                return [new.handle.hex(), new.content.size, new.info.st_mtime_ns]
        return None

    def _gone(self, step: Transition) -> list[Any] | None:
        """What a step takes away from its node's new place, as it was when it was observed."""
        if isinstance(step, Exchange):
            return self._state(step.other)
        if isinstance(step, Make | Move) and step.displaces is not None:
            return self._state(step.displaces.node)
        return None

    def _path_text(self, place: Place) -> str:
        return self.index.place_path(place).decode("latin-1")


def note_stuck(db: Database, path: bytes, where: dict[str, Any]) -> None:
    """Note what waits for the store: its path below the root, and where it lies."""
    row = {"op": "Stuck", "keys": [], "node": 0, "path": path.decode("latin-1"), **where}
    db.execute(_INSERT, (STUCK_PAIR, json.dumps(row)))
