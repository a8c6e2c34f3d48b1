"""``bisync rollback``: list, prune, lock, unlock, merge."""

import argparse
import os
import time
from typing import Any

from bisync.cli.output import human_size, show_rows
from bisync.cli.times import keep_days
from bisync.core.path import STORE_DIR, display
from bisync.errors import UsageError
from bisync.fs.rollback import Day, Done
from bisync.fs.statefolder import find_root
from bisync.session.rollback import days, lock, merge, prune

_DAY_S = 86_400


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    action, *more = options.words or ["list"]
    takes = {"list": 0, "prune": 0, "lock": 0, "unlock": 0, "merge": 1}
    if action not in takes or len(more) != takes[action]:
        raise UsageError("rollback: say list, prune, lock, unlock, or merge STORE")
    root = find_root(os.fsencode(options.root or os.curdir), options.state_dir)
    store = os.fsencode(options.rollback_dir) if options.rollback_dir else STORE_DIR
    where: dict[str, Any] = {"store": store, "state_dir": options.state_dir}
    if action == "list":
        found = days(root, **where)
        lines = [_line(day) for day in found] or ["the store is empty"]
        show_rows([_row(day) for day in found], lines, as_json=options.json)
        return 0
    if action == "merge":
        done = merge(root, os.fsencode(more[0]), **where)
        text = f"{done.entries} versions merged, {done.renamed} of them under a number, "
        return _end(options, action, done, text + f"{done.skipped} were there already")
    if action == "prune":
        done = _prune(options, root, where)
        size = human_size(done.size)
        return _end(options, action, done, f"{done.entries} versions removed, {size}")
    done = lock(root, on=action == "lock", **where)
    text = f"{done.entries} entries {action}ed"
    if done.weaker:
        text += "; by permission bits only, flags are not to be had here"
    return _end(options, action, done, text)


def _prune(options: argparse.Namespace, root: bytes, where: dict[str, Any]) -> Done:
    if options.day is not None:
        return prune(root, day=options.day, **where)
    if options.keep is None:
        raise UsageError("rollback prune: say --keep AGE, or --day YYYY-MM-DD")
    age = keep_days(options.keep)
    if age is None:
        return Done()
    limit = time.strftime("%Y-%m-%d", time.localtime(time.time() - age * _DAY_S))
    return prune(root, before=limit, **where)


def _line(day: Day) -> str:
    text = f"{display(day.name)}  {day.entries} versions  {human_size(day.size)}"
    if day.unknown:
        text += f"  ({day.unknown} of unknown origin)"
    return text + ("  locked" if day.locked else "")


def _row(day: Day) -> dict[str, Any]:
    return {
        "type": "day",
        "day": display(day.name),
        "versions": day.entries,
        "bytes": day.size,
        "unknown": day.unknown,
        "locked": day.locked,
    }


def _end(options: argparse.Namespace, action: str, done: Done, text: str) -> int:
    code = 23 if done.refused else 0
    row = {
        "type": "summary",
        "action": action,
        "entries": done.entries,
        "bytes": done.size,
        "renamed": done.renamed,
        "skipped": done.skipped,
        "refused": len(done.refused),
        "weaker": done.weaker,
        "exit_code": code,
        "error": None,
    }
    lines = [f"problem: {display(path)}: {reason}" for path, reason in done.refused]
    show_rows([row], [*lines, text], as_json=options.json)
    return code
