"""Synchronise two directories from a program: plan first, then do it, then look at conflicts.

Usage: python examples/01_sync.py ALPHA BETA
"""

import sys

import bisync


def main(alpha: str, beta: str) -> int:
    """Synchronise two directories and say what happened."""

    def show(event: bisync.Event) -> None:
        if isinstance(event, bisync.Change):
            print(f"{event.side}: {event.action} {event.path.decode(errors='replace')}")

    config = bisync.Config(
        conflict=bisync.Policy.NEWEST,
        ignore=bisync.Ignore(("*.tmp", "/cache/")),
        max_delete=bisync.DeleteLimit(percent=30),
    )
    planned = bisync.plan(alpha, beta, config)
    print(f"{len(planned.changes)} changes planned")
    try:
        report = bisync.sync(alpha, beta, config, listener=show)
    except bisync.HaltError as error:
        print(f"a person has to look first: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{report.created} created, {report.moves} moved, {report.kept} old versions kept")
    for quarrel in bisync.conflicts(alpha):
        print(f"conflict {quarrel.id}: {quarrel.path.decode(errors='replace')}: {quarrel.reason}")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
