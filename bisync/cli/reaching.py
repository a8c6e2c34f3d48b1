"""How the commands reach other machines."""

import argparse
import os
from collections.abc import Callable, Sequence

from bisync.cli.rsyncwords import size
from bisync.core.location import location
from bisync.endpoint.connect import Connection, Reach
from bisync.errors import UsageError

_KIB = 1024


def reach(options: argparse.Namespace, *, compress: bool = True) -> Reach:
    """What the options say; the environment's RSYNC_RSH counts as it does for rsync."""
    timeout = options.timeout or "0"
    if not timeout.isdecimal():
        raise UsageError(f"--timeout {timeout}: give a number of seconds")
    limit = options.bwlimit
    return Reach(
        rsh=options.rsh or os.environ.get("RSYNC_RSH") or "ssh",
        agent_command=options.agent_command or "bisync",
        timeout_s=int(timeout),
        bwlimit=0 if limit is None else size(limit, "--bwlimit", unit=_KIB),
        compress=compress,
    )


def set_out(roots: Sequence[str], over: Reach, stop: Callable[[], None]) -> list[Connection | None]:
    """A connection to the first root that is elsewhere, on its way while more of us is loaded."""
    places = [location(os.fsencode(root)) for root in roots]
    first = next((each for each in places if each.is_remote), None)
    return [Connection(each, over, stop) if each is first else None for each in places]
