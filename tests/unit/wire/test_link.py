"""Two ends: all arrives, in order; nothing stands still; what an end must not send is refused."""

import random
from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bisync.errors import ProtocolError, TimedOutError
from bisync.wire.frames import HEAD_SIZE, MOST, Frame, Lane, Packer, Preamble
from bisync.wire.link import BEAT_S, PREAMBLE_S, SILENCE_S, Link

NONCE = bytes(16)
PREAMBLE = Preamble(1, 1, 0, NONCE)
NARROW = {Lane.SMALL: MOST + HEAD_SIZE, Lane.BULK: MOST + HEAD_SIZE}
TINY = {Lane.SMALL: 60, Lane.BULK: 60}  # one small frame


def pair(windows: dict[Lane, int] | None = None, *, compress: bool = False) -> tuple[Link, Link]:
    made = [Link(PREAMBLE, compress=compress, now=0.0, windows=windows) for _ in range(2)]
    return made[0], made[1]


def meet(*ends: Link) -> None:
    first = [end.to_send(0.0) for end in ends]
    assert list(ends[0].received(first[1], 0.0)) == list(ends[1].received(first[0], 0.0)) == []


class Wire:
    """What is on its way in one direction: so much at most, in pieces of any size."""

    def __init__(self, room: int) -> None:
        self.room, self.data, self.rest = room, bytearray(), b""

    def fill(self, end: Link) -> bool:
        moved = False
        while len(self.data) < self.room:
            self.rest = self.rest or end.to_send(0.0)
            if not self.rest:
                break
            some = self.rest[: self.room - len(self.data)]
            self.data += some
            self.rest = self.rest[len(some) :]
            moved = True
        return moved

    def take(self, size: int) -> bytes:
        some = bytes(self.data[:size])
        del self.data[:size]
        return some


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([Lane.SMALL, Lane.BULK]),
            st.integers(0, 3),
            st.integers(0, 30),
        ),
        max_size=60,
    ),
    st.integers(1, 100),
    st.randoms(use_true_random=False),
)
def test_all_arrives(
    sent: list[tuple[bool, Lane, int, int]], room: int, chance: random.Random
) -> None:
    """Both directions full, windows of one frame, pipes of a few bytes; each lane in order."""
    ends, wires = pair(TINY), (Wire(room), Wire(room))
    wanted: list[dict[Any, list[int]]] = [defaultdict(list), defaultdict(list)]
    found: list[dict[Any, list[int]]] = [defaultdict(list), defaultdict(list)]
    for number, (whose, lane, stream, size) in enumerate(sent):
        ends[whose].send(lane, [number, stream], bytes(size), stream=stream)
        wanted[not whose][lane, stream if lane is Lane.BULK else 0].append(number)
    for end in ends:
        end.close()
    waiting: list[tuple[Link, Frame]] = []
    for _ in range(100_000):
        moved = False
        for number in chance.sample((0, 1), 2):
            moved |= wires[number].fill(ends[number])
            some = wires[number].take(chance.randint(1, room))
            moved |= bool(some)
            other = ends[1 - number]
            for frame in other.received(some, 0.0):
                count, stream = frame.message
                lane = frame.lane, stream if frame.lane is Lane.BULK else 0
                found[1 - number][lane].append(count)
                waiting.append((other, frame))
        if waiting and (not moved or chance.random() < 0.3):
            end, frame = waiting.pop(chance.randrange(len(waiting)))  # disks take their time
            end.done(frame)
            moved = True
        if not moved:
            break
    assert found == wanted
    for end in ends:
        assert end.ended
        assert end.queued == 0
        end.lost()


def drain(end: Link, now: float = 0.0) -> list[bytes]:
    return list(iter(lambda: end.to_send(now), b""))


def test_control_overtakes():
    one, two = pair()
    meet(one, two)
    for number in range(4):
        one.send(Lane.BULK, [number], bytes(1000), stream=number % 2)
    one.send(Lane.SMALL, ["a question"])
    one.send(Lane.CONTROL, [1, 0])
    came = [list(two.received(data, 0.0)) for data in drain(one)]
    assert came[0] == []
    messages = [frame.message for frames in came for frame in frames]
    assert messages == [["a question"], [0], [1], [2], [3]]


def test_streams_take_turns():
    one, two = pair()
    meet(one, two)
    for stream, count in ((1, 5), (2, 2), (3, 1)):
        for number in range(count):
            one.send(Lane.BULK, [stream, number], stream=stream)
    order = [frame.message[0] for data in drain(one) for frame in two.received(data, 0.0)]
    assert order == [1, 2, 3, 1, 2, 1, 1, 1]


def test_no_more_than_granted():
    """A full window is all that goes; what is dealt with may come again."""
    one, two = pair(NARROW)
    meet(one, two)
    for _ in range(8):
        one.send(Lane.BULK, None, bytes(MOST // 4))
    frames = [frame for data in drain(one) for frame in two.received(data, 0.0)]
    assert len(frames) == 3
    assert drain(one) == []
    two.done(frames[0])
    (grant,) = drain(two)
    assert list(one.received(grant, 0.0)) == []
    assert len(drain(one)) == 1


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Lane.CONTROL, [0, 1, 1]),
        Frame(Lane.CONTROL, [0, 2, -5]),
        Frame(Lane.CONTROL, [0, 0, 5]),
        Frame(Lane.CONTROL, [0, 9, 5]),
        Frame(Lane.CONTROL, [0, True, 5]),
        Frame(Lane.CONTROL, [3]),
        Frame(Lane.CONTROL, []),
        Frame(Lane.CONTROL, None),
        Frame(Lane.CONTROL, [1, 0], b"content"),
        Frame(Lane.CONTROL, [[1]]),
    ],
)
def test_control_frames_that_no_end_makes(frame: Frame):
    one, two = pair()
    meet(one, two)
    with pytest.raises(ProtocolError):
        list(two.received(Packer(compress=False).pack(frame)[0], 0.0))


def test_more_than_was_granted():
    _, two = pair(NARROW)
    list(two.received(PREAMBLE.to_bytes(), 0.0))
    frame = Packer(compress=False).pack(Frame(Lane.SMALL, None, bytes(MOST - 1)))[0]
    assert len(list(two.received(frame, 0.0))) == 1
    with pytest.raises(ProtocolError, match="granted"):
        list(two.received(frame, 0.0))


def test_after_the_last_frame():
    one, two = pair()
    meet(one, two)
    one.close()
    (bye,) = drain(one)
    list(two.received(bye, 0.0))
    assert two.ended
    with pytest.raises(ProtocolError):
        list(two.received(Packer(compress=False).pack(Frame(Lane.SMALL, 1))[0], 0.0))
    with pytest.raises(ProtocolError):
        one.send(Lane.SMALL, 1)


def test_signs_of_life():
    one, two = pair()
    meet(one, two)
    assert one.tick(BEAT_S / 2) == BEAT_S
    assert drain(one, BEAT_S / 2) == []
    one.tick(BEAT_S)
    (beat,) = drain(one, BEAT_S)
    assert list(two.received(beat, BEAT_S)) == []
    two.tick(SILENCE_S + BEAT_S / 2)
    with pytest.raises(TimedOutError, match="silent"):
        one.tick(SILENCE_S)
    with pytest.raises(TimedOutError, match="silent"):
        two.tick(BEAT_S + SILENCE_S)


def test_only_one_way_is_dead():
    """What we send does not arrive, and what they send does: they say so."""
    one, two = pair()
    meet(one, two)
    for second in range(1, int(SILENCE_S)):
        two.tick(float(second))
        assert all(list(one.received(data, second)) == [] for data in drain(two, float(second)))
    two.silence = 2 * SILENCE_S
    two.tick(SILENCE_S + 1)
    (beat,) = drain(two, SILENCE_S + 1)
    with pytest.raises(TimedOutError, match="heard nothing"):
        list(one.received(beat, SILENCE_S + 1))


def test_nobody_begins():
    one, _ = pair()
    one.send(Lane.SMALL, "before we know who is there")
    assert one.to_send(0.0) == PREAMBLE.to_bytes()
    assert one.to_send(0.0) == b""
    assert one.tick(0.0) <= PREAMBLE_S
    assert list(one.received(b"\xf0", PREAMBLE_S - 1)) == []
    with pytest.raises(TimedOutError, match="nothing of itself"):
        one.tick(PREAMBLE_S)


def test_it_ends_too_early():
    one, two = pair()
    with pytest.raises(ProtocolError, match="before it began"):
        one.lost()
    meet(one, two)
    with pytest.raises(ProtocolError, match="lost"):
        one.lost()


def test_another_version():
    one = Link(Preamble(2, 3, 0, NONCE), compress=False, now=0.0)
    with pytest.raises(ProtocolError, match="too old"):
        list(one.received(PREAMBLE.to_bytes(), 0.0))
    newer = Link(Preamble(1, 3, 0, NONCE), compress=False, now=0.0)
    list(newer.received(PREAMBLE.to_bytes(), 0.0))
    assert newer.version == 1


def test_the_preamble_comes_byte_by_byte_with_a_frame_behind_it():
    one, two = pair(compress=True)
    list(one.received(PREAMBLE.to_bytes(), 0.0))
    one.send(Lane.SMALL, ["hello"], b"x" * 5000)
    data = b"".join(drain(one))
    came = [frame for byte in data for frame in two.received(bytes([byte]), 0.0)]
    assert [(frame.message, bytes(frame.payload)) for frame in came] == [(["hello"], b"x" * 5000)]
    assert Counter(map(type, came)) == {Frame: 1}
