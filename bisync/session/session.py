"""One synchronisation of two roots, from opening them to the report."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from bisync.core.conflict import Conflict
from bisync.core.ignore import Matcher
from bisync.core.node import SIDES, NodeId, Side
from bisync.core.plan import Update
from bisync.core.resolve import Rules
from bisync.core.safety import HOUR_NS, Wanted, withhold
from bisync.delta.digest import digest_of
from bisync.endpoint.interface import Ending, Hello
from bisync.endpoint.local import LocalEndpoint
from bisync.errors import BisyncError, Interrupted, UsageError
from bisync.fs.conflicts import Quarrel, Take
from bisync.fs.database import StateDamagedError, translated
from bisync.fs.recovery import Recovered
from bisync.fs.replica import Options
from bisync.fs.root import enclosing_root
from bisync.fs.walk import Problem, ScanResult, ScanRules
from bisync.session.commit import Ledger, open_ledger
from bisync.session.config import Config, Fsync
from bisync.session.cycle import Cycle
from bisync.session.pairing import Relation, Start, relate
from bisync.session.report import Listener, Met, Progress, Report, met_from

_PROBE_NS = 10**9  # a writer caught while a file was displaced shows within this time


class Session:
    """Two roots and how to keep them equal.

    Use as a context manager; :meth:`run` may be called again and again. Each run observes
    both trees, merges what changed, applies it and returns a :class:`Report`.
    """

    def __init__(
        self,
        alpha: str | bytes | os.PathLike[str],
        beta: str | bytes | os.PathLike[str],
        config: Config | None = None,
        *,
        listener: Listener = lambda _event: None,
    ) -> None:
        self.paths = (os.fsencode(alpha), os.fsencode(beta))
        self.config = config or Config()
        self.listener = listener

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def run(self, *, dry: bool = False) -> Report:
        """Synchronise once.

        Args:
            dry: decide everything, change nothing.

        Returns:
            What was done. Problems of single paths are in it, not raised.

        Raises:
            UsageError: the request makes no sense.
            RootLockedError: another engine works on a root.
            HaltError: a root guard wants a person's word.
            EndpointError: a side cannot go on.
        """
        report = Report()
        try:
            try:
                with translated("the state"):
                    self._run(report, dry=dry)
            except StateDamagedError as error:
                # Unreadable state is set aside and the trees are merged: nothing is deleted.
                if dry or not self._set_state_aside():
                    raise
                report.messages.append(str(error))
                self._run(report, dry=dry)
        except BisyncError as error:
            report.error = str(error)
            report.exit_code = error.exit_code
            if isinstance(error, Interrupted):
                report.exit_code = 128 + error.signum
            report.finish()
            error.report = report  # type: ignore[attr-defined]
            raise
        report.finish()
        return report

    # -- phases --------------------------------------------------------------

    def _run(self, report: Report, *, dry: bool) -> None:
        matcher = self.config.ignore.matcher()
        _refuse_nested(self.paths)
        sides: list[LocalEndpoint] = []
        try:
            for path in self.paths:
                sides.append(LocalEndpoint(path, self._options(matcher), dry=dry))
            _OneRun(self, (sides[0], sides[1]), report, dry=dry).go()
        finally:
            for side in sides:
                side.close()

    def _options(self, matcher: Matcher) -> Options:
        c = self.config
        return Options(
            rules=ScanRules(matcher, c.store, specials=c.specials, devices=c.devices),
            store=c.store,
            state_dir=c.state_dir,
            workers=c.workers,
            fsync=c.fsync is not Fsync.NEVER,
            stop=c.stop,
        )

    def _set_state_aside(self) -> bool:
        """Put away what cannot be read; whether anything could not."""
        found = False
        for path in self.paths:
            side = LocalEndpoint(path, self._options(Matcher(())))
            try:
                found = side.replica.set_aside_if_damaged() or side.replica.damaged != "" or found
            finally:
                side.close()
        return found


class _OneRun:
    """The phases of one run, in order."""

    def __init__(
        self,
        session: Session,
        sides: tuple[LocalEndpoint, LocalEndpoint],
        report: Report,
        *,
        dry: bool,
    ) -> None:
        self.config = session.config
        self.sides = sides
        self.report = report
        self.tell = session.listener
        self.dry = dry
        self.forced: tuple[set[NodeId], set[NodeId]] = (set(), set())  # looked at whatever marks say

    def go(self) -> None:
        relation, hellos = self._relate()
        ledger = self._open_archive(relation, hellos)
        if not self.dry:
            self._carry_out(ledger, hellos)
        self._observe()
        cycle = Cycle(
            self.sides,
            ledger,
            self._rules(relation, hellos, ledger),
            self.config,
            self.report,
            self.tell,
            dry=self.dry,
        )
        deletions: list[tuple[int, int]] = []
        stopped: Interrupted | None = None
        try:
            changed = (
                itertools.chain(self.forced[0], self.sides[0].changed(ledger.archives[0])),
                itertools.chain(self.forced[1], self.sides[1].changed(ledger.archives[1])),
            )
            cycle.run(changed)
            cycle.repeat()
            deletions = self._removals(cycle, ledger)
            cycle.repeat()
        except Interrupted as error:
            stopped = error
        cycle.set_times()
        if not self.dry:
            self._look_again(cycle)
            self._finish(cycle, ledger, hellos, deletions, stopped=stopped is not None)
        if stopped is not None:
            raise stopped

    def _say(self, text: str) -> None:
        self.report.messages.append(text)
        self.tell(Met("", "note", b"", text))

    def _relate(self) -> tuple[Relation, tuple[Hello, Hello]]:
        hellos = (self.sides[0].hello(), self.sides[1].hello())
        familiar = [True, True]
        for side in SIDES:
            if hellos[side].known and hellos[side].recorded != hellos[side].root:
                familiar[side] = self.sides[side].looks_familiar()
        relation = relate(hellos, (familiar[0], familiar[1]), self.config)
        for text in relation.messages:
            self._say(text)
        fresh = [
            self.sides[side].establish(
                new_identity=relation.new_identity[side],
                new_incarnation=relation.new_incarnation[side],
            )
            for side in SIDES
        ]
        return relation, (fresh[0], fresh[1])

    def _open_archive(self, relation: Relation, hellos: tuple[Hello, Hello]) -> Ledger:
        hellos = (
            replace(hellos[0], replica=hellos[0].replica or "alpha"),
            replace(hellos[1], replica=hellos[1].replica or "beta"),
        )
        ledger = open_ledger(self.sides, hellos)
        if self.dry:
            if relation.start is Start.FIRST:
                for archive in ledger.archives:
                    archive.clear()
            return ledger
        recovered = (
            self.sides[0].recover(ledger.archives[0]),
            self.sides[1].recover(ledger.archives[1]),
        )
        if relation.start is Start.FIRST:
            ledger.clear()
            return ledger
        ledger.settle()
        for text in ledger.compare(self.config.after_restore, (hellos[0].path, hellos[1].path)):
            self._say(text)
        ledger.replay(recovered)
        self._fetch_damaged(ledger, recovered)
        for side in SIDES:
            if relation.new_incarnation[side]:
                for archive in ledger.archives:
                    archive.db.begin()
                    archive.forget_ids(archive.column(side))
                    archive.reset_cursor()
        return ledger

    def _fetch_damaged(self, ledger: Ledger, recovered: tuple[Recovered, Recovered]) -> None:
        """What a power cut took from one side is new on the other: it comes back from there."""
        for side in SIDES:
            keys = ledger.lead.by_side(side, recovered[side].damaged)
            agreed = ledger.lead.nodes(keys.values())
            ledger.commit(
                [ledger.row(Update(key=key, names=frozenset()), (-1, -1)) for key in agreed]
            )
            for each in agreed.values():
                there = each.ids[side.other]
                if there is not None:
                    self.forced[side.other].add(there)
            for node in recovered[side].damaged:
                self._say(f"{self.sides[side].hello().path}: a file was damaged by a power cut "
                          f"(node {node}); it is kept aside and fetched again")  # fmt: skip

    def _carry_out(self, ledger: Ledger, hellos: tuple[Hello, Hello]) -> None:
        """Do what a person chose for conflicts that were decided: it is their edit."""
        for side in SIDES:
            for choice in self.sides[side].choices(ledger.archives[side]):
                quarrel = choice.quarrel
                if quarrel.waiting:
                    continue
                here = side
                if quarrel.kept is not None and quarrel.loser_replica == hellos[side.other].replica:
                    here = side.other
                why_not = self.sides[here].carry_out(ledger.archives[here], choice)
                if why_not:
                    self._meet(Met(here.label, "problem", quarrel.path, f"conflict: {why_not}"))
                    continue
                for each in self.sides:
                    each.forget_conflicts([quarrel.id])

    def _meet(self, met: Met) -> None:
        if self.report.add(met):
            self.tell(met)

    def _observe(self) -> None:
        counted = [0, 0]

        def scan(side: Side) -> ScanResult:
            def progress(count: int) -> None:
                counted[side] += count
                self.tell(Progress("scan", sum(counted)))

            return self.sides[side].scan(None, progress)

        if self.config.workers > 1:
            with ThreadPoolExecutor(2) as pool:
                results = list(pool.map(scan, SIDES))
        else:
            results = [scan(side) for side in SIDES]
        self.problems: tuple[list[Problem], list[Problem]] = ([], [])
        for side, result in zip(SIDES, results, strict=True):
            self.report.files_scanned += result.entries
            self.problems[side].extend(result.problems)
            for problem in result.problems:
                self._meet(met_from(side.label, problem))

    def _rules(
        self, relation: Relation, hellos: tuple[Hello, Hello], ledger: Ledger
    ) -> Rules:
        chosen: dict[bytes, Side | None] = {}
        for side in SIDES:
            for choice in self.sides[side].choices(ledger.archives[side]):
                if choice.quarrel.waiting:
                    winner = {Take.LIVE: side, Take.KEPT: side.other}.get(choice.take)
                    chosen[choice.quarrel.path] = winner
        return Rules(
            policy=self.config.conflict,
            replicas=(hellos[0].replica[:7] or "alpha", hellos[1].replica[:7] or "beta"),
            presume=not self.config.checksum,
            amnesia=(relation.new_incarnation[0], relation.new_incarnation[1]),
            decisions=chosen,
        )

    def _removals(self, cycle: Cycle, ledger: Ledger) -> list[tuple[int, int]]:
        """Let the guard judge each side's removals, then do them."""
        now = time.time_ns()
        done = []
        for side in SIDES:
            asking = side.other
            count = sum(cycle.withheld[side].values())
            if not count:
                continue
            column = ledger.lead.column(asking)
            wanted = Wanted(
                count=count,
                done_this_hour=self.sides[side].deletions_since(
                    ledger.archives[side], column, now - HOUR_NS
                ),
                entries=ledger.lead.state().entries,
                emptied=self.sides[asking].replica.index.count() == 0,
            )
            reason = None if self.config.yes else withhold(wanted, self.config.max_delete)
            if reason is not None:
                text = f"{reason}; approve with --yes"
                self.report.withheld += count
                self._meet(Met(side.label, "withheld", b"", text))
                for node in cycle.withheld[side]:
                    cycle.unfinished[side].nodes[node] = "withheld"
                continue
            before = self.report.deleted
            cycle.remove(side)
            done.append((column, self.report.deleted - before))
        return done

    def _look_again(self, cycle: Cycle) -> None:
        """Whoever was caught in ``open`` while a file was displaced gets the edit back."""
        for side in SIDES:
            for path in self.sides[side].probe_displaced(min_age_ns=_PROBE_NS):
                self._meet(
                    Met(side.label, "busy", path, "was written while it was replaced; both stay")
                )
                cycle.unfinished[side].nodes[1] = "brought back"

    def _finish(
        self,
        cycle: Cycle,
        ledger: Ledger,
        hellos: tuple[Hello, Hello],
        deletions: list[tuple[int, int]],
        *,
        stopped: bool,
    ) -> None:
        now = time.time_ns()
        rows = tuple(
            self._conflict_row(conflict, kept, hellos, now)
            for conflict, kept in cycle.conflicts
            if conflict.path not in cycle.rules.decisions  # a person knows already
        )
        left = any(u.nodes for u in cycle.unfinished) or stopped or self.report.problems > 0
        entries = ledger.lead.state().entries
        for side in SIDES:
            pending = dict(cycle.unfinished[side].nodes)
            if stopped:
                ledger.archives[side].reset_cursor()
                continue
            self.sides[side].finish(
                ledger.archives[side],
                Ending(now, not left, pending, rows, tuple(deletions), entries),
            )

    def _conflict_row(
        self, conflict: Conflict, kept: bytes | None, hellos: tuple[Hello, Hello], now: int
    ) -> Quarrel:
        loser, loser_side, waits = conflict.loser, conflict.loser_side, conflict.winner is None
        name = conflict.path + conflict.kind.value.encode() + (b"" if waits else str(now).encode())
        return Quarrel(
            id=digest_of(name)[:6].hex(),
            kind=conflict.kind.value,
            path=conflict.path,
            time_ns=now,
            reason=conflict.reason,
            detail=conflict.detail,
            waiting=waits,
            winner=None if conflict.winner is None else hellos[conflict.winner].path,
            loser=None if loser_side is None else hellos[loser_side].path,
            loser_replica="" if loser_side is None else hellos[loser_side].replica,
            kept=kept,
            kept_as=conflict.kept_as,
            mtime_ns=conflict.loser_mtime_ns,
            digest=None if loser is None or loser.digest is None else loser.digest.hex(),
        )


def _refuse_nested(paths: tuple[bytes, bytes]) -> None:
    real = [os.path.realpath(p) for p in paths]
    texts = [os.fsdecode(p) for p in real]
    if real[0] == real[1]:
        raise UsageError(f"{texts[0]}: both sides are the same directory")
    for text, path in zip(texts, real, strict=True):
        above = enclosing_root(path)
        if above is not None:
            raise UsageError(
                f"{text} lies inside the root {os.fsdecode(above)}; synchronise that one, "
                "or exclude the folder and move it out"
            )
    for outer, inner in ((0, 1), (1, 0)):
        if real[inner].startswith(real[outer].rstrip(b"/") + b"/"):
            raise UsageError(f"{texts[inner]} lies inside {texts[outer]}; choose separate roots")


