"""Content over a connection: what one end has, the other one pulls.

Small files are asked for ahead of their turn, so a long way does not cost a round trip for each.
What comes is hashed here: the digest that counts is never the other end's word.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from bisync.core.node import NodeId
from bisync.delta.digest import BLOCK_SIZE, ContentHasher
from bisync.endpoint.channel import Channel
from bisync.endpoint.inline import Inline
from bisync.endpoint.stream import Stream
from bisync.endpoint.versions import fault_in, version_from_plain, version_to_plain
from bisync.errors import BisyncError, PathError, ProtocolError, StaleError
from bisync.fs.content import BIG, LARGEST, Chunk, ContentSource, Expected, Version
from bisync.wire.frames import BULK
from bisync.wire.letters import Op, Piece
from bisync.wire.schema import Bool, Int, Plain, refuse

if TYPE_CHECKING:
    from bisync.delta.changes import ChangeSink

_AHEAD = 256  # files that were asked for and not taken yet
_AHEAD_SIZE = 4 << 20  # bytes of them
_FRESH_S = 1.0  # in which what came along is taken for what would come now
_SLACK = 4 << 10  # bytes that a small file may have grown by
_SIZE, _YES, _NODE = Int(0, LARGEST), Bool(), Int(0)


class RemoteContent:
    """The content that the other end has: a ``ContentSource``."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._due: deque[Expected] = deque()
        self._coming: OrderedDict[NodeId, tuple[Stream, Expected]] = OrderedDict()
        self._coming_size = 0
        self._here: dict[NodeId, Inline] = {}
        self._came = 0.0

    def expect(self, files: Sequence[Expected]) -> None:
        """These will be asked for whole, in this order."""
        self._drop_all()
        self._due = deque(file for file in files if not self.has([file.node]))
        self._ask_ahead()

    def learn(self, files: dict[NodeId, Inline]) -> None:
        """These came already; what was not asked for of those before is of no use."""
        self._here, self._came = files, time.monotonic()

    def has(self, nodes: Iterable[NodeId]) -> bool:
        """Whether all of these came already, just now."""
        if time.monotonic() - self._came > _FRESH_S:
            self.forget()
        return self._here.keys() >= set(nodes)

    def _ask_ahead(self) -> None:
        if len(self._coming) > _AHEAD // 2 or self._coming_size > _AHEAD_SIZE // 2:
            return  # enough is on its way; many are asked for at once
        rows: list[Plain] = []
        while self._due and len(self._coming) < _AHEAD and self._coming_size < _AHEAD_SIZE:
            file = self._due.popleft()
            if file.node in self._coming:
                continue
            most = min(file.size + _SLACK, BULK)
            stream = self._channel.open(bounded=most)
            self._coming[file.node] = stream, file
            self._coming_size += file.size
            rows.append([stream.number, file.node, file.refuse_writer, most])
        if rows:
            self._channel.send_piece(1, Op.WANTS, rows, b"")

    def _drop(self) -> None:
        _, (stream, file) = self._coming.popitem(last=False)
        self._coming_size -= file.size
        stream.close()

    def _drop_all(self) -> None:
        self._due.clear()
        while self._coming:
            self._drop()

    def _ahead(self, node: NodeId) -> Stream | None:
        """The stream of a file that was asked for ahead; those before it are not needed."""
        if node not in self._coming:
            return None
        while next(iter(self._coming)) != node:
            self._drop()
        stream, file = self._coming.pop(node)
        self._coming_size -= file.size
        return stream

    def supply(
        self,
        node: NodeId,
        sink: Callable[[Chunk], None],
        restart: Callable[[], None],
        *,
        refuse_writer: bool,
    ) -> Version:
        """Read one whole version into ``sink``."""
        if self.has([node]):
            came = self._here.pop(node)
            taken = _Taken(sink)
            if came.data:
                taken.data(memoryview(came.data))
            return taken.version([came.size, came.digest, came.writer, came.instant])
        stream = self._ahead(node)
        if stream is not None:
            try:
                return _received(stream, sink, restart)
            finally:
                stream.close()
                self._ask_ahead()
        stream = self._channel.open()
        try:
            stream.send(Op.WANT, node, refuse_writer, LARGEST)
            return _received(stream, sink, restart)
        except BaseException as error:
            stream.give_up(error)
            raise
        finally:
            stream.close()

    def supply_changes(
        self, node: NodeId, sink: "ChangeSink", *, refuse_writer: bool = False
    ) -> Version:
        """Take what an older version of a big file lacks."""
        from bisync.endpoint.changes import ChangesIn  # noqa: PLC0415 -- loads numpy

        stream = self._channel.open()
        try:
            return ChangesIn(stream, sink).take(node, refuse_writer=refuse_writer)
        finally:
            stream.close()

    def forget(self) -> None:
        """What came already may not hold any more."""
        self._here = {}

    def close(self) -> None:
        """What came or was asked for ahead is of no use."""
        self.forget()
        self._drop_all()


class _Taken:
    """What came of one version: in order, without gaps, hashed."""

    def __init__(self, sink: Callable[[Chunk], None]) -> None:
        self._sink = sink
        self._proofs: dict[int, bytes] = {}
        self._hasher = ContentHasher(self._proofs.__setitem__)

    def data(self, payload: memoryview) -> None:
        """Bytes."""
        at = self._hasher.size
        if at % BLOCK_SIZE or not payload:
            refuse("content that is not in order")
        self._hasher.update(payload)
        self._sink(Chunk(at, len(payload), payload))

    def hole(self, length: int) -> None:
        """Zeros."""
        at = self._hasher.size
        if at % BLOCK_SIZE or length == 0 or at + length > LARGEST:
            refuse("a hole that no file has")
        self._hasher.update_zeros(length)
        self._sink(Chunk(at, length, None))

    def version(self, plain: list[Plain]) -> Version:
        """All came."""
        size, digest, writer, instant = version_from_plain(plain)
        if size != self._hasher.size or digest != self._hasher.digest():
            raise ProtocolError("the other end sent another content than it says")
        blocks = None
        if size >= BIG:
            from bisync.delta.carry import blocks_proven  # noqa: PLC0415 -- loads numpy

            blocks = blocks_proven(size, self._proofs)
        return Version(size, digest, writer, blocks, instant)


def _received(
    stream: Stream, sink: Callable[[Chunk], None], restart: Callable[[], None]
) -> Version:
    taken = _Taken(sink)
    while True:
        piece = stream.next()
        values = piece.values
        match piece.op:
            case Op.DATA if not values:
                taken.data(piece.payload)
            case Op.HOLE if len(values) == 1:
                taken.hole(_SIZE.unpack(values[0]))
            case Op.WHOLE:
                if piece.payload:
                    taken.data(piece.payload)
                return taken.version(values)
            case Op.END:
                return taken.version(values)
            case Op.RESTART:
                restart()
                taken = _Taken(sink)
            case Op.FAULT:
                raise fault_in(piece)
            case _:
                refuse("content in the wrong order")


class ContentServer:
    """Gives the other end the content that it wants of one side."""

    def __init__(self, source: Callable[[], ContentSource]) -> None:
        self._source = source

    def want(self, stream: Stream, first: Piece) -> None:
        """Serve one stream."""
        try:
            if first.op is Op.WANT:
                self._whole(stream, first.values)
            else:
                from bisync.endpoint.changes import give_changes  # noqa: PLC0415 -- loads numpy

                give_changes(stream, first.values, self._source())
        except ProtocolError:
            raise
        except BisyncError as error:
            stream.give_up(error)
        except OSError as error:
            stream.give_up(PathError(error.strerror or str(error)))

    def _whole(self, stream: Stream, values: list[Plain]) -> None:
        if len(values) != 3:
            refuse("who wants a file says which, and how much of it")
        node, refuse_writer = _NODE.unpack(values[0]), _YES.unpack(values[1])
        giving = _Giving(stream, _SIZE.unpack(values[2]))
        version = self._source().supply(
            node, giving.take, giving.restart, refuse_writer=refuse_writer
        )
        giving.end(version)


class _Giving:
    """Sends a version as it is read; a small one as one piece."""

    def __init__(self, stream: Stream, most: int) -> None:
        self._stream = stream
        self._most, self._left = most, most
        self._held: memoryview | None = None  # the first piece, while it may be all there is
        self._sent = False

    def take(self, chunk: Chunk) -> None:
        """A stretch of it."""
        self._left -= chunk.length
        if self._left < 0:
            raise StaleError("it grew")
        if chunk.data is None:
            self._flush()
            self._send(Op.HOLE, chunk.length)
            return
        for data in _stretches(chunk.data):
            if self._held is None and not self._sent:
                self._held = memoryview(bytes(data))
                continue
            self._flush()
            self._send(Op.DATA, payload=data)

    def _flush(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._send(Op.DATA, payload=held)

    def _send(self, op: Op, *values: Plain, payload: bytes | memoryview = b"") -> None:
        self._sent = True
        self._stream.send(op, *values, payload=payload)

    def restart(self) -> None:
        """What was taken is void."""
        self._held, self._left = None, self._most
        if self._sent:
            self._stream.send(Op.RESTART)
            self._sent = False

    def end(self, version: Version) -> None:
        """All was taken."""
        held, self._held = self._held, None
        if self._sent:
            self._stream.send(Op.END, *version_to_plain(version))
        else:
            payload = held if held is not None else b""
            if self._most <= BULK:
                self._stream.send_small(version_to_plain(version), payload)
            else:
                self._stream.send(Op.WHOLE, *version_to_plain(version), payload=payload)


def _stretches(data: memoryview) -> Iterator[memoryview]:
    for at in range(0, len(data), BULK):
        yield data[at : at + BULK]
