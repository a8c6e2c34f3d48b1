"""Two roots and how to keep them equal: the library's front door."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Self

from msgspec.structs import replace

from bisync.core.ignore import Matcher
from bisync.core.location import Location, location
from bisync.core.node import SIDES, Side
from bisync.core.path import display
from bisync.endpoint.calls import Opening
from bisync.endpoint.connect import Connection, Reach
from bisync.endpoint.glance import Peers
from bisync.endpoint.interface import Endpoint
from bisync.endpoint.local import LocalEndpoint
from bisync.endpoint.remote import RemoteEndpoint
from bisync.errors import (
    BisyncError,
    DrivenError,
    EndpointError,
    HaltError,
    HeldSilentlyError,
    HeldTooLongError,
    Interrupted,
    RootLockedError,
    UsageError,
)
from bisync.fs.claim import Claim
from bisync.fs.database import StateDamagedError, translated
from bisync.fs.replica import Options
from bisync.fs.root import enclosing_root
from bisync.fs.turns import DEAF_S
from bisync.fs.walk import ScanRules
from bisync.session.config import Config, Fsync
from bisync.session.foresight import peers
from bisync.session.report import Listener, Progress, Report
from bisync.session.run import WHOLE, Manner, Pairing, Run
from bisync.watch.interface import Spot

_MEETINGS = 5
_LITTLE_S = 2.0  # for the other root while we hold one


class Session:
    """Two roots and how to keep them equal.

    :meth:`run` may be called again and again. Each run observes both trees, merges what
    changed, applies it and returns a :class:`Report`. As a context manager the roots stay open
    between runs, until somebody else wants to work on one; else each run opens and closes them.
    """

    def __init__(
        self,
        alpha: str | bytes | os.PathLike[str],
        beta: str | bytes | os.PathLike[str],
        config: Config | None = None,
        *,
        listener: Listener = lambda _event: None,
        reach: Reach | None = None,
        links: Sequence[Connection | None] = (None, None),
    ) -> None:
        """
        Args:
            alpha: a directory: ``PATH``, ``[USER@]HOST:PATH`` or ``ssh://[USER@]HOST[:PORT]/PATH``.
            beta: the other one.
            config: how they are kept equal.
            listener: gets every event.
            reach: how other machines are reached.
            links: connections to them that are on their way already; the session's from now on.
        """
        self.locations = (location(os.fsencode(alpha)), location(os.fsencode(beta)))
        self.reach = reach or Reach()
        self.config = config or Config()
        self.listener = listener
        # Called with each side that was opened.
        self.opened: Callable[[int, Endpoint], None] = lambda _number, _side: None
        self.drives = False  # it is the one that carries everything, or says who is
        self._claims: list[Claim] = []
        self._claimed: tuple[str, str] | None = None  # the replicas of the pair
        self._id = os.urandom(16).hex()
        self._stays_open = False
        self._in_hand = threading.RLock()
        self._counted = (0, 0)  # bytes that crossed in earlier runs over the same connections
        self._open_sides: list[Endpoint | None] = [None, None]
        self._links: list[Connection | None] = list(links)
        self._pairing: Pairing | None = None

    def __enter__(self) -> Self:
        self._stays_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._stays_open = False
        self.close()

    def close(self) -> None:
        """Give both roots back."""
        with self._in_hand:
            sides, self._open_sides = self._open_sides, [None, None]
            links, self._links = self._links, [None, None]
            self._pairing = None
            self._counted = (0, 0)
            with contextlib.ExitStack() as stack:  # each is closed, whatever the others say
                stack.callback(self._drop_claims)
                for side, link in zip(sides, links, strict=True):
                    if side is not None:
                        stack.callback(side.close)  # and its connection
                    elif link is not None:
                        stack.callback(link.close)

    def run(
        self,
        *,
        dry: bool = False,
        only: tuple[Iterable[str | bytes | Spot], Iterable[str | bytes | Spot]] | None = None,
        manner: Manner = WHOLE,
    ) -> Report:
        """Synchronise once.

        Args:
            dry: decide everything, change nothing.
            only: the directories that may have changed on alpha and on beta, as paths below
                the roots ("" is the root itself). The rest of the trees is not looked at.
                ``None``: everything is.
            manner: whether removals are done and the store is tended, too.

        Returns:
            What was done. Problems of single paths are in it, not raised.

        Raises:
            UsageError: the request makes no sense.
            RootLockedError: another engine works on a root, and does not answer or takes too long.
            HaltError: a root guard wants a person's word.
            EndpointError: a side cannot go on.
        """
        report = Report()
        where = None
        if only is not None:
            where = (set(map(_spot, only[0])), set(map(_spot, only[1])))
        try:
            try:
                with translated("the state"), self._in_hand:
                    self._run(report, where, manner, dry=dry)
            except StateDamagedError as error:
                # Unreadable state is set aside and the trees are merged: nothing is deleted.
                if dry or not self._set_state_aside():
                    raise
                report.messages.append(str(error))
                with self._in_hand:
                    self._run(report, None, manner, dry=dry)
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

    def has_unread(self) -> bool:
        """Whether there may be files that were taken for equal by size and time."""
        if self._pairing is None:
            return True
        try:
            return bool(self._pairing.ledger.lead.presumed(0, 1))
        except EndpointError:
            return True  # the next run finds out what is wrong

    def _count_traffic(self, report: Report) -> None:
        """What crossed counts, where something crossed."""
        far = [link.channel for link in self._links if link is not None]
        if far:
            report.bytes_sent = sum(channel.sent for channel in far) - self._counted[0]
            report.bytes_received = sum(channel.received for channel in far) - self._counted[1]
            self._counted = (
                self._counted[0] + report.bytes_sent,
                self._counted[1] + report.bytes_received,
            )

    # -- phases --------------------------------------------------------------

    def _run(
        self,
        report: Report,
        only: tuple[set[Spot], set[Spot]] | None,
        manner: Manner,
        *,
        dry: bool,
    ) -> None:
        if dry and any(self._open_sides):
            self.close()  # a dry run looks with eyes of its own
        try:
            run = Run(self._open(only, dry=dry), self.config, report, self.listener, dry=dry)
            pairing = self._pairing
            if pairing is None:
                run, pairing = self._meet(run, report, dry=dry)
                if self.drives:
                    self._claim(run.sides, pairing)
                only = None if pairing.relation.start.value != "go on" else only
            self._pairing = pairing
            run.go(pairing, only, manner)
        except BaseException:
            self._count_traffic(report)
            self.close()
            raise
        if dry or not self._stays_open:
            self._count_traffic(report)
            self.close()
        else:
            self._rest(run.sides)
            self._count_traffic(report)

    def _claim(self, sides: tuple[Endpoint, Endpoint], pairing: Pairing) -> None:
        """Be the session that drives this pair.

        Raises:
            DrivenError: another one is.
        """
        pair = (pairing.hellos[0].replica, pairing.hellos[1].replica)
        if self._claimed == pair:
            return
        self._drop_claims()
        me = f"session {self._id[:8]}"
        who = f"process {os.getpid()} on {os.uname().nodename}, {me},"
        for side, archive in zip(sides, pairing.ledger.archives, strict=True):
            found = side.drive(archive, who)
            if isinstance(found, str):
                if me in found:
                    raise EndpointError("the other end still waits for a connection that was lost")
                raise DrivenError(f"{found} drives this pair already")
            self._claims.append(found)
        self._claimed = pair

    def _drop_claims(self) -> None:
        claims, self._claims, self._claimed = self._claims, [], None
        for each in claims:
            each.close()

    def _meet(self, run: Run, report: Report, *, dry: bool) -> tuple[Run, Pairing]:
        """Relate the sides; again, if somebody else began with one in the same moment."""
        tries = 0
        while True:
            try:
                return run, run.meet()
            except RootLockedError:
                self._leave()
                tries += 1
                if tries == _MEETINGS:
                    raise
            self.config.stop()
            run = Run(self._open(None, dry=dry), self.config, report, self.listener, dry=dry)

    # -- opening, and turns ----------------------------------------------------

    def check(self) -> None:
        """Refuse what can never work, as far as that is known without touching anything.

        Raises:
            UsageError: the roots are one, or one in the other; or options say what cannot be.
        """
        if not any(where.is_remote for where in self.locations):
            _refuse_nested((self.locations[0].path, self.locations[1].path))
        elif self.config.state_dir is not None:
            raise UsageError("--state-dir: it cannot be said for another machine")

    def _open(
        self, only: tuple[set[Spot], set[Spot]] | None, *, dry: bool
    ) -> tuple[Endpoint, Endpoint]:
        """Both sides, each at its turn; ``only`` is what the run will look at.

        Who holds one root waits only a little for the other: two sessions that hold what the other
        wants would wait for ever.
        """
        matcher = self.config.matcher()
        self.check()
        self._set_out()
        wait_s = self.config.wait_s
        end = None if wait_s is None else time.monotonic() + wait_s
        silent_since: float | None = None
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            little = _LITTLE_S * (1 + random.random())  # noqa: S311 -- so that two do not meet again
            waits = (left, little if left is None else min(little, left))
            try:
                first = self._side(0, matcher, waits[0], only, dry=dry)
                return first, self._side(1, matcher, waits[1], only, dry=dry)
            except HeldTooLongError as error:
                self._leave()
                silent_since = _silent(error, silent_since)
                if end is not None and time.monotonic() >= end:
                    raise
                self.config.stop()
                time.sleep(little / 10)

    def _set_out(self) -> None:
        """Begin the connections that are missing: on their way while the other side opens.

        One after the other: two at once would ask their questions at the same terminal.
        """
        for number, where in enumerate(self.locations):
            if where.is_remote and self._links[number] is None:
                for link in filter(None, self._links):
                    link.begun()
                self._links[number] = Connection(where, self.reach, self.config.stop)

    def _side(
        self,
        number: int,
        matcher: Matcher,
        wait_s: float | None,
        only: tuple[set[Spot], set[Spot]] | None,
        *,
        dry: bool,
    ) -> Endpoint:
        """One side, open; it may have been open."""
        where, side = self.locations[number], self._open_sides[number]
        wait_ms = None if wait_s is None else round(wait_s * 1000)
        spots = None if only is None or self._pairing is None else only[number]
        if isinstance(side, RemoteEndpoint) and side.wake(
            wait_ms, spots, self._peers(1 - number, only)
        ):
            self._pairing = None
        if side is not None:
            return side
        self._pairing = None
        if not where.is_remote:
            alone = not any(each.is_remote for each in self.locations)
            name = "" if alone else os.uname().nodename
            options = replace(
                self._options(matcher), wait_s=wait_s, wanted=self._wanted, session=self._id
            )
            side = LocalEndpoint(where.path, options, dry=dry, machine=name)
        else:
            link = self._links[number]
            assert link is not None
            link.begun()
            opening = replace(self._opening(where, dry=dry), wait_ms=wait_ms, session=self._id)
            side = RemoteEndpoint(link, opening, where.machine)
        self._open_sides[number] = side
        self.opened(number, side)
        return side

    def _peers(self, number: int, only: tuple[set[Spot], set[Spot]] | None) -> Peers:
        """Whom on the other side that concerns which changed on a side that is here."""
        here, side = self._open_sides[number], SIDES[number]
        contents = self.config.one_way is None or side is Side.BETA
        if only is None or self._pairing is None or not isinstance(here, LocalEndpoint):
            return Peers(contents=contents)
        return peers(self._pairing.ledger, here, side, only[number], contents=contents)

    def is_whole(self) -> bool:
        """Whether the roots that are open just now are still where they were."""
        with self._in_hand:
            for side in self._open_sides:
                if isinstance(side, LocalEndpoint):
                    try:
                        side.replica.root.check()
                    except HaltError:
                        return False
        return True

    def _wanted(self) -> None:
        """Somebody waits for a root: it goes as soon as no run is in hand."""
        with self._in_hand:
            self._give_away()

    def _rest(self, sides: tuple[Endpoint, Endpoint]) -> None:
        """No run is in hand: whoever waits for a root gets it."""
        for side in sides:
            if isinstance(side, RemoteEndpoint):
                side.rest()
            elif isinstance(side, LocalEndpoint):
                side.replica.rest()
        self._give_away()

    def _give_away(self) -> None:
        for number, side in enumerate(self._open_sides):
            if isinstance(side, LocalEndpoint) and side.replica.folder.is_wanted:
                self._open_sides[number] = None
                self._pairing = None
                side.close()

    def _leave(self) -> None:
        """Give both roots back, and keep the connections."""
        sides, self._open_sides = self._open_sides, [None, None]
        self._pairing = None
        with contextlib.ExitStack() as stack:  # each is, whatever the others say
            for side in filter(None, sides):
                stack.callback(side.leave if isinstance(side, RemoteEndpoint) else side.close)

    def _opening(self, where: Location, *, dry: bool, set_aside: bool = False) -> Opening:
        c = self.config
        share = None if c.allowance is None else max(1, round(c.allowance.share * 1e6))
        return Opening(
            path=where.path,
            dry=dry,
            patterns=c.patterns(),
            store=c.store,
            specials=c.specials,
            devices=c.devices,
            fsync=c.fsync is not Fsync.NEVER,
            apply=c.apply,
            hot=c.hot.patterns,
            hot_share=share,
            base_clones=c.base_clones,
            bwlimit=self.reach.bwlimit,
            set_aside=set_aside,
        )

    def _options(self, matcher: Matcher) -> Options:
        c = self.config
        return Options(
            rules=ScanRules(matcher, c.store, specials=c.specials, devices=c.devices),
            store=c.store,
            state_dir=c.state_dir,
            workers=c.workers,
            fsync=c.fsync is not Fsync.NEVER,
            apply=c.apply,
            hot=c.hot.matcher(),
            allowance=c.allowance,
            base_clones=c.base_clones,
            stop=c.stop,
            arrived=self._arrived,
        )

    def _arrived(self, name: bytes, done: int, total: int, literal: int) -> None:
        self.listener(Progress("file", 0, done, display(name), total, literal))

    def _set_state_aside(self) -> bool:
        """Put away what cannot be read; whether anything could not."""
        found = False
        for where in self.locations:
            if where.is_remote:
                connection = Connection(where, self.reach, self.config.stop)
                connection.begun()
                opening = self._opening(where, dry=False, set_aside=True)
                far = RemoteEndpoint(connection, opening, where.machine)
                try:
                    found = far.hello().damaged != "" or found
                finally:
                    far.close()
                continue
            side = LocalEndpoint(where.path, self._options(Matcher(())))
            try:
                found = side.replica.set_aside_if_damaged() or side.replica.damaged != "" or found
            finally:
                side.close()
        return found


def _is_one(one: bytes, two: bytes) -> bool:
    """Whether two paths lead to one directory, as where it is mounted twice."""
    try:
        return os.path.samefile(one, two)
    except OSError:
        return False


def _silent(error: HeldTooLongError, since: float | None) -> float | None:
    """Since when the holder of a root has said nothing.

    Raises:
        RootLockedError: for so long that it will not.
    """
    if not isinstance(error, HeldSilentlyError):
        return None
    now = time.monotonic()
    if since is not None and now - since > DEAF_S:
        raise RootLockedError(f"{error}, and does not answer") from error
    return since or now


def _spot(place: str | bytes | Spot) -> Spot:
    return place if isinstance(place, Spot) else Spot(os.fsencode(place))


def _refuse_nested(paths: tuple[bytes, bytes]) -> None:
    real = [os.path.realpath(p) for p in paths]
    texts = [os.fsdecode(p) for p in real]
    if real[0] == real[1] or _is_one(*real):
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
