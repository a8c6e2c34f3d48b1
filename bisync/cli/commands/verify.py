"""``bisync verify``: bit rot, and its repair."""

import argparse

from bisync.cli.output import human_size, show_rows
from bisync.core.path import display
from bisync.errors import UsageError
from bisync.session.verify import Verified, verify


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    found = verify(
        options.root,
        options.peer,
        sample=_share(options.sample),
        repair=options.repair,
        state_dir=options.state_dir,
    )
    left = [path for path in found.rotten if path not in found.repaired]
    code = 23 if left or found.problems else 0
    show_rows([_row(found, code)], _lines(found), as_json=options.json)
    return code


def _share(text: str) -> float:
    number = text.removesuffix("%")
    try:
        share = float(number) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UsageError(f"--sample {text}: give a percentage like 5%")
    return share


def _row(found: Verified, code: int) -> dict[str, object]:
    return {
        "type": "summary",
        "checked": found.checked,
        "bytes": found.size,
        "unread": found.unread,
        "skipped": found.skipped,
        "rotten": [display(path) for path in found.rotten],
        "repaired": [display(path) for path in found.repaired],
        "lost": [display(path) for path in found.lost],
        "problems": len(found.problems),
        "exit_code": code,
        "error": None,
    }


def _lines(found: Verified) -> list[str]:
    lines = [f"problem: {display(met.path)}: {met.reason}" for met in found.problems]
    for path in found.rotten:
        end = "repaired, and kept in the store" if path in found.repaired else "damaged"
        end = "damaged, and intact nowhere" if path in found.lost else end
        lines.append(f"{display(path)}: its content changed, though nobody wrote to it: {end}")
    lines.append(
        f"{found.checked} files read, {human_size(found.size)}; {len(found.rotten)} damaged, "
        f"{len(found.repaired)} repaired, {found.skipped} written since and skipped"
    )
    return lines
