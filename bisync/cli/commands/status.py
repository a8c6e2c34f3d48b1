"""``bisync status``, ``wait``, ``flush``, ``pause`` and ``resume``: what runs on this machine."""

import argparse
import json
import sys
import time
from typing import Any

from bisync.cli.moments import when
from bisync.cli.output import human_size, line
from bisync.cli.prometheus import exposition
from bisync.cli.times import seconds
from bisync.errors import EndpointError, UsageError
from bisync.session.control import ask

_WORST = (1, 2, 3, 12, 30, 25, 23, 40, 24, 0)
_REFRESH_S = 0.5
_LINES_S = 2.0  # where they are no picture on a terminal


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.command == "status":
        return _watched(options) if options.watch else _status(options)
    question: dict[str, Any] = {"do": options.command, "session": options.session}
    if options.command in ("wait", "flush") and options.timeout is not None:
        question["timeout"] = seconds(options.timeout, "--timeout")
    if options.command == "resume":
        question |= {"yes": options.yes, "accept_root": options.accept_root}
    rows = ask(question, slow=True)
    for row in rows:
        if options.json:
            line(json.dumps(row))
        elif row["said"]:
            line(f"{row['session']}: {row['said']}")
    return min((int(row["code"]) for row in rows), key=_WORST.index)


def _status(options: argparse.Namespace) -> int:
    if options.prometheus and options.json:
        raise UsageError("--prometheus: it is a format of its own; leave out --json")
    if options.prometheus:
        sys.stdout.write(exposition(ask({"do": "status", "session": options.session})))
        return 0
    silent: list[EndpointError] = []
    for row in ask({"do": "status", "session": options.session}, silent=silent):
        line(json.dumps(row) if options.json else "\n".join(_told(row)))
    if silent and options.session is None:
        raise silent[0]
    return 0


def _watched(options: argparse.Namespace) -> int:
    if options.json or not sys.stdout.isatty():
        while True:  # until somebody stops it, or nobody is there any more
            _status(options)
            sys.stdout.flush()
            time.sleep(_LINES_S)
    from rich.console import Console  # noqa: PLC0415 -- only for a terminal
    from rich.live import Live as Screen  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    question = {"do": "status", "session": options.session}
    with Screen(console=Console(), auto_refresh=False, screen=False) as screen:
        while True:
            rows = [text for row in ask(question) for text in _told(row)]
            screen.update(Text("\n".join(rows)), refresh=True)
            time.sleep(_REFRESH_S)


def _done(totals: dict[str, int]) -> str:
    names = ("created", "updated", "moves", "deleted", "conflicts")
    return ", ".join(f"{name} {totals[name]}" for name in names)


def _told(row: dict[str, Any]) -> list[str]:
    """A session, for people."""
    totals = row["totals"]
    age = row["oldest_age_s"]
    done = "never" if row["complete_ns"] is None else when(row["complete_ns"])
    arrow = "<->" if row["direction"] == "both" else "->"
    text = [
        f"{row['session']} (process {row['pid']})",
        f"  {row['alpha']} {arrow} {row['beta']}",
        f"  {row['phase']}" + (f": {row['reason']}" if row["reason"] else ""),
        f"  complete {done}; {row['backlog']} directories marked"
        + ("" if age is None else f", the oldest change {age:.1f} s ago"),
        f"  {totals['runs']} runs: " + _done(totals),
    ]
    for side, seen in zip(("alpha", "beta"), row["watchers"], strict=True):
        if seen is None:
            text.append(f"  {side}: not watched just now")
            continue
        what = f"  {side}: {seen['kind']}"
        if seen["directories"]:
            what += f", {seen['directories']} directories"
        if seen["polled"]:
            what += f", {seen['polled']} looked at now and then"
        text += [what, *(f"    {note}" for note in seen["notes"])]
    for side, sizes in zip(("alpha", "beta"), row["sizes"] or (), strict=False):
        whole = sizes.pop("whole")
        parts = ", ".join(f"{part} {human_size(size)}" for part, size in sizes.items())
        text.append(f"  {side}'s own files: {'' if whole else 'at least '}{parts}")
    text += [f"  busy: {path}" for path in row["busy"]]
    text += [f"  problem: {problem}" for problem in row["problems"]]
    if row["weaker_check"]:
        text.append(
            f"  weaker check: {row['weaker_check']} replaced files of others, looked at until they "
            "were still for a minute"
        )
    if row["withheld"]:
        text.append(f"  {row['withheld']} deletions withheld")
    if row["waiting_conflicts"]:
        text.append(f"  {row['waiting_conflicts']} conflicts wait for you")
    if row["last_error"] and not row["reason"]:
        text.append(f"  last error: {row['last_error']}")
    return text
