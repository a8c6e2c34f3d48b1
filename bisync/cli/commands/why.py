"""``bisync why``: the last decisions about a path, and their evidence."""

import argparse

from bisync.cli.moments import when
from bisync.cli.output import show_rows
from bisync.cli.places import root_and_path
from bisync.core.path import display
from bisync.session.why import why


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    root, path = root_and_path(options.path, options.root, options.state_dir)
    found = why(root, path, state_dir=options.state_dir)
    lines = [f"{display(path) or '.'}: {found.state}"]
    lines += [f"waits: {text}" for text in found.waits]
    for q in found.conflicts:
        state = "waits for you" if q.waiting else f"{q.winner} won"
        lines.append(f"conflict {q.id}: {q.reason}; {state}")
    lines += [f"{when(d.time_ns)}  epoch {d.epoch}  {d.text}" for d in found.decisions]
    show_rows([found.to_json()], lines, as_json=options.json)
    return 0
