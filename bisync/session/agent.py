"""The other end: does what a bisync elsewhere asks, within what this end allows."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from bisync.endpoint.channel import Channel, Stream
from bisync.endpoint.interface import Tree
from bisync.endpoint.service import ANYTHING, Policy, RootService
from bisync.endpoint.trees import Order, TreeService
from bisync.errors import Interrupted, UsageError
from bisync.linux.limits import workers
from bisync.session.farmirror import RUN, MirrorService
from bisync.session.mirrorconfig import MirrorConfig
from bisync.session.origin import LocalOrigin
from bisync.wire.letters import Letter, Piece
from bisync.wire.schema import Plain, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What the one who drives may not go beyond, whatever is asked for."""

    root: bytes | None = None  # only this directory; None: any that the user may go to
    policy: Policy = ANYTHING

    def locate(self, path: bytes) -> bytes:
        """The directory that a path of the other end means here.

        Raises:
            UsageError: it is outside.
        """
        if self.root is None:
            return path  # as it was spelled: a link in the place of a root is looked at
        if os.path.realpath(path) != os.path.realpath(self.root):
            raise UsageError(f"{os.fsdecode(path)}: this agent serves one directory only")
        return self.root

    def locate_below(self, path: bytes) -> bytes:
        """As :meth:`locate`, or something in that directory; spelled as it was."""
        if self.root is not None:
            root, real = os.path.realpath(self.root), os.path.realpath(path)
            if real != root and not real.startswith(root.rstrip(b"/") + b"/"):
                raise UsageError(f"{os.fsdecode(path)}: this agent serves one directory only")
        return path

    def locate_source(self, path: bytes) -> bytes:
        """As :meth:`locate_below`, for something that is read."""
        return self.locate_below(path)


class Agent:
    """Serves one connection until the other end says goodbye."""

    def __init__(self, channel: Channel, confinement: Confinement) -> None:
        self._channel = channel
        self._root = RootService(channel, confinement.locate, confinement.policy)
        self._mirror = MirrorService(
            channel, confinement.locate_below, confinement.policy, self._stop
        )
        self._trees = TreeService(self._walk)
        self._confinement = confinement
        channel.service = self

    def _stop(self) -> None:
        if self._channel.stop_asked or self._channel.broken:
            raise Interrupted(15)

    def _walk(self, order: Order | None) -> Tree:
        if order is None:
            refuse("an order to walk nothing")
        paths = [self._confinement.locate_source(path) for path in order.sources]
        config = MirrorConfig(
            wish=order.wish,
            filters=order.filters,
            files_from=order.files_from,
            one_file_system=order.one_file_system,
            prune_empty=order.prune_empty,
            bwlimit=order.bwlimit,
            workers=workers(),
            stop=self._stop,
        )
        return LocalOrigin(paths).walk(config)

    def run(self) -> None:
        """Serve.

        Raises:
            EndpointError: the connection ended before the goodbye.
        """
        try:
            self._channel.serve()
        finally:
            self._trees.close()
            self._root.close()
            self._channel.close()

    def ask(self, letter: Letter, part: Callable[[Plain], None]) -> Plain:
        """Answer a call."""
        if letter.about == RUN:
            return self._mirror.run(letter.body, part)
        if self._trees.takes(letter.about):
            return self._trees.ask(letter, part)
        return self._root.ask(letter, part)

    def told(self, letter: Letter) -> None:
        """Take what needs no answer."""
        self._root.told(letter)

    def want(self, stream: Stream, first: Piece) -> None:
        """Give content."""
        (self._root if self._trees.tree is None else self._trees).want(stream, first)
