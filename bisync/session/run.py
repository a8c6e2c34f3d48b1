"""The phases of one run, in order: relate, recover, observe, decide and apply, conclude."""

import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from msgspec import Struct, field
from msgspec.structs import replace

from bisync.core.conflict import Conflict
from bisync.core.node import ROOT, SIDES, NodeId, Side
from bisync.core.path import display
from bisync.core.plan import Update
from bisync.core.resolve import Rules
from bisync.core.safety import HOUR_NS, Wanted, withhold
from bisync.delta.digest import digest_of
from bisync.endpoint.interface import Ending, Endpoint, Hello
from bisync.errors import Interrupted
from bisync.fs.conflicts import Quarrel, Take
from bisync.fs.recovery import Recovered
from bisync.fs.walk import ScanResult
from bisync.session.approval import Withheld
from bisync.session.commit import Ledger, open_ledger
from bisync.session.config import Config
from bisync.session.cycle import Cycle, Noted
from bisync.session.pairing import Relation, Start, relate
from bisync.session.report import Listener, Met, Progress, Report
from bisync.watch.interface import Spot

# Of files that were taken for equal a run of a session that stays open reads so many, so many
# bytes; a larger one alone, and one that would hold up all else is left to --checksum and `verify`.
_PROVED = 64
_PROVED_BYTES = 256 << 20
_PROVED_LARGEST = 4 << 30
_REMOVAL_ROUNDS = 2  # a removal that went stale gets another chance
_PROBE_NS = 10**9  # a writer caught while a file was displaced shows within this time


class Pairing(Struct, frozen=True):
    """What two sides agreed on when they met; good for as long as both stay open."""

    relation: Relation
    hellos: tuple[Hello, Hello]
    ledger: Ledger


class Proving(Struct):
    """How far a session has read the files that were taken for equal by size and time."""

    after: int = 0  # the agreed number up to which it did
    done: bool = False


class Manner(Struct, frozen=True):
    """What a run does; one of many that follow each other closely leaves some to the others."""

    removals: bool = True  # else what became free may get a new owner first
    tend: bool = True  # let the store go of what is old, tidy the state
    measure: bool = False  # see how much room the engine's own files take
    left: bool = False  # something that an earlier run met is not looked at by this one
    until_ns: int | None = None  # what was noticed later is for another one; None: it is not
    prove: Proving | None = None  # go on with this for a while; None: not without --checksum
    approved: Withheld = field(default_factory=Withheld)  # by a person, as it was shown


WHOLE = Manner()


class Run:
    """One run over two open sides."""

    def __init__(
        self,
        sides: tuple[Endpoint, Endpoint],
        config: Config,
        report: Report,
        listener: Listener,
        *,
        dry: bool,
    ) -> None:
        self.config = config
        self.sides = sides
        self.report = report
        self.tell = listener
        self.dry = dry
        self.busy: tuple[list[str], list[str]] = ([], [])
        self.forced: tuple[set[NodeId], set[NodeId]] = (
            set(),
            set(),
        )  # looked at whatever marks say

    def meet(self) -> Pairing:
        """Relate the sides, and settle what an earlier run left half done."""
        relation, hellos = self._relate()
        return Pairing(relation, hellos, self._open_archive(relation, hellos))

    def go(
        self, pairing: Pairing, only: tuple[set[Spot], set[Spot]] | None, manner: Manner
    ) -> None:
        """Observe, decide, apply and conclude.

        Args:
            pairing: what :meth:`meet` returned, for these sides.
            only: the directories of each side that may have changed; ``None``: any.
            manner: what of a whole run is left for another one.
        """
        relation, hellos, ledger = pairing.relation, pairing.hellos, pairing.ledger
        if not self.dry:
            self._carry_out(ledger, hellos)
        began_ns = time.time_ns()  # what happens from here on may be seen, or not
        if manner.until_ns is not None:
            began_ns = min(began_ns, manner.until_ns)
        seen = self._observe(only)

        def note(found: list[Noted]) -> None:
            self._note_conflicts(ledger, hellos, found)

        cycle = Cycle(
            self.sides,
            ledger,
            self._rules(relation, hellos, ledger, manner),
            self.config,
            self.report,
            self.tell,
            note,
            approved=manner.approved.directories,
            dry=self.dry,
        )
        for side in SIDES:
            cycle.met_by_scan(side, seen[side])
        deletions: list[tuple[int, int]] = []
        stopped: Interrupted | None = None
        try:
            changed = (
                itertools.chain(
                    self.forced[0],
                    self._unread(ledger, manner),
                    self.sides[0].changed(ledger.archives[0]),
                ),
                itertools.chain(self.forced[1], self.sides[1].changed(ledger.archives[1])),
            )
            cycle.run(changed)
            cycle.repeat()
            for _ in range(_REMOVAL_ROUNDS if manner.removals else 0):
                deletions += self._removals(cycle, ledger, deletions, manner.approved)
                cycle.repeat()
            cycle.leave_removals()
        except Interrupted as error:
            stopped = error
        cycle.set_times()
        if not self.dry:
            self._look_again(cycle)
            if stopped is None:  # else no mark was forgotten: the next run reads them again
                self._finish(cycle, ledger, deletions, manner, began_ns)
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
        for side in SIDES:
            for text in recovered[side].said:
                self._say(f"{self.sides[side].hello().path}: {text}")
            for path, reason in recovered[side].stuck:
                self._meet(Met(side.label, "problem", path, reason))
        if relation.start is Start.FIRST:
            ledger.clear()
            return ledger
        ledger.settle()
        for text in ledger.compare(self.config, (hellos[0].path, hellos[1].path)):
            self._say(text)
        ledger.replay(recovered, self.sides)
        self._fetch_damaged(ledger, recovered)
        for side in SIDES:
            # Also one that another pair of this root met first.
            known_as = ledger.archives[side].state().incarnation
            if known_as and known_as != hellos[side].incarnation:
                relation.new_incarnation[side] = True
            if relation.new_incarnation[side]:
                for archive in ledger.archives:
                    archive.forget_ids(archive.column(side))
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

    def _carry_out(self, ledger: Ledger, hellos: tuple[Hello, Hello]) -> None:
        """Do what a person chose for conflicts that were decided: it is their edit."""
        for side in SIDES:
            for choice in self.sides[side].choices(ledger.archives[side]):
                quarrel = choice.quarrel
                if quarrel.waiting:
                    continue
                here = side
                if quarrel.loser_replica == hellos[side.other].replica and quarrel.kept_as is None:
                    here = side.other
                if self.config.one_way is not None and here is Side.ALPHA:
                    self._say(
                        f"{display(quarrel.path)}: what was chosen would change alpha; dropped"
                    )
                    why_not = ""
                else:
                    why_not = self.sides[here].carry_out(ledger.archives[here], choice)
                if why_not:
                    self._meet(Met(here.label, "problem", quarrel.path, f"conflict: {why_not}"))
                    continue
                for each in self.sides:
                    each.forget_conflicts([quarrel.id])

    def _meet(self, met: Met) -> None:
        if self.report.add(met):
            self.tell(met)

    def _observe(self, only: tuple[set[Spot], set[Spot]] | None) -> tuple[ScanResult, ScanResult]:
        counted = [0, 0]

        def scan(side: Side) -> ScanResult:
            def progress(count: int) -> None:
                counted[side] += count
                self.tell(Progress("scan", sum(counted)))

            if only is None:
                return self.sides[side].scan(None, progress)
            return self.sides[side].look(only[side], progress)

        if self.config.workers > 1:
            with ThreadPoolExecutor(2) as pool:
                alpha, beta = pool.map(scan, SIDES)
        else:
            alpha, beta = map(scan, SIDES)
        self.report.files_scanned += alpha.entries + beta.entries
        return alpha, beta

    def _unread(self, ledger: Ledger, manner: Manner) -> Iterator[NodeId]:
        """Alpha's nodes of files that were taken for equal, if this run is to read them."""
        proving, most = manner.prove, _PROVED
        left, largest = _PROVED_BYTES, _PROVED_LARGEST
        if self.config.checksum:
            proving, most = Proving(), self.config.chunk
            left = largest = sys.maxsize
        if proving is None:
            return
        while keys := ledger.lead.presumed(proving.after, most):
            for key, agreed in sorted(ledger.lead.nodes(keys).items()):
                node, size = agreed.ids[Side.ALPHA], agreed.content.size
                if node is not None and size <= largest:
                    if size > left and left < _PROVED_BYTES:
                        return
                    left -= size
                    yield node
                proving.after = key
            proving.after = max(keys)
            if not self.config.checksum:
                return
        proving.done = True

    def _rules(
        self, relation: Relation, hellos: tuple[Hello, Hello], ledger: Ledger, manner: Manner
    ) -> Rules:
        chosen: dict[bytes, Side | None] = {}
        for side in SIDES:
            for choice in self.sides[side].choices(ledger.archives[side]):
                if choice.quarrel.waiting:
                    winner = {Take.LIVE: side, Take.KEPT: side.other}.get(choice.take)
                    chosen[choice.quarrel.path] = winner
        # Two users may make files of one size in one tick of the clock; that is no first contact.
        first = relation.start is Start.FIRST or ledger.lead.state().complete_ns is None
        return Rules(
            policy=self.config.conflict,
            replicas=(hellos[0].replica[:7] or "alpha", hellos[1].replica[:7] or "beta"),
            presume=first and not self.config.checksum,
            prove=self.config.checksum or manner.prove is not None,
            amnesia=(relation.new_incarnation[0], relation.new_incarnation[1]),
            decisions=chosen,
            one_way=self.config.one_way,
        )

    def _removals(
        self,
        cycle: Cycle,
        ledger: Ledger,
        before: list[tuple[int, int]],
        approved: Withheld,
    ) -> list[tuple[int, int]]:
        """Let the guard judge each side's removals, then do them.

        Args:
            before: (column that asked, entries) of this run so far.
            approved: by a person, who was shown just these; they count for nothing later.
        """
        now = time.time_ns()
        done = []
        for side in SIDES:
            asking, waiting = side.other, cycle.withheld[side]
            new = dict(waiting.items() - approved.nodes[side].items())
            seen = sum(waiting.values()) - sum(new.values())
            count = sum(new.values())
            column = ledger.lead.column(asking)
            if count and not self.config.yes:
                wanted = Wanted(
                    count=count,
                    done_this_hour=self.sides[side].deletions_since(
                        ledger.archives[side], column, now - HOUR_NS
                    )
                    + sum(count for asked, count in before if asked == column),
                    entries=ledger.lead.state().entries,
                    emptied=self.sides[asking].is_empty(),
                )
                reason = withhold(wanted, self.config.max_delete)
                if reason is not None:
                    self.report.withheld += count
                    self.report.held.nodes[side].update(new)
                    self._meet(Met(side.label, "withheld", b"", f"{reason}; approve with --yes"))
                    for node in new:
                        cycle.unfinished[side][node] = "withheld"
                        del waiting[node]
            if waiting:
                deleted = self.report.deleted
                cycle.remove(side)
                done.append((column, max(self.report.deleted - deleted - seen, 0)))
        return done

    def _look_again(self, cycle: Cycle) -> None:
        """Whoever was caught in ``open`` while a file was displaced gets the edit back."""
        for side in SIDES:
            probed = self.sides[side].probe_displaced(min_age_ns=_PROBE_NS)
            self.report.weak += probed.weak
            for path in probed.back:
                self._meet(
                    Met(side.label, "busy", path, "was written while it was replaced; both stay")
                )
                cycle.unfinished[side][ROOT] = "brought back"

    def _finish(
        self,
        cycle: Cycle,
        ledger: Ledger,
        deletions: list[tuple[int, int]],
        manner: Manner,
        began_ns: int,
    ) -> None:
        left = any(cycle.unfinished) or self.report.problems > 0 or manner.left
        entries = ledger.lead.state().entries
        busy = [[], []] if not self.report.busy else [self.report.busy_paths(s) for s in SIDES]
        for side in SIDES:
            if cycle.unfinished[side]:
                self.sides[side].keep_pending(ledger.archives[side], cycle.unfinished[side])
        for side in SIDES:
            ending = Ending(
                time.time_ns(),
                None if left else began_ns,
                cycle.unfinished[side],
                frozenset(map(_conflict_id, cycle.waiting)),
                tuple(deletions),
                entries,
                tuple(busy[side]),
                self.config.retention if manner.tend else None,
            )
            for text in self.sides[side].finish(ledger.archives[side], ending):
                self._say(text)
        if manner.measure:
            self.report.sizes = (self.sides[0].sizes(), self.sides[1].sizes())

    def _note_conflicts(
        self,
        ledger: Ledger,
        hellos: tuple[Hello, Hello],
        found: list[Noted],
    ) -> None:
        """Put what was decided on both lists, and take off what could not be carried out."""
        now = time.time_ns()
        rows = [self._conflict_row(n.conflict, n.kept, hellos, now) for n in found if not n.undone]
        undone = [_conflict_id(n.conflict) for n in found if n.undone]
        for side in SIDES:
            self.sides[side].add_conflicts(ledger.archives[side], rows)
            self.sides[side].forget_conflicts(undone)

    def _conflict_row(
        self, conflict: Conflict, kept: bytes | None, hellos: tuple[Hello, Hello], now: int
    ) -> Quarrel:
        loser, loser_side, waits = conflict.loser, conflict.loser_side, conflict.winner is None
        return Quarrel(
            id=_conflict_id(conflict),
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


def _conflict_id(conflict: Conflict) -> str:
    """A short id: the same for the same conflict, whenever it is met again."""
    name = conflict.path + conflict.kind.value.encode()
    if conflict.winner is not None:
        digest = conflict.loser.digest if conflict.loser is not None else None
        name += b"%d" % conflict.loser_mtime_ns + (digest or b"")
    return digest_of(name)[:6].hex()
