"""``bisync recover``: after a crash, before the programs that use the files start."""

import argparse
import os

from bisync.cli.output import show_rows
from bisync.core.path import display
from bisync.fs.torn import Mended
from bisync.session.recover import recover


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    store = os.fsencode(options.rollback_dir) if options.rollback_dir else None
    found = recover(options.root, state_dir=options.state_dir, store=store)
    code = 23 if found.edited else 0
    row = {
        "type": "summary",
        "old": [display(path) for path in found.old],
        "new": [display(path) for path in found.new],
        "edited": [display(path) for path in found.edited],
        "exit_code": code,
        "error": None,
    }
    show_rows([row], _lines(found), as_json=options.json)
    return code


def _lines(found: Mended) -> list[str]:
    lines = [f"{display(path)}: the old version again" for path in found.old]
    lines += [f"{display(path)}: the new version" for path in found.new]
    lines += [
        f"problem: {display(path)}: a crash left it half-written, and it was written to since; "
        "the next sync keeps it in the store and fetches it anew"
        for path in found.edited
    ]
    return lines or ["nothing was left half-written"]
