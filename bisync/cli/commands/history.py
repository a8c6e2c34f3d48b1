"""``bisync history`` and ``bisync restore``: what became of a path, and back to a time."""

import argparse
import os
import time

from bisync.cli.moments import moment, when
from bisync.cli.output import show_rows
from bisync.cli.places import root_and_path
from bisync.core.path import display
from bisync.session.history import Moment, history, restore


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    root, path = root_and_path(options.path, options.root, options.state_dir)
    if options.command == "restore":
        return _restore(options, root, path)
    moments = history(root, path, state_dir=options.state_dir)
    lines = [_line(m) for m in moments] or [f"{display(path)}: nothing is known of it"]
    show_rows([m.to_json() for m in moments], lines, as_json=options.json)
    return 0


def _line(m: Moment) -> str:
    text = f"{when(m.time_ns)}  {m.action:10}  {display(m.path)}"
    if m.old_path is not None:
        text += f"  (was {display(m.old_path)})"
    if m.size is not None:
        text += f"  {m.size} bytes"
    if m.kept is not None:
        text += f"  kept as {display(m.kept)}"
    if not m.complete:
        return text + "  (its content is nowhere to be found)"
    return text + ("  (needs the peer)" if m.needs_peer else "")


def _restore(options: argparse.Namespace, root: bytes, path: bytes) -> int:
    at = None if options.at is None else moment(options.at, time.time_ns())
    to = None if options.to is None else os.path.abspath(os.fsencode(options.to))
    done = restore(root, path, at, to, state_dir=options.state_dir)
    row = {
        "type": "summary",
        "restored": done.entries,
        "incomplete": len(done.incomplete),
        "kept": done.report.kept,
        "exit_code": 23 if done.incomplete else done.report.exit_code,
        "error": None,
    }
    where = display(to) if to is not None else display(path) or "the root"
    lines = [f"{where}: {done.entries} entries restored, {done.report.kept} kept in the store"]
    lines += [f"problem: {display(p)}: its content is nowhere to be found" for p in done.incomplete]
    show_rows([row], lines, as_json=options.json)
    return int(str(row["exit_code"]))
