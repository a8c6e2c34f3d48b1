"""After a crash: what was performed counts, what was displaced reaches the store.

Reads the result log and the stage before anything else happens. Parked nodes go on to
their new place or back; a displaced object goes to the store; an incoming object whose
identity the log does not show in use is removed, everything else is kept as recovered.
"""

import json
import logging
import os
import time
from typing import Any

from msgspec import Struct, field

from bisync.core.node import Attributes, Content, Kind, Node, NodeId, Place
from bisync.core.path import TEMP_PREFIX, display
from bisync.core.plan import Placements, Update
from bisync.core.rows import update_from_list
from bisync.errors import PathError, StaleError
from bisync.fs.content import read_version
from bisync.fs.copying import is_another_place, remove_object
from bisync.fs.displaced import leave_beside, remove_unused
from bisync.fs.finisher import Finisher, handle_in
from bisync.fs.incoming import link_beside
from bisync.fs.log import FAILED, STUCK_PAIR, note_stuck, place_from_row
from bisync.fs.look import Looker
from bisync.fs.meta import attributes_of, kind_of
from bisync.fs.replica import Replica
from bisync.fs.stage import PARTIAL
from bisync.fs.takeback import link, swap_back
from bisync.fs.torn import Mended, Mender
from bisync.linux.boot import boot_id
from bisync.linux.filesystem import syncfs
from bisync.linux.rename import ASIDE, rename_noreplace, swap

log = logging.getLogger(__name__)
STORE_NAME = "store"  # in the state: the path of the store that the last run used
_NO_PAIR = 0


class Recovered(Struct):
    """What one side's log says about the time before a crash."""

    updates: dict[int, tuple[Update, tuple[int, int]]] = field(default_factory=dict)
    performed: set[int] = field(default_factory=set)  # keys whose steps here were all done
    failed: set[int] = field(default_factory=set)  # keys with a step that was not done
    placed: Placements = field(default_factory=Placements)
    returned: int = 0  # objects brought back or to the store
    damaged: set[NodeId] = field(default_factory=set)  # what has to be fetched again
    said: list[str] = field(default_factory=list)
    stuck: list[tuple[bytes, str]] = field(default_factory=list)  # what the store did not take


class _Intent(Struct, frozen=True):
    """One step that a run was about to take, or took."""

    pair: int
    done: bool
    row: dict[str, Any]


def recover(replica: Replica, pair: int) -> Recovered:
    """Settle stage and log of one side; the log itself stays until the archive has it."""
    return _Recovery(replica, pair).run()


def mend(replica: Replica) -> Mended:
    """Make what a crash left half-written whole, and nothing else: before programs start.

    A file that was written to since stays where it is; the next run sees to it.

    Raises:
        HaltError: a program has such a file open already.
    """
    run = _Recovery(replica, _NO_PAIR)
    replica.database.begin()
    mended = run.mender(take_out=False).run()
    run.finish_databases()
    run.finish_names()
    replica.database.commit()
    return mended


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
        self._mend()
        self.finish_databases()
        for intent in self.intents:
            if not intent.done:
                self._note_written(intent.row)
                self._undo_keep(intent.row)
                self._finish_group(intent.row)
                self.bind(intent.row)
        for intent in self.intents:
            performed = intent.row["op"] != FAILED and (
                intent.done or self.was_performed(intent.row)
            )
            if performed and not intent.done:
                self.finish_move_over(intent.row)
            if intent.pair == self.pair:
                keys = self.out.performed if performed else self.out.failed
                keys.update(intent.row["keys"])
                if performed:
                    self._note_move(intent.row)
                    self.index.mark(intent.row["node"])  # it may not come to be agreed on
        self.out.performed -= self.out.failed
        self._empty_stage()
        self._check_unflushed()
        self.replica.settled()
        if self.replica.options.store_day is None:
            self.replica.database.put(STORE_NAME, self.replica.options.store)
        self.index.save_numbers()
        self.replica.database.commit()
        return self.out

    def mender(self, *, take_out: bool) -> Mender:
        """What settles the undos, told by the log which files they are about."""
        about = {
            row["undo"].encode(): (row["node"], bytes.fromhex(row["into"]), row["path"])
            for row in (intent.row for intent in self.intents)
            if row.get("undo")
        }
        r = self.replica
        return Mender(self.look, r.stage, r.store, about, take_out=take_out)

    def _mend(self) -> None:
        """Make files that were being written into whole, before anything looks at them."""
        mended = self.mender(take_out=True).run()
        for node in mended.damaged:
            for place in self.index.places(node):
                self.index.drop_name(place)
            self.index.drop_node(node)
        self.out.damaged |= mended.damaged
        self.out.returned += len(mended.old) + len(mended.new)
        for kept, path, before in mended.taken:
            text = [path.decode("latin-1"), before, time.time_ns(), False]
            self.replica.database.execute(
                "INSERT OR REPLACE INTO displaced VALUES(?, ?)", (kept, json.dumps(text))
            )
            self.out.said.append(
                f"{display(path)}: a crash left it half-written, and it was written to since: "
                f"kept as {display(kept)} in the store, and fetched again"
            )

    # -- what was done -------------------------------------------------------

    def bind(self, row: dict[str, Any]) -> None:
        """Tell the index which object a step put into place, so that it keeps its number."""
        handle = handle_in(row)
        if handle is None or not row.get("at"):
            return
        place = place_from_row(row["at"][0])
        known = self._handle_of(row["node"]) == handle and "written" not in row
        if self._handle_at(place) != handle or known:
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

    def _note_written(self, row: dict[str, Any]) -> None:
        """A new version was to be written into the old one: if it was, the step is done."""
        if not row.get("undo"):
            return
        into, place = bytes.fromhex(row["into"]), place_from_row(row["at"][0])
        if self._handle_at(place) != into:
            return
        try:
            spot = self.replica.directories.at(place)
            info = self.look.stat(*spot)
            if (info.st_size, info.st_mtime_ns) != (row["size"], row["mtime"]):
                return
            if read_version(*spot).digest.hex() == row["digest"]:
                row["handle"], row["written"] = row["into"], True
        except PathError as error:
            log.info("not-known-whether-written path=%s reason=%s", row.get("path"), error)

    def _handle_at(self, place: Place) -> bytes | None:
        try:
            return self.look.handle(*self.replica.directories.at(place))
        except (StaleError, OSError):
            return None

    def _handle_of(self, node: NodeId) -> bytes | None:
        known = self.index.identity(node)
        return None if known is None else known[0]

    def was_performed(self, row: dict[str, Any]) -> bool:
        match row["op"]:
            case "Make" | "Replace" | "Link" | "Move" | "Exchange":
                wanted = handle_in(row) if "handle" in row else self._handle_of(row["node"])
                return wanted is not None and all(
                    self._handle_at(place) == wanted for place in _places(row["at"])
                )
            case "Remove" | "Unlink":
                gone = self._handle_of(row["node"])
                return gone is not None and self._handle_at(place_from_row(row["from"])) != gone
            case "SetAttributes":
                return False  # the next scan shows what they are
            case _:
                return True

    def _finish_group(self, row: dict[str, Any]) -> None:
        """A hard-link group was replaced at some of its names: the others follow.

        Only while the old object is in the stage and unwritten; an edit made through one of
        the names since is for the next plan.
        """
        if row["op"] != "Replace" or len(row["at"]) < 2 or row.get("old") is None:
            return
        new, (text, size, mtime_ns) = handle_in(row), row["old"]
        old, places = bytes.fromhex(text), _places(row["at"])
        if new is None:
            return
        try:
            spot = self.spot(row)
            info = self.look.stat(*spot)
            if self.look.handle(*spot) != old or self._handle_at(places[0]) != new:
                return
        except StaleError:
            return
        if (info.st_size, info.st_mtime_ns) != (size, mtime_ns):
            return
        first_dir, first = self.replica.directories.at(places[0])
        self._remove_links(*spot, row)
        for number, place in enumerate(places[1:], 1):
            if self._handle_at(place) != old:
                continue
            dir_fd, name = self.replica.directories.at(place)
            temp = spot[0], link_beside(spot[1], number)
            link((first_dir, first), temp)
            swap(*temp, dir_fd, name)
            if self._handle_at_spot(temp) != old:  # somebody was faster
                swap_back(self.look.root.handles, temp, (dir_fd, name), new)
            os.fsync(dir_fd)
            self._drop_link(temp, row)

    def finish_names(self) -> None:
        """Take away names that a step had given and come no further."""
        for row in (intent.row for intent in self.intents if not intent.done):
            self._undo_keep(row)
            if row["op"] == "Move" and self.was_performed(row):
                self.finish_move_over(row)

    def finish_databases(self) -> None:
        """Files that belong together were replaced in part: the others follow, if they all can."""
        rows = [(i.pair, i.row) for i in self.intents if not i.done]
        Finisher(self.replica, self.look, self).run(rows)

    def _undo_keep(self, row: dict[str, Any]) -> None:
        """A save by backup linked the old object to its new name and came no further."""
        if "keep" not in row:
            return
        place, keep = place_from_row(row["at"][0]), place_from_row(row["keep"])
        old = self._handle_of(row["displaces"])
        if old is not None and self._handle_at(place) == old == self._handle_at(keep):
            dir_fd, name = self.replica.directories.at(keep)
            os.unlink(name, dir_fd=dir_fd)
            os.fsync(dir_fd)

    def _note_move(self, row: dict[str, Any]) -> None:
        match row["op"]:
            case "Move":
                was = row.get("was")
                old = None if was is None else place_from_row(was)
                new = place_from_row(row["at"][0])
                self.out.placed.move(row["node"], row["keys"][0], old, new)
            case "Exchange":
                new, old = place_from_row(row["at"][0]), place_from_row(row["other_at"])
                self.out.placed.move(row["node"], row["keys"][0], old, new)
                self.out.placed.move(row["other"], row["keys"][1], new, old)
            case "Park":
                old = place_from_row(row["from"])
                self.out.placed.move(row["node"], row["keys"][0], old, old)
            case _:
                pass

    def finish_move_over(self, row: dict[str, Any]) -> None:
        """A move swapped two names and came no further: what it displaced goes to the store."""
        if "displaced_at" not in row:
            return
        place = place_from_row(row["displaced_at"])
        gone = self._handle_of(row["displaces"])
        if gone is None or self._handle_at(place) != gone:
            return
        dir_fd, name = self.replica.directories.at(place)
        try:
            rename_noreplace(dir_fd, name, self.replica.stage.displaced, row["out"].encode())
        except OSError as error:
            if not is_another_place(error):
                raise
            self.to_store(dir_fd, name, row)
        os.fsync(dir_fd)

    # -- what lies in the stage, or beside its target ------------------------

    def spot(self, row: dict[str, Any]) -> tuple[int, bytes]:
        """Where a step's new object waits, and what it displaced lies after an exchange."""
        if "near" in row:
            return self.replica.directories.at(place_from_row(row["near"]))
        return self.replica.stage.incoming, row["in"].encode()

    def _settle_near(self, row: dict[str, Any]) -> None:
        """What lies beside its target: unused is removed, displaced kept or brought back."""
        try:
            dir_fd, name = self.spot(row)
            handle = self.look.handle(dir_fd, name)
        except StaleError:
            return
        if "in" not in row and ("astray" in row or row["op"] == "Stuck"):
            self.to_store(dir_fd, name, row)
        elif "in" not in row:
            self._bring_back(dir_fd, name, row)
        elif handle_in(row) in (None, handle):
            self._discard((dir_fd, name), row)
        else:
            self.to_store(dir_fd, name, row)
        self._remove_links(dir_fd, name, row)

    def _remove_links(self, dir_fd: int, near: bytes, row: dict[str, Any]) -> None:
        """Remove what a hard-link group left beside its new object on its way."""
        for number in range(1, len(row.get("at", ()))):
            self._drop_link((dir_fd, link_beside(near, number)), row)

    def _drop_link(self, spot: tuple[int, bytes], row: dict[str, Any]) -> None:
        """Remove a link of a group's new or old object; what somebody saved goes to the store."""
        known = {handle_in(row), bytes.fromhex(row["old"][0]) if row.get("old") else None}
        try:
            others = self.look.stat(*spot).st_nlink - 1
            if others and self.look.handle(*spot) in known:
                os.unlink(spot[1], dir_fd=spot[0])
            else:
                self.to_store(*spot, row)
        except StaleError:
            return

    def _handle_at_spot(self, spot: tuple[int, bytes]) -> bytes | None:
        try:
            return self.look.handle(*spot)
        except StaleError:
            return None

    def _empty_stage(self) -> None:
        stage = self.replica.stage
        rows = [intent.row for intent in self.intents]
        self.replica.database.execute("DELETE FROM result WHERE pair=?", (STUCK_PAIR,))
        for row in rows:
            if "near" in row:
                self._settle_near(row)
        incoming = {row["in"].encode(): row for row in rows if "in" in row}
        for name, row in incoming.items():
            if "near" not in row:
                self._remove_links(stage.incoming, name, row)
        outgoing = {row["out"].encode("latin-1"): row for row in rows if "out" in row}
        there = os.listdir(stage.displaced)  # before more has to wait there
        for name in map(os.fsencode, os.listdir(stage.incoming)):
            if name.startswith(PARTIAL):
                continue  # the next run may go on with it
            found = incoming.get(name.removesuffix(ASIDE))
            if not name.endswith(ASIDE) and self._is_ours(name, found):
                self._discard((stage.incoming, name), found)
            else:
                self.to_store(stage.incoming, name, found)
        for name in map(os.fsencode, there):
            found = outgoing.get(name)
            back = found is not None and "astray" not in found
            if found is not None and back and found["op"] in ("Park", "Remove", "Unlink"):
                self._bring_back(stage.displaced, name, found)
            else:
                self.to_store(stage.displaced, name, found)

    def _is_ours(self, name: bytes, row: dict[str, Any] | None) -> bool:
        """Whether an incoming object is what a step made, and not what an exchange gave for it.

        Intents are durable before the first name is touched, so what the log does not know
        was never used; unless the log itself was lost.
        """
        if row is None:
            return not self.replica.lost_log
        if _stayed_in_stage(row):
            return True
        return handle_in(row) in (None, self.look.handle(self.replica.stage.incoming, name))

    def _discard(self, spot: tuple[int, bytes], row: dict[str, Any] | None) -> None:
        """Remove what a step made, unless somebody used it while an exchange showed it."""
        in_stage = spot[0] == self.replica.stage.incoming
        # A link adds nothing; without an identity it is no whole copy yet.
        hidden = row is None or "mtime" not in row or handle_in(row) is None
        if row is None or hidden or (in_stage and _stayed_in_stage(row)):
            remove_object(*spot)
        elif not remove_unused(*spot, (row["size"], row["mtime"])):
            self._leave_beside(spot, row)

    def _leave_beside(self, spot: tuple[int, bytes], row: dict[str, Any]) -> None:
        if "at" not in row or not self.replica.options.fsync:  # it may be torn by a power cut
            self.to_store(*spot, row)
            return
        try:
            beside = leave_beside(self.replica.directories, spot, place_from_row(row["at"][0]))
        except (StaleError, OSError) as error:
            log.info("recovered name=%s reason=%s", spot[1], error)
            self.to_store(*spot, row)
            return
        os.fsync(self.replica.directories.open(beside[0]))
        path = display(self.index.place_path(beside))
        self.out.returned += 1
        self.out.said.append(f"{path}: somebody used it before the run stopped that had brought it")

    def _bring_back(self, from_fd: int, name: bytes, row: dict[str, Any]) -> None:
        """What was on its way out of the tree goes back: the next plan decides again."""
        place = place_from_row(row["from"])
        try:
            dir_fd, old = self.replica.directories.at(place)
            rename_noreplace(from_fd, name, dir_fd, old)
            os.fsync(dir_fd)
        except (StaleError, OSError) as error:
            log.info("recovered name=%s reason=%s", name, error)
            self.to_store(from_fd, name, row)
            return
        self.out.returned += 1
        self.out.failed.update(row["keys"])
        self.out.performed -= set(row["keys"])

    # -- what was never flushed ----------------------------------------------

    def _check_unflushed(self) -> None:
        """After another boot: a file with the times we set but not our bytes is damage."""
        replica, boot = self.replica, boot_id()
        rows = replica.database.execute("SELECT node, boot FROM unflushed").fetchall()
        if rows and replica.options.fsync:
            syncfs(replica.root.fd)  # whatever this boot wrote is safe from here on
        for node, written in rows:
            if written == boot and not replica.options.fsync:
                continue
            if written != boot and self._is_damaged(node):
                self.out.damaged.add(node)
            replica.database.execute("DELETE FROM unflushed WHERE node=?", (node,))

    def _is_damaged(self, node: NodeId) -> bool:
        """Whether a file is not what we wrote; if so it leaves the tree for the store."""
        places, row = self.index.places(node), self.index.node(node)
        if not places or row is None or row.kind is not Kind.FILE:
            return False
        handle = self._handle_of(node)
        ours = [place for place in places if self._handle_at(place) == handle]
        if not ours:
            return False  # somebody put something else there
        try:
            dir_fd, name = self.replica.directories.at(ours[0])
            if self.look.stat(dir_fd, name).st_mtime_ns != row.attributes.mtime_ns:
                return False  # somebody wrote to it since
            if read_version(dir_fd, name).digest == row.content.digest:
                return False
            path = self.index.place_path(ours[0])
            record = {"reason": "damaged by a power cut", "conflict": False, "digest": None}
            kept = self.replica.store.keep(dir_fd, name, path, record, copy=len(ours) > 1)
            self.replica.store.flush()
            self.out.said.append(
                f"{display(path)}: damaged by a power cut; kept as {display(kept.path)} in the "
                "store, and fetched again"
            )
            for parent, other in ours[1:]:
                os.unlink(other, dir_fd=self.replica.directories.open(parent))
        except PathError as error:
            log.warning("damaged-not-removed node=%d reason=%s", node, error)
            return False
        for place in places:
            self.index.drop_name(place)
        self.index.drop_node(node)
        return True

    def to_store(self, dir_fd: int, name: bytes, row: dict[str, Any] | None) -> None:
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
            self._stay(dir_fd, name, path, error.reason, row)
            return
        self.replica.store.flush()
        self.out.returned += 1

    def _stay(
        self, dir_fd: int, name: bytes, path: bytes, reason: str, row: dict[str, Any] | None
    ) -> None:
        """What the store did not take stays where nothing is removed; the next run tries again."""
        log.warning("stage-entry-kept name=%s reason=%s", name, reason)
        self.out.stuck.append((path, f"what was displaced before a crash waits: {reason}"))
        stage = self.replica.stage
        if dir_fd == stage.incoming:
            stage.set_aside(name)
        if dir_fd in (stage.incoming, stage.displaced):
            where: dict[str, Any] = {"out": name.decode("latin-1")}
        elif row is not None and "near" in row and name.startswith(TEMP_PREFIX):
            where = {"near": [row["near"][0], name.decode("latin-1")]}  # it, or a link beside it
        else:
            return  # it has its name in the tree
        note_stuck(self.replica.database, path, where)


def _stayed_in_stage(row: dict[str, Any]) -> bool:
    """Whether what a step made there was never exchanged with a name of the tree.

    It was copied beside its target first, or was there to be written into a file.
    """
    return "near" in row or bool(row.get("undo"))


def _places(rows: list[Any]) -> list[Place]:
    return [place_from_row(row) for row in rows]
