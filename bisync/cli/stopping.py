"""What the commands that run the engine share: a clean stop, paths, and how many threads."""

import os
import signal
from types import FrameType

from bisync.errors import Interrupted, UsageError


class Stopper:
    """Turns SIGINT and SIGTERM into a clean stop after the operation in hand."""

    def __init__(self) -> None:
        self.signum = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum

    def check(self) -> None:
        """Raise if a stop was asked for."""
        if self.signum:
            raise Interrupted(self.signum)


def local_path(text: str) -> str:
    """A location on this machine.

    Raises:
        UsageError: it is on another one.
    """
    head = text.split("/", 1)[0]
    if text.startswith("ssh://") or (":" in head and not os.path.exists(text)):
        raise UsageError(f"{text}: other machines are not supported yet; give a local directory")
    return text


def workers() -> int:
    """How many threads read, hash and flush; the environment may say so."""
    text = os.environ.get("BISYNC_WORKERS", "2")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"BISYNC_WORKERS={text}: give a number of threads, at least 1")
    return int(text)
