"""``bisync conflicts``: list them, show one, resolve one."""

import argparse
import os
import time

from bisync.cli.output import show_rows
from bisync.core.path import display, parse
from bisync.errors import UsageError
from bisync.fs.conflicts import Quarrel, Take
from bisync.fs.statefolder import find_root
from bisync.session.conflicts import conflict_list


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    state_dir = options.state_dir
    root = find_root(os.fsencode(options.root or os.curdir), state_dir)
    action, which = _words(options.words)
    with conflict_list(root, state_dir) as found:
        rows = found.rows() if which is None else [found.find(_below(root, which))]
        if action == "resolve":
            if options.take is None:
                raise UsageError("conflicts resolve: say what to take: --take live, kept or both")
            found.choose(rows[0], Take(options.take))
            lines = [f"{display(rows[0].path)}: take {options.take}; the next sync does it"]
        elif action == "show":
            lines = _details(rows[0])
        else:
            lines = [_line(row) for row in rows] or ["no conflicts"]
    show_rows([row.to_json() for row in rows], lines, as_json=options.json)
    return 0


def _words(words: list[str]) -> tuple[str, str | None]:
    action, *rest = words or ["list"]
    if action not in ("list", "show", "resolve") or len(rest) > 1:
        raise UsageError("conflicts: say list, show or resolve, and one ID or PATH")
    if action != "list" and not rest:
        raise UsageError(f"conflicts {action}: say which one, by its ID or PATH")
    return action, rest[0] if rest else None


def _below(root: bytes, which: str) -> str:
    """A path given from the current folder or as absolute, as one below the root."""
    path = os.path.join(os.path.realpath(os.getcwdb()), parse(which))
    if os.path.lexists(path) and path.startswith(root + b"/"):
        return display(os.path.normpath(path)[len(root) + 1 :])
    return which


def _line(q: Quarrel) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(q.time_ns / 1e9))
    state = "waits for you" if q.waiting else f"{q.winner} won"
    return f"{q.id}  {when}  {q.kind}  {display(q.path)}: {q.reason}; {state}"


def _details(q: Quarrel) -> list[str]:
    lines = [_line(q)]
    if q.detail:
        lines.append(f"  {q.detail}")
    if q.loser is not None:
        lines.append(f"  lost: the version of {q.loser}")
    if q.kept is not None:
        lines.append(f"  kept in the rollback store there: {display(q.kept)}")
    if q.kept_as is not None:
        lines.append(f"  kept in the tree: {display(q.kept_as)}")
    lines.append(f"  resolve: bisync conflicts resolve {q.id} --take live|kept|both")
    return lines
