"""The content of one version on its way, as either end of a channel sees it."""

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Protocol

from bisync.endpoint.faults import number_of
from bisync.errors import BisyncError, PathError, StaleError
from bisync.wire.frames import Frame
from bisync.wire.letters import Op, Piece
from bisync.wire.schema import Plain, refuse


class Carrier(Protocol):
    """The channel, as a stream needs it."""

    @property
    def broken(self) -> bool:
        """Whether nothing can be said any more."""

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until something is there; do what the other end asks meanwhile."""

    def done(self, frame: Frame) -> None:
        """What a frame brought was dealt with."""

    def forget(self, stream: int) -> None:
        """A stream is over."""

    def send_piece(
        self, stream: int, op: Op, values: list[Plain], payload: bytes | memoryview
    ) -> None:
        """Send a piece of a stream; waits while too much waits to be written."""

    def send_small(self, stream: int, values: list[Plain], payload: bytes | memoryview) -> None:
        """Send all of a small file that was asked for ahead."""


class Stream:
    """The content of one version, on its way; either end sees it as one of these.

    Args:
        bounded: bytes of which the peer must not send more, and gets its credit back at once;
            else it gets credit back for what was taken.
        given: the other end wants it of us.
    """

    def __init__(
        self, channel: Carrier, number: int, *, bounded: int | None = None, given: bool = False
    ) -> None:
        self.number = number
        self._given, self._unwanted = given, False
        self._channel = channel
        self._pieces: deque[tuple[Piece, Frame | None]] = deque()
        self._bounded = bounded

    def came(self, piece: Piece, frame: Frame) -> bool:
        """Take a piece from the reader; whether its credit may go back at once."""
        if piece.op is Op.FAULT and self._given:
            self._unwanted = True
        if self._bounded is None:
            self._pieces.append((piece, frame))
            return False
        self._bounded -= len(piece.payload)
        if self._bounded < 0 or len(self._pieces) > 4:
            refuse("more of a file than was asked for")
        self._pieces.append((piece, None))
        return True

    def waiting(self) -> bool:
        """Whether there is a piece."""
        return bool(self._pieces)

    def next(self) -> Piece:
        """The next piece; waits for it. Its payload stays valid."""
        self._channel.wait(self.waiting)
        piece, frame = self._pieces.popleft()
        if frame is not None:
            self._channel.done(frame)
        return piece

    def send(self, op: Op, *values: Plain, payload: bytes | memoryview = b"") -> None:
        """Send a piece; waits while too much waits to be written.

        Raises:
            StaleError: who wanted it does not want it any more.
        """
        if self._unwanted:
            raise StaleError("it is not wanted any more")
        self._channel.send_piece(self.number, op, list(values), payload)

    def send_small(self, values: list[Plain], payload: bytes | memoryview) -> None:
        """Send all of a small file that was asked for ahead."""
        if not self._unwanted:
            self._channel.send_small(self.number, values, payload)

    def give_up(self, error: BaseException) -> None:
        """Let the other end know that it comes to nothing: nothing more is taken, or given."""
        if not (self._channel.broken or self._unwanted):
            known = error if isinstance(error, BisyncError) else PathError(str(error))
            with contextlib.suppress(BisyncError):
                self._channel.send_piece(self.number, Op.FAULT, list(number_of(known)), b"")

    def close(self) -> None:
        """What still comes is of no use."""
        for _, frame in self._pieces:
            if frame is not None:
                self._channel.done(frame)
        self._pieces.clear()
        self._channel.forget(self.number)
