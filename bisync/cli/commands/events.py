"""``bisync events``: what happens in the sessions that run on this machine, as it happens."""

import argparse
import json
import sys

from bisync.cli.output import line
from bisync.session.control import follow


def run(options: argparse.Namespace) -> int:
    """Run the command until it is stopped, or nobody is left to tell anything."""
    for row in follow(options.session):
        line(json.dumps(row))
        sys.stdout.flush()
    return 0
