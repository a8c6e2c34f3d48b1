"""``bisync daemon``: every session of the configuration, until it is stopped."""

import argparse
import fcntl
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from msgspec import Struct
from msgspec.structs import replace

from bisync.cli.commands.sync import config_of
from bisync.cli.commands.watch import live_config
from bisync.cli.configfile import default_path, read
from bisync.cli.output import Output, complain, line, mute
from bisync.cli.reaching import reach
from bisync.errors import (
    BisyncError,
    Interrupted,
    RootLockedError,
    UnwrittenError,
    UsageError,
)
from bisync.linux.manager import notify, watchdog_s
from bisync.session.config import Config
from bisync.session.control import Server, folder
from bisync.session.live import Live, LiveConfig
from bisync.session.report import Event, Listener
from bisync.session.session import Session

log = logging.getLogger(__name__)
_LOOK_S = 1.0
_AGAIN_S = 30.0  # until a session that ended with an error is begun again


def run(options: argparse.Namespace) -> int:
    """Run the command; 0 when it was asked to stop."""
    path = options.config or default_path()
    if options.check:
        names = _checked(path)
        line(f"{path}: {len(names)} sessions: {', '.join(names)}")
        return 0
    return Daemon(path, as_json=options.json, verbose=options.verbose).run()


def _parser() -> argparse.ArgumentParser:
    from bisync.cli.main import build_parser  # noqa: PLC0415 -- it names this module

    return build_parser()


def _never() -> None:
    """Stop for nothing: a session that is not run."""


class _Wanted(Struct, frozen=True):
    """One session of a configuration, understood: what files it names say counts, too."""

    options: argparse.Namespace
    config: Config
    how: LiveConfig

    def session(self, stop: Callable[[], None], listener: Listener) -> Session:
        """That session."""
        o, config = self.options, replace(self.config, stop=stop)
        return Session(o.alpha, o.beta, config, listener=listener, reach=reach(o))


def _checked(path: str) -> dict[str, _Wanted]:
    """The sessions of a configuration.

    Raises:
        UsageError: something in it is wrong.
    """
    wanted = {}
    for name, options in read(path, _parser()).items():
        try:
            one = _Wanted(options, config_of(options, _never), live_config(options))
            one.session(_never, lambda _event: None).check()
        except UsageError as error:
            raise UsageError(f"{path}: [session.{name}] {error}") from error
        wanted[name] = one
    return wanted


class _Running:
    """One session on a thread of its own; begun again when it ended without being asked to."""

    def __init__(self, name: str, wanted: _Wanted, output: Output) -> None:
        self.name, self.wanted = name, wanted
        self._stopping = threading.Event()
        self._output = output
        self._is_heard = True
        self.live = Live(wanted.session(self._stop, self._hear), wanted.how)
        self.settled = threading.Event()  # it was complete once, or has failed
        self._thread = threading.Thread(target=self._run, name=f"session-{name}")
        self._thread.start()

    def _stop(self) -> None:
        if self._stopping.is_set():
            raise Interrupted(signal.SIGTERM)

    def _hear(self, event: Event) -> None:
        self._write(lambda: self._output.event(event))

    def _write(self, show: Callable[[], None]) -> None:
        """Show something; who has no room for a log still wants the files kept equal."""
        if not self._is_heard:
            return
        try:
            show()
        except (OSError, UnwrittenError) as error:
            self._is_heard = False
            mute()
            log.warning("%s: nothing more is written: %s", self.name, error)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.live.run(self._ready)
            except BisyncError as error:
                self.live.failed(error)
                complain(f"{self.name}: {error}")
            except Exception as error:
                log.exception("%s: internal error", self.name)
                self.live.failed(BisyncError(f"internal error: {type(error).__name__}: {error}"))
            self.settled.set()
            self._stopping.wait(_AGAIN_S)

    def _ready(self) -> None:
        self.settled.set()
        self._write(self._output.ready)

    def ask_to_stop(self) -> None:
        """End after the run in hand."""
        self._stopping.set()
        self.live.stop()

    def join(self) -> None:
        """Wait for the end, and close with what was done."""
        self._thread.join()
        self._write(lambda: self._output.summary(self.live.report()))

    @property
    def has_begun(self) -> bool:
        """Whether it was complete once, or said why not: the peer of a service may be down."""
        return self.settled.is_set() or self.live.was_tried

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()


class Daemon:
    """All sessions of a configuration."""

    def __init__(self, path: str, *, as_json: bool, verbose: bool) -> None:
        self._path, self._json, self._verbose = path, as_json, verbose
        self._sessions: dict[str, _Running] = {}
        self._wake = threading.Event()
        self._stopping = self._reload = False

    def run(self) -> int:
        """Run until SIGINT or SIGTERM; SIGHUP reads the configuration again."""
        wanted = _checked(self._path)
        lock = self._lock()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, self._note)
        server = Server("daemon", self._lives)
        try:
            self._apply(wanted)
            self._serve()
        finally:
            notify("STOPPING=1")
            for each in self._sessions.values():
                each.ask_to_stop()
            for each in self._sessions.values():
                each.join()
            server.close()
            os.close(lock)
        return 0

    def _lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(os.path.join(folder(), "daemon.lock"), flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise RootLockedError("a daemon of this user runs already") from error
        return lock

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            self._reload = True
        else:
            self._stopping = True
        self._wake.set()

    def _lives(self) -> dict[str, Live]:
        return {name: each.live for name, each in list(self._sessions.items())}

    def _serve(self) -> None:
        told, rest = False, watchdog_s()
        beat = 0.0
        while not self._stopping:
            self._wake.wait(_LOOK_S if rest is None else min(rest, _LOOK_S))
            self._wake.clear()
            if self._reload:
                self._reload = False
                self._read_again()
            if not told and all(each.has_begun for each in self._sessions.values()):
                told = True
                notify("READY=1")
            alive = all(each.is_alive for each in self._sessions.values())
            if rest is not None and alive and time.monotonic() - beat >= rest / 2:
                beat = time.monotonic()
                notify("WATCHDOG=1")

    def _read_again(self) -> None:
        """Sessions that did not change go on; a file that is wrong changes nothing."""
        try:
            wanted = _checked(self._path)
        except UsageError as error:
            complain(f"{error}; going on as before")
            return
        self._apply(wanted)
        complain(f"read again: {', '.join(self._sessions)}")

    def _apply(self, wanted: dict[str, _Wanted]) -> None:
        leaving = {
            name: each for name, each in self._sessions.items() if wanted.get(name) != each.wanted
        }
        for each in leaving.values():
            each.ask_to_stop()
        for name, each in leaving.items():
            each.join()
            del self._sessions[name]
        for name, one in wanted.items():
            if name not in self._sessions:
                self._sessions[name] = _Running(name, one, self._output(name, one.options))

    def _output(self, name: str, options: argparse.Namespace) -> Output:
        return Output(
            as_json=self._json,
            verbose=self._verbose or options.verbose,
            quiet=options.quiet,
            progress=False,
            stats=False,
            live=True,
            label=name,
        )
