"""Make transitions real on one tree, a batch at a time.

Durability order of a batch: everything staged -> data durable -> intents in the result
log -> name operations -> directories durable -> results in the log. No name ever leads to
content that is not durable, and nothing is unlinked, replaced or overwritten before it
has its place in the store.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from bisync.core.groups import Together
from bisync.core.ignore import Matcher, reserved
from bisync.core.method import Apply
from bisync.core.node import ROOT, Attributes, Content, Kind, Node, NodeId
from bisync.core.path import STATE_DIR, display
from bisync.core.plan import (
    Exchange,
    Link,
    Make,
    Move,
    Park,
    Remove,
    Replace,
    Transition,
    Unlink,
    keys_of,
    new_places,
    place_of,
)
from bisync.errors import BusyError, Interrupted, PathError, StaleError
from bisync.fs.content import ContentSource, Expected
from bisync.fs.copying import remove_object
from bisync.fs.database import Database
from bisync.fs.displaced import leave_beside, remove_unused
from bisync.fs.incoming import LARGE, Arrived, Builder, Staged, not_told
from bisync.fs.index import Index
from bisync.fs.log import ResultLog
from bisync.fs.look import Looker
from bisync.fs.perform import Performer
from bisync.fs.record import Recorder
from bisync.fs.result import Failed, Result, Status
from bisync.fs.root import Directories, Root
from bisync.fs.soften import hard_directories, harden, softened
from bisync.fs.stage import Stage
from bisync.fs.store import Store
from bisync.linux.filesystem import syncfs

if TYPE_CHECKING:
    from bisync.fs.blocklist import BlockLists

log = logging.getLogger(__name__)
SMALL = 256 << 10  # bytes; a file with no more is asked for ahead of its turn
MARKER = b"replica"  # in a folder of state: makes a directory a root
_FSYNC_EACH = 64  # directories made durable one by one; more by one flush


class Tools(Struct, frozen=True):
    """What a replica lends to its applier."""

    root: Root
    index: Index
    db: Database
    stage: Stage
    store: Store
    directories: Directories
    matcher: Matcher
    lists: Callable[[], "BlockLists"]
    workers: int
    fsync: bool = True
    boot: str = ""  # this boot of the machine; what it did not flush is looked at after another
    stop: Callable[[], None] = lambda: None
    whole_files: bool = False
    apply: Apply = Apply.AUTO
    may_be_written: Callable[[Node], bool] = lambda _node: True
    arrived: Arrived = not_told


class Applier:
    """Applies one batch of transitions for one pair."""

    def __init__(self, tools: Tools, pair: int, source: ContentSource) -> None:
        self.t = tools
        self.look = Looker(tools.root, tools.index, tools.directories)
        self.source = source
        apply = tools.apply
        if apply is Apply.AUTO and not tools.fsync:
            apply = Apply.REPLACE  # what can be undone has to be durable
        self.builder = Builder(
            self.look, tools.stage, source, tools.lists, tools.workers, tools.stop, tools.arrived,
            apply, tools.may_be_written,
        )  # fmt: skip
        self.record = Recorder(self.look, tools.db)
        self.log = ResultLog(tools.db, tools.index, pair)
        self.steps: list[Transition] = []
        self.staged: dict[int, Staged] = {}  # by position in the batch
        self.made: dict[NodeId, Staged] = {}
        self.outs: dict[int, bytes] = {}  # names in out/, by position
        self.performer = Performer(
            self.look,
            self.record,
            tools.stage,
            tools.store,
            self.log,
            self.staged,
            self.outs,
            tools.matcher,
        )
        self.results: dict[int, Result] = {}
        self.failed = Failed()
        self.members: dict[Together, list[int]] = {}  # positions of what belongs together
        self.of_step: dict[int, Together] = {}
        self.fixed: set[NodeId] = set()  # nodes whose files are not written into
        self.hard: dict[NodeId, int] = {}  # directories that are softened for a step, with modes

    # -- the batch -----------------------------------------------------------

    def run(
        self,
        steps: list[Transition],
        updates: dict[int, str],
        together: Sequence[Together] = (),
    ) -> list[Result]:
        """Apply ``steps`` in order.

        Args:
            steps: transitions of this side.
            updates: rows for the ancestor by archive number, as JSON, for the log.
            together: of some keys, all steps are done or none.

        Raises:
            NoSpaceError: the side cannot write its own state; nothing half-visible is left.
            HaltError: the root is not what it was.
        """
        self.t.root.check()
        self.steps = steps
        bound = {key for group in together for key in group.keys}
        self.fixed = {s.node for s in steps if isinstance(s, Link) or bound & set(keys_of(s))}
        self.source.expect(expected(steps))
        stopped = self._prepare_all(steps)
        self._bind(steps, together)
        self.t.stage.flush(durable=self.t.fsync)
        todo = [(i, step) for i, step in enumerate(steps) if i not in self.results]
        if todo:
            self.hard = hard_directories([step for _, step in todo], self.t.index)
            keys = [group.keys for group in together]
            self.log.intend(todo, self.staged, self.outs, updates, self.hard, keys)
            self.t.root.check()
            of_step = self.of_step = {i: g for g, mine in self.members.items() for i in mine}
            begun: set[Together] = set()
            try:
                for i, step in enumerate(steps):
                    if i not in self.results:
                        group = of_step.get(i)
                        if not stopped and (group is None or group not in begun):
                            self.t.stop()
                        if group is not None and group not in begun:
                            self._look_for_writers(group, steps)
                            begun.add(group)
                    if i not in self.results:
                        self._guard(i, step, self._perform)
                    self.failed.note(self.results[i])
            except Interrupted:
                for i, step in todo:
                    if i not in self.results:
                        self.results[i] = Result(step, Status.STALE, "stopped before it")
                        self._clean_up(i)
            parked = [step for _, step in todo if isinstance(step, Park)]
            with softened(parked, self.hard, self.t.directories):
                back = self.performer.bring_back()
            for i, step in todo:
                if isinstance(step, Park) and step.node in back:
                    place = back[step.node]
                    beside = None if place == step.old else place
                    self.results[i] = Result(
                        step, Status.STALE, "its way was blocked", beside=beside
                    )
            self._make_durable()
            self._conclude()
        return [self.results[i] for i in range(len(steps))]

    def _prepare_all(self, steps: list[Transition]) -> bool:
        """Build what all steps need; whether a stop was asked for while a later one was built.

        Then those before are still done if a large file is among them, whose copy took long.
        """
        for i, step in enumerate(steps):
            try:
                self._guard(i, step, self._prepare)
            except Interrupted:
                if all(one.content.size < LARGE for one in self.staged.values()):
                    raise
                for j in range(i, len(steps)):
                    self.results[j] = Result(steps[j], Status.STALE, "stopped before it")
                return True
        return False

    def _bind(self, steps: list[Transition], together: Sequence[Together]) -> None:
        """Give up all steps of what belongs together if one of them cannot be done."""
        self.failed = Failed([group.keys for group in together])
        of_key = {key: group for group in together for key in group.keys}
        for i, step in enumerate(steps):
            for group in {of_key[key] for key in keys_of(step) if key in of_key}:
                self.members.setdefault(group, []).append(i)
        for group, mine in self.members.items():
            result = None
            if self.source.moved(set(group.source)):
                text = "it was written to while it was read"
                result = Result(steps[mine[0]], Status.BUSY, text)
            self._give_up(group, steps, mine, result)

    def _look_for_writers(self, group: Together, steps: list[Transition]) -> None:
        """A writer of any file of a database stops all its steps, before the first is done."""
        mine = self.members[group]
        for i in mine:
            if i not in self.results:
                self._guard(i, steps[i], self._refuse_writers)
        result = None
        try:
            if group.top is not None:
                self._look_at_all(group, steps)
        except StaleError as error:
            result = Result(steps[mine[0]], Status.STALE, error.reason)
        except BusyError as error:
            result = Result(steps[mine[0]], Status.BUSY, error.reason)
        except PathError as error:
            result = Result(steps[mine[0]], Status.PROBLEM, error.reason)
        self._give_up(group, steps, mine, result)

    def _look_at_all(self, group: Together, steps: list[Transition]) -> None:
        """What is to stay of a declared directory has to be what the index says, too.

        Raises:
            PathError: stale, busy, or its steps cannot be done by renaming.
        """
        assert group.top is not None
        for node in group.there:  # a server has some of its files open, not all
            for place in self.t.index.places(node)[:1]:
                with self.look.guarded(place, node):
                    pass
        self.look.unchanged(group.top, self.t.matcher)
        for step in (steps[i] for i in self.members[group]):
            gone = [step.node, *(n for _, n in step.members)] if isinstance(step, Remove) else []
            if any(row.foreign for row in self.t.index.nodes(gone).values()):
                raise PathError("a directory of it that goes holds files which are left alone")
        places = (place_of(steps[i]) for i in self.members[group])
        parents = {place[0] for place in places if place is not None}
        for parent in parents:
            if self.t.index.places(parent) or parent == ROOT:
                self.t.stage.reaches(self.t.directories.open(parent))

    def _give_up(
        self,
        group: Together,
        steps: list[Transition],
        mine: list[int],
        why_not: Result | None = None,
    ) -> None:
        """If a step of what belongs together cannot be done, or all of it: none is."""
        failed = Failed([group.keys])
        for i in mine:
            if i in self.results:
                failed.note(self.results[i])
        if why_not is not None:
            failed.note(why_not)
        for i in mine:
            waits = None if i in self.results else failed.stops(steps[i])
            if waits is not None:
                self.results[i] = waits
                self._clean_up(i)

    def _refuse_writers(self, _i: int, step: Transition) -> None:
        """Whoever has a file of a database open for writing here has to close it first."""
        if isinstance(step, Replace | Remove):
            place = step.places[0] if isinstance(step, Replace) else step.place
            if place in self.t.index.places(step.node):  # else it gets there in this batch
                with self.look.guarded(place, step.node):
                    pass

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
        if staged.apart is not None:
            self.t.stage.discard(staged.apart.undo)
        try:
            ours = self.look.handle(*staged.spot) == staged.handle
        except StaleError:
            return
        except OSError as error:
            log.info("stage-not-looked-at name=%s reason=%s", staged.name, error)
            ours = False
        try:
            if not ours:
                self._let_wait(i, staged)  # somebody's got stuck here
            elif staged.shown and not isinstance(self.steps[i], Link):
                self._discard(i, staged)
            else:
                remove_object(*staged.spot)
        except OSError as error:
            log.info("stage-clean-up name=%s reason=%s", staged.name, error)

    def _discard(self, i: int, staged: Staged) -> None:
        """Remove a staged object, unless it was somebody's for a moment.

        It may have been at its name before that was taken back. Whoever opened it there goes on
        with it, and finds it beside the name; so does who made something in a directory.
        """
        then = staged.info.st_size, staged.info.st_mtime_ns
        if remove_unused(*staged.spot, then):
            return
        place = place_of(self.steps[i]) or (ROOT, staged.name)
        try:
            beside = leave_beside(self.t.directories, staged.spot, place)
        except (StaleError, OSError) as error:
            log.warning("not-left-beside name=%s reason=%s", staged.name, error)
            self._let_wait(i, staged)
            return
        self.record.touched.add(place[0])
        log.warning("kept-beside path=%s", display(self.t.index.place_path(beside)))

    def _let_wait(self, i: int, staged: Staged) -> None:
        place = place_of(self.steps[i]) or (ROOT, staged.name)
        self.performer.back.let_wait(staged.spot, self.t.index.place_path(place), place[0])

    def _prepare(self, i: int, step: Transition) -> None:
        """Build what the step needs, and choose names for what it takes away."""
        self.t.stop()
        match step:
            case Make() | Replace():
                old, into = None, None
                if isinstance(step, Replace) and not self.t.whole_files:
                    old = step.node if step.keep is None else step.keep_node
                    if self._may_be_written(step):
                        into = {"reason": step.reason, "conflict": False}
                self.staged[i] = self.builder.build(
                    step.content,
                    step.attributes,
                    step.source,
                    trace=b"%d %d" % (self.log.pair, step.source or 0),
                    name=(step.place if isinstance(step, Make) else step.places[0])[1],
                    new=isinstance(step, Make),
                    old=old,
                    into=into,
                )
                self.made[step.node] = self.staged[i]
            case Link() if step.displaces is not None:
                handle, content = self._linked(step.node)
                info = os.fstat(self.t.root.fd)  # a link has no state of its own
                self.staged[i] = Staged(self.t.stage.incoming, Stage.name(), handle, content, info)
            case Remove() | Unlink() | Park():
                self.outs[i] = Stage.name()
            case Move() if step.displaces is not None:
                self.outs[i] = Stage.name()
            case _:
                pass

    def _may_be_written(self, step: Replace) -> bool:
        alone = step.keep is None and len(step.places) == 1 and step.node not in self.fixed
        return alone and not step.conflict

    def _linked(self, node: NodeId) -> tuple[bytes, Content]:
        """What gets one more name: it is there, or this batch makes it."""
        made = self.made.get(node)
        if made is not None:
            return made.handle, made.content
        row, known = self.t.index.node(node), self.t.index.identity(node)
        if row is None or known is None:
            raise StaleError("it is not known any more")
        return known[0], row.content

    def _refuse_ours(self, step: Transition) -> None:
        """Nothing that comes from the other side may be the engine's own, or become it.

        State is believed: a folder of it that was brought here by somebody else would be, too.
        """
        index = self.t.index
        for parent, name in new_places(step):
            if reserved(name, at_root=parent == ROOT):
                raise PathError("that name is the engine's own")
            above = {n for _, n in index.names_of([parent]).get(parent, ())}
            if name == MARKER and STATE_DIR in above:
                raise PathError("it would be the state of a root")
            if name == STATE_DIR:
                inside = {n for n, _ in index.children([step.node]).get(step.node, ())}
                if isinstance(step, Exchange):
                    inside |= {n for n, _ in index.children([step.other]).get(step.other, ())}
                if MARKER in inside:
                    raise PathError("it would be the state of a root")

    def _perform(self, i: int, step: Transition) -> None:
        self._refuse_ours(step)
        with softened((step,), self.hard, self.t.directories):
            self.performer.together = i in self.of_step
            result = self.failed.stops(step) or self.performer.perform(i, step)
        staged = self.staged.get(i)
        if staged is not None and result.status is Status.DONE:
            result = replace(result, matched=staged.matched)
            if staged.blocks is not None:
                self.t.lists().save(step.node, staged.blocks)
        self.results[i] = result

    def _make_durable(self) -> None:
        if not self.t.fsync:
            return
        self.t.store.flush()
        touched = self.record.touched
        if len(touched) > _FSYNC_EACH:
            syncfs(self.t.root.fd)
            return
        for node in sorted(touched):
            try:
                os.fsync(self.t.directories.open(node))
            except StaleError:
                syncfs(self.t.root.fd)  # it was moved meanwhile; it still has to be durable
                return

    def _conclude(self) -> None:
        """Index changes and results become durable together."""
        db = self.t.db
        db.begin()
        done = {i for i, result in self.results.items() if result.status is Status.DONE}
        self.log.conclude({i: self.results[i].step for i in self.log.rows if i not in done})
        for where, path, before, weak in self.performer.displaced:
            row = [path.decode("latin-1"), before, time.time_ns(), weak]
            db.execute("INSERT OR REPLACE INTO displaced VALUES(?, ?)", (where, json.dumps(row)))
        if not self.t.fsync:
            fresh = {
                step.node for i in done if isinstance(step := self.results[i].step, Make | Replace)
            }
            db.many(
                "INSERT OR REPLACE INTO unflushed VALUES(?, ?)",
                [(node, self.t.boot) for node in fresh],
            )
        db.many("DELETE FROM softened WHERE node=?", [(node,) for node in self.hard])
        self.t.index.save_numbers()
        db.commit()

    # -- directories, last of all --------------------------------------------

    def harden(self) -> None:
        """Take back the write permission that directories had for now, or a cut run left them."""
        rows = self.t.db.execute("SELECT node, mode FROM softened ORDER BY node DESC").fetchall()
        for node, mode in rows:
            places, row = self.t.index.places(node), self.t.index.node(node)
            if row is not None and (places or node == ROOT):
                try:
                    self.look.at(places[0] if places else (0, b""), node)
                    if harden(self.t.directories.open(node), mode):
                        self.record.attributes(row, replace(row.attributes, mode=mode))
                except StaleError:
                    pass  # gone or replaced: not ours any more
                except OSError as error:
                    log.info("not-hardened node=%d reason=%s", node, error)
                    continue  # the next run tries again, before it scans
            self.t.db.begin()
            self.t.db.execute("DELETE FROM softened WHERE node=?", (node,))

    def set_directory_time(self, node: NodeId, mtime_ns: int, *, ours: bool) -> Attributes | None:
        """Set a directory's time, last of all; return what it now has.

        Args:
            ours: something was done in it for us; else nobody's other time is written over.

        Returns:
            ``None`` if the directory is not there any more, or has a time of somebody else's.

        Raises:
            StaleError: it, or one above it, was moved meanwhile.
            OSError: it cannot be set.
        """
        places = self.t.index.places(node)
        row = self.t.index.node(node)
        if row is None or (node != ROOT and not places):
            return None
        looked = self.look.at(places[0] if places else (0, b""), node)
        if not ours and looked.info.st_mtime_ns not in (mtime_ns, row.attributes.mtime_ns):
            return None
        fd = self.t.directories.open(node)
        if looked.info.st_mtime_ns != mtime_ns:
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        self.t.db.begin()
        fresh_time = replace(row.attributes, mtime_ns=mtime_ns)
        self.record.attributes(row, fresh_time, time_is_set=True)
        fresh = self.t.index.node(node)
        return None if fresh is None else fresh.attributes


def expected(steps: Sequence[Transition]) -> list[Expected]:
    """The small files that steps need, in their order."""
    return [
        Expected(step.source, step.content.size, isinstance(step, Make))
        for step in steps
        if isinstance(step, Make | Replace)
        and step.source is not None
        and step.content.kind is Kind.FILE
        and step.content.size <= SMALL
    ]
