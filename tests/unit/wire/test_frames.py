"""Frames come out as they went in, however the bytes are cut; and nothing else comes out."""

import random
import resource
import struct
import tracemalloc
from collections.abc import Iterator

import msgpack
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from bisync.errors import ProtocolError
from bisync.wire.frames import (
    BULK,
    HEAD_SIZE,
    MAGIC,
    MOST,
    PREAMBLE_SIZE,
    Frame,
    Lane,
    Packer,
    Preamble,
    Unpacker,
    common_version,
    message_of,
    refuse_other,
)

NONCE = bytes(range(16))
messages = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.text(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=10,
)
frames = st.builds(
    Frame,
    st.sampled_from(Lane),
    messages,
    st.binary(max_size=2000) | st.binary(max_size=9).map(lambda data: data * 3000),
)


def plain(frame: Frame) -> tuple[Lane, object, bytes]:
    return frame.lane, frame.message, bytes(frame.payload)


@given(st.lists(frames, max_size=5), st.booleans(), st.randoms(use_true_random=False))
def test_there_and_back(sent: list[Frame], compress: bool, chance: random.Random):
    packer, unpacker = Packer(compress=compress), Unpacker()
    packed = list(map(packer.pack, sent))
    data, sizes, found = b"".join(data for data, _ in packed), [size for _, size in packed], []
    while data:
        size = chance.choice((1, 2, HEAD_SIZE, 700, len(data)))
        came = list(unpacker.feed(data[:size]))
        found += map(plain, came)
        assert [frame.size for frame in came] == sizes[: len(came)]
        del sizes[: len(came)]
        data = data[size:]
        assert unpacker.wanted > 0
    assert found == list(map(plain, sent))


@given(st.lists(frames, min_size=1, max_size=3), st.booleans(), st.data())
def test_damage(sent: list[Frame], compress: bool, data: st.DataObject):
    """Any byte may be another: frames, or the end of the session; within bounds."""
    packer = Packer(compress=compress)
    stream = bytearray(b"".join(data for data, _ in map(packer.pack, sent)))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    unpacker = Unpacker()
    try:
        for frame in unpacker.feed(bytes(stream)):
            assert len(frame.payload) <= MOST
    except ProtocolError:
        pass
    assert unpacker.wanted <= MOST + HEAD_SIZE


@given(st.binary(max_size=300))
def test_noise(data: bytes):
    try:
        list(Unpacker().feed(data))
    except ProtocolError:
        pass
    try:
        message_of(data)
    except ProtocolError:
        pass


def head(stored: int, header: int, payload: int, lane: int = 1, packing: int = 0) -> bytes:
    return struct.pack(">IIIBB", stored, header, payload, lane, packing)


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "longer than may be", head(MOST + 1, 1, MOST)
    yield "4 GiB", head(2**32 - 1, 2**32 - 1, 0)
    yield "sizes that wrap", head(0, 2**31, 2**31)
    yield "no message", head(5, 0, 5)
    yield "sizes that differ", head(7, 3, 5) + b"1234567"
    yield "a lane too many", head(1, 1, 0, lane=3) + b"\xc0"
    yield "unknown packing", head(1, 1, 0, packing=2) + b"\xc0"
    yield "packed and longer", head(9, 4, 4, packing=1) + bytes(9)
    big = zstandard.compress(bytes(100 * MOST))
    yield "unpacks to 100 MiB", head(len(big), 1000, MOST - 1000, packing=1) + big
    streamed = zstandard.ZstdCompressor().compressobj()
    unknown = streamed.compress(bytes(5000)) + streamed.flush()
    yield "unpacks to an unknown size", head(len(unknown), 1, 4999, packing=1) + unknown
    two = zstandard.compress(bytes(3000)) * 2
    yield "two packed frames", head(len(two), 1, 2999, packing=1) + two
    for what, data in (
        ("a map", msgpack.packb({1: 2})),
        ("an extension", msgpack.packb(msgpack.ExtType(5, b"x"))),
        ("a time", msgpack.packb(msgpack.Timestamp(1, 1))),
        ("two messages", b"\xc0\xc0"),
        ("half a message", b"\x92\xc0"),
        ("deep", b"\x91" * 5000 + b"\xc0"),
        ("a list that is not there", b"\xdd\xff\xff\xff\xff"),
        ("bytes that are not there", b"\xc6\xff\xff\xff\xff"),
        ("text that is none", b"\xa2\xff\xfe"),
    ):
        yield what, head(len(data), len(data), 0) + data


@pytest.mark.parametrize("data", [pytest.param(data, id=what) for what, data in bombs()])
def test_bombs(data: bytes):
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            list(Unpacker().feed(data))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_frame_full_of_lists_is_bounded():
    """One frame may cost some ten times its size, and not more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = b"\xdd" + struct.pack(">I", MOST - 5) + b"\x90" * (MOST - 5)
    (frame,) = Unpacker().feed(head(MOST, MOST, 0) + data)
    assert len(frame.message) == MOST - 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 << 10


def test_too_much_to_send():
    with pytest.raises(ProtocolError):
        Packer(compress=False).pack(Frame(Lane.BULK, [1], bytes(MOST)))


def test_what_does_not_pack_is_not_packed():
    """Noise is tried now and then; what packs again is packed again."""
    packer = Packer(compress=True)
    noise, tried = random.Random(1).randbytes(BULK), 0
    compress = packer._zstd.compress

    class Counted:
        def compress(self, data: bytes) -> bytes:
            nonlocal tried
            tried += 1
            return compress(data)

    packer._zstd = Counted()
    for _ in range(200):
        assert len(packer.pack(Frame(Lane.BULK, None, noise))[0]) > BULK
    assert tried < 12
    sizes = [len(packer.pack(Frame(Lane.BULK, None, bytes(BULK)))[0]) for _ in range(80)]
    assert sizes[-1] < 1000


def test_preambles():
    mine = Preamble(2, 4, 5, NONCE)
    assert Preamble.of(mine.to_bytes()) == mine
    assert len(mine.to_bytes()) == PREAMBLE_SIZE
    assert common_version(mine, Preamble(1, 3, 0, NONCE)) == 3
    assert common_version(mine, Preamble(4, 9, 0, NONCE)) == 4
    with pytest.raises(ProtocolError, match="bisync here is too old"):
        common_version(mine, Preamble(5, 9, 0, NONCE))
    with pytest.raises(ProtocolError, match="bisync there is too old"):
        common_version(mine, Preamble(1, 1, 0, NONCE))
    with pytest.raises(ProtocolError):
        Preamble.of(Preamble(4, 2, 0, NONCE).to_bytes())


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"Welcome to host!\nLast login", "Welcome to host!"),
        (b"\x1b[31mred\n", "\\x1b[31mred"),
        (b"\n\n", ""),
        (b"bash: bisync: command not found\n", "not found"),
        (b"\xf0bisyncX", "\\xf0bisyncX"),
    ],
)
def test_somebody_else_talks(said: bytes, shown: str):
    with pytest.raises(ProtocolError) as caught:
        refuse_other(said)
    assert shown in str(caught.value)
    assert "\x1b" not in str(caught.value)
    refuse_other(MAGIC[:3])
