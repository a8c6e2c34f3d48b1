"""Make transitions real on one tree, a batch at a time.

Durability order of a batch: everything staged -> data durable -> intents in the result
log -> name operations -> directories durable -> results in the log. No name ever leads to
content that is not durable, and nothing is unlinked, replaced or overwritten before it
has its place in the store.
"""

import contextlib
import errno
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

from bisync.core.node import ROOT, Attributes, Content, Kind, Node, NodeId, Place
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
from bisync.errors import BusyError, Interrupted, PathError, StaleError
from bisync.fs.content import Chunk, Version
from bisync.fs.database import Database
from bisync.fs.index import Index
from bisync.fs.look import Guard, Looked, Looker, look_through, stamp
from bisync.fs.meta import apply_attributes, attributes_of, read_xattrs
from bisync.fs.root import Directories, Root
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.linux.filesystem import syncfs
from bisync.linux.rename import exchange, is_unsupported, rename_noreplace

log = logging.getLogger(__name__)
_FSYNC_EACH = 64  # directories made durable one by one; more by one flush


class Status(Enum):
    """How a transition ended."""

    DONE = "done"
    STALE = "stale"  # the place changed: observe again
    BUSY = "busy"  # a writer: come back later
    PROBLEM = "problem"
    SKIPPED = "skipped"  # deliberately left, e.g. a directory that holds ignored files


@dataclass(frozen=True, slots=True)
class Result:
    """One transition and how it ended."""

    step: Transition
    status: Status
    reason: str = ""
    size: int = 0  # content bytes that came from the other side
    kept: bytes | None = None  # where the displaced object went, below the store
    missed: tuple[str, ...] = ()  # attributes that could not be set


class ContentSource(Protocol):
    """Where new content comes from: the other side."""

    def supply(
        self,
        node: NodeId,
        sink: Callable[[Chunk], None],
        restart: Callable[[], None],
        *,
        refuse_writer: bool,
    ) -> Version:
        """Read one whole version of a node into ``sink``.

        Raises:
            PathError: busy, stale or unreadable; what the sink got is void.
        """
        ...


@dataclass(slots=True)
class _Staged:
    """An object in ``in/`` waiting for its name."""

    name: bytes
    handle: bytes
    content: Content
    size: int = 0
    missed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tools:
    """What a replica lends to its applier."""

    root: Root
    index: Index
    db: Database
    stage: Stage
    store: Store
    directories: Directories
    fsync: bool = True
    stop: Callable[[], None] = lambda: None


class Applier:
    """Applies one batch of transitions for one pair."""

    def __init__(self, tools: Tools, pair: int, source: ContentSource) -> None:
        self.t = tools
        self.pair = pair
        self.source = source
        self.look = Looker(tools.root, tools.index, tools.directories)
        self.staged: dict[int, _Staged] = {}  # by position in the batch
        self.outs: dict[int, bytes] = {}  # names in out/, by position
        self.parked: dict[NodeId, bytes] = {}
        self.logged: dict[int, int] = {}  # rows of the result log, by position
        self.touched: set[NodeId] = set()  # directories whose names changed
        self.displaced: list[tuple[bytes, bytes, os.stat_result]] = []
        self.results: dict[int, Result] = {}

    # -- the batch -----------------------------------------------------------

    def run(self, steps: list[Transition], updates: dict[int, str]) -> list[Result]:
        """Apply ``steps`` in order.

        Args:
            steps: transitions of this side.
            updates: rows for the ancestor by archive number, as JSON, for the log.

        Raises:
            NoSpaceError: the side cannot write its own state; nothing half-visible is left.
            HaltError: the root is not what it was.
        """
        self.t.root.check()
        for i, step in enumerate(steps):
            self._guard(i, step, self._prepare)
        if self.t.fsync:
            self.t.stage.flush()
        todo = [(i, step) for i, step in enumerate(steps) if i not in self.results]
        if todo:
            self._log_intents(todo, updates)
            self.t.root.check()
            try:
                for i, step in todo:
                    self.t.stop()
                    self._guard(i, step, self._perform)
            except Interrupted:
                for i, step in todo:
                    if i not in self.results:
                        self.results[i] = Result(step, Status.STALE, "stopped before it")
                        self._clean_up(i)
            self._make_durable()
            self._log_results()
        return [self.results[i] for i in range(len(steps))]

    def _guard(self, i: int, step: Transition, act: Callable[[int, Transition], None]) -> None:
        """Run one act; what goes wrong with one path stays with that path."""
        try:
            act(i, step)
            return
        except StaleError as error:
            self.results[i] = Result(step, Status.STALE, error.reason)
        except BusyError as error:
            self.results[i] = Result(step, Status.BUSY, error.reason)
        except PathError as error:
            self.results[i] = Result(step, Status.PROBLEM, error.reason)
        except OSError as error:
            self.results[i] = Result(step, Status.PROBLEM, error.strerror or str(error))
        self._clean_up(i)

    def _clean_up(self, i: int) -> None:
        """A staged object whose step failed is not needed any more, if it is still ours."""
        staged = self.staged.get(i)
        if staged is None:
            return
        incoming = self.t.stage.incoming
        try:
            if self.look.handle(incoming, staged.name) == staged.handle:
                self.t.stage.discard(staged.name)
            else:
                # Something of the user's got stuck here: recovery brings it to the store.
                rename_noreplace(incoming, staged.name, self.t.stage.displaced, staged.name)
        except (StaleError, OSError) as error:
            log.debug("stage-clean-up name=%s reason=%s", staged.name, error)

    # -- staging -------------------------------------------------------------

    def _prepare(self, i: int, step: Transition) -> None:
        self.t.stop()
        match step:
            case Make():
                self.staged[i] = self._build(step.content, step.attributes, step.source, new=True)
            case Replace():
                self.staged[i] = self._build(step.content, step.attributes, step.source, new=False)
            case Remove() | Unlink() | Park():
                self.outs[i] = Stage.name()
            case Move() if step.displaces is not None:
                self.outs[i] = Stage.name()
            case _:
                pass

    def _build(
        self, content: Content, attributes: Attributes, source: NodeId | None, *, new: bool
    ) -> _Staged:
        stage, folder = self.t.stage, self.t.stage.incoming
        if content.kind is Kind.FILE:
            assert source is not None
            return self._fetch(content, attributes, source, new=new)
        name = Stage.name()
        match content.kind:
            case Kind.DIR:
                attributes = soft(attributes)
                os.mkdir(name, 0o700, dir_fd=folder)
            case Kind.SYMLINK:
                os.symlink(content.target, name, dir_fd=folder)
            case Kind.FIFO:
                os.mkfifo(name, 0o600, dir_fd=folder)
            case Kind.SOCKET:
                os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=folder)
            case Kind.CHAR:
                os.mknod(name, stat.S_IFCHR | 0o600, content.rdev, dir_fd=folder)
            case Kind.BLOCK:
                os.mknod(name, stat.S_IFBLK | 0o600, content.rdev, dir_fd=folder)
        try:
            missed = self._dress(folder, name, content.kind, attributes)
            return _Staged(name, self.look.handle(folder, name), content, 0, missed)
        except BaseException:
            stage.discard(name)
            raise

    def _fetch(
        self, content: Content, attributes: Attributes, source: NodeId, *, new: bool
    ) -> _Staged:
        stage = self.t.stage
        name, fd = stage.create()
        try:
            version = self.source.supply(
                source,
                lambda chunk: stage.write(fd, chunk),
                lambda: os.ftruncate(fd, 0),
                refuse_writer=new,
            )
            if content.digest is not None and version.digest != content.digest:
                raise StaleError("its content is not what was observed")
            os.ftruncate(fd, version.size)
            missed = self._dress(fd, b"", Kind.FILE, attributes)
            handle = self.t.root.handles.read(fd, b"")
        except BaseException:
            os.close(fd)
            stage.discard(name)
            raise
        stage.finish(fd)
        verified = Content(Kind.FILE, version.size, version.digest)
        return _Staged(name, handle, verified, version.size, missed)

    def _dress(self, fd: int, name: bytes, kind: Kind, wanted: Attributes) -> tuple[str, ...]:
        """A new inode gets its attributes before it becomes visible."""
        info = os.fstat(fd) if not name else self.look.stat(fd, name)
        inherited = read_xattrs(fd, name)
        return tuple(apply_attributes(fd, name, kind, attributes_of(info, *inherited), wanted))

    # -- the result log ------------------------------------------------------

    def _log_intents(self, todo: list[tuple[int, Transition]], updates: dict[int, str]) -> None:
        keys: set[int] = set()
        sql = "INSERT INTO result(pair, done, payload) VALUES(?, 0, ?)"
        self.t.db.begin()
        for i, step in todo:
            keys.update(keys_of(step))
            text = json.dumps(self._intent(i, step), separators=(",", ":"))
            self.logged[i] = self.t.db.execute(sql, (self.pair, text)).lastrowid or 0
        self.t.db.many(sql, [(self.pair, updates[key]) for key in sorted(keys & updates.keys())])
        self.t.db.many(
            "INSERT OR REPLACE INTO softened VALUES(?, ?)",
            [
                (step.node, step.attributes.mode)
                for _, step in todo
                if isinstance(step, Make)
                and step.content.kind is Kind.DIR
                and soft(step.attributes) != step.attributes
            ],
        )
        self.t.index.save_numbers()
        self.t.db.commit()

    def _intent(self, i: int, step: Transition) -> dict[str, Any]:
        """What recovery needs to tell whether the step was performed, and to finish it."""
        row: dict[str, Any] = {
            "op": type(step).__name__,
            "keys": list(keys_of(step)),
            "node": step.node,
        }
        if i in self.staged:
            staged = self.staged[i]
            row["in"] = staged.name.decode()
            row["handle"] = staged.handle.hex()
            digest = staged.content.digest
            row["digest"] = None if digest is None else digest.hex()
            row["size"] = staged.content.size
        if i in self.outs:
            row["out"] = self.outs[i].decode()
        match step:
            case Make() | Link():
                row["at"] = [_place(step.place)]
                if step.displaces is not None:
                    row["displaces"] = step.displaces.node
                    row["path"] = self._path_text(step.place)
            case Move():
                row["at"] = [_place(step.new)]
                if step.displaces is not None and step.old is not None:
                    row["displaces"] = step.displaces.node
                    row["displaced_at"] = _place(step.old)
                    row["path"] = self._path_text(step.new)
            case Exchange():
                row["at"] = [_place(step.new)]
                row["other"] = step.other
                row["other_at"] = _place(step.old)
            case Replace():
                row["at"] = [_place(p) for p in step.places]
                row["path"] = self._path_text(step.places[0])
                old = step.keep_node if step.keep is not None else step.node
                row["displaces"] = old
                known = self.t.index.identity(old)
                if len(step.places) > 1 and known is not None:
                    row["old"] = [known[0].hex(), known[1].size, known[1].mtime_ns]
                if step.keep is not None:
                    row["keep"] = _place(step.keep)
                    row["keep_node"] = step.keep_node
            case Park():
                row["from"] = _place(step.old)
            case Remove() | Unlink():
                row["from"] = _place(step.place)
                row["path"] = self._path_text(step.place)
            case SetAttributes():
                pass
        return row

    def _path_text(self, place: Place) -> str:
        return self.t.index.place_path(place).decode("latin-1")

    def _log_results(self) -> None:
        """Index changes and results become durable together."""
        self.t.db.begin()
        failed = [
            (seq,) for i, seq in self.logged.items() if self.results[i].status is not Status.DONE
        ]
        self.t.db.many("DELETE FROM result WHERE seq=?", failed)
        self.t.db.execute("UPDATE result SET done=1 WHERE pair=? AND done=0", (self.pair,))
        for where, path, info in self.displaced:
            row = [path.decode("latin-1"), info.st_size, info.st_mtime_ns, time.time_ns()]
            self.t.db.execute(
                "INSERT OR REPLACE INTO displaced VALUES(?, ?)", (where, json.dumps(row))
            )
        self.t.index.save_numbers()
        self.t.db.commit()

    def _make_durable(self) -> None:
        if not self.t.fsync:
            return
        self.t.store.flush()
        if len(self.touched) > _FSYNC_EACH:
            syncfs(self.t.root.fd)
            return
        for node in sorted(self.touched):
            try:
                os.fsync(self.t.directories.open(node))
            except StaleError:
                syncfs(self.t.root.fd)  # it was moved meanwhile; it still has to be durable
                return

    # -- performing ----------------------------------------------------------

    def _perform(self, i: int, step: Transition) -> None:
        match step:
            case Make():
                self._make(i, step)
            case Link():
                self._link(i, step)
            case Move():
                self._move(i, step)
            case Exchange():
                self._exchange(i, step)
            case Park():
                self._park(i, step)
            case Replace():
                self._replace(i, step)
            case Unlink():
                self._unlink(i, step)
            case Remove():
                self._remove(i, step)
            case SetAttributes():
                self._set_attributes(i, step)

    def _done(self, i: int, step: Transition, **more: Any) -> None:
        self.t.index.mark(step.node)  # other pairs of this replica have to hear of it
        self.results[i] = Result(step, Status.DONE, **more)

    def _place_free(self, dir_fd: int, name: bytes, new_dir: int, new: bytes) -> None:
        try:
            rename_noreplace(dir_fd, name, new_dir, new)
        except FileExistsError as error:
            raise StaleError("something new has its name") from error
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise StaleError("it was moved or replaced") from error
            if not is_unsupported(error):
                raise
            # No such flag here: a link never overwrites either (files only).
            os.link(name, new, src_dir_fd=dir_fd, dst_dir_fd=new_dir, follow_symlinks=False)
            os.unlink(name, dir_fd=dir_fd)

    def _make(self, i: int, step: Make) -> None:
        staged = self.staged[i]
        dir_fd, name = self.t.directories.at(step.place)
        kept = None
        if step.displaces is None:
            self._place_free(self.t.stage.incoming, staged.name, dir_fd, name)
        else:
            kept = self._put_over(staged.name, step.place, step.displaces)
        self._record_new(step.node, step.place, staged, step.attributes)
        self._done(i, step, size=staged.size, kept=kept, missed=staged.missed)

    def _record_new(
        self, node: NodeId, place: Place, staged: _Staged, wanted: Attributes
    ) -> None:
        dir_fd, name = self.t.directories.at(place)
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
        self.t.db.begin()
        self.t.index.put_node(row, staged.handle, info.st_ino)
        self.t.index.put_name(place, node, stamp(info))
        self.touched.add(place[0])

    def _put_over(self, staged_name: bytes, place: Place, removal: Remove) -> bytes | None:
        """Exchange a staged object with what must go, then keep what came out."""
        incoming = self.t.stage.incoming
        path = self.t.index.place_path(place)
        with self.look.guarded(place, removal.node) as guard:
            self._swap_in(staged_name, place, guard)
            if stat.S_ISDIR(guard.looked.info.st_mode):
                members = {node for _, node in removal.members}
                try:
                    look_through(self.look, incoming, staged_name, removal.node, members)
                except PathError:
                    exchange(incoming, staged_name, *self.t.directories.at(place))
                    raise
        try:
            kept = self._keep(incoming, staged_name, path, guard.looked, removal)
        except PathError:
            exchange(incoming, staged_name, *self.t.directories.at(place))
            raise
        self._forget_tree(removal, place)
        return kept

    def _swap_in(self, staged_name: bytes, place: Place, guard: Guard) -> None:
        """Exchange, look at what came out, and take it back if it is a surprise."""
        incoming = self.t.stage.incoming
        dir_fd, name = self.t.directories.at(place)
        exchange(incoming, staged_name, dir_fd, name)
        if guard.somebody_waits() or not self.look.same_object(
            incoming, staged_name, guard.looked
        ):
            exchange(incoming, staged_name, dir_fd, name)
            raise StaleError("somebody changed it at the same moment")
        self.touched.add(place[0])

    def _keep(
        self,
        dir_fd: int,
        name: bytes,
        path: bytes,
        looked: Looked,
        removal: Remove | Replace,
    ) -> bytes | None:
        info = self.look.stat(dir_fd, name)
        known = self.t.index.node(removal.node)
        digest = None if known is None or known.content.digest is None else known.content.digest
        record = {
            "reason": removal.reason,
            "conflict": removal.conflict,
            "digest": None if digest is None else digest.hex(),
        }
        shared = stat.S_ISREG(info.st_mode) and info.st_nlink > 1
        kept = self.t.store.keep(dir_fd, name, path, record, copy=shared)
        if stat.S_ISREG(looked.info.st_mode) and not shared:
            self.displaced.append((kept.path, path, info))
        return kept.path

    def _forget_tree(self, removal: Remove, place: Place) -> None:
        index = self.t.index
        self.t.db.begin()
        if index.at([place]).get(place) == removal.node:
            index.drop_name(place)
        for _, node in removal.members:
            for below in index.places(node):
                index.drop_name(below)
            index.drop_node(node)
            self.t.directories.drop(node)
        if not index.places(removal.node):
            index.drop_node(removal.node)
        self.t.directories.drop(removal.node)
        self.touched.add(place[0])

    def _refresh(self, node: NodeId, places: Iterable[Place]) -> None:
        """After our own operation: new times and stamps, same content."""
        index = self.t.index
        row, identity = index.node(node), index.identity(node)
        if row is None or identity is None:
            raise StaleError("it is not known any more")
        info = None
        for place in places:
            dir_fd, name = self.t.directories.at(place)
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

    def _link(self, i: int, step: Link) -> None:
        places = self.t.index.places(step.node)
        if not places:
            raise StaleError("it is not there any more")
        looked = self.look.at(places[0], step.node)
        dir_fd, name = self.t.directories.at(step.place)
        kept = None
        if step.displaces is None:
            self._link_free(looked, dir_fd, name)
        else:
            temp = Stage.name()
            self._link_free(looked, self.t.stage.incoming, temp)
            kept = self._put_over(temp, step.place, step.displaces)
        if self.look.handle(dir_fd, name) != looked.handle:
            raise StaleError("another object got the name")
        self.t.db.begin()
        self._refresh(step.node, [step.place])
        self.touched.add(step.place[0])
        self._done(i, step, kept=kept)

    @staticmethod
    def _link_free(looked: Looked, dir_fd: int, name: bytes) -> None:
        try:
            os.link(
                looked.name,
                name,
                src_dir_fd=looked.dir_fd,
                dst_dir_fd=dir_fd,
                follow_symlinks=False,
            )
        except FileExistsError as error:
            raise StaleError("something new has its name") from error

    def _move(self, i: int, step: Move) -> None:
        if step.displaces is not None:
            self._move_over(i, step, step.displaces)
            return
        new_dir, new = self.t.directories.at(step.new)
        if step.old is None:
            out = self.parked.pop(step.node)
            self._place_free(self.t.stage.displaced, out, new_dir, new)
        else:
            looked = self.look.at(step.old, step.node)
            self._place_free(looked.dir_fd, looked.name, new_dir, new)
            if self.look.handle(new_dir, new) != looked.handle:
                self._place_free(new_dir, new, looked.dir_fd, looked.name)
                raise StaleError("something else had its name")
            self.touched.add(step.old[0])
        self.t.db.begin()
        if step.old is not None:
            self.t.index.drop_name(step.old)
        self._refresh(step.node, [step.new])
        self.touched.add(step.new[0])
        self._done(i, step)

    def _move_over(self, i: int, step: Move, removal: Remove) -> None:
        """Swap the two names, then take what must go away from the old one."""
        assert step.old is not None
        path, out = self.t.index.place_path(step.new), self.outs[i]
        one = self.look.at(step.old, step.node)
        with self.look.guarded(step.new, removal.node) as guard:
            two = guard.looked
            exchange(one.dir_fd, one.name, two.dir_fd, two.name)
            try:
                if (
                    self.look.handle(two.dir_fd, two.name) != one.handle
                    or not self.look.same_object(one.dir_fd, one.name, two)
                    or guard.somebody_waits()
                ):
                    raise StaleError("somebody changed it at the same moment")
                self._place_free(one.dir_fd, one.name, self.t.stage.displaced, out)
            except (PathError, OSError):
                exchange(one.dir_fd, one.name, two.dir_fd, two.name)
                raise
        try:
            kept = self._keep(self.t.stage.displaced, out, path, two, removal)
        except PathError:
            self._place_free(self.t.stage.displaced, out, one.dir_fd, one.name)
            exchange(one.dir_fd, one.name, two.dir_fd, two.name)
            raise
        self._forget_tree(removal, step.new)
        self.t.db.begin()
        self.t.index.drop_name(step.old)
        self._refresh(step.node, [step.new])
        self.touched.update((step.old[0], step.new[0]))
        self._done(i, step, kept=kept)

    def _exchange(self, i: int, step: Exchange) -> None:
        one, two = self.look.at(step.old, step.node), self.look.at(step.new, step.other)
        exchange(one.dir_fd, one.name, two.dir_fd, two.name)
        if (
            self.look.handle(two.dir_fd, two.name) != one.handle
            or self.look.handle(one.dir_fd, one.name) != two.handle
        ):
            exchange(one.dir_fd, one.name, two.dir_fd, two.name)
            raise StaleError("something else had one of the names")
        self.t.db.begin()
        self.t.index.drop_name(step.old)
        self.t.index.drop_name(step.new)
        self._refresh(step.node, [step.new])
        self._refresh(step.other, [step.old])
        self.touched.update((step.old[0], step.new[0]))
        self._done(i, step)

    def _park(self, i: int, step: Park) -> None:
        looked = self.look.at(step.old, step.node)
        out = self.outs[i]
        self._place_free(looked.dir_fd, looked.name, self.t.stage.displaced, out)
        if self.look.handle(self.t.stage.displaced, out) != looked.handle:
            self._place_free(self.t.stage.displaced, out, looked.dir_fd, looked.name)
            raise StaleError("something else had its name")
        self.parked[step.node] = out
        self.t.db.begin()
        self.t.index.drop_name(step.old)
        self.touched.add(step.old[0])
        self._done(i, step)

    def _replace(self, i: int, step: Replace) -> None:
        staged, incoming = self.staged[i], self.t.stage.incoming
        old = step.keep_node if step.keep is not None else step.node
        first, *rest = step.places
        path = self.t.index.place_path(first)
        extra = [Stage.name() for _ in rest]
        with self.look.guarded(first, old) as guard:
            for place in rest:
                self.look.at(place, old, content=True)
            if step.keep is not None:
                self._link_free(guard.looked, *self.t.directories.at(step.keep))
            for name in extra:
                os.link(staged.name, name, src_dir_fd=incoming, dst_dir_fd=incoming)
            try:
                self._swap_in(staged.name, first, guard)
            except (PathError, OSError):
                self._undo_links(step, guard, extra)
                raise
            for name, place in zip(extra, rest, strict=True):
                self._swap_in(name, place, guard)
                os.unlink(name, dir_fd=incoming)
        kept = None
        if step.keep is not None:
            os.unlink(staged.name, dir_fd=incoming)
            self.touched.add(step.keep[0])
        else:
            try:
                kept = self._keep(incoming, staged.name, path, guard.looked, step)
            except PathError:
                self._swap_back(staged.name, step.places)
                raise
        self._record_replaced(step, staged)
        self._done(i, step, size=staged.size, kept=kept, missed=staged.missed)

    def _swap_back(self, old_name: bytes, places: tuple[Place, ...]) -> None:
        """The old version could not be kept: it takes its names again."""
        incoming = self.t.stage.incoming
        first, *rest = [self.t.directories.at(place) for place in places]
        for dir_fd, name in rest:
            temp = Stage.name()
            os.link(old_name, temp, src_dir_fd=incoming, dst_dir_fd=incoming)
            exchange(incoming, temp, dir_fd, name)
            os.unlink(temp, dir_fd=incoming)
        exchange(incoming, old_name, *first)

    def _undo_links(self, step: Replace, guard: Guard, extra: list[bytes]) -> None:
        for name in extra:
            os.unlink(name, dir_fd=self.t.stage.incoming)
        if step.keep is not None:
            dir_fd, name = self.t.directories.at(step.keep)
            with contextlib.suppress(StaleError):
                if self.look.handle(dir_fd, name) == guard.looked.handle:
                    os.unlink(name, dir_fd=dir_fd)

    def _record_replaced(self, step: Replace, staged: _Staged) -> None:
        index = self.t.index
        dir_fd, name = self.t.directories.at(step.places[0])
        info = self.look.stat(dir_fd, name)
        wanted = step.attributes
        found = (wanted.xattrs, wanted.acl)
        if staged.missed:
            found = read_xattrs(dir_fd, name)
        self.t.db.begin()
        version = 1
        if step.keep is not None:
            for place in step.places:
                index.drop_name(place)
            self._refresh(step.keep_node, [step.keep])
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

    def _unlink(self, i: int, step: Unlink) -> None:
        out = self.outs[i]
        looked = self._displace(step.place, step.node, out)
        others = [p for p in self.t.index.places(step.node) if p != step.place]
        alive = any(self._holds(place, looked.handle) for place in others)
        if not alive:
            self._put_back(out, looked)
            raise StaleError("its other names are gone")
        os.unlink(out, dir_fd=self.t.stage.displaced)
        self.t.db.begin()
        self.t.index.drop_name(step.place)
        self._refresh(step.node, others[:1])
        self.touched.add(step.place[0])
        self._done(i, step)

    def _holds(self, place: Place, handle: bytes) -> bool:
        try:
            return self.look.handle(*self.t.directories.at(place)) == handle
        except StaleError:
            return False

    def _displace(self, place: Place, node: NodeId, out: bytes) -> Looked:
        """Take a name out of the tree; what came out is what was looked at, or goes back."""
        looked = self.look.at(place, node)
        self._place_free(looked.dir_fd, looked.name, self.t.stage.displaced, out)
        if not self.look.same_object(self.t.stage.displaced, out, looked):
            self._put_back(out, looked)
            raise StaleError("somebody changed it at the same moment")
        return looked

    def _put_back(self, out: bytes, looked: Looked) -> None:
        try:
            rename_noreplace(self.t.stage.displaced, out, looked.dir_fd, looked.name)
        except FileExistsError:
            # Somebody made a new one meanwhile: both are the user's, both stay.
            beside = looked.name[:200] + b".recovered-" + out[:8]
            rename_noreplace(self.t.stage.displaced, out, looked.dir_fd, beside)

    def _remove(self, i: int, step: Remove) -> None:
        out = self.outs[i]
        path = self.t.index.place_path(step.place)
        known = self.t.index.node(step.node)
        if known is not None and known.kind is Kind.DIR:
            looked = self._remove_dir(step, out, known, i)
            if looked is None:
                return
        else:
            with self.look.guarded(step.place, step.node) as guard:
                looked = self._displace(step.place, step.node, out)
                if guard.somebody_waits():
                    self._put_back(out, looked)
                    raise StaleError("somebody opened it at the same moment")
        try:
            kept = self._keep(self.t.stage.displaced, out, path, looked, step)
        except PathError:
            self._put_back(out, looked)
            raise
        self._forget_tree(step, step.place)
        self._done(i, step, kept=kept)

    def _remove_dir(self, step: Remove, out: bytes, known: Node, i: int) -> Looked | None:
        """Displace a directory with all its members; ``None`` where it has to stay."""
        if known.foreign and self._holds_more(step):
            reason = "kept: it holds files that are left alone"
            self.results[i] = Result(step, Status.SKIPPED, reason)
            return None
        looked = self._displace(step.place, step.node, out)
        members = {node for _, node in step.members}
        try:
            look_through(self.look, self.t.stage.displaced, out, step.node, members)
        except (PathError, OSError):
            self._put_back(out, looked)
            raise
        return looked

    def _holds_more(self, step: Remove) -> bool:
        looked = self.look.at(step.place, step.node)
        fd = os.open(looked.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=looked.dir_fd)
        try:
            return bool(os.listdir(fd))
        finally:
            os.close(fd)

    def _set_attributes(self, i: int, step: SetAttributes) -> None:
        index = self.t.index
        places = index.places(step.node)
        if step.node != ROOT and not places:
            raise StaleError("it is not there any more")
        row = index.node(step.node)
        looked = self.look.at(places[0] if places else (0, b""), step.node)
        if row is None:
            raise StaleError("it is not known any more")
        found = read_xattrs(looked.dir_fd, looked.name)
        now = attributes_of(looked.info, *found)
        wanted = step.attributes
        if row.kind is Kind.DIR:
            wanted = replace(wanted, mtime_ns=now.mtime_ns)
        if replace(now, mtime_ns=0) != replace(row.attributes, mtime_ns=0) or (
            row.kind is not Kind.DIR and now.mtime_ns != row.attributes.mtime_ns
        ):
            raise StaleError("its attributes changed since it was observed")
        missed = apply_attributes(looked.dir_fd, looked.name, row.kind, now, wanted)
        self.t.db.begin()
        self._record_attributes(step.node, row, looked, places, keep_time=row.kind is Kind.DIR)
        self._done(i, step, missed=tuple(missed))

    def _record_attributes(
        self, node: NodeId, row: Node, looked: Looked, places: list[Place], *, keep_time: bool
    ) -> None:
        info = os.fstat(looked.dir_fd) if not looked.name else self.look.stat(looked.dir_fd, looked.name)
        found = read_xattrs(looked.dir_fd, looked.name)
        attributes = attributes_of(info, *found)
        if keep_time:
            attributes = replace(attributes, mtime_ns=row.attributes.mtime_ns)
        fresh = replace(row, attributes=attributes, ctime_ns=info.st_ctime_ns)
        self.t.index.put_node(fresh, looked.handle, info.st_ino)
        if not keep_time:
            for place in places:
                self.t.index.set_stamp(place, stamp(info))

    # -- directories, last of all --------------------------------------------

    def harden(self) -> None:
        """Take back the write permission that new directories had while they were filled."""
        rows = self.t.db.execute("SELECT node, mode FROM softened ORDER BY node DESC").fetchall()
        for node, mode in rows:
            places, row = self.t.index.places(node), self.t.index.node(node)
            if places and row is not None:
                with contextlib.suppress(StaleError):
                    looked = self.look.at(places[0], node)
                    os.chmod(b"/proc/self/fd/%d" % self.t.directories.open(node), mode)
                    self._record_attributes(node, row, looked, places, keep_time=True)
            self.t.db.begin()
            self.t.db.execute("DELETE FROM softened WHERE node=?", (node,))

    def set_directory_time(self, node: NodeId, mtime_ns: int) -> Attributes | None:
        """Set a directory's time, last of all; return what it now has.

        Returns:
            ``None`` if the directory is not there any more.
        """
        places = self.t.index.places(node)
        row = self.t.index.node(node)
        if row is None or (node != ROOT and not places):
            return None
        try:
            looked = self.look.at(places[0] if places else (0, b""), node)
        except StaleError:
            return None
        fd = self.t.root.fd if node == ROOT else self.t.directories.open(node)
        if looked.info.st_mtime_ns != mtime_ns:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        self.t.db.begin()
        self._record_attributes(node, row, looked, places, keep_time=False)
        fresh = self.t.index.node(node)
        return None if fresh is None else fresh.attributes


def soft(attributes: Attributes) -> Attributes:
    """A new directory's attributes while it is filled: a plain user needs write permission."""
    if os.geteuid() == 0 or attributes.mode & 0o700 == 0o700:
        return attributes
    return replace(attributes, mode=attributes.mode | 0o700)


def _place(place: Place) -> list[Any]:
    return [place[0], place[1].decode("latin-1")]
