"""Perform one transition: look, change names by renames that keep what they displace, look again.

Each method either does its step whole or raises and leaves the names as they were.
"""

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from msgspec.structs import replace

from bisync.core.ignore import Matcher
from bisync.core.node import ROOT, Kind, Node, NodeId, Place
from bisync.core.path import TEMP_PREFIX, display
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
)
from bisync.errors import PathError, StaleError
from bisync.fs.copying import copy_object, is_another_place, remove_object
from bisync.fs.displaced import evidence
from bisync.fs.incoming import Staged, link_beside
from bisync.fs.index import NO_STAMP
from bisync.fs.log import ResultLog, place_to_row
from bisync.fs.look import Guard, Looked, Looker, look_through, uncovered
from bisync.fs.meta import apply_attributes, attributes_of, read_xattrs
from bisync.fs.record import Recorder
from bisync.fs.result import Result, Status
from bisync.fs.retention import HAS_DELTAS
from bisync.fs.root import OPEN_DIR
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.fs.takeback import Spot, TakeBack, link
from bisync.linux.rename import is_unsupported, rename_noreplace, swap

log = logging.getLogger(__name__)


@contextmanager
def _undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Take a change of names back if what follows it fails."""
    try:
        yield
    except (PathError, OSError):
        undo()
        raise


class Performer:
    """Performs the steps of one batch, in order."""

    def __init__(
        self,
        look: Looker,
        record: Recorder,
        stage: Stage,
        store: Store,
        log: ResultLog,
        staged: dict[int, Staged],
        outs: dict[int, bytes],
        matcher: Matcher,
    ) -> None:
        self.look = look
        self.record = record
        self.index = look.index
        self.directories = look.directories
        self.stage = stage
        self.store = store
        self.log = log
        self.back = TakeBack(look, stage, log)
        self.staged = staged  # by position in the batch
        self.outs = outs  # names in out/, by position
        self.matcher = matcher
        self.parked: dict[NodeId, tuple[bytes, Place]] = {}  # name in out/, where it was
        # Kept, path, evidence, and whether no lease could be had.
        self.displaced: list[tuple[bytes, bytes, list[Any], bool]] = []
        self.weak = False  # of what the step in hand displaces
        self.together = False  # the step in hand must not be undone: others were done with it
        self.waiting = ""  # why what it displaced is not in the store yet

    def perform(self, i: int, step: Transition) -> Result:
        """Do the step at position ``i``.

        Raises:
            PathError: stale, busy or impossible; nothing changed.
            OSError: likewise.
        """
        self.waiting, self.weak = "", False
        result = self._dispatch(i, step)
        if self.waiting:
            result = replace(result, reason=self.waiting)
        if result.status is Status.DONE:
            self.index.mark(step.node, self.log.pair)  # the root's other pairs have to hear of it
        return result

    def _dispatch(self, i: int, step: Transition) -> Result:
        match step:
            case Make():
                return self._make(i, step)
            case Link():
                return self._link(i, step)
            case Move():
                return self._move(i, step)
            case Exchange():
                return self._exchange(step)
            case Park():
                return self._park(i, step)
            case Replace():
                return self._replace(i, step)
            case Unlink():
                return self._unlink(i, step)
            case Remove():
                return self._remove(i, step)
            case SetAttributes():
                return self._set_attributes(step)

    @staticmethod
    def _place_free(dir_fd: int, name: bytes, new_dir: int, new: bytes) -> None:
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

    def _make(self, i: int, step: Make) -> Result:
        staged, displaces = self.staged[i], step.displaces
        dir_fd, name = self.directories.at(step.place)
        kept = None
        if displaces is None:
            self._near(i, step.place, lambda: self._place_free(*staged.spot, dir_fd, name))
        else:
            kept = self._put_over(i, staged, step.place, displaces)
        self.record.made(step.node, step.place, staged)
        return Result(step, Status.DONE, size=staged.size, kept=kept, missed=staged.missed)

    def _near(self, i: int, place: Place, act: Callable[[], None]) -> None:
        """Do something with a staged object; where the stage cannot serve, from beside ``place``.

        A rename cannot leave a quota project, an encryption policy or a subvolume. The log
        names the new place before anything is put there, and the new object before it is used.
        """
        try:
            act()
            return
        except OSError as error:
            if not is_another_place(error):
                raise
        staged = self.staged[i]
        near, dir_fd = TEMP_PREFIX + Stage.name(), self.directories.open(place[0])
        self.log.amend(i, near=place_to_row((place[0], near)), handle=None)
        copy_object(*staged.spot, dir_fd, near)
        os.fsync(dir_fd)
        old, staged.handle = staged.spot, self.look.handle(dir_fd, near)
        staged.dir_fd, staged.name = dir_fd, near
        staged.info, staged.found = self.look.stat(dir_fd, near), read_xattrs(dir_fd, near)
        self.log.amend(i, handle=staged.handle.hex())
        remove_object(*old)
        act()

    def _put_over(self, i: int, staged: Staged, place: Place, removal: Remove) -> bytes | None:
        """Exchange a staged object with what must go, then keep what came out."""
        path = self.index.place_path(place)
        known = self.index.node(removal.node)
        is_dir = known is not None and known.kind is Kind.DIR
        if known is not None and is_dir and known.foreign and self._holds_more(removal):
            raise PathError("a directory that holds files which are left alone is in its place")
        with self.look.guarded(place, removal.node) as guard:
            self.weak = guard.is_weak
            staged.shown = True
            self._near(i, place, lambda: self._swap_in(staged.spot, staged.handle, place, guard))
        with _undone_by(lambda: self.back.exchange(staged.spot, place, staged.handle)):
            if stat.S_ISDIR(guard.looked.info.st_mode):
                members = {node for _, node in removal.members}
                look_through(self.look, *staged.spot, removal.node, members)
            kept = self._keep(*staged.spot, path, removal)
        self.record.forget_tree(removal, place)
        return kept

    def _swap_in(self, spot: Spot, ours: bytes, place: Place, guard: Guard) -> None:
        """Exchange, look at what came out, and take it back if it is a surprise."""
        self.record.touched.add(place[0])  # taken back, too, it is durable before the log forgets
        swap(*spot, *self.directories.at(place))
        with _undone_by(lambda: self.back.exchange(spot, place, ours)):
            if guard.somebody_waits() or not self.look.same_object(*spot, guard.looked):
                raise StaleError("somebody changed it at the same moment")

    def _keep(
        self,
        dir_fd: int,
        name: bytes,
        path: bytes,
        removal: Remove | Replace,
    ) -> bytes | None:
        info = self.look.stat(dir_fd, name)
        known = self.index.node(removal.node)
        digest = None if known is None or known.content.digest is None else known.content.digest
        record = {
            "reason": removal.reason,
            "conflict": removal.conflict,
            "digest": None if digest is None else digest.hex(),
        }
        if isinstance(removal, Replace) and not removal.conflict and known is not None:
            record["installed"] = self.index.is_installed(known)  # such a version may be thinned
        shared = stat.S_ISREG(info.st_mode) and info.st_nlink > 1
        before = None if shared else evidence(dir_fd, name)
        try:
            kept = self.store.keep(dir_fd, name, path, record, copy=shared)
        except PathError as error:
            if not self.together or dir_fd not in (self.stage.incoming, self.stage.displaced):
                raise
            self.waiting = f"what it replaced waits in the stage: {error.reason}"
            self.back.let_wait((dir_fd, name), path, ROOT)
            return None
        is_copied_dir = kept.copied and stat.S_ISDIR(info.st_mode)
        if before is not None and not is_copied_dir:  # nobody holds what is only a copy
            self.displaced.append((kept.path, path, before, self.weak))
        return kept.path

    def _link(self, i: int, step: Link) -> Result:
        places = self.index.places(step.node)
        if not places:
            raise StaleError("it is not there any more")
        looked = self.look.at(places[0], step.node)
        dir_fd, name = self.directories.at(step.place)
        kept = None
        if step.displaces is None:
            self._link_free(looked, dir_fd, name)
        else:
            staged = self.staged[i]
            self._link_free(looked, *staged.spot)
            kept = self._put_over(i, staged, step.place, step.displaces)
        if self.look.handle(dir_fd, name) != looked.handle:
            raise StaleError("another object got the name")
        self.record.db.begin()
        self.record.refresh(step.node, [step.place])
        self.record.touched.add(step.place[0])
        return Result(step, Status.DONE, kept=kept)

    @staticmethod
    def _link_free(looked: Looked, dir_fd: int, name: bytes) -> None:
        try:
            link((looked.dir_fd, looked.name), (dir_fd, name))
        except FileExistsError as error:
            raise StaleError("something new has its name") from error
        except OSError as error:
            if is_another_place(error):
                raise PathError("a hard link cannot cross into another quota project") from error
            raise

    def _move(self, i: int, step: Move) -> Result:
        if step.displaces is not None:
            return self._move_over(i, step, step.displaces)
        new_dir, new = self.directories.at(step.new)
        if step.old is None:
            out, _ = self.parked[step.node]
            self._place_free(self.stage.displaced, out, new_dir, new)
            del self.parked[step.node]
            self.directories.unpin(step.node)
        else:
            looked = self.look.at(step.old, step.node)
            if stat.S_ISDIR(looked.info.st_mode):
                self._check_filter(looked, step.old, step.new)
            self._place_free(looked.dir_fd, looked.name, new_dir, new)
            with _undone_by(lambda: self._place_free(new_dir, new, looked.dir_fd, looked.name)):
                if self.look.handle(new_dir, new) != looked.handle:
                    raise StaleError("something else had its name")
            self.record.touched.add(step.old[0])
        self.record.db.begin()
        if step.old is not None:
            self.index.drop_name(step.old)
        self.record.refresh(step.node, [step.new])
        self.record.touched.add(step.new[0])
        return Result(step, Status.DONE)

    def _check_filter(self, looked: Looked, old: Place, new: Place) -> None:
        """A directory must not take along what a filter hides only at the old place."""
        if not self.matcher.active:
            return
        fd = os.open(looked.name, OPEN_DIR, dir_fd=looked.dir_fd)
        try:
            found = uncovered(
                self.matcher, fd, self.index.place_path(old), self.index.place_path(new)
            )
        finally:
            os.close(fd)
        if found is not None:
            raise PathError(f"{display(found)} is left alone, but would not be at the new place")

    def _move_over(self, i: int, step: Move, removal: Remove) -> Result:
        """Swap the two names, then take what must go away from the old one."""
        assert step.old is not None
        path = self.index.place_path(step.new)
        one = self.look.at(step.old, step.node)
        with self.look.guarded(step.new, removal.node) as guard:
            two, self.weak = guard.looked, guard.is_weak
            swap(one.dir_fd, one.name, two.dir_fd, two.name)
            with _undone_by(lambda: self.back.names(one, two)):
                if (
                    self.look.handle(two.dir_fd, two.name) != one.handle
                    or not self.look.same_object(one.dir_fd, one.name, two)
                    or guard.somebody_waits()
                ):
                    raise StaleError("somebody changed it at the same moment")
                out = self._take_out(i, step.old, one)
        with (
            _undone_by(lambda: self.back.names(one, two)),
            _undone_by(lambda: self._put_back(out, one)),
        ):
            kept = self._keep(*out, path, removal)
        self.record.forget_tree(removal, step.new)
        self.record.db.begin()
        self.index.drop_name(step.old)
        self.record.refresh(step.node, [step.new])
        self.record.touched.update((step.old[0], step.new[0]))
        return Result(step, Status.DONE, kept=kept)

    def _exchange(self, step: Exchange) -> Result:
        one, two = self.look.at(step.old, step.node), self.look.at(step.new, step.other)
        swap(one.dir_fd, one.name, two.dir_fd, two.name)
        with _undone_by(lambda: swap(one.dir_fd, one.name, two.dir_fd, two.name)):
            if (
                self.look.handle(two.dir_fd, two.name) != one.handle
                or self.look.handle(one.dir_fd, one.name) != two.handle
            ):
                raise StaleError("something else had one of the names")
        self.record.db.begin()
        self.index.drop_name(step.old)
        self.index.drop_name(step.new)
        self.record.refresh(step.node, [step.new])
        self.record.refresh(step.other, [step.old])
        self.record.touched.update((step.old[0], step.new[0]))
        return Result(step, Status.DONE)

    def _park(self, i: int, step: Park) -> Result:
        looked = self.look.at(step.old, step.node)
        out = self.outs[i]
        if stat.S_ISDIR(looked.info.st_mode):
            self.directories.pin(step.node)  # names in it may move while it has none itself
        with _undone_by(lambda: self.directories.unpin(step.node)):
            self._place_free(looked.dir_fd, looked.name, self.stage.displaced, out)
            with _undone_by(lambda: self._put_back((self.stage.displaced, out), looked)):
                if self.look.handle(self.stage.displaced, out) != looked.handle:
                    raise StaleError("something else had its name")
        self.parked[step.node] = out, step.old
        self.record.db.begin()
        self.index.drop_name(step.old)
        self.record.touched.add(step.old[0])
        return Result(step, Status.DONE)

    def bring_back(self) -> dict[NodeId, Place]:
        """Give every node that is still parked a name again: its old one, or one beside it.

        Returns:
            Where each node is now; what was planned for it has to be planned anew.
        """
        back = {}
        for node, (out, place) in list(self.parked.items()):
            del self.parked[node]
            self.directories.unpin(node)
            try:
                dir_fd, name = self.directories.at(place)
            except StaleError:
                place = (ROOT, place[1])
                dir_fd, name = self.directories.at(place)
            try:
                rename_noreplace(self.stage.displaced, out, dir_fd, name)
            except FileExistsError:
                place = (place[0], name[:200] + b".recovered-" + out[-8:])
                rename_noreplace(self.stage.displaced, out, dir_fd, place[1])
            self.record.db.begin()
            self.index.put_name(place, node, NO_STAMP)
            self.index.mark(node)
            self.record.touched.add(place[0])
            back[node] = place
        return back

    def _replace(self, i: int, step: Replace) -> Result:
        staged = self.staged[i]
        if staged.apart is not None:
            kept = self._write_into(i, step, staged)
            if kept is not None:
                self.record.replaced(step, staged)
                return Result(step, Status.DONE, size=staged.size, kept=kept, missed=staged.missed)
        old = step.keep_node if step.keep is not None else step.node
        first, *rest = step.places
        path = self.index.place_path(first)
        with self.look.guarded(first, old) as guard:
            self.weak = guard.is_weak
            for place in rest:
                self.look.at(place, old, content=True)
            if step.keep is not None:
                self._link_free(guard.looked, *self.directories.at(step.keep))
            with _undone_by(lambda: self._undo_keep(step, guard)):
                staged.shown = True
                self._near(
                    i, first, lambda: self._swap_in(staged.spot, staged.handle, first, guard)
                )
                done = [first]
                with _undone_by(lambda: self.back.group(staged, done)):
                    for place in rest:
                        self._follow(staged, len(done), first, place, guard)
                        done.append(place)
        kept = None
        if step.keep is not None:
            os.unlink(staged.name, dir_fd=staged.dir_fd)
            self.record.touched.add(step.keep[0])
        else:
            with _undone_by(lambda: self.back.group(staged, step.places)):
                kept = self._keep(*staged.spot, path, step)
        self.record.replaced(step, staged)
        return Result(step, Status.DONE, size=staged.size, kept=kept, missed=staged.missed)

    def _write_into(self, i: int, step: Replace, staged: Staged) -> bytes | None:
        """Write the new version into the old one; ``None`` if somebody else has that open.

        Then it is whole in the stage, to be exchanged.
        """
        from bisync.fs.inplace import InPlace  # noqa: PLC0415 -- loads numpy

        place, in_place = step.places[0], InPlace(self.look, self.stage, self.store)
        self.record.db.begin()
        self.record.db.put(HAS_DELTAS, 1)
        kept = in_place.write(place, step.node, staged)
        if kept is None:
            in_place.make_whole(place, step.node, staged)
            self.log.amend(i, undo=None, mtime=staged.info.st_mtime_ns)
            return None
        return kept

    def _follow(
        self, staged: Staged, number: int, first: Place, place: Place, guard: Guard
    ) -> None:
        """Another name of a hard-link group gets the object that its first name has now.

        What comes out is a link of the old object, which the stage still has.
        """
        temp = staged.dir_fd, link_beside(staged.name, number)
        link(self.directories.at(first), temp)
        try:
            if self.look.handle(*temp) != staged.handle:
                os.unlink(temp[1], dir_fd=temp[0])
                raise StaleError("somebody changed it at the same moment")
            self._swap_in(temp, staged.handle, place, guard)
        finally:
            self.back.drop_link(temp, place, first, staged.handle, guard.looked.handle)

    def _undo_keep(self, step: Replace, guard: Guard) -> None:
        if step.keep is not None:
            dir_fd, name = self.directories.at(step.keep)
            with contextlib.suppress(StaleError):
                if self.look.handle(dir_fd, name) == guard.looked.handle:
                    os.unlink(name, dir_fd=dir_fd)

    def _unlink(self, i: int, step: Unlink) -> Result:
        looked, out = self._displace(i, step.place, step.node)
        others = [p for p in self.index.places(step.node) if p != step.place]
        with _undone_by(lambda: self._put_back(out, looked)):
            if not any(self._holds(place, looked.handle) for place in others):
                raise StaleError("its other names are gone")
            os.unlink(out[1], dir_fd=out[0])
        self.record.db.begin()
        self.index.drop_name(step.place)
        self.record.refresh(step.node, others[:1])
        self.record.touched.add(step.place[0])
        return Result(step, Status.DONE)

    def _holds(self, place: Place, handle: bytes) -> bool:
        try:
            return self.look.handle(*self.directories.at(place)) == handle
        except StaleError:
            return False

    def _displace(self, i: int, place: Place, node: NodeId) -> tuple[Looked, tuple[int, bytes]]:
        """Take a name out of the tree; what came out is what was looked at, or goes back.

        Returns:
            What was looked at, and where it is now: in ``out/``, or beside its old name
            where no rename leads out of its directory.
        """
        looked = self.look.at(place, node)
        out = self._take_out(i, place, looked)
        with _undone_by(lambda: self._put_back(out, looked)):
            if not self.look.same_object(*out, looked):
                raise StaleError("somebody changed it at the same moment")
        return looked, out

    def _take_out(self, i: int, place: Place, looked: Looked) -> tuple[int, bytes]:
        """Rename a name into ``out/``, or to one beside it where no rename leads out."""
        out = self.stage.displaced, self.outs[i]
        try:
            self._place_free(looked.dir_fd, looked.name, *out)
        except OSError as error:
            if not is_another_place(error):
                raise
            out = looked.dir_fd, TEMP_PREFIX + self.outs[i]
            self.log.amend(i, near=place_to_row((place[0], out[1])))
            self._place_free(looked.dir_fd, looked.name, *out)
        return out

    @staticmethod
    def _put_back(out: tuple[int, bytes], looked: Looked) -> None:
        try:
            rename_noreplace(*out, looked.dir_fd, looked.name)
        except FileExistsError:
            # Somebody made a new one meanwhile: both are the user's, both stay.
            beside = looked.name[:200] + b".recovered-" + out[1][-8:]
            rename_noreplace(*out, looked.dir_fd, beside)

    def _remove(self, i: int, step: Remove) -> Result:
        path = self.index.place_path(step.place)
        known = self.index.node(step.node)
        if known is not None and known.kind is Kind.DIR:
            if known.foreign and self._holds_more(step):
                return Result(step, Status.SKIPPED, "kept: it holds files that are left alone")
            looked, out = self._displace(i, step.place, step.node)
            members = {node for _, node in step.members}
            with _undone_by(lambda: self._put_back(out, looked)):
                look_through(self.look, *out, step.node, members)
        else:
            with self.look.guarded(step.place, step.node) as guard:
                self.weak = guard.is_weak
                looked, out = self._displace(i, step.place, step.node)
                with _undone_by(lambda: self._put_back(out, looked)):
                    if guard.somebody_waits():
                        raise StaleError("somebody opened it at the same moment")
        with _undone_by(lambda: self._put_back(out, looked)):
            kept = self._keep(*out, path, step)
        self.record.forget_tree(step, step.place)
        return Result(step, Status.DONE, kept=kept)

    def _holds_more(self, step: Remove) -> bool:
        looked = self.look.at(step.place, step.node)
        fd = os.open(
            looked.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=looked.dir_fd
        )
        try:
            return bool(os.listdir(fd))
        finally:
            os.close(fd)

    def _set_attributes(self, step: SetAttributes) -> Result:
        places, row = self.index.places(step.node), self.index.node(step.node)
        if row is None or (step.node != ROOT and not places):
            raise StaleError("it is not there any more")
        place = places[0] if places else (0, b"")
        if row.kind is Kind.FILE and step.attributes.mtime_ns != row.attributes.mtime_ns:
            # Setting the time would hide a write of this moment: no writer may be there.
            with self.look.guarded(place, step.node) as guard:
                return self._set(step, row, guard.looked)
        return self._set(step, row, self.look.at(place, step.node))

    def _set(self, step: SetAttributes, row: Node, looked: Looked) -> Result:
        now = attributes_of(looked.info, *read_xattrs(looked.dir_fd, looked.name))
        wanted, known = step.attributes, row.attributes
        if row.kind is Kind.DIR:
            wanted = replace(wanted, mtime_ns=now.mtime_ns)
            known = replace(known, mtime_ns=now.mtime_ns)
        if now != known:
            raise StaleError("its attributes changed since it was observed")
        missed = apply_attributes(looked.dir_fd, looked.name, row.kind, now, wanted)
        if missed:
            info = self.look.stat(looked.dir_fd, looked.name) if looked.name else None
            found = read_xattrs(looked.dir_fd, looked.name)
            wanted = attributes_of(info or os.fstat(looked.dir_fd), *found)
        if row.kind is Kind.DIR:
            wanted = replace(wanted, mtime_ns=row.attributes.mtime_ns)
        self.record.db.begin()
        self.record.attributes(row, wanted)
        return Result(step, Status.DONE, missed=tuple(missed))
