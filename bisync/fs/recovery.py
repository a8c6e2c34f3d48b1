"""After a crash: what was performed counts, what was displaced reaches the store.

Reads the result log and the stage before anything else happens. Parked nodes go on to
their new place or back; a displaced object goes to the store; an incoming object whose
identity the log does not show in use is removed, everything else is kept as recovered.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from typing import Any

from bisync.core.node import Attributes, Content, Kind, Node, NodeId, Place
from bisync.core.plan import Update
from bisync.core.rows import update_from_list
from bisync.errors import PathError, StaleError
from bisync.fs.look import Looker
from bisync.fs.meta import attributes_of, kind_of
from bisync.fs.replica import Replica
from bisync.linux.rename import exchange, rename_noreplace

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recovered:
    """What one side's log says about the time before a crash."""

    updates: dict[int, tuple[Update, tuple[int, int]]] = field(default_factory=dict)
    performed: set[int] = field(default_factory=set)  # keys whose steps here were all done
    failed: set[int] = field(default_factory=set)  # keys with a step that was not done
    returned: int = 0  # objects brought back or to the store


@dataclass(frozen=True, slots=True)
class _Intent:
    """One step that a run was about to take, or took."""

    pair: int
    done: bool
    row: dict[str, Any]


def recover(replica: Replica, pair: int) -> Recovered:
    """Settle stage and log of one side; the log itself stays until the archive has it."""
    return _Recovery(replica, pair).run()


class _Recovery:
    def __init__(self, replica: Replica, pair: int) -> None:
        self.replica = replica
        self.index = replica.index
        self.look = Looker(replica.root, replica.index, replica.directories)
        self.pair = pair
        self.out = Recovered()
        self.intents: list[_Intent] = []
        # The stage is shared by all pairs of a root, so the log is read for all of them.
        rows = replica.database.execute("SELECT pair, done, payload FROM result ORDER BY seq")
        for owner, done, payload in rows.fetchall():
            value = json.loads(payload)
            if isinstance(value, dict):
                self.intents.append(_Intent(owner, bool(done), value))
            elif owner == pair:
                update = update_from_list(value)
                self.out.updates[update[0].key] = update

    def run(self) -> Recovered:
        self.replica.database.begin()
        for intent in self.intents:
            if not intent.done:
                self._finish_group(intent.row)
                self._bind(intent.row)
        for intent in self.intents:
            performed = intent.done or self._was_performed(intent.row)
            if performed and not intent.done:
                self._finish_move_over(intent.row)
            if intent.pair == self.pair:
                keys = self.out.performed if performed else self.out.failed
                keys.update(intent.row["keys"])
        self.out.performed -= self.out.failed
        self._empty_stage()
        self.index.save_numbers()
        self.replica.database.commit()
        return self.out

    # -- what was done -------------------------------------------------------

    def _bind(self, row: dict[str, Any]) -> None:
        """Tell the index which object a step put into place, so that it keeps its number."""
        if "handle" not in row or not row.get("at"):
            return
        handle = bytes.fromhex(row["handle"])
        place = _place(row["at"][0])
        if self._handle_at(place) != handle or self._handle_of(row["node"]) == handle:
            return  # not performed, or known already
        if row["op"] == "Replace" and "keep_node" not in row:
            old = self.index.node(row["node"])
            version = 1 if old is None else old.version + 1
        else:
            version = 1
        info = self.look.stat(*self.replica.directories.at(place))
        digest = None if row["digest"] is None else bytes.fromhex(row["digest"])
        kind = kind_of(info.st_mode)
        content = Content(kind, row["size"], digest) if kind is Kind.FILE else Content(kind)
        if kind is Kind.SYMLINK:
            dir_fd, name = self.replica.directories.at(place)
            content = Content(kind, target=os.readlink(name, dir_fd=dir_fd))
        elif kind in (Kind.CHAR, Kind.BLOCK):
            content = Content(kind, rdev=info.st_rdev)
        # The times are not those of an observation: the next scan looks at it anew.
        attributes: Attributes = attributes_of(info, (), ())
        node = Node(row["node"], content, attributes, -1, version)
        self.index.put_node(node, handle, info.st_ino)
        self.index.mark(node.id)

    def _handle_at(self, place: Place) -> bytes | None:
        try:
            return self.look.handle(*self.replica.directories.at(place))
        except (StaleError, OSError):
            return None

    def _handle_of(self, node: NodeId) -> bytes | None:
        known = self.index.identity(node)
        return None if known is None else known[0]

    def _was_performed(self, row: dict[str, Any]) -> bool:
        match row["op"]:
            case "Make" | "Replace" | "Link" | "Move" | "Exchange":
                if "handle" in row:
                    wanted: bytes | None = bytes.fromhex(row["handle"])
                else:
                    wanted = self._handle_of(row["node"])
                return wanted is not None and all(
                    self._handle_at(_place(p)) == wanted for p in row["at"]
                )
            case "Remove" | "Unlink":
                gone = self._handle_of(row["node"])
                return gone is not None and self._handle_at(_place(row["from"])) != gone
            case "SetAttributes":
                return False  # the next scan shows what they are
            case _:
                return True

    def _finish_group(self, row: dict[str, Any]) -> None:
        """A hard-link group was replaced at some of its names: the others follow.

        Only while the old object is in the stage and unwritten; an edit made through one of
        the names since is for the next plan.
        """
        if "old" not in row:
            return
        new, (text, size, mtime_ns) = bytes.fromhex(row["handle"]), row["old"]
        old, stage, places = bytes.fromhex(text), self.replica.stage, list(map(_place, row["at"]))
        try:
            info = self.look.stat(stage.incoming, row["in"].encode())
            if self.look.handle(stage.incoming, row["in"].encode()) != old:
                return
        except StaleError:
            return
        if self._handle_at(places[0]) != new or (info.st_size, info.st_mtime_ns) != (size, mtime_ns):
            return
        first_dir, first = self.replica.directories.at(places[0])
        for place in places[1:]:
            if self._handle_at(place) != old:
                continue
            dir_fd, name = self.replica.directories.at(place)
            temp = stage.name()
            os.link(first, temp, src_dir_fd=first_dir, dst_dir_fd=stage.incoming)
            exchange(stage.incoming, temp, dir_fd, name)
            os.fsync(dir_fd)
            os.unlink(temp, dir_fd=stage.incoming)

    def _finish_move_over(self, row: dict[str, Any]) -> None:
        """A move swapped two names and came no further: what it displaced goes to the store."""
        if "displaced_at" not in row:
            return
        place = _place(row["displaced_at"])
        gone = self._handle_of(row["displaces"])
        if gone is None or self._handle_at(place) != gone:
            return
        dir_fd, name = self.replica.directories.at(place)
        rename_noreplace(dir_fd, name, self.replica.stage.displaced, row["out"].encode())
        os.fsync(dir_fd)

    # -- what lies in the stage ----------------------------------------------

    def _empty_stage(self) -> None:
        stage = self.replica.stage
        rows = [intent.row for intent in self.intents]
        incoming = {row["in"].encode(): row for row in rows if "in" in row}
        outgoing = {row["out"].encode(): row for row in rows if "out" in row}
        for name in map(os.fsencode, os.listdir(stage.incoming)):
            row = incoming.get(name)
            if row is not None and not self._is_unused(name, row):
                self._to_store(stage.incoming, name, row)
                continue
            try:
                stage.discard(name)
            except OSError as error:
                log.info("stage-entry-kept name=%s reason=%s", name, error)
                self._to_store(stage.incoming, name, row)
        for name in map(os.fsencode, os.listdir(stage.displaced)):
            row = outgoing.get(name)
            if row is not None and row["op"] in ("Park", "Remove", "Unlink"):
                self._bring_back(name, row)
            else:
                self._to_store(stage.displaced, name, row)

    def _is_unused(self, name: bytes, row: dict[str, Any]) -> bool:
        handle = self.look.handle(self.replica.stage.incoming, name)
        return handle == bytes.fromhex(row["handle"])

    def _bring_back(self, name: bytes, row: dict[str, Any]) -> None:
        """What was on its way out of the tree goes back: the next plan decides again."""
        stage = self.replica.stage
        place = _place(row["from"])
        try:
            dir_fd, old = self.replica.directories.at(place)
            rename_noreplace(stage.displaced, name, dir_fd, old)
            os.fsync(dir_fd)
        except (StaleError, OSError) as error:
            log.info("recovered name=%s reason=%s", name, error)
            self._to_store(stage.displaced, name, row)
            return
        self.out.returned += 1
        self.out.failed.update(row["keys"])
        self.out.performed -= set(row["keys"])

    def _to_store(self, dir_fd: int, name: bytes, row: dict[str, Any] | None) -> None:
        """Displaced, and the only copy may be here: into the store with it."""
        path = b"recovered/" + name
        if row is not None and "path" in row:
            path = row["path"].encode("latin-1")
        info = self.look.stat(dir_fd, name)
        shared = info.st_nlink > 1 and kind_of(info.st_mode) is Kind.FILE
        if row is not None and "keep" in row and shared:
            os.unlink(name, dir_fd=dir_fd)  # it has its own name in the tree already
            return
        record = {"reason": "recovered after a crash", "conflict": False, "digest": None}
        try:
            self.replica.store.keep(dir_fd, name, path, record, copy=shared)
        except PathError as error:
            # It stays where it is, safe, and the next run tries again.
            log.warning("stage-entry-kept name=%s reason=%s", name, error)
            return
        self.replica.store.flush()
        self.out.returned += 1


def _place(row: list[Any]) -> Place:
    return (row[0], row[1].encode("latin-1"))
