"""The two calls most programs need."""

import os

from bisync.endpoint.connect import Reach
from bisync.session.config import Config
from bisync.session.report import Listener, Report
from bisync.session.session import Session


def sync(
    alpha: str | bytes | os.PathLike[str],
    beta: str | bytes | os.PathLike[str],
    config: Config | None = None,
    *,
    listener: Listener = lambda _event: None,
    reach: Reach | None = None,
) -> Report:
    """Synchronise two roots once, both ways.

    Args:
        alpha: one root: ``PATH``, ``[USER@]HOST:PATH`` or ``ssh://[USER@]HOST[:PORT]/PATH``.
        beta: the other.
        config: policies and limits; the defaults are the safe ones.
        listener: gets every event while the run goes on.
        reach: how other machines are reached; the default is the system's ssh.

    Returns:
        What was done; ``exit_code`` is what the command would exit with.

    Raises:
        BisyncError: the run as a whole could not go on; see :mod:`bisync.errors`.
    """
    return Session(alpha, beta, config, listener=listener, reach=reach).run()


def plan(
    alpha: str | bytes | os.PathLike[str],
    beta: str | bytes | os.PathLike[str],
    config: Config | None = None,
    *,
    listener: Listener = lambda _event: None,
    reach: Reach | None = None,
) -> Report:
    """Say what :func:`sync` would do and why; change nothing.

    Returns:
        A report whose ``changes`` lists each planned transition.
    """
    return Session(alpha, beta, config, listener=listener, reach=reach).run(dry=True)
