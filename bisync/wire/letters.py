"""What two ends say to each other: calls, their answers, and content; sans-I/O.

A *letter* has a word, the number of the call or stream that it belongs to, and a body of plain
values. Its body may be larger than a frame: it travels as the payloads of several. Letters of
content are never cut: each is a frame of the bulk lane, with a few values and the bytes.
"""

from collections.abc import Iterator
from enum import IntEnum, unique

import msgpack
from msgspec import Struct

from bisync.errors import ProtocolError
from bisync.wire.frames import BULK, Frame, Lane, message_of
from bisync.wire.schema import Int, Plain, refuse

MOST_BODY = 24 << 20  # bytes of one letter
MOST_OPEN = 256  # letters of which a part came


@unique
class Word(IntEnum):
    """What a letter is."""

    ASK = 0  # a call: answer it
    ANSWER = 1  # the last word to a call
    PART = 2  # of an answer that comes in several
    FAULT = 3  # the call failed
    TELL = 4  # no answer is due


@unique
class Op(IntEnum):
    """What a frame of content is. From who has the new version, unless it says otherwise."""

    DATA = 0  # [offset], bytes
    HOLE = 1  # [offset, length]
    RESTART = 2  # [] what came so far is void
    END = 3  # [version] all came
    FAULT = 4  # [kind, text] from either: it came to nothing
    WHOLE = 5  # [version], bytes: all of a small file
    BEGIN = 6  # [size, last], numbers of the blocks that differ; the first of a version by changes
    PUT = 7  # [block, proof, pieces], literal bytes
    ZERO = 8  # [block, proof]
    ASK_PAGES = 9  # [blocks]
    ASK_ANCHORS = 10  # [near, most]
    ASK_SUMS = 11  # [blocks]
    PROOFS = 12  # [group, last], 32 bytes each; from who has the old version
    PAGES = 13  # [block], 8 bytes each; likewise
    ANCHORS = 14  # [last], 16 bytes each; likewise
    SUMS = 15  # [last], 8 bytes each; likewise
    WANT = 16  # [node, refuse_writer, most]: a version is wanted whole; the first of its stream
    BATCH = 18  # [[stream, version]...], all their bytes: several that would be WHOLE
    WANTS = 19  # [[stream, node, refuse_writer, most]...]: several WANTs
    WANT_CHANGES = 17  # [node, refuse_writer, key, size, searchable]: what an old one lacks


_WORD, _NUMBER = Int(0, max(Word)), Int(0, 2**63 - 1)
_STREAM, _OP = Int(1, 2**62), Int(0, max(Op))


class Letter(Struct, frozen=True):
    """One letter. ``about`` says what is asked for, or what kind of fault it is."""

    word: Word
    number: int
    about: int
    body: Plain


class Piece(Struct, frozen=True):
    """One frame of content."""

    stream: int
    op: Op
    values: list[Plain]
    payload: memoryview


def parts_of(letter: Letter) -> Iterator[tuple[list[int], bytes]]:
    """The frames of a letter: messages and payloads.

    Raises:
        ProtocolError: it is too large; the fault is here.
    """
    body = msgpack.packb(letter.body, use_bin_type=True)
    if len(body) > MOST_BODY:
        raise ProtocolError(f"a message of {len(body)} bytes cannot be sent")
    for at in range(0, max(len(body), 1), BULK):
        last = int(at + BULK >= len(body))
        head = [int(letter.word), letter.number, letter.about, last]
        yield head, body[at : at + BULK]


class Assembler:
    """Makes letters of frames again."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], tuple[int, bytearray]] = {}
        self._size = 0

    def take(self, frame: Frame) -> Letter | None:
        """A letter, if this frame of the small lane was its last.

        Raises:
            ProtocolError: it is no such frame, or too much.
        """
        message = frame.message
        if type(message) is not list or len(message) != 4:
            refuse("a letter was due")
        word, number, about = _WORD.unpack(message[0]), *map(_NUMBER.unpack, message[1:3])
        if message[3] not in (0, 1):
            refuse("a letter was due")
        key = word, number
        known, data = self._open.pop(key, (about, bytearray()))
        self._size += len(frame.payload)
        if known != about or self._size > MOST_BODY or len(self._open) >= MOST_OPEN:
            refuse("a letter that is too large")
        data += frame.payload
        if not message[3]:
            self._open[key] = about, data
            return None
        self._size -= len(data)
        return Letter(Word(word), number, about, message_of(bytes(data)))


def piece_of(frame: Frame) -> Piece:
    """What a frame of the bulk lane holds.

    Raises:
        ProtocolError: it is no content.
    """
    message = frame.message
    if type(message) is not list or len(message) < 2:
        refuse("content was due")
    stream, op = _STREAM.unpack(message[0]), Op(_OP.unpack(message[1]))
    payload = frame.payload
    if len(payload) > BULK:
        refuse("more content in one frame than there may be")
    if not isinstance(payload, memoryview):
        payload = memoryview(payload)
    assert frame.lane is Lane.BULK
    return Piece(stream, op, message[2:], payload)


def rows_of(values: list[Plain]) -> Iterator[tuple[int, list[Plain]]]:
    """Streams and what is said of each, in a piece about several.

    Raises:
        ProtocolError: it is no such piece.
    """
    for row in values:
        if type(row) is not list or not row:
            refuse("a row of streams was due")
        yield _STREAM.unpack(row[0]), row[1:]
