"""Two roots kept equal from now on: watchers, the runs that they cause, and what a person may ask.

Marks come from the watchers of both sides on threads of their own. One thread, the caller's, takes
those that are due and runs the session over them. A mark is never trusted, only looked at; whatever
may have been missed makes the next run look at everything.
"""

import contextlib
import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict, replace

from bisync.core.node import SIDES
from bisync.core.path import display
from bisync.endpoint.interface import Endpoint
from bisync.endpoint.local import LocalEndpoint
from bisync.endpoint.remote import RemoteEndpoint
from bisync.errors import (
    BisyncError,
    DrivenError,
    EndpointError,
    HaltError,
    Interrupted,
    UsageError,
)
from bisync.fs.sizes import Sizes
from bisync.session.approval import Withheld
from bisync.session.remembered import absolute, last_complete
from bisync.session.report import Event, Listener, Met, Progress, Report, spots_of
from bisync.session.run import Manner, Proving
from bisync.session.session import Session
from bisync.session.totals import Totals
from bisync.watch.choose import Kind, watch
from bisync.watch.interface import Coverage, Watcher
from bisync.watch.marks import Batch, Marks

log = logging.getLogger(__name__)
_QUIET_S = 0.5  # removals wait until no name became free for so long
_REMOVALS_S = 10.0  # but not longer
_TEND_S = 600.0
_GUARD_S = 5.0  # between two looks whether the roots are still there
_BUSY_S = (1.0, 2.0, 4.0, 10.0)  # until busy files are looked at again
_PROBLEMS_S = 60.0
_PROBE_S, _PROBE_WEAK_S = 1.2, 5.0  # until what was displaced is looked at again
_RETRY_S = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)  # after a failure
# Two runs that follow each other leave a gap: as long as the processors worked for the first one,
# and so much of the time it took, for those who wait for the same disk.
_GAP_SHARE = 0.25
_MOST_GAP_S = 1.0
_PROVE_S = 1.0  # at least, between two runs that read what was taken for equal
_PROVE_SHARE = 0.05  # of the time they may take
_LOOKED_AT = 1000  # problems whose directories are looked at again together
_SHOWN = 100  # busy files and problems in the status


class LiveConfig(Struct, frozen=True, kw_only=True):
    """How changes are noticed."""

    watcher: Kind = Kind.AUTO
    poll_s: float = 30.0  # between two looks at what cannot be watched
    rescan_s: float = 3600.0  # between two looks at everything, whatever the watchers say


class _Request(Struct):
    """Somebody wants to know when all that happened until now is done."""

    number: int
    everything: bool  # look at all, whatever was marked
    sent: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    code: int = 0
    said: str = ""

    def answer(self, code: int, said: str = "") -> None:
        self.code, self.said = code, said
        self.done.set()


class Live:
    """Keeps a session's roots equal until it is told to stop.

    :meth:`run` is for one thread; everything else may be called from any.
    """

    def __init__(self, session: Session, config: LiveConfig | None = None) -> None:
        self.session = session
        self.config = config or LiveConfig()
        self._changed = threading.Condition()
        self._marks = (Marks(self._poke), Marks(self._poke))
        self._watchers: list[Watcher | RemoteEndpoint | None] = [None, None]
        self._coverage: list[Coverage | None] = [None, None]
        self._requests: list[_Request] = []
        self._numbers = itertools.count(time.time_ns())  # never one of an earlier life
        self._phase, self._reason, self._last_error = "starting", "", ""
        self._stopping = self._paused = False
        self._held = Withheld()  # deletions, as they were shown
        self._approved = Withheld()  # of those, by a person
        self._accepts_root = False
        self._has_followed = False  # somebody else drove it, so it can be driven
        self._end = (EndpointError.exit_code, "it was stopped")  # for who waits after the end
        self._failures = self._busy_rounds = 0
        self._began = now = time.monotonic()
        self._all_at = now  # when everything is looked at
        self._again_at: float | None = None  # when what was left is looked at
        self._proving = Proving()
        self._prove_at = math.inf  # when some of what was taken for equal is read
        self._gap_until = self._tended = 0.0
        self._used_before = 0.0  # seconds of processor time, when the last run began
        self._guarded = now
        self._removals_wait: float | None = None  # since when
        self._in_hand: float | None = None  # the oldest mark of the run in hand
        self._complete_ns = complete = last_complete(session)
        age = 0.0 if complete is None else max(0.0, (time.time_ns() - complete) / 1e9)
        self._open_since: float | None = now - age  # since when something may not be done
        self._last = Report()
        self._sizes: tuple[Sizes, Sizes] | None = None  # the engine's own files; now and then
        self._standing: list[Met] = []  # problems, until somebody looks there again
        self._withheld = 0  # deletions; a run that leaves removals for later does not count them
        self._totals = Totals()
        self._hearers: list[Listener] = [session.listener]
        session.opened, session.drives, session.listener = self._opened, True, self._tell

    # -- what others may ask ---------------------------------------------------

    def stop(self) -> None:
        """End :meth:`run` after the run in hand."""
        self._set(_stopping=True)

    def pause(self) -> None:
        """Run no more; marks are kept."""
        self._set(_paused=True)

    def resume(self, *, yes: bool = False, accept_root: bool = False) -> None:
        """Go on; approve a halt, as a person saw it.

        Args:
            yes: the deletions that are withheld, as status and events showed them; what is
                deleted after that is judged anew.
            accept_root: a root that is another one than before.
        """
        with self._changed:
            self._paused = False
            if yes:
                self._approved = self._held
            self._accepts_root = self._accepts_root or accept_root
            if self._failures or yes or accept_root:
                self._all_at = time.monotonic()
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None, *, everything: bool = False) -> tuple[int, str]:
        """Wait until all that happened on both sides until now is done.

        Args:
            timeout_s: give up after so long.
            everything: look at all of both trees for it, instead of at what was noticed.

        Returns:
            An exit code and why: 0, or what the run that did it ended with (24: some files were
            busy); 25 where a guard waits for a person, 30 after the time.
        """
        request = _Request(next(self._numbers), everything)
        with self._changed:
            if self._phase in ("stopped", "failed"):
                return self._end
            self._requests.append(request)
            self._changed.notify_all()
        if not request.done.wait(timeout_s):
            with self._changed:
                self._requests = [each for each in self._requests if each is not request]
            return 30, "it took too long"
        return request.code, request.said

    def status(self) -> dict[str, Any]:
        """Where it stands; for programs and people."""
        self._look_at_coverage()
        with self._changed:
            now = time.monotonic()
            oldest = self._oldest()
            report, totals = self._last, self._totals
            return {
                "alpha": absolute(self.session.locations[0]),
                "beta": absolute(self.session.locations[1]),
                "direction": "both" if self.session.config.one_way is None else "to beta",
                "phase": self._phase,
                "reason": self._reason,
                "backlog": sum(marks.count() for marks in self._marks),
                "oldest_age_s": None if oldest is None else round(now - oldest, 3),
                "complete_ns": self._complete_ns,
                "busy": [p for s in SIDES for p in report.busy_paths(s)][:_SHOWN],
                "problems": [
                    f"{met.side} {display(met.path)}: {met.reason}"
                    for met in self._standing[:_SHOWN]
                ],
                "withheld": self._withheld,
                "weaker_check": report.weak,
                "waiting_conflicts": report.waiting,
                "last_error": self._last_error,
                "watchers": [
                    None if seen is None else {
                        "kind": seen.kind, "directories": seen.directories,
                        "polled": seen.polled, "notes": seen.notes,
                    }
                    for seen in self._coverage
                ],
                "sizes": self._sizes and list(map(asdict, self._sizes)),
                "totals": {
                    **asdict(totals), "conflicts": totals.conflicts + report.waiting
                },
            }  # fmt: skip

    def report(self) -> Report:
        """What was done since the start, as one report."""
        with self._changed:
            return self._totals.report(
                time.monotonic() - self._began,
                self._last,
                withheld=self._withheld,
                problems=len(self._standing),
            )

    def _oldest(self) -> float | None:
        times = [self._in_hand, self._open_since, self._oldest_mark(math.inf)]
        found = min(each for each in times if each is not None)
        return None if found == math.inf else found

    def _oldest_mark(self, none: float) -> float:
        return min((t for m in self._marks if (t := m.oldest()) is not None), default=none)

    def _set(self, **values: object) -> None:
        with self._changed:
            for name, value in values.items():
                setattr(self, name, value)
            self._changed.notify_all()

    def _poke(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # -- the loop --------------------------------------------------------------

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Run until :meth:`stop`.

        Args:
            ready: called after the first run that ended.

        Raises:
            UsageError: it cannot work like this.
        """
        self._set(_phase="starting", _all_at=time.monotonic(), _failures=0)
        try:
            with self.session:
                told = False
                while self._wait_for_work():
                    self._work()
                    if not told and self._totals.runs:
                        told = True
                        ready()
        except Interrupted:
            log.info("interrupted")
        except BisyncError as error:
            self.failed(error)
            raise
        finally:
            self._drop_watchers()
            with self._changed:
                if self._phase != "failed":
                    self._phase = "stopped"
                for request in self._requests:
                    request.answer(*self._end)
                self._requests.clear()

    def events(self) -> Iterator[Event]:
        """:meth:`run` on a thread of its own; what happens, as it happens, until :meth:`stop`.

        Raises:
            UsageError: it cannot work like this.
        """
        happened: SimpleQueue[Event | BaseException | None] = SimpleQueue()

        def work() -> None:
            try:
                self.run()
            except BaseException as error:  # noqa: BLE001 -- it is raised where it can be seen
                happened.put(error)
            happened.put(None)

        def hear(event: Event) -> None:
            if not isinstance(event, Progress):
                happened.put(event)

        thread = threading.Thread(target=work, name="bisync-live")
        with self.heard(hear):
            thread.start()
            try:
                while (event := happened.get()) is not None:
                    if isinstance(event, BaseException):
                        raise event
                    yield event
            finally:
                self.stop()
                thread.join()

    @contextlib.contextmanager
    def heard(self, listener: Listener) -> Iterator[None]:
        """Let somebody more hear each event while the block runs; they must not make it wait."""
        with self._changed:
            self._hearers = [*self._hearers, listener]
        try:
            yield
        finally:
            with self._changed:
                self._hearers = [each for each in self._hearers if each is not listener]

    def _tell(self, event: Event) -> None:
        for listener in self._hearers:
            listener(event)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; ``False``: to end."""
        while True:
            self._send_tokens()
            with self._changed:
                self.session.config.stop()
                if self._stopping:
                    return False
                now = time.monotonic()
                if self._is_cut():
                    self._all_at = now
                if self._phase in ("halted", "following"):
                    self._refuse_requests()
                due = self._due(now)
                if due is not None and due <= now:
                    return True
                self._phase = self._resting_phase()
                self._changed.wait(min(_GUARD_S if due is None else due - now, 0.5))
            if self._watches_well() and time.monotonic() - self._guarded > _GUARD_S:
                self._guard()

    def _resting_phase(self) -> str:
        if self._paused:
            return "paused"
        if self._failures:
            return self._phase
        return "watching"

    def _due(self, now: float) -> float | None:
        """When there is something to do."""
        if any(self._is_ripe(each) for each in self._requests):
            return now
        if self._paused:
            return None
        if self._failures:
            return self._all_at
        times = [marks.next() for marks in self._marks]
        marked = [max(each, self._gap_until) for each in times if each is not None]
        again = math.inf if self._again_at is None else self._again_at
        return min(*marked, self._all_at, again, max(self._prove_at, self._gap_until))

    def _is_ripe(self, request: _Request) -> bool:
        """Whether all that happened before somebody asked has been noticed."""
        if self._failures or self._paused:
            return False
        return request.everything or (
            request.sent and all(marks.last_token >= request.number for marks in self._marks)
        )

    def _refuse_requests(self) -> None:
        """Nobody waits for what needs a person, or another session."""
        code = HaltError.exit_code if self._phase == "halted" else DrivenError.exit_code
        for request in self._requests:
            request.answer(code, self._reason)
        self._requests.clear()

    def _send_tokens(self) -> None:
        """Behind them comes only what happened after somebody asked."""
        with self._changed:
            todo = [each for each in self._requests if not (each.sent or each.everything)]
        if not todo or not self._watches_well():
            return
        for request in todo:
            for watcher in self._watchers:
                try:
                    if watcher is None or not watcher.send_token(request.number):
                        request.everything = True
                except EndpointError as error:
                    self._failed(error, "reconnecting")
                    return
            request.sent = True

    def _is_cut(self) -> bool:
        """Whether a connection ended while nothing was in hand."""
        return not self._failures and any(
            isinstance(w, RemoteEndpoint) and w.channel.broken for w in self._watchers
        )

    def _watches_well(self) -> bool:
        return not self._failures and all(w is not None for w in self._watchers)

    def _guard(self) -> None:
        """No watcher tells of every way in which a root can go."""
        self._guarded = time.monotonic()
        if not self.session.is_whole():
            self._set(_all_at=time.monotonic())

    def _work(self) -> None:
        """One run over what is due."""
        with self._changed:
            now = time.monotonic()
            ripe = [each for each in self._requests if self._is_ripe(each)]
            batches = [m.take(quiet_s=_QUIET_S, all_now=bool(ripe)) for m in self._marks]
            lost = any(batch.everything for batch in batches)
            asked = any(each.everything for each in ripe)
            everything = lost or asked or self._all_at <= now or self._failures > 0
            if lost:
                for each in self._requests:
                    each.sent = each.sent and each in ripe  # its token may be lost, too
            self._phase = "scanning" if everything else "running"
            olds = [batch.oldest for batch in batches if batch.oldest is not None]
            self._in_hand = min(olds, default=None)
            again = everything or bool(ripe) or (self._again_at or math.inf) <= now
            most = len(self._standing) if everything else _LOOKED_AT if again else 0
            troubled, unseen = spots_of(self._standing[:most]), self._standing[most:]
            polled = not everything and any(c is not None and c.polled for c in self._coverage)
            manner = self._manner(
                batches, now, asked=bool(ripe) or everything, left=polled or bool(unseen)
            )
            accepts, self._accepts_root = self._accepts_root, False
        self._used_before = time.process_time()
        config = self.session.config
        self.session.config = replace(config, accept_root=config.accept_root or accepts)
        marked = (batches[0].directories | troubled[0], batches[1].directories | troubled[1])
        only = None if everything else marked
        try:
            report = self.session.run(only=only, manner=manner)
            if everything:
                self._proving = Proving(done=not self.session.has_unread())
        except Interrupted:
            raise
        except UsageError as error:
            if not (self._totals.runs or self._has_followed):
                raise
            self._failed(error, "halted")  # it did work: a root is not there just now
        except HaltError as error:
            self._failed(error, "halted")
        except DrivenError as error:
            self._has_followed = True
            self._failed(error, "following", accepts_root=accepts)
        except BisyncError as error:
            self._failed(error, "reconnecting", accepts_root=accepts)
        else:
            self._stand(report, unseen)
            self._ended(report, now, manner, ripe, everything=everything)
        finally:
            self.session.config = config

    def _stand(self, report: Report, unseen: list[Met]) -> None:
        """Keep problems that a run did not look at, or it would seem that there are none."""
        met = [each for each in report.met if each.kind == "problem"]
        with self._changed:
            self._standing = list(dict.fromkeys([*unseen, *met]))

    def _manner(self, batches: list[Batch], now: float, *, asked: bool, left: bool) -> Manner:
        idle = not (asked or any(batch.directories for batch in batches))
        proves = self._proving if idle and now >= self._prove_at else None
        if proves is None:
            self._prove_at = max(self._prove_at, now + _PROVE_S)  # there is no spare time
        vacated = any(batch.vacated for batch in batches)
        if not vacated or asked:
            self._removals_wait = None
        elif self._removals_wait is None:
            self._removals_wait = now
        waits = self._removals_wait is not None and now - self._removals_wait < _REMOVALS_S
        tend = now - self._tended > _TEND_S
        if tend:
            self._tended = now
        return Manner(
            removals=not waits,
            tend=tend,
            measure=tend,
            left=left,
            until_ns=time.time_ns() - int(1e9 * (time.monotonic() - self._oldest_mark(now))),
            prove=proves,
            approved=self._approved,
        )

    def _ended(
        self,
        report: Report,
        began: float,
        manner: Manner,
        ripe: list[_Request],
        *,
        everything: bool,
    ) -> None:
        if everything:
            self._look_at_coverage(far=True)
        with self._changed:
            now, used = time.monotonic(), time.process_time() - self._used_before
            self._failures, self._reason, self._in_hand = 0, "", None
            if manner.removals:
                self._held = report.held
                if manner.approved is self._approved:  # and not one that came meanwhile
                    self._approved = Withheld()
            self._last = report
            self._sizes = report.sizes or self._sizes
            took = now - began if self._totals.runs else 0.0  # what came while it started is next
            self._gap_until = now + min(max(used, took * _GAP_SHARE), took, _MOST_GAP_S)
            self._totals.add(report)
            if everything:
                self._all_at = now + self.config.rescan_s
            if everything or manner.prove is not None:
                pause = max(_PROVE_S, (now - began) * (1 / _PROVE_SHARE - 1))
                self._prove_at = math.inf if self._proving.done else now + pause
            self._again_at = self._look_again_at(report, manner, now)
            if report.exit_code == 0 and manner.removals and not self._standing:
                if not manner.left:
                    self._open_since, self._complete_ns = None, manner.until_ns
            elif self._open_since is None:
                self._open_since = began
            known = 0 if manner.removals else self._withheld
            self._withheld = max(report.withheld, known)
            if self._withheld:
                self._reason = "deletions are withheld; approve with resume --yes"
            self._requests = [each for each in self._requests if each not in ripe]
            unseen = self._standing and report.exit_code in (0, 24, 40)
            for request in ripe:
                request.answer(23 if unseen else report.exit_code, self._reason)

    def _look_again_at(self, report: Report, manner: Manner, now: float) -> float | None:
        """When what was left is looked at again."""
        times = []
        if not manner.removals:
            times.append(now + _QUIET_S)
        if report.busy:
            times.append(now + _BUSY_S[min(self._busy_rounds, len(_BUSY_S) - 1)])
            self._busy_rounds += 1
        else:
            self._busy_rounds = 0
        if self._standing:
            times.append(now + _PROBLEMS_S)
        if report.kept or report.weak:  # somebody may have had it open
            times.append(now + (_PROBE_S if report.kept else _PROBE_WEAK_S))
        return min(times, default=None)

    @property
    def was_tried(self) -> bool:
        """Whether a run ended, well or not."""
        return self._totals.runs > 0 or self._failures > 0

    def failed(self, error: BisyncError) -> None:
        """:meth:`run` ended with an error that a person has to see."""
        said = str(error)
        self._set(_phase="failed", _reason=said, _last_error=said, _end=(error.exit_code, said))

    def _failed(self, error: BisyncError, phase: str, *, accepts_root: bool = False) -> None:
        """Try again later, at everything: nobody knows what was missed."""
        if str(error) != self._reason:
            log.warning("%s", error)
        self.session.close()
        self._drop_watchers()
        with self._changed:
            pause = _RETRY_S[min(self._failures, len(_RETRY_S) - 1)]
            self._failures += 1
            self._accepts_root = self._accepts_root or accepts_root  # it was not met yet
            now = time.monotonic()
            self._all_at = now + pause * (0.75 + random.random() / 2)  # noqa: S311
            self._phase, self._reason, self._last_error = phase, str(error), str(error)
            self._in_hand = None
            if self._open_since is None:
                self._open_since = now
            for request in self._requests:
                request.sent = False  # whoever would have told of its token is gone
            if phase != "reconnecting":
                self._refuse_requests()

    # -- watchers --------------------------------------------------------------

    def _opened(self, number: int, side: Endpoint) -> None:
        """A side was opened: watch it, unless that goes on already."""
        marks, known = self._marks[number], self._watchers[number]
        kind, poll_s = self.config.watcher, self.config.poll_s
        if isinstance(side, RemoteEndpoint):
            if isinstance(known, RemoteEndpoint) and known.channel is side.channel:
                return
            self._watchers[number] = side
            self._coverage[number] = side.watch(kind.value, poll_s, marks, self._poke)
        elif isinstance(side, LocalEndpoint) and known is None:
            watcher = watch(kind, side.scope(poll_s), marks)
            self._watchers[number] = watcher
            self._coverage[number] = watcher.coverage()

    def _look_at_coverage(self, *, far: bool = False) -> None:
        """Ask the watchers here; never under the lock, which they wait for to tell of marks.

        ``far``: ask those elsewhere, too; only this session's thread may.
        """
        for number, watcher in enumerate(self._watchers):
            if watcher is not None and (far or not isinstance(watcher, RemoteEndpoint)):
                with contextlib.suppress(EndpointError):  # the next run finds it cut
                    self._coverage[number] = watcher.coverage()

    def _drop_watchers(self) -> None:
        watchers, self._watchers = self._watchers, [None, None]
        for watcher in watchers:
            if watcher is not None and not isinstance(watcher, RemoteEndpoint):
                watcher.close()
