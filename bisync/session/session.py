"""Two roots and how to keep them equal: the library's front door."""

import os
from collections.abc import Iterable
from typing import Self

from bisync.core.ignore import Matcher
from bisync.core.location import Location, location
from bisync.core.path import display
from bisync.endpoint.calls import Opening
from bisync.endpoint.connect import Connection, Reach
from bisync.endpoint.interface import Endpoint
from bisync.endpoint.local import LocalEndpoint
from bisync.endpoint.remote import RemoteEndpoint
from bisync.errors import BisyncError, Interrupted, UsageError
from bisync.fs.database import StateDamagedError, translated
from bisync.fs.replica import Options
from bisync.fs.root import enclosing_root
from bisync.fs.walk import ScanRules
from bisync.session.config import Config, Fsync
from bisync.session.report import Listener, Progress, Report
from bisync.session.run import Pairing, Run


class Session:
    """Two roots and how to keep them equal.

    :meth:`run` may be called again and again. Each run observes both trees, merges what
    changed, applies it and returns a :class:`Report`. As a context manager the roots stay
    open, and locked, between runs; otherwise each run opens and closes them.
    """

    def __init__(
        self,
        alpha: str | bytes | os.PathLike[str],
        beta: str | bytes | os.PathLike[str],
        config: Config | None = None,
        *,
        listener: Listener = lambda _event: None,
        reach: Reach | None = None,
    ) -> None:
        """
        Args:
            alpha: a directory: ``PATH``, ``[USER@]HOST:PATH`` or ``ssh://[USER@]HOST[:PORT]/PATH``.
            beta: the other one.
            config: how they are kept equal.
            listener: gets every event.
            reach: how other machines are reached.
        """
        self.locations = (location(os.fsencode(alpha)), location(os.fsencode(beta)))
        self.reach = reach or Reach()
        self.config = config or Config()
        self.listener = listener
        self._stays_open = False
        self._counted = (0, 0)  # bytes that crossed in earlier runs over the same connections
        self._sides: tuple[Endpoint, Endpoint] | None = None
        self._pairing: Pairing | None = None

    def __enter__(self) -> Self:
        self._stays_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._stays_open = False
        self.close()

    def close(self) -> None:
        """Give both roots back."""
        sides, self._sides, self._pairing = self._sides, None, None
        self._counted = (0, 0)
        for side in sides or ():
            side.close()

    def run(
        self,
        *,
        dry: bool = False,
        only: tuple[Iterable[str | bytes], Iterable[str | bytes]] | None = None,
    ) -> Report:
        """Synchronise once.

        Args:
            dry: decide everything, change nothing.
            only: the directories that may have changed on alpha and on beta, as paths below
                the roots ("" is the root itself). The rest of the trees is not looked at.
                ``None``: everything is.

        Returns:
            What was done. Problems of single paths are in it, not raised.

        Raises:
            UsageError: the request makes no sense.
            RootLockedError: another engine works on a root.
            HaltError: a root guard wants a person's word.
            EndpointError: a side cannot go on.
        """
        report = Report()
        where = None
        if only is not None:
            where = ({os.fsencode(p) for p in only[0]}, {os.fsencode(p) for p in only[1]})
        try:
            try:
                with translated("the state"):
                    self._run(report, where, dry=dry)
            except StateDamagedError as error:
                # Unreadable state is set aside and the trees are merged: nothing is deleted.
                if dry or not self._set_state_aside():
                    raise
                report.messages.append(str(error))
                self._run(report, None, dry=dry)
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

    def _count_traffic(self, report: Report) -> None:
        """What crossed counts, where something crossed."""
        far = [side.channel for side in self._sides or () if isinstance(side, RemoteEndpoint)]
        if far:
            report.bytes_sent = sum(channel.sent for channel in far) - self._counted[0]
            report.bytes_received = sum(channel.received for channel in far) - self._counted[1]
            self._counted = (
                self._counted[0] + report.bytes_sent,
                self._counted[1] + report.bytes_received,
            )

    # -- phases --------------------------------------------------------------

    def _run(
        self, report: Report, only: tuple[set[bytes], set[bytes]] | None, *, dry: bool
    ) -> None:
        if dry:
            self.close()  # a dry run looks with eyes of its own
        try:
            if self._sides is None:
                self._open(dry=dry)
            assert self._sides is not None
            run = Run(self._sides, self.config, report, self.listener, dry=dry)
            if self._pairing is None:
                self._pairing = run.meet()
                only = None if self._pairing.relation.start.value != "go on" else only
            run.go(self._pairing, only)
        except BaseException:
            self._count_traffic(report)
            self.close()
            raise
        self._count_traffic(report)
        if dry or not self._stays_open:
            self.close()

    def _open(self, *, dry: bool) -> None:
        matcher = self.config.matcher()
        if not any(where.is_remote for where in self.locations):
            _refuse_nested((self.locations[0].path, self.locations[1].path))
        elif self.config.state_dir is not None:
            raise UsageError("--state-dir: it cannot be said for another machine")
        sides: list[Endpoint] = []
        try:
            for where in self.locations:
                sides.append(self._side(where, matcher, dry=dry))
        except BaseException:
            for side in sides:
                side.close()
            raise
        self._sides = (sides[0], sides[1])

    def _side(self, where: Location, matcher: Matcher, *, dry: bool) -> Endpoint:
        if not where.is_remote:
            alone = not any(each.is_remote for each in self.locations)
            name = "" if alone else os.uname().nodename
            return LocalEndpoint(where.path, self._options(matcher), dry=dry, machine=name)
        connection = Connection(where, self.reach, self.config.stop)
        try:
            return RemoteEndpoint(connection, self._opening(where, dry=dry), where.machine)
        except BaseException:
            connection.close()
            raise

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
