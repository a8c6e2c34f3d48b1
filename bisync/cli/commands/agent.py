"""``bisync agent``: the other end, on standard input and output."""

import argparse
import logging
import os
import sys

from bisync.cli.stopping import Stopper
from bisync.endpoint.channel import Channel
from bisync.endpoint.service import Policy
from bisync.errors import Interrupted, UsageError
from bisync.linux.landlock import confine
from bisync.session.agent import Agent
from bisync.session.confinement import Confinement

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    """Serve one connection; 0 only after an orderly goodbye."""
    for fd in (0, 1):
        if os.isatty(fd):
            raise UsageError("this runs at the other end of a connection; it is not for people")
    stopper = Stopper(agent=True)
    if options.root is not None:
        _confine(os.fsencode(options.root))
    reading, writing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(2, 1)  # nothing but frames may go where the frames go
    os.close(null)
    channel = Channel(reading, writing, first=2, stop=stopper.check, drives=False)
    root = None if options.root is None else os.fsencode(options.root)
    try:
        Agent(channel, Confinement(root=root, policy=_policy(options)), stopper.check).run()
    except Interrupted as error:
        return 128 + error.signum
    return 0


def _policy(o: argparse.Namespace) -> Policy:
    """Bound to a directory, only what was said here is lent; else whoever drives is the user."""
    bound = o.root is not None
    return Policy(
        changes=not o.read_only,
        prunes=not o.append_only_store,
        devices=o.devices or not bound,
        set_id=o.set_id or not bound,
        commands=not bound,
        chooses_store=not bound,
    )


def _confine(root: bytes) -> None:
    """A second wall: the kernel lets this process reach nothing but what it serves and runs on."""
    if not os.path.isdir(root):
        raise UsageError(f"--root {os.fsdecode(root)}: no such directory")
    system = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc", "/proc", "/sys", "/dev"]
    own = [path for path in (sys.prefix, sys.base_prefix, *sys.path) if path]
    if not confine([root, os.devnull], [*system, *own]):
        log.info("no-landlock")
