"""What the two ends of a connection may say to each other, and what they are asked for."""

from collections.abc import Callable
from typing import Any, Protocol

from bisync.wire.letters import Letter, Piece
from bisync.wire.schema import Plain

STOP = 0
"""What to tell the other end when a person wants a stop: what is in hand ends cleanly."""
MARKS = 2
"""What an end that watches tells: see :data:`bisync.endpoint.calls.MARKED`."""
PATIENCE = 1
"""What to tell the other end of the seconds after which a silent end is gone."""
MOST_PATIENCE_S = 86_400


class Service(Protocol):
    """What an end does for the other one."""

    def ask(self, letter: Letter, part: Callable[[Plain], None]) -> Plain:
        """Answer a call; ``part`` sends what of the answer comes before its end."""
        ...

    def told(self, letter: Letter) -> None:
        """Take what needs no answer."""
        ...

    def want(self, stream: Any, first: Piece) -> None:
        """Give the content that a stream of the channel's was opened for."""
        ...
