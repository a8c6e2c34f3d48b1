"""The changes of a big file over a connection; see :mod:`bisync.delta.changes`.

The end that has the old version sends its proving digests, and answers for pages, anchors and sums.
Finding digests stay at home: their seed is a secret of the replica. Pages are asked for ahead, so
a long way does not cost a round trip for each block.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from bisync.core.node import NodeId
from bisync.delta.backend import Offsets, Sums
from bisync.delta.blocks import Blocks
from bisync.delta.carry import (
    anchors_from_bytes,
    anchors_to_bytes,
    ascending,
    blocks_of,
    numbers_from_bytes,
    numbers_to_bytes,
    proofs_of,
    sums_from_bytes,
    sums_to_bytes,
)
from bisync.delta.changes import ChangeSink, Moved, Piece, Pieces
from bisync.delta.digest import BLOCK_SIZE, GROUP_BLOCKS
from bisync.delta.pages import PAGE_SIZE
from bisync.delta.search import Anchors
from bisync.endpoint.stream import Stream
from bisync.endpoint.versions import fault_in, version_to_plain
from bisync.fs.content import LARGEST, ContentSource, Version
from bisync.wire import letters
from bisync.wire.frames import BULK
from bisync.wire.letters import Op
from bisync.wire.schema import Bool, Bytes, Each, Int, Maybe, Plain, Several, refuse

_RUN = 64  # blocks whose pages are asked for at once
_AHEAD = 512  # blocks whose pages were asked for and not used yet
_MOST_ANCHORS = 1 << 20
_MOST_SUMS = 1 << 22
_SIZE, _BLOCK, _DIGEST, _YES = Int(0, LARGEST), Int(0, LARGEST // BLOCK_SIZE), Bytes(32, 32), Bool()
_BLOCKS = Several(_BLOCK, _RUN, list)
_PIECES = Several(
    Each((Int(0, BLOCK_SIZE), Int(1, BLOCK_SIZE), Maybe(_SIZE))), BLOCK_SIZE // PAGE_SIZE * 4, list
)
_U64 = Int(0, 2**64 - 1)


class ChangesIn:
    """The end that has the old version: it makes the new one."""

    def __init__(self, stream: Stream, sink: ChangeSink) -> None:
        self._stream, self._sink = stream, sink
        self._due: Iterator[int] | None = None  # the blocks that are still to come
        self._size = 0

    def take(self, node: NodeId, *, refuse_writer: bool) -> Version:
        """Ask for the changes, and make them.

        Raises:
            PathError: the other end could not give them, or the old version is not what it was.
        """
        sink = self._sink
        self._stream.send(
            Op.WANT_CHANGES, node, refuse_writer, sink.key, sink.old.size, sink.searchable
        )
        last = max(sink.old.groups, default=-1)
        if last < 0:
            self._stream.send(Op.PROOFS, 0, True)
        for number, data in proofs_of(sink.old):
            self._stream.send(Op.PROOFS, number, number == last, payload=data)
        try:
            return self._take_all()
        except ValueError as error:
            refuse(str(error))
        except BaseException as error:
            self._stream.give_up(error)
            raise

    def _take_all(self) -> Version:
        numbers = bytearray()
        while True:
            piece = self._stream.next()
            if piece.op is Op.BEGIN:
                numbers += piece.payload
                if self._begin(piece.values, numbers):
                    numbers.clear()
            elif piece.op is Op.END:
                return self._end(piece.values)
            elif piece.op is Op.FAULT:
                raise fault_in(piece)
            else:
                self._act(piece)

    def _begin(self, values: list[Plain], numbers: bytearray) -> bool:
        if len(values) != 2 or len(numbers) > 8 * (LARGEST // BLOCK_SIZE):
            refuse("the blocks that differ were due")
        if not _YES.unpack(values[1]):
            return False
        self._size = _SIZE.unpack(values[0])
        changed = numbers_from_bytes(bytes(numbers))
        count = -(-self._size // BLOCK_SIZE)
        if not ascending(changed) or (len(changed) and int(changed[-1]) >= count):
            refuse("blocks out of order, or beyond the end")
        self._due = iter(changed.tolist())
        self._sink.begin(self._size, changed)
        return True

    def _next_is(self, plain: Plain) -> int:
        """The block that a piece is about: the next one that is due."""
        block = _BLOCK.unpack(plain)
        if self._due is None or next(self._due, None) != block:
            refuse("a block that is not due")
        return block

    def _act(self, piece: "letters.Piece") -> None:
        values, sink = piece.values, self._sink
        match piece.op:
            case Op.PUT if len(values) == 3:
                block = self._next_is(values[0])
                pieces = _pieces(_PIECES.unpack(values[2]), piece.payload)
                sink.put(block, _DIGEST.unpack(values[1]), pieces)
            case Op.ZERO if len(values) == 2:
                sink.zero(self._next_is(values[0]), _DIGEST.unpack(values[1]))
            case Op.ASK_PAGES if len(values) == 1:
                for block in _BLOCKS.unpack(values[0]):
                    self._old(block)
                    data = sums_to_bytes(sink.pages(block))
                    self._stream.send(Op.PAGES, block, payload=data)
            case Op.ASK_ANCHORS if len(values) == 2:
                near = Several(_BLOCK, 1 << 16, list).unpack(values[0])
                for block in near:
                    self._old(block)
                most = Int(2, _MOST_ANCHORS).unpack(values[1])
                self._reply(Op.ANCHORS, anchors_to_bytes(sink.anchors(near, most)))
            case Op.ASK_SUMS if not values:
                wanted = numbers_from_bytes(piece.payload).tolist()
                for block in wanted:
                    if not 0 <= block < sink.old.size // BLOCK_SIZE:
                        refuse("sums of no whole block")
                self._reply(Op.SUMS, sums_to_bytes(sink.sums(wanted)))
            case _:
                refuse("changes in the wrong order")

    def _old(self, block: int) -> None:
        if self._due is None or block >= self._sink.old.count:
            refuse("a block that the old version has not")

    def _reply(self, op: Op, data: bytes) -> None:
        for at in range(0, max(len(data), 1), BULK):
            self._stream.send(op, at + BULK >= len(data), payload=data[at : at + BULK])

    def _end(self, values: list[Plain]) -> Version:
        if len(values) != 4 or self._due is None or next(self._due, None) is not None:
            refuse("not all blocks came")
        size, digest = _SIZE.unpack(values[0]), _DIGEST.unpack(values[1])
        if size != self._size:
            refuse("another size than was said")
        return Version(size, digest, _YES.unpack(values[2]), instant=_YES.unpack(values[3]))


def _pieces(rows: list[tuple[int, int, int | None]], payload: memoryview) -> Pieces:
    """What a block is made of; the literal bytes follow each other in the payload."""
    found: Pieces = []
    at = 0
    for offset, length, old in rows:
        piece: Piece
        if old is None:
            piece = payload[at : at + length]
            at += length
        else:
            piece = Moved(old, length)
        found.append((offset, piece))
    if at != len(payload):
        refuse("more or less bytes than the pieces have")
    return found


def give_changes(stream: Stream, values: list[Plain], source: ContentSource) -> None:
    """Serve a stream that changes are wanted on.

    Raises:
        PathError: they cannot be given; or the old version is not what it was.
    """
    if len(values) != 5:
        refuse("who wants changes says of what")
    node, refuse_writer = Int(0).unpack(values[0]), _YES.unpack(values[1])
    key, size = _U64.unpack(values[2]), _SIZE.unpack(values[3])
    old = _old_version(stream, size)
    sink = _FarSink(stream, key, old, searchable=_YES.unpack(values[4]))
    version = source.supply_changes(node, sink, refuse_writer=refuse_writer)
    stream.send(Op.END, *version_to_plain(version))


def _old_version(stream: Stream, size: int) -> Blocks:
    proofs: dict[int, bytes] = {}
    while True:
        piece = stream.next()
        if piece.op is not Op.PROOFS or len(piece.values) != 2:
            refuse("digests were due")
        number, last = Int(0).unpack(piece.values[0]), _YES.unpack(piece.values[1])
        if number in proofs or len(proofs) > LARGEST // BLOCK_SIZE // GROUP_BLOCKS:
            refuse("digests that came already")
        if piece.payload:
            proofs[number] = bytes(piece.payload)
        if last:
            break
    try:
        return blocks_of(size, proofs)
    except ValueError as error:
        refuse(str(error))


class _FarSink:
    """A ``ChangeSink`` at the other end."""

    def __init__(self, stream: Stream, key: int, old: Blocks, *, searchable: bool) -> None:
        self.key = key
        self.old = old
        self._stream = stream
        self._searchable = searchable
        self._due: deque[int] = deque()  # blocks whose pages are still to be asked for
        self._asked: set[int] = set()
        self._pages: dict[int, Sequence[int]] = {}

    @property
    def searchable(self) -> bool:
        """Whether moved content may be taken from its version."""
        return self._searchable

    def begin(self, size: int, changed: Offsets) -> None:
        """The new version has ``size`` bytes."""
        while self._asked:
            self._take_pages()
        self._pages.clear()
        data = numbers_to_bytes(changed)
        for at in range(0, max(len(data), 1), BULK):
            last = at + BULK >= len(data)
            self._stream.send(Op.BEGIN, size, last, payload=data[at : at + BULK])
        self._due = deque(block for block in changed.tolist() if block < self.old.count)
        self._ask_ahead()

    def _ask_ahead(self) -> None:
        while self._due and len(self._asked) + len(self._pages) < _AHEAD:
            run = [self._due.popleft() for _ in range(min(_RUN, len(self._due)))]
            self._ask([block for block in run if block not in self._pages])

    def _ask(self, blocks: list[int]) -> None:
        self._asked.update(blocks)
        self._stream.send(Op.ASK_PAGES, blocks)

    def _take_pages(self) -> None:
        self._took(self._stream.next())

    def _took(self, piece: letters.Piece) -> None:
        if piece.op is Op.FAULT:
            raise fault_in(piece)
        if piece.op is not Op.PAGES or len(piece.values) != 1:
            refuse("pages were due")
        block = _BLOCK.unpack(piece.values[0])
        if block not in self._asked:
            refuse("pages that nobody asked for")
        if len(piece.payload) != 8 * -(-self.old.length(block) // PAGE_SIZE):
            refuse("pages of another block")
        self._asked.discard(block)
        self._pages[block] = sums_from_bytes(piece.payload).tolist()

    def pages(self, block: int) -> Sequence[int]:
        """The digests of the pages of one of its blocks."""
        if block >= self.old.count:
            return []
        if block not in self._pages and block not in self._asked:
            self._ask([block])
        while block not in self._pages:
            self._take_pages()
        return self._pages[block]

    def anchors(self, near: Sequence[int], most: int) -> Anchors:
        """See :class:`bisync.delta.search.Holder`."""
        self._stream.send(Op.ASK_ANCHORS, list(near), most)
        try:
            found = anchors_from_bytes(self._answer(Op.ANCHORS, 16 * _MOST_ANCHORS))
        except ValueError as error:
            refuse(str(error))
        if len(found.offset) and int(found.offset.max()) >= self.old.size:
            refuse("an anchor beyond the end")
        return found

    def sums(self, blocks: Sequence[int]) -> Sums:
        """See :class:`bisync.delta.search.Holder`."""
        found = [self._sums(blocks[at : at + BULK // 8]) for at in range(0, len(blocks), BULK // 8)]
        return sums_from_bytes(b"".join(found))

    def _sums(self, blocks: Sequence[int]) -> bytes:
        self._stream.send(Op.ASK_SUMS, payload=sums_to_bytes(blocks))
        data = self._answer(Op.SUMS, 8 * _MOST_SUMS)
        if len(data) != 8 * len(blocks):
            refuse("sums of other blocks")
        return data

    def _answer(self, op: Op, most: int) -> bytes:
        data = bytearray()
        while True:
            piece = self._stream.next()
            if piece.op is not op:
                self._took(piece)
                continue
            if len(piece.values) != 1 or len(data) + len(piece.payload) > most:
                refuse("an answer that is too large")
            data += piece.payload
            if _YES.unpack(piece.values[0]):
                return bytes(data)

    def put(self, block: int, proof: bytes, pieces: Pieces) -> None:
        """A block that differs."""
        rows: list[Plain] = []
        literal: list[memoryview] = []
        for offset, piece in pieces:
            if isinstance(piece, Moved):
                rows.append([offset, piece.length, piece.old])
            else:
                rows.append([offset, len(piece), None])
                literal.append(piece)
        self._stream.send(Op.PUT, block, proof, rows, payload=b"".join(literal))
        self._over(block)

    def zero(self, block: int, proof: bytes) -> None:
        """A block that differs and is zeros."""
        self._stream.send(Op.ZERO, block, proof)
        self._over(block)

    def _over(self, block: int) -> None:
        """A block's pages are not needed any more."""
        if block in self._asked:
            self.pages(block)
        self._pages.pop(block, None)
        self._ask_ahead()
