"""What the commands that run the engine share: a clean stop."""

import signal
from types import FrameType

from bisync.errors import Interrupted


class Stopper:
    """Turns SIGINT and SIGTERM into a clean stop after the operation in hand."""

    def __init__(self, *, agent: bool = False) -> None:
        """``agent``: its terminal has gone when it hangs up, and nobody is at the keyboard."""
        self.signum = 0
        for signum in (signal.SIGTERM, signal.SIGHUP if agent else signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum

    def check(self) -> None:
        """Raise if a stop was asked for."""
        if self.signum:
            raise Interrupted(self.signum)
