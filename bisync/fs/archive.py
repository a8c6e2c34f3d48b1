"""The ancestor of one pair on disk, kept on both sides as a chain of epochs.

Each commit has a number, a random nonce, the nonce of the one before and a running digest
of everything committed. It is *prepared* on both sides before either marks it committed,
so that after any crash both can say which commits count.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import Struct

from bisync.core.node import ROOT, Agreed, Content, Kind, NodeId, Place, Side
from bisync.core.past import Past
from bisync.core.plan import Update
from bisync.core.rows import (
    attributes_from_list,
    attributes_from_text,
    content_from_list,
    places_from_list,
    update_to_list,
)
from bisync.delta.digest import chain_digest
from bisync.fs.database import Database
from bisync.fs.oplog import OperationLog

_HISTORY = 1000  # links of the chain that are remembered
_ROWS = 1000  # at a time


class Epoch(Struct, frozen=True):
    """One link of the chain."""

    number: int = 0
    nonce: str = ""
    predecessor: str = ""


class PairState(Struct, frozen=True):
    """What a replica knows about one of its pairs, without its peer."""

    pair: int
    peer: str  # replica id
    column: int  # which of the two columns of a row is this replica's
    location: str  # where the peer was last reached
    identity: str  # of the peer's root
    epoch: Epoch
    digest: bytes
    entries: int
    cursor: int | None  # marks read so far; None: the whole tree is still to be looked at
    incarnation: str  # of this replica when the cursor was written
    complete_ns: int | None  # when a run last ended with nothing left to do


class Commit(Struct, frozen=True):
    """One commit of the archive: rows, and its place in the chain."""

    epoch: Epoch
    payload: bytes  # JSON list of update rows, in columns 0 and 1


class Chain(Struct, frozen=True):
    """Where an archive stands, for another one that becomes its copy."""

    epoch: Epoch
    digest: bytes
    entries: int
    next_key: int
    links: tuple[tuple[int, str], ...]  # number and nonce of those that are remembered


class Archive:
    """One pair's archive on one side. Rows are in *columns*, the same on both sides.

    Lookups (``AgreedView``) are in sides of the running session: ``flipped`` says that
    alpha is column 1.
    """

    def __init__(self, db: Database, pair: int, *, flipped: bool) -> None:
        self.db = db
        self.pair = pair
        self.flipped = flipped
        self.reasons: dict[int, str] = {}  # of what is committed next, for the operation log
        self._loading = False

    # -- lookups -------------------------------------------------------------

    def _both(self, pair: tuple) -> tuple:  # type: ignore[type-arg]
        return (pair[1], pair[0]) if self.flipped else pair

    def nodes(self, keys: Iterable[int]) -> dict[int, Agreed]:
        """The agreed nodes with these numbers."""
        found = {}
        for row in self._each("SELECT * FROM agreed WHERE pair=? AND key", keys):
            found[row[1]] = self._agreed(row)
        return found

    def _agreed(self, row: tuple) -> Agreed:  # type: ignore[type-arg]
        (_, key, node0, node1, kind, size, rdev, digest, target, attr0, attr1, version0, version1,
         presumed) = row  # fmt: skip
        attributes = (attributes_from_text(attr0), attributes_from_text(attr1))
        return Agreed(
            key,
            Content(Kind(kind), size, digest, target, rdev),
            self._both(attributes),
            self._both((node0, node1)),
            self._both((version0, version1)),
            bool(presumed),
        )

    def names_of(self, keys: Iterable[int]) -> dict[int, frozenset[Place]]:
        """All names of each agreed node."""
        found: dict[int, set[Place]] = {}
        sql = "SELECT key, parent, name FROM agreed_name WHERE pair=? AND key"
        for key, parent, name in self._each(sql, keys):
            found.setdefault(key, set()).add((parent, name))
        return {key: frozenset(names) for key, names in found.items()}

    def at(self, places: Iterable[Place]) -> dict[Place, int]:
        """What was agreed at each place."""
        found = {}
        for place in places:
            row = self.db.execute(
                "SELECT key FROM agreed_name WHERE pair=? AND parent=? AND name=?",
                (self.pair, *place),
            ).fetchone()
            if row is not None:
                found[place] = row[0]
        return found

    def children(self, keys: Iterable[int]) -> dict[int, list[tuple[bytes, int]]]:
        """What each agreed directory held."""
        return {
            key: self.db.execute(
                "SELECT name, key FROM agreed_name WHERE pair=? AND parent=?", (self.pair, key)
            ).fetchall()
            for key in keys
        }

    def by_side(self, side: Side, ids: Iterable[NodeId]) -> dict[NodeId, int]:
        """The archive's numbers of a side's nodes."""
        column = self.column(side)
        sql = (
            f"SELECT node{column}, key FROM agreed INDEXED BY agreed_node{column} "
            f"WHERE pair=? AND node{column}"
        )
        return dict(self._each(sql, ids))

    def column(self, side: Side) -> int:
        """The column of a side of this session."""
        return 1 - side if self.flipped else int(side)

    def _each(self, sql: str, values: Iterable[int]) -> Iterator[tuple]:  # type: ignore[type-arg]
        todo = list(values)
        for start in range(0, len(todo), 200):
            batch = todo[start : start + 200]
            marks = ",".join("?" * len(batch))
            yield from self.db.execute(f"{sql} IN ({marks})", (self.pair, *batch))

    # -- the pair's own row --------------------------------------------------

    def state(self) -> PairState:
        """The pair's row."""
        found = pair_states(self.db, self.pair)
        return found[0]

    def next_key(self) -> int:
        """The first archive number never used."""
        row = self.db.execute("SELECT next_key FROM pair WHERE id=?", (self.pair,)).fetchone()
        return int(row[0])

    def nonces(self) -> set[str]:
        """Nonces of the links that are remembered."""
        rows = self.db.execute("SELECT nonce FROM chain WHERE pair=?", (self.pair,))
        return {row[0] for row in rows}

    def presumed(self, after: int, most: int) -> list[int]:
        """Numbers above one of files that were taken for equal by size and time; so many."""
        sql = "SELECT key FROM agreed WHERE pair=? AND key>? AND presumed=1 ORDER BY key LIMIT ?"
        return [key for (key,) in self.db.execute(sql, (self.pair, after, most)).fetchall()]

    # -- what could not be finished ------------------------------------------

    def halfway(self) -> dict[NodeId, Place]:
        """Where nodes of this replica were left that their user did not put there."""
        rows = self.db.execute("SELECT node, parent, name FROM halfway WHERE pair=?", (self.pair,))
        return {node: (parent, name) for node, parent, name in rows.fetchall()}

    def leave_halfway(self, placed: dict[NodeId, Place]) -> None:
        """Remember where nodes were left; agreeing on a node forgets it."""
        if not placed:
            return
        self.db.begin()
        self.db.many(
            "INSERT OR REPLACE INTO halfway VALUES(?,?,?,?)",
            [(self.pair, node, *place) for node, place in placed.items()],
        )
        self.db.commit()

    # -- commits -------------------------------------------------------------

    def prepare(self, commit: Commit) -> None:
        """Store a commit durably without making it count."""
        e = commit.epoch
        self.db.begin()
        self.db.execute(
            "INSERT OR REPLACE INTO prepared VALUES(?,?,?,?,?)",
            (self.pair, e.number, e.nonce, e.predecessor, commit.payload),
        )
        self.db.commit()

    def prepared(self) -> Commit | None:
        """The commit that waits, if any."""
        row = self.db.execute("SELECT * FROM prepared WHERE pair=?", (self.pair,)).fetchone()
        return None if row is None else Commit(Epoch(row[1], row[2], row[3]), row[4])

    def drop_prepared(self) -> None:
        """Forget a commit that only one side has."""
        self.db.begin()
        self.db.execute("DELETE FROM prepared WHERE pair=?", (self.pair,))
        self.db.commit()

    def commit(self, rows: list[list[Any]] | None = None) -> None:
        """Let the prepared commit count, and empty the result log behind it.

        Args:
            rows: what is prepared, where the caller has it at hand.
        """
        waiting = self.prepared()
        if waiting is None:
            raise LookupError("nothing is prepared")
        self.db.begin()
        self.write(json.loads(waiting.payload) if rows is None else rows)
        e = waiting.epoch
        self.db.execute(
            "UPDATE pair SET number=?, nonce=?, predecessor=?, digest=? WHERE id=?",
            (e.number, e.nonce, e.predecessor,
             chain_digest(self.state().digest, waiting.payload), self.pair),
        )  # fmt: skip
        self.db.execute(
            "INSERT OR REPLACE INTO chain VALUES(?,?,?)", (self.pair, e.number, e.nonce)
        )
        self.db.execute(
            "DELETE FROM chain WHERE pair=? AND number<?", (self.pair, e.number - _HISTORY)
        )
        self.db.execute("DELETE FROM prepared WHERE pair=?", (self.pair,))
        self.db.execute("DELETE FROM result WHERE pair=?", (self.pair,))
        self.db.commit()

    def write(self, rows: list[list[Any]]) -> None:
        """Bring rows up to date; the transaction is the caller's.

        Args:
            rows: as :func:`bisync.core.rows.update_to_list` makes them.
        """
        self._log(rows)
        self._write(rows)

    def _write(self, rows: list[list[Any]]) -> None:
        pair = self.pair
        stays = [row for row in rows if row[1] or row[0] == ROOT]
        goes = [row for row in rows if not row[1] and row[0] != ROOT]
        before = self._count_names(row[0] for row in rows)
        self.db.many(
            "DELETE FROM agreed_name WHERE pair=? AND key=?", [(pair, row[0]) for row in rows]
        )
        self.db.many("DELETE FROM agreed WHERE pair=? AND key=?", [(pair, row[0]) for row in goes])
        if self.halfway():
            column = self.state().column
            self.db.many(
                "DELETE FROM halfway WHERE pair=? AND node=?",
                [(pair, row[3][column]) for row in rows],
            )
        names = [
            (pair, parent, name.encode("latin-1"), row[0])
            for row in stays
            for parent, name in row[1]
        ]
        self.db.many("INSERT OR REPLACE INTO agreed_name VALUES(?,?,?,?)", names)
        self.db.many(
            "INSERT OR REPLACE INTO agreed VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (self._row(row) for row in stays),
        )
        top = max((row[0] for row in stays), default=0)
        self.db.execute(
            "UPDATE pair SET entries=entries+?, next_key=max(next_key, ?) WHERE id=?",
            (len(names) - before, top + 1, pair),
        )

    def _log(self, rows: list[list[Any]]) -> None:
        """Let the operation log know what these rows find."""
        log = OperationLog(self.db)
        if log.began(self.pair) is None:
            return
        keys = [row[0] for row in rows]
        nodes, names = self.nodes(keys), self.names_of(keys)
        column = self.state().column
        side = 1 - column if self.flipped else column
        found: list[tuple[int, Past | None]] = []
        for row in rows:
            key, now = row[0], attributes_from_list(row[4][column])
            agreed, old = nodes.get(key), names.get(key, frozenset())
            if agreed is None:
                found.append((key, None))
                continue
            same = old == places_from_list(row[1]) and now == agreed.attributes[side]
            if same and content_from_list(row[2]) == agreed.content:
                continue  # other node numbers, or the other side's attributes
            found.append((key, Past(old, agreed.content, agreed.attributes[side])))
        log.record(self.pair, self.state().epoch.number + 1, found, self.reasons)

    def _count_names(self, keys: Iterable[int]) -> int:
        sql = "SELECT count(*) FROM agreed_name WHERE pair=? AND key"
        return sum(row[0] for row in self._each(sql, keys))

    def _row(self, row: list[Any]) -> tuple[object, ...]:
        key, _, content, ids, attributes, versions, presumed = row
        kind, size, digest, target, rdev = content or (int(Kind.DIR), 0, None, "", 0)
        texts = map(_attributes_text, attributes)
        known = None if digest is None else bytes.fromhex(digest)
        return (
            self.pair, key, *ids, kind, size, rdev, known, target.encode("latin-1"), *texts,
            *versions, presumed,
        )  # fmt: skip

    def forget(self) -> None:
        """Forget everything agreed, durably: first contact again."""
        self.db.begin()
        self.clear()
        self.db.commit()

    def clear(self) -> None:
        """Forget everything agreed; no commit."""
        for table in ("agreed", "agreed_name", "prepared", "result", "chain", "pending", "halfway"):
            self.db.execute(f"DELETE FROM {table} WHERE pair=?", (self.pair,))
        self.db.execute(
            "UPDATE pair SET number=0, nonce='', predecessor='', digest=x'', entries=0, "
            "next_key=2, cursor=NULL WHERE id=?",
            (self.pair,),
        )

    # -- becoming a copy -----------------------------------------------------

    def rows(self) -> Iterator[list[list[Any]]]:
        """Everything agreed, some rows at a time, as :meth:`commit` takes them."""
        keys = [
            row[0] for row in self.db.execute("SELECT key FROM agreed WHERE pair=?", (self.pair,))
        ]
        for start in range(0, len(keys), _ROWS):
            some = keys[start : start + _ROWS]
            agreed, names = self.nodes(some), self.names_of(some)
            yield [self._to_row(agreed[key], names.get(key, frozenset())) for key in some]

    def _to_row(self, agreed: Agreed, names: frozenset[Place]) -> list[Any]:
        update = Update(
            key=agreed.id,
            names=names,
            content=agreed.content,
            ids=self._both(agreed.ids),
            attributes=self._both(agreed.attributes),
            presumed=agreed.presumed,
        )
        return update_to_list(update, self._both(agreed.versions))

    def chain(self) -> Chain:
        """Where it stands."""
        state = self.state()
        links = self.db.execute("SELECT number, nonce FROM chain WHERE pair=?", (self.pair,))
        return Chain(
            state.epoch, state.digest, state.entries, self.next_key(), tuple(links.fetchall())
        )

    def load(self, rows: list[list[Any]]) -> None:
        """Take rows of another archive; :meth:`adopt` ends it. The first call clears this one."""
        if not self._loading:
            self.db.begin()
            self.clear()
            self._loading = True
        self._write(rows)

    def adopt(self, chain: Chain) -> None:
        """Stand where another archive stands, with the rows that were loaded."""
        self.load([])
        e = chain.epoch
        self.db.many(
            "INSERT INTO chain VALUES(?,?,?)", [(self.pair, *link) for link in chain.links]
        )
        self.db.execute(
            "UPDATE pair SET number=?, nonce=?, predecessor=?, digest=?, entries=?, next_key=? "
            "WHERE id=?",
            (e.number, e.nonce, e.predecessor, chain.digest, chain.entries, chain.next_key,
             self.pair),
        )  # fmt: skip
        self.db.commit()
        self._loading = False

    def forget_ids(self, column: int) -> None:
        """One side's node numbers mean nothing any more; places and contents stay.

        The whole tree has to be looked at again.
        """
        self.db.begin()
        self.db.execute(
            f"UPDATE agreed SET node{column}=NULL, version{column}=-1 WHERE pair=?", (self.pair,)
        )
        self.db.execute("UPDATE pair SET cursor=NULL WHERE id=?", (self.pair,))
        self.db.commit()

    def forget_results(self) -> None:
        """What the log proves is agreed on: it is not needed any more."""
        if self.db.execute("SELECT 1 FROM result WHERE pair=?", (self.pair,)).fetchone():
            self.db.begin()
            self.db.execute("DELETE FROM result WHERE pair=?", (self.pair,))
            self.db.commit()


def _attributes_text(row: list[Any] | None) -> str | None:
    if row is not None and len(row) == 4:  # nearly all: no extended attributes
        return f"[{row[0]},{row[1]},{row[2]},{row[3]}]"
    return None if row is None else json.dumps(row, separators=(",", ":"))


def is_presumed(db: Database, node: NodeId) -> bool:
    """Whether any pair took a node for equal to the other side's by its size and time."""
    return any(
        db.execute(
            f"SELECT 1 FROM pair JOIN agreed ON agreed.pair=pair.id AND node{side}=? "
            f"WHERE side={side} AND presumed=1",
            (node,),
        ).fetchone()
        for side in (0, 1)
    )


def pair_states(db: Database, pair: int | None = None) -> list[PairState]:
    """The pairs a replica belongs to."""
    sql = (
        "SELECT id, peer, side, location, identity, number, nonce, predecessor, digest, entries, "
        "cursor, incarnation, complete_ns FROM pair"
    )
    rows = db.execute(sql + (" WHERE id=?" if pair is not None else ""), (pair,) if pair else ())
    return [_pair_state(row) for row in rows.fetchall()]


def _pair_state(row: tuple) -> PairState:  # type: ignore[type-arg]
    (pair, peer, column, location, identity, number, nonce, predecessor, digest, entries, cursor,
     incarnation, complete_ns) = row  # fmt: skip
    epoch = Epoch(number, nonce, predecessor)
    return PairState(
        pair, peer, column, location, identity, epoch, bytes(digest), entries, cursor,
        incarnation, complete_ns,
    )  # fmt: skip


def add_pair(
    db: Database, *, peer: str, column: int, location: str, identity: str, incarnation: str
) -> int:
    """Make a pair's row; nothing is agreed yet."""
    cursor = db.execute(
        "INSERT INTO pair VALUES(NULL,?,?,?,?,0,'','',x'',0,2,NULL,?,NULL)",
        (peer, column, location, identity, incarnation),
    )
    return int(cursor.lastrowid or 0)
