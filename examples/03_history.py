"""List the versions of a file, and bring the one before its last change to a new place.

Usage: python examples/03_history.py ROOT PATH DEST
"""

import sys

import bisync


def main(root: str, path: str, to: str) -> int:
    """Show what became of a path below a root, and restore it elsewhere."""
    for moment in bisync.history(root, path):
        kept = "" if moment.kept is None else f", kept as {moment.kept.decode(errors='replace')}"
        print(f"{moment.time_ns}: {moment.action} {moment.path.decode(errors='replace')}{kept}")
    try:
        done = bisync.restore(root, path, to=to)
    except bisync.UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{done.entries} entries restored, {len(done.incomplete)} incomplete")
    return 23 if done.incomplete else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
