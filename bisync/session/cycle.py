"""One pass over what changed: close, decide, stage and apply, commit; a chunk at a time.

Everything between observing and applying is a pure function of values, so a chunk can be
decided anew at any time. Deletions wait until everything else has gone through, and until
the guard has seen how many they are.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from bisync.core.closure import close
from bisync.core.conflict import Conflict
from bisync.core.diff import Join, frozen_keys, join, wanted_digests
from bisync.core.groups import Group, goes_with
from bisync.core.node import (
    ROOT,
    SIDES,
    AgreedPart,
    Kind,
    Node,
    NodeId,
    Part,
    Place,
    Side,
)
from bisync.core.plan import (
    Exchange,
    Link,
    Make,
    Move,
    Park,
    Placements,
    Plan,
    Remove,
    Replace,
    SetAttributes,
    Transition,
    Update,
    homeless,
    keys_of,
    place_of,
)
from bisync.core.planner import HELD_NAME, PENDING_TIME, Numbers, make_plan
from bisync.core.reconcile import Outcome, reconcile
from bisync.core.resolve import Rules
from bisync.endpoint.interface import MOVED_ON, Endpoint, Read
from bisync.fs.result import Failed, Result, Status
from bisync.fs.walk import ScanResult
from bisync.session.batches import batches, slices
from bisync.session.commit import Ledger
from bisync.session.config import Config, Fsync
from bisync.session.groups import (
    ABSENT,
    MIXED,
    Groups,
    settle,
    together,
    whole_or_not,
    with_the_rest,
)
from bisync.session.report import (
    ACTIONS,
    Change,
    Listener,
    Met,
    Progress,
    Report,
    met_from,
    reasons,
)
from bisync.session.times import DirectoryTimes

_FEW = 100  # steps, and directory times: then these are set with the steps
_ROUNDS = 4  # how often what moved under our hands is looked at again
_DECLARED_ROUNDS = 20  # of a declared directory: files come and go all the time below a server


class Noted(Struct, frozen=True):
    """A conflict for the lists: where its loser is kept, or that it was not carried out."""

    conflict: Conflict
    kept: bytes | None
    undone: bool = False


class Cycle:
    """One run over two observed sides."""

    def __init__(
        self,
        sides: tuple[Endpoint, Endpoint],
        ledger: Ledger,
        rules: Rules,
        config: Config,
        report: Report,
        listener: Listener,
        note: Callable[[list[Noted]], None],
        *,
        approved: Mapping[bytes, int],
        dry: bool,
    ) -> None:
        self.sides = sides
        self.ledger = ledger
        self.rules = rules
        self.config = config
        self.report = report
        self.tell = listener
        self.note = note  # records decided conflicts, each with where its loser is kept
        self.approved = approved  # deletions in declared directories, by path
        self.dry = dry
        self.numbers = Numbers(
            (sides[0].numbers(), sides[1].numbers()), itertools.count(ledger.lead.next_key())
        )
        self.groups = Groups(sides, config.groups)
        self.databases: list[Group] = []  # of the chunk in hand
        self.applied = 0  # steps done so far
        self.settled: tuple[set[NodeId], set[NodeId]] = (set(), set())
        self.stale: tuple[dict[NodeId, str], dict[NodeId, str]] = ({}, {})
        self.unfinished: tuple[dict[NodeId, str], dict[NodeId, str]] = ({}, {})  # for the next run
        self.withheld: tuple[dict[NodeId, int], dict[NodeId, int]] = ({}, {})
        self.postponed: tuple[set[NodeId], set[NodeId]] = (set(), set())  # until removals are done
        self.stays: tuple[set[bytes], set[bytes]] = (set(), set())  # what had to go, and could not
        self.times = DirectoryTimes(sides, ledger, self._no_time)
        self.frozen: tuple[dict[NodeId, str], dict[NodeId, str]] = ({}, {})
        self.waiting: list[Conflict] = []  # conflicts that nobody decided
        self.attribute_notes: set[tuple[int, str]] = set()
        self.planned: set[Change] = set()
        self.moved: set[tuple[Side, NodeId]] = set()
        self.ids: dict[int, tuple[NodeId | None, NodeId | None]] = {}  # of the chunk in hand

    # -- the run -------------------------------------------------------------

    def run(self, marks: tuple[Iterable[NodeId], Iterable[NodeId]]) -> None:
        """Decide and do everything the marks call for, but removals."""
        self.groups.look()
        for path in self.groups.absent():
            self._tell_met(Met("", "problem", path, ABSENT))
        for side in SIDES:
            for batch in batches(marks[side], self.config.chunk):
                todo = {n for n in batch if n not in self.settled[side]}
                if todo:
                    self.chunk(side, todo, removals=False)

    def repeat(self) -> None:
        """Observe again what had changed under our hands, and decide it anew.

        Also whatever else that showed: a scan of a directory finds more than it was made for.
        """
        for count in range(_DECLARED_ROUNDS):
            if self.dry:
                return
            again, declared = self.groups.around(self.stale)
            if count >= _ROUNDS and not declared:
                break
            stale, self.stale = self.stale, ({}, {})
            for side, parents in zip(SIDES, again, strict=True):
                if parents:
                    self.met_by_scan(side, self.sides[side].scan(parents))
            todo = [
                [*stale[side], *self.sides[side].changed(self.ledger.archives[side])]
                for side in SIDES
            ]
            if not any(todo):
                return
            for side in SIDES:
                self.settled[side].clear()
            self.run((todo[0], todo[1]))
        for side in SIDES:
            for node, reason in self.stale[side].items():
                self._met(side, "busy", node, f"it keeps changing: {reason}")
                self.unfinished[side][node] = reason

    def met_by_scan(self, side: Side, result: ScanResult) -> None:
        """Tell what a scan met; what it could not look at is frozen for this run."""
        self.frozen[side].update(result.frozen)
        for problem in result.problems:
            self._tell_met(met_from(side.label, problem))

    def remove(self, side: Side) -> None:
        """Do the removals on one side that waited."""
        nodes = list(self.withheld[side])
        self.withheld[side].clear()
        self.stays[side].clear()
        self.settled[side].clear()
        for batch in batches(nodes, self.config.chunk):
            todo = {n for n in batch if n not in self.settled[side]}
            if todo:
                self.chunk(side, todo, removals=True)
        waiting, self.postponed = self.postponed, (set(), set())
        for s in SIDES:
            self.settled[s].clear()
        if any(waiting):
            self.run(waiting)

    def leave_removals(self) -> None:
        """Removals that are still not done, and what waits for them, are for the next run."""
        for side in SIDES:
            left = dict.fromkeys(self.withheld[side], "its removal waits")
            left |= dict.fromkeys(self.postponed[side], "it waits for a removal")
            self.unfinished[side].update(left | self.unfinished[side])
            for node in self.postponed[side] if self.stays[side.other] else ():
                if (path := self.sides[side].path(node)) in self.stays[side.other]:
                    self._tell_met(Met(side.other.label, "problem", path, HELD_NAME))

    # -- one chunk -----------------------------------------------------------

    def chunk(self, side: Side, nodes: set[NodeId], *, removals: bool) -> None:
        """Close, decide and do one set of marked nodes."""
        self.config.stop()
        marks: list[set[NodeId]] = [set(), set()]
        marks[side] = nodes
        try:
            self._chunk((marks[0], marks[1]), removals=removals)
        finally:
            for s, text in self.groups.release():
                self._tell_met(Met(s.label, "problem", b"", text))

    def _chunk(self, marks: tuple[set[NodeId], set[NodeId]], *, removals: bool) -> None:
        joined, held = self._decide_inputs(marks)
        plan = self._plan(joined, held, removals=removals)
        for s in SIDES:
            self.settled[s].update(joined.parts[s].names_of)
            self.withheld[s].update(plan.withheld[s])
            self.postponed[s].update(plan.postponed[s])
        self._note_plan(plan, joined)
        if self.dry:
            self._list(plan)
            return
        self.ids = plan.ids
        self._note_conflicts(plan, [])  # a crash must not take them off the lists
        results = self._apply(plan, joined)
        self._settle(plan, results)

    def _decide_inputs(self, marks: tuple[set[NodeId], set[NodeId]]) -> tuple[Join, dict[int, str]]:
        agreed, parts = self._close(marks)
        joined = join(agreed, parts)
        waiting: list[tuple[Side, NodeId, str]] = []
        self.databases = self.groups.among(joined)
        came = [] if self.dry else self.groups.hold(joined, self.databases)
        for side, group, read in came:
            members = [node for _, node in sorted(group.members[side].items())]
            if read.status != "read":
                self._note_read(side, replace(read, node=members[0] if members else ROOT))
                waiting += [(side, node, read.reason) for node in members]
                again = self.stale if read.status == "stale" else self.unfinished
                again[side].update(dict.fromkeys(members, read.reason))
            parts[side].nodes.update(self.sides[side].nodes(members))
        if came:
            joined = join(agreed, parts)
        wanted = wanted_digests(joined, presume=self.rules.presume, prove=self.rules.prove)
        if not any(wanted) and not waiting:
            return joined, with_the_rest(frozen_keys(joined, self.frozen), self.databases)
        held_back = {node for _, node, _ in waiting}
        for side in SIDES:
            for read in self.sides[side].read(sorted(wanted[side] - held_back)):
                self._note_read(side, read)
                if read.status != "read":
                    waiting.append((side, read.node, read.reason))
            for node, fresh in self.sides[side].nodes(wanted[side]).items():
                if node in parts[side].nodes:
                    parts[side].nodes[node] = fresh
        joined = join(agreed, parts)
        held = frozen_keys(joined, self.frozen)
        for side, node, reason in waiting:
            if node in joined.key_of[side]:
                held[joined.key_of[side][node]] = reason
        return joined, with_the_rest(held, self.databases)

    def _close(
        self, marks: tuple[set[NodeId], set[NodeId]]
    ) -> tuple[AgreedPart, tuple[Part, Part]]:
        """What decides about some nodes, and about the databases that they are files of."""
        while True:
            views = self.sides[0].view, self.sides[1].view
            one_way = self.rules.one_way is not None
            agreed, parts = close(self.ledger.lead, views, marks, one_way=one_way)
            missing = self.groups.missing(parts)
            if missing[0] <= marks[0] and missing[1] <= marks[1]:
                break
            marks = marks[0] | missing[0], marks[1] | missing[1]
        for part, archive in zip(parts, self.ledger.archives, strict=True):
            part.halfway = archive.halfway()
        return agreed, parts

    def _note_read(self, side: Side, read: Read) -> None:
        """Something was read, or has to be later."""
        if read.status == "stale":
            self.stale[side][read.node] = read.reason
        elif read.reason:
            kind = "busy" if read.status == "read" else read.status
            self._met(side, kind, read.node, read.reason)
            self.unfinished[side][read.node] = read.reason

    def _plan(self, joined: Join, held: dict[int, str], *, removals: bool) -> Plan:
        def taken(side: Side, place: Place) -> bool:
            parent = joined.local_of[side].get(place[0])
            return parent is not None and bool(self.sides[side].view.at([(parent, place[1])]))

        def judge(rules: Rules, more: Mapping[int, str]) -> Outcome:
            return reconcile(joined, rules, held=held | dict(more), taken=taken)

        while True:
            outcome = judge(self.rules, {})
            outcome, left = settle(joined, outcome, self.databases, self.rules, judge)
            at_once = set[int]().union(*(goes_with(outcome, group) for group in self.databases))
            plan = make_plan(joined, outcome, self.numbers, removals=removals, at_once=at_once)
            waiting = whole_or_not(
                joined, outcome, plan, self.databases, self.config, self.approved
            )
            for group, met, count in waiting:
                self.report.withheld += count
                if count:
                    self.report.held.directories[met.path] = count
                self._tell_met(met)
                held = held | dict.fromkeys(group.keys, met.reason)
            if not waiting:
                break
        for group in left:
            self._tell_met(Met("", "problem", joined.path(Side.ALPHA, group.place), MIXED))
        return plan

    def _note_plan(self, plan: Plan, joined: Join) -> None:
        for conflict in plan.conflicts:
            if conflict.winner is None:
                self.report.waiting += 1
                self.waiting.append(conflict)
            self.report.conflicts += 1
            self.report.conflict_list.append(conflict)
            self.tell(conflict)
        for _, path, text in plan.notes:
            self.tell(Met("", "note", path, text))
        for path, text in plan.strays:
            self._tell_met(Met(Side.BETA.label, "problem", path, text))
        for side in SIDES:
            for node in plan.held_nodes[side]:
                self.unfinished[side].setdefault(node, "held")
        for side, nodes, reason in plan.blocked:
            there = side if nodes[side] is not None else side.other  # it may be new to this side
            path = self.sides[there].path(nodes[there] or ROOT) or b"?"
            self._tell_met(Met(side.label, "problem", path, reason))
            for s, one in zip(SIDES, nodes, strict=True):
                if one is not None:
                    self.unfinished[s][one] = reason
        known = joined.agreed.nodes
        self.report.presumed += sum(u.presumed and u.key not in known for u in plan.updates)

    # -- doing it ------------------------------------------------------------

    def _apply(self, plan: Plan, joined: Join) -> tuple[list[Result], list[Result]]:
        rows = {
            u.key: json.dumps(self.ledger.row(u, (1, 1)), separators=(",", ":"))
            for u in plan.updates
        }
        keys_on = [{k for step in plan.steps[s] for k in keys_of(step)} for s in SIDES]
        results: tuple[list[Result], list[Result]] = ([], [])
        for side in SIDES:
            steps = plan.steps[side]
            if not steps:
                continue
            later = set() if side is Side.BETA else keys_on[Side.BETA]
            last = {key: n for n, step in enumerate(steps) for key in keys_of(step)}
            failed, end = Failed(), 0
            whole = bool(self.databases)
            for some in slices(steps, whole=whole, single=self.config.fsync is Fsync.ALWAYS):
                end += len(some)
                ready = []
                for step in some:
                    waits = failed.stops(step)
                    if waits is None:
                        ready.append(step)
                    else:
                        self._count(side, waits)
                        results[side].append(waits)
                if not ready:
                    continue
                # What is to be agreed on is logged with the last step that it depends on.
                logged = {
                    key: rows[key]
                    for step in ready
                    for key in keys_of(step)
                    if key in rows and key not in later and key not in failed and last[key] < end
                }
                done = self.sides[side].apply(
                    self.ledger.archives[side],
                    ready,
                    logged,
                    self.sides[side.other],
                    together(plan, joined, self.databases, side),
                )
                for result in done:
                    failed.note(result)
                    self._count(side, result)
                results[side].extend(done)
                self.applied += len(done)
                moved = self.report.bytes_sent + self.report.bytes_received
                self.tell(Progress("apply", self.applied, moved))
        return results

    def _settle(self, plan: Plan, results: tuple[list[Result], list[Result]]) -> None:
        """Agree on what was done; queue the rest."""
        failed: set[int] = set()
        for result in itertools.chain(*results):
            if result.status is not Status.DONE:
                failed.update(keys_of(result.step))
        if failed:
            agreed = {u.key for u in plan.updates} - failed
            for side in SIDES:
                placed = Placements()
                for result in results[side]:
                    if result.status is Status.DONE:
                        placed.add(result.step)
                    elif result.beside is not None and isinstance(result.step, Park):
                        step = result.step
                        placed.move(step.node, step.key, step.old, result.beside)
                self.ledger.leave_halfway(side, placed, agreed)
        updates = [u for u in plan.updates if u.key not in failed]
        timed: list[Update] = []
        if not failed and len(plan.directory_times) + sum(map(len, results)) <= _FEW:
            keys = {u.key for u in updates}
            timed = self.times.set_now(plan.directory_times)
            timed = [u for u in timed if u.key not in keys]
        else:  # at the end: what comes in the same directories may well be in the next chunk
            self.times.note(plan.directory_times)
        rows = self._rows(updates) + self.times.rows(timed)
        self.ledger.commit(rows, reasons(plan, results))
        self._note_conflicts(plan, [*itertools.chain(*results)])

    def _note_conflicts(self, plan: Plan, results: list[Result]) -> None:
        """Put what is decided on the lists; once more with what came of it."""
        found: list[Noted] = []
        for conflict in plan.conflicts:
            if conflict.path in self.rules.decisions:
                continue  # a person decided it and knows
            key = plan.archived.get(conflict.key, conflict.key)
            mine = [r for r in results if key in keys_of(r.step)]
            kept = next((r.kept for r in mine if r.kept is not None), None)
            undone = any(r.status is not Status.DONE for r in mine)
            found.append(Noted(conflict, kept, undone=undone))
        if found:
            self.note(found)

    def _rows(self, updates: list[Update]) -> list[list[Any]]:
        """Rows for the archive, with what each side really holds now."""
        found = [self.sides[s].nodes([u.ids[s] for u in updates if u.ids[s]]) for s in SIDES]
        rows: dict[int, list[Any]] = {}
        held: dict[int, Update] = {}
        for update in updates:
            if not update.names and update.key != ROOT:
                rows[update.key] = self.ledger.row(update, (-1, -1))
                continue
            a, b = (found[s].get(update.ids[s] or 0) for s in SIDES)
            if a is not None and b is not None:
                held[update.key] = update
                versions = (a.version, b.version)
                rows[update.key] = self.ledger.row(self._really(update, a, b), versions)
        parents = {p for u in held.values() for p, _ in u.names}
        for key in homeless(held, self.ledger.lead.nodes(parents).keys()):
            del rows[key]
        for update in updates:
            if update.key not in rows and all(update.ids):
                for s in SIDES:
                    self.stale[s][update.ids[s]] = "what it was done to or in moved on"
        return list(rows.values())

    def _really(self, update: Update, a: Node, b: Node) -> Update:
        content = update.content
        if content is not None and not content.known and not update.presumed:
            content = a.content if a.content.known else b.content
        attributes = [a.attributes, b.attributes]
        if a.kind is Kind.DIR and update.key in self.times:
            attributes = [replace(x, mtime_ns=PENDING_TIME) for x in attributes]
        elif a.kind is Kind.DIR and update.key != ROOT:
            for s, node, wanted in zip(SIDES, (a, b), update.attributes, strict=True):
                if wanted is not None and node.attributes.mtime_ns != wanted.mtime_ns:
                    # Its user did something in it that was not observed, before it was moved.
                    attributes[s] = replace(attributes[s], mtime_ns=wanted.mtime_ns)
                    self.stale[s][node.id] = "its time changed meanwhile"
        return replace(update, content=content, attributes=(attributes[0], attributes[1]))

    def set_times(self) -> None:
        """Directory times that still wait, when nothing else is left to do."""
        if not self.dry:
            self.times.set_all()

    def _no_time(self, side: Side, node: NodeId, reason: str) -> None:
        self._met(side, "busy" if reason == MOVED_ON else "problem", node, reason)
        self.unfinished[side][node] = reason

    # -- counting and telling ------------------------------------------------

    def _count(self, side: Side, result: Result) -> None:
        step, report = result.step, self.report
        if result.status is Status.STALE:
            for s, node in self._nodes_of(step):
                self.stale[s][node] = result.reason
            return
        if result.status is not Status.DONE:
            self._failed(side, result)
            return
        if side is Side.BETA:
            report.bytes_sent += result.size
        else:
            report.bytes_received += result.size
        report.literal_bytes += result.size
        report.matched_bytes += result.matched
        report.kept += result.kept is not None
        self._count_step(side, step)
        if result.reason:
            self._tell_met(Met(side.label, "problem", self._path(side, step), result.reason))
        for text in result.missed:
            if (step.key, text) not in self.attribute_notes:
                self.attribute_notes.add((step.key, text))
                self.tell(Met(side.label, "note", self._path(side, step), f"not set: {text}"))
        self.tell(self._change(side, step, result.size))

    def _moved(self, side: Side, *nodes: NodeId) -> None:
        """Count each node once, however many steps take it to its new name."""
        fresh = {(side, node) for node in nodes} - self.moved
        self.moved |= fresh
        self.report.moves += len(fresh)

    def _count_step(self, side: Side, step: Transition) -> None:
        report = self.report
        match step:
            case Make() | Link():
                report.created += isinstance(step, Make)
                report.deleted += 0 if step.displaces is None else 1 + len(step.displaces.members)
            case Move():
                self._moved(side, step.node)
                report.deleted += 0 if step.displaces is None else 1
            case Exchange():
                self._moved(side, step.node, step.other)
            case Replace():
                report.updated += 1
                if step.keep is not None:
                    self._moved(side, step.keep_node)
            case SetAttributes():
                report.updated += 1
            case Remove():
                report.deleted += 1 + len(step.members)
            case _:
                pass

    def _failed(self, side: Side, result: Result) -> None:
        step = result.step
        kind = result.status.value
        path = self._path(side, step)
        self._tell_met(Met(side.label, kind, path, result.reason))
        if result.status is Status.SKIPPED:
            self.stays[side].add(path)
        for s, node in self._nodes_of(step):
            self.unfinished[s][node] = result.reason

    def _nodes_of(self, step: Transition) -> Iterator[tuple[Side, NodeId]]:
        """What either side has of the nodes that a step is about."""
        for key in keys_of(step):
            for side, node in zip(SIDES, self.ids.get(key, (None, None)), strict=True):
                if node is not None:
                    yield side, node

    def _met(self, side: Side, kind: str, node: NodeId, reason: str) -> None:
        path = self.sides[side].path(node) or b"?"
        self._tell_met(Met(side.label, kind, path, reason))

    def _tell_met(self, met: Met) -> None:
        if self.report.add(met):
            self.tell(met)

    def _path(self, side: Side, step: Transition) -> bytes:
        place = place_of(step)
        if place is not None:
            return self.sides[side].place_path(place)
        return self.sides[side].path(step.node) or b"."

    def _change(self, side: Side, step: Transition, size: int) -> Change:
        old = None
        if isinstance(step, Move | Exchange) and step.old is not None:
            old = self.sides[side].place_path(step.old)
        action = ACTIONS.get(type(step), "attributes")
        return Change(side.label, action, self._path(side, step), step.reason, old, size)

    def _list(self, plan: Plan) -> None:
        """A dry run: say what would be done, each thing once."""
        for side in SIDES:
            for step in plan.steps[side]:
                if isinstance(step, Park):
                    continue
                if isinstance(step, Make):
                    self.sides[side].imagine(step.node, step.place)
                change = self._change(side, step, 0)
                if change in self.planned:
                    continue
                self.planned.add(change)
                self._count_step(side, step)
                self.report.changes.append(change)
                self.tell(change)
