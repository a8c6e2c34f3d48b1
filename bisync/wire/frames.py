"""Frames: what crosses the wire, one after the other; sans-I/O.

Each end begins with a preamble: the magic, the lowest and the highest version it speaks, its
features, a nonce of this start. Then come frames:

    stored   u32  bytes that follow the head
    header   u32  bytes of the message
    payload  u32  bytes of bulk behind it
    lane     u8   see :class:`Lane`
    packing  u8   0: as they are (stored = header + payload); 1: one zstd frame of both

all big-endian. No frame holds more than :data:`MOST` bytes, stored or not; what a head claims is
checked before anything is read or made room for.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import msgpack
import zstandard
from msgspec import Struct

from bisync.errors import ProtocolError
from bisync.wire.schema import Plain, refuse

MAGIC = b"\xf0bisync\n"
VERSIONS = (4, 4)  # the lowest and the highest that is spoken here
MOST = 1 << 20  # bytes of a frame without its head
BULK = 256 << 10  # bytes of content in one frame at most
NONCE_SIZE = 16
_PREAMBLE = struct.Struct(f">8sHHQ{NONCE_SIZE}s")
PREAMBLE_SIZE = _PREAMBLE.size
_HEAD = struct.Struct(">IIIBB")
HEAD_SIZE = _HEAD.size
_PLAIN, _ZSTD = 0, 1
_SMALLEST = 512  # bytes; packing less is not worth it
_LEVEL = 3
LINE = 200  # bytes shown of what is no preamble


class Lane(IntEnum):
    """What goes before what, and has credit of its own."""

    CONTROL = 0  # credit, acknowledgements, signs of life, ends: needs no credit, goes first
    SMALL = 1  # questions, answers, rows
    BULK = 2  # content


class Preamble(Struct, frozen=True):
    """How an end begins."""

    lowest: int
    highest: int
    features: int  # one bit each; what one end lacks is not used
    nonce: bytes  # 16 bytes, of this start of that end

    def to_bytes(self) -> bytes:
        """As it is sent."""
        return _PREAMBLE.pack(MAGIC, self.lowest, self.highest, self.features, self.nonce)

    @classmethod
    def of(cls, data: bytes) -> "Preamble":
        """From its bytes, :data:`PREAMBLE_SIZE` of them.

        Raises:
            ProtocolError: it is none.
        """
        refuse_other(data)
        _, lowest, highest, features, nonce = _PREAMBLE.unpack(data)
        if lowest > highest:
            refuse("versions in the wrong order")
        return cls(lowest, highest, features, nonce)


def refuse_other(data: bytes) -> None:
    """Make sure that the first bytes, as far as they are there, are those of our own kind.

    Raises:
        ProtocolError: somebody else talks; with the first line of it.
    """
    if not MAGIC.startswith(data[: len(MAGIC)]):
        line = data[:LINE].splitlines()[0] if data.strip() else data
        shown = line.decode("ascii", "backslashreplace")
        shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
        raise ProtocolError(
            f"the other end does not begin as bisync does but with: {shown}\n"
            "does its login shell print something? Is `bisync` there, and new enough?"
        )


def common_version(mine: Preamble, theirs: Preamble) -> int:
    """The highest version that both speak.

    Raises:
        ProtocolError: there is none.
    """
    version = min(mine.highest, theirs.highest)
    if version < max(mine.lowest, theirs.lowest):
        older = "here" if mine.highest < theirs.lowest else "there"
        raise ProtocolError(
            f"no common version: {mine.lowest} to {mine.highest} here, {theirs.lowest} to "
            f"{theirs.highest} there; the bisync {older} is too old"
        )
    return version


class Frame(Struct, frozen=True):
    """One frame: a message as plain values, and the bulk that belongs to it."""

    lane: Lane
    message: Plain
    payload: bytes | memoryview = b""
    size: int = 0  # bytes that it takes of its lane's credit; known once it is packed


class Packer:
    """Makes frames' bytes. What does not get smaller is not packed for a while."""

    def __init__(self, *, compress: bool) -> None:
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL) if compress else None
        self._skip = self._streak = 0

    def pack(self, frame: Frame) -> tuple[bytes, int]:
        """A frame's bytes, and what it takes of its lane's credit.

        Raises:
            ProtocolError: it holds too much; the fault is here.
        """
        header = msgpack.packb(frame.message, use_bin_type=True)
        size = len(header) + len(frame.payload)
        if size > MOST:
            raise ProtocolError(f"a message of {size} bytes cannot be sent")
        packing, stored, parts = _PLAIN, size, (header, frame.payload)
        if self._zstd is not None and size >= _SMALLEST and self._is_worth_it(frame.lane):
            smaller = self._zstd.compress(b"".join(parts))
            if frame.lane is Lane.BULK:
                self._learn(len(smaller) * 16 < size * 15)
            if len(smaller) < size:
                packing, stored, parts = _ZSTD, len(smaller), (smaller, b"")
        head = _HEAD.pack(stored, len(header), len(frame.payload), frame.lane, packing)
        return b"".join((head, *parts)), HEAD_SIZE + size

    def _is_worth_it(self, lane: Lane) -> bool:
        if lane is not Lane.BULK or self._skip == 0:
            return True
        self._skip -= 1
        return False

    def _learn(self, got_smaller: bool) -> None:
        self._streak = 0 if got_smaller else min(self._streak + 1, 6)
        self._skip = 0 if got_smaller else 1 << self._streak


class Unpacker:
    """Takes bytes as they come, and gives frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._zstd = zstandard.ZstdDecompressor(max_window_size=MOST)
        self.wanted = HEAD_SIZE  # bytes that are missing until something can be given

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """Take bytes; the frames that are whole now.

        Raises:
            ProtocolError: they are no frames. Nothing can be read after that.
        """
        self._buffer += data
        at = 0
        try:
            while (frame := self._next(at)) is not None:
                found, at = frame
                yield found
        finally:
            del self._buffer[:at]

    def _next(self, at: int) -> tuple[Frame, int] | None:
        there = len(self._buffer) - at
        if there < HEAD_SIZE:
            self.wanted = HEAD_SIZE - there
            return None
        stored, header, payload, lane, packing = _HEAD.unpack_from(self._buffer, at)
        size = header + payload
        if size > MOST or stored > MOST or header == 0 or lane > Lane.BULK or packing > _ZSTD:
            refuse("a frame that no end makes")
        if stored != size if packing == _PLAIN else stored >= size:
            refuse("a frame whose sizes do not fit")
        if there < HEAD_SIZE + stored:
            self.wanted = HEAD_SIZE + stored - there
            return None
        begin, end = at + HEAD_SIZE, at + HEAD_SIZE + stored
        body = bytes(memoryview(self._buffer)[begin:end])
        if packing == _ZSTD:
            body = self._unzipped(body, size)
        self.wanted = HEAD_SIZE
        message = message_of(body[:header])
        return Frame(Lane(lane), message, memoryview(body)[header:], HEAD_SIZE + size), end

    def _unzipped(self, body: bytes, size: int) -> bytes:
        try:
            if zstandard.frame_content_size(body) != size:
                refuse("a packed frame of another size")
            found = self._zstd.decompress(body, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ProtocolError(f"the peer sent a damaged frame: {error}") from error
        if len(found) != size:
            refuse("a packed frame of another size")
        return found


def message_of(data: bytes) -> Plain:
    """A message from its bytes: plain values, no more than the bytes account for.

    Raises:
        ProtocolError: it is none.
    """

    def pairs(_pairs: Any) -> Any:
        refuse("a map")

    def extension(_code: int, _data: bytes) -> Any:
        refuse("an extension")

    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            object_pairs_hook=pairs,
            ext_hook=extension,
            max_bin_len=len(data),
            max_str_len=len(data),
            max_array_len=len(data),
            max_map_len=0,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ProtocolError("the peer sent what is no message") from error
