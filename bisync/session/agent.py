"""The other end: does what a bisync elsewhere asks, within what this end allows."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from bisync.endpoint.channel import Channel, Stream
from bisync.endpoint.service import RootService
from bisync.errors import UsageError
from bisync.wire.letters import Letter, Piece
from bisync.wire.schema import Plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What the one who drives may not go beyond, whatever is asked for."""

    root: bytes | None = None  # only this directory; None: any that the user may go to

    def locate(self, path: bytes) -> bytes:
        """The directory that a path of the other end means here.

        Raises:
            UsageError: it is outside.
        """
        real = os.path.realpath(path)
        if self.root is None:
            return real
        root = os.path.realpath(self.root)
        if real != root:
            raise UsageError(f"{os.fsdecode(path)}: this agent serves one directory only")
        return root


class Agent:
    """Serves one connection until the other end says goodbye."""

    def __init__(self, channel: Channel, confinement: Confinement) -> None:
        self._channel = channel
        self._root = RootService(channel, confinement.locate)
        channel.service = self

    def run(self) -> None:
        """Serve.

        Raises:
            EndpointError: the connection ended before the goodbye.
        """
        try:
            self._channel.serve()
        finally:
            self._root.close()
            self._channel.close()

    def ask(self, letter: Letter, part: Callable[[Plain], None]) -> Plain:
        """Answer a call."""
        return self._root.ask(letter, part)

    def told(self, letter: Letter) -> None:
        """Take what needs no answer."""
        self._root.told(letter)

    def want(self, stream: Stream, first: Piece) -> None:
        """Give content."""
        self._root.want(stream, first)
