"""The other end: does what a bisync elsewhere asks, within what this end allows."""

from collections.abc import Callable

from bisync.endpoint.channel import Channel
from bisync.endpoint.interface import Tree
from bisync.endpoint.service import RootService
from bisync.endpoint.stream import Stream
from bisync.endpoint.trees import Order, TreeService
from bisync.errors import Interrupted
from bisync.linux.limits import workers
from bisync.session.confinement import Confinement
from bisync.session.farmirror import RUN, MirrorService
from bisync.session.mirrorconfig import MirrorConfig
from bisync.session.origin import LocalOrigin
from bisync.wire.letters import Letter, Piece
from bisync.wire.schema import Plain, refuse


class Agent:
    """Serves one connection until the other end says goodbye."""

    def __init__(
        self, channel: Channel, confinement: Confinement, stop: Callable[[], None] = lambda: None
    ) -> None:
        self._channel = channel
        self._asked_to_stop = stop
        self._root = RootService(channel, confinement.locate, confinement.policy, stop)
        self._mirror = MirrorService(channel, confinement, self._stop)
        self._trees = TreeService(self._walk)
        self._confinement = confinement
        channel.service = self

    def _stop(self) -> None:
        self._asked_to_stop()
        if self._channel.stop_asked or self._channel.broken:
            raise Interrupted(15)

    def _walk(self, order: Order | None) -> Tree:
        if order is None:
            refuse("an order to walk nothing")
        self._confinement.refuse_filters(order.filters)
        paths = [self._confinement.locate_below(path) for path in order.sources]
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
            self._root.end()
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
