"""The only place that prints: lines for people, or one JSON object per line."""

import json
import os
import sys
import tempfile
import time
import traceback
from types import TracebackType
from typing import Any

from bisync.core.conflict import Conflict
from bisync.core.path import display
from bisync.errors import BisyncError, UnwrittenError
from bisync.session.report import Change, Event, Met, Progress, Report, event_to_json

_ARROWS = {"alpha": "alpha <-", "beta": "beta  <-"}
_REFRESH_S = 0.1


class Output:
    """Shows the events of a run, and its summary."""

    def __init__(
        self,
        *,
        as_json: bool,
        verbose: bool,
        quiet: bool,
        progress: bool,
        stats: bool,
        live: bool = False,
        label: str = "",
    ) -> None:
        """``label``: of whom the lines are, where there are several."""
        self._json = as_json
        self._label = label
        self._live = live  # whoever reads it reads along
        self._verbose = verbose
        self._quiet = quiet
        self._stats = stats
        self._progress = progress and not as_json and sys.stderr.isatty()
        self._plain_progress = progress and not as_json and not sys.stderr.isatty()
        self._status: Any = None
        self._last, self._phase = 0.0, ""
        self._file = "", 0.0, 0  # in hand: its name, when and where it was first seen

    def __enter__(self) -> "Output":
        if self._progress:
            from rich.console import Console  # noqa: PLC0415 - only for a terminal

            self._status = Console(stderr=True).status("starting")
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def event(self, event: Event) -> None:
        """Show one event of a run."""
        if isinstance(event, Progress):
            self._show_progress(event)
        elif self._json:
            self._say_json(event_to_json(event))
        else:
            self._show(event)
        if self._live and not isinstance(event, Progress):
            sys.stdout.flush()

    def ready(self) -> None:
        """Both sides were made equal for the first time; from now on changes are followed."""
        if self._json:
            self._say_json({"type": "ready"})
        elif not self._quiet:
            self._say("ready: watching both sides")
        sys.stdout.flush()

    def _say(self, text: str) -> None:
        line(f"{self._label}: {text}" if self._label else text)

    def _say_json(self, row: dict[str, Any]) -> None:
        line(json.dumps({**row, "session": self._label} if self._label else row))

    def _show_progress(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self._last < _REFRESH_S and event.phase == self._phase:
            return
        self._last, self._phase = now, event.phase
        if event.phase == "file":
            text = self._of_file(event, now)
        else:
            text = f"{event.phase}: {event.done} entries"
            if event.bytes:
                text += f", {human_size(event.bytes)}"
        if self._status is not None:
            self._status.update(text)
        elif self._plain_progress:
            print(text, file=sys.stderr)

    def _of_file(self, event: Progress, now: float) -> str:
        """How far one file is, how fast, and how much longer; from when it was first seen on."""
        name, began, at = self._file
        if name != event.name or event.bytes < at:
            self._file = name, began, at = event.name, now, event.bytes
        text = f"{event.name}: {human_size(event.bytes)} of {human_size(event.total)}"
        text += f", {human_size(event.bytes - event.literal)} matched"
        rate = (event.bytes - at) / (now - began) if now > began else 0.0
        if rate > 0:
            left = (event.total - event.bytes) / rate
            text += f", {human_size(int(rate))}/s, {left:.0f} s left"
        return text

    def _show(self, event: Event) -> None:
        match event:
            case Change():
                if self._verbose:
                    path = display(event.path)
                    if event.old_path is not None:
                        path = f"{display(event.old_path)} -> {path}"
                    why = f"  ({event.reason})" if event.reason else ""
                    self._say(f"{_ARROWS[event.side]} {event.action} {path}{why}")
            case Conflict():
                if not self._quiet:
                    end = "waits for you" if event.winner is None else f"{event.winner.label} wins"
                    self._say(f"conflict: {display(event.path)}: {event.reason}; {end}")
            case Met(kind="note"):
                if not self._quiet and (self._verbose or not event.path):
                    where = f"{display(event.path)}: " if event.path else ""
                    self._say(f"note: {where}{event.reason}")
            case Met(kind="skipped"):
                if self._verbose:
                    self._say(f"skipped: {event.side} {display(event.path)}: {event.reason}")
            case Met():
                path = f"{display(event.path)}: " if event.path else ""
                label = f"{self._label}: " if self._label else ""
                print(f"{label}{event.kind}: {event.side} {path}{event.reason}", file=sys.stderr)

    def summary(self, report: Report) -> None:
        """Close with what was done."""
        if self._json:
            self._say_json(report.summary())
            return
        if self._quiet:
            return
        if self._label:
            line(f"{self._label}:")
        r = report
        line(
            f"scanned {r.files_scanned}, created {r.created}, updated {r.updated}, "
            f"moved {r.moves}, deleted {r.deleted}, kept {r.kept}"
        )
        line(
            f"sent {human_size(r.bytes_sent)}, received {human_size(r.bytes_received)} "
            f"(literal {human_size(r.literal_bytes)}, matched {human_size(r.matched_bytes)}) "
            f"in {r.elapsed_s:.2f} s"
        )
        trouble = [
            f"{n} {what}"
            for n, what in (
                (r.conflicts, "conflicts"),
                (r.problems, "problems"),
                (r.busy, "busy"),
                (r.withheld, "deletions withheld"),
                (r.skipped, "skipped"),
            )
            if n
        ]
        if trouble:
            line(", ".join(trouble))
        if self._stats:
            for name, value in r.summary().items():
                line(f"  {name}: {value}")


def line(text: str) -> None:
    """One line on standard output.

    Raises:
        UnwrittenError: it does not take it.
    """
    try:
        print(text, flush=False)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UnwrittenError(error.strerror) from error


def mute() -> None:
    """Write nothing more to standard output, nor what waits to be: it takes nothing."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def complain(text: str) -> None:
    """One line on standard error."""
    print(f"bisync: {text}", file=sys.stderr, flush=True)


def human_size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def show_rows(rows: list[dict[str, Any]], lines: list[str], *, as_json: bool) -> None:
    """A list of records: for programs, or the lines for people."""
    for row in rows if as_json else ():
        line(json.dumps(row))
    for text in () if as_json else lines:
        line(text)


def fail(error: BisyncError, *, as_json: bool) -> int:
    """One clear line on stderr, and the summary where one is promised."""
    report = getattr(error, "report", None) or Report(error=str(error), exit_code=error.exit_code)
    if as_json:
        line(json.dumps(report.summary()))
    print(f"bisync: {error}", file=sys.stderr)
    return int(report.exit_code)


def crash(error: Exception, *, as_json: bool) -> int:
    """A bug: one line for the user, the traceback in a file for whoever mends it."""
    text = "".join(traceback.format_exception(error))
    message = f"internal error: {type(error).__name__}: {error}"
    try:
        fd, path = tempfile.mkstemp(prefix="bisync-crash-", suffix=".txt")
        with os.fdopen(fd, "w") as file:
            file.write(text)
        message += f"; details in {path}"
    except OSError as why:
        message += f"; details could not be written: {why.strerror}"
    if as_json:
        line(json.dumps(Report(error=message, exit_code=1).summary()))
    print(f"bisync: {message}", file=sys.stderr)
    return 1
