"""How the commands reach other machines."""

import argparse
import os

from bisync.cli.rsyncwords import size
from bisync.endpoint.connect import Reach
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
