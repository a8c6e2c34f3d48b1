"""Read-only directories of a plain user: writable for the length of one step.

A name can only be changed in a directory that may be written, and a directory can only change its
parent if it may be written itself. Where it belongs to the user who runs the engine, it gets the
permission for one step and loses it again whatever happens; what a crash leaves writable is in the
table ``softened`` before, and hardened before the next scan.
"""

import logging
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from bisync.core.node import Kind, NodeId, Place
from bisync.core.plan import (
    Exchange,
    Link,
    Make,
    Move,
    Park,
    Remove,
    Replace,
    SetAttributes,
    Transition,
    Unlink,
)
from bisync.errors import StaleError
from bisync.fs.index import Index
from bisync.fs.meta import proc_path
from bisync.fs.root import Directories

log = logging.getLogger(__name__)


def soft(mode: int) -> int:
    """A directory's mode while something is done in it."""
    if os.geteuid() == 0 or mode & 0o700 == 0o700:
        return mode
    return mode | 0o700


def hard_directories(steps: Iterable[Transition], index: Index) -> dict[NodeId, int]:
    """The directories that have to be softened for steps, with their modes."""
    user = os.geteuid()
    if user == 0:
        return {}
    wanted = {node for step in steps for node in _directories(step)}
    return {
        node: row.attributes.mode
        for node, row in index.nodes(wanted).items()
        if row.kind is Kind.DIR
        and row.attributes.uid == user
        and soft(row.attributes.mode) != row.attributes.mode
    }


@contextmanager
def softened(
    steps: Iterable[Transition], modes: dict[NodeId, int], directories: Directories
) -> Iterator[None]:
    """Let steps write where ``modes`` (of :func:`hard_directories`) says that they may not.

    What cannot be hardened afterwards is taken out of ``modes``.
    """
    if not modes:
        yield
        return
    with ExitStack() as stack:
        for node in {node for step in steps for node in _directories(step)} & modes.keys():
            try:
                fd = os.dup(directories.open(node))
                stack.callback(os.close, fd)
                mode = stat.S_IMODE(os.fstat(fd).st_mode)
                if mode == modes[node]:
                    os.chmod(proc_path(fd), soft(mode))
                    stack.callback(_harden, fd, node, modes)
            except (StaleError, OSError):
                continue  # the step itself will say so
        yield


def harden(fd: int, mode: int) -> bool:
    """Take back what :func:`soft` gave; ``False``: somebody set another mode since, which stays."""
    if (os.fstat(fd).st_mode ^ soft(mode)) & 0o777:
        return False
    os.chmod(proc_path(fd), mode)
    return True


def _harden(fd: int, node: NodeId, modes: dict[NodeId, int]) -> None:
    try:
        harden(fd, modes[node])
    except OSError as error:
        log.info("not-hardened node=%d reason=%s", node, error)
        del modes[node]  # its row stays: tried again at the end of the run


def _directories(step: Transition) -> Iterator[NodeId]:
    """Those a step changes names in, and those that change their parent (if they are any)."""
    places: tuple[Place | None, ...] = ()
    match step:
        case Make() | Link() | Unlink():
            places = (step.place,)
        case Move():
            places = (step.old, step.new)
            yield step.node
        case Exchange():
            places = (step.old, step.new)
            yield from (step.node, step.other)
        case Park():
            places = (step.old,)
            yield step.node
        case Remove():
            places = (step.place,)
            yield step.node
        case Replace():
            places = (*step.places, step.keep)
        case SetAttributes():
            return
    if isinstance(step, Make | Link | Move) and step.displaces is not None:
        yield step.displaces.node
    yield from (place[0] for place in places if place is not None)
