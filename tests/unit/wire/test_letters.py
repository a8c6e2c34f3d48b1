"""Letters: cut into frames and put together again, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bisync.errors import ProtocolError
from bisync.wire.frames import BULK, Frame, Lane
from bisync.wire.letters import MOST_OPEN, Assembler, Letter, Op, Word, parts_of, piece_of
from bisync.wire.schema import OsText, Text, Time

BODIES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.text(),
    lambda below: st.lists(below, max_size=5),
    max_leaves=20,
)


def frames(letter: Letter) -> list[Frame]:
    """The frames of a letter."""
    return [Frame(Lane.SMALL, message, payload) for message, payload in parts_of(letter)]


@given(BODIES, st.sampled_from(Word), st.integers(0, 2**63 - 1))
def test_there_and_back(body: object, word: Word, number: int):
    """Any letter."""
    taken = Assembler()
    (found,) = [f for f in map(taken.take, frames(Letter(word, number, 7, body))) if f]
    assert found == Letter(word, number, 7, body)


def test_letters_mixed():
    """Large letters whose frames come in turns."""
    one = Letter(Word.ASK, 3, 1, b"a" * (3 * BULK + 5))
    two = Letter(Word.ASK, 5, 2, b"b" * (2 * BULK))
    taken, found = Assembler(), []
    for pair in zip(frames(one), [*frames(two), None], strict=False):
        found += [letter for frame in pair if frame and (letter := taken.take(frame))]
    assert sorted(f.number for f in found) == [3, 5]
    assert {f.number: f.body for f in found} == {3: one.body, 5: two.body}


@pytest.mark.parametrize(
    "message",
    [None, [], [0, 1, 2], [9, 1, 1, 1], [0, -1, 1, 1], [0, 1, 1, 2], [0, 2**63, 1, 1], [True] * 4],
)
def test_none(message: object):
    """Messages that no letter has."""
    with pytest.raises(ProtocolError):
        Assembler().take(Frame(Lane.SMALL, message, b"\xc0"))


def test_without_end():
    """Letters that are begun and never ended, or grow for ever."""
    for numbers, payload in ((range(MOST_OPEN + 2), b"x"), ([1] * 300, bytes(BULK))):
        taken = Assembler()
        with pytest.raises(ProtocolError):
            [taken.take(Frame(Lane.SMALL, [0, number, 1, 0], payload)) for number in numbers]


@pytest.mark.parametrize("message", [None, [], [1], [0, 1], [1, 99], [1, -1], ["1", 1], [2**63, 0]])
def test_no_piece(message: object):
    """Messages that no content has."""
    with pytest.raises(ProtocolError):
        piece_of(Frame(Lane.BULK, message, b""))


def test_piece():
    """A piece of content."""
    piece = piece_of(Frame(Lane.BULK, [4, int(Op.HOLE), 5], b"abc"))
    assert (piece.stream, piece.op, piece.values, bytes(piece.payload)) == (4, Op.HOLE, [5], b"abc")


@given(st.integers(-(2**80), 2**80))
def test_times(value: int):
    """Times that fit 64 bits, and those that do not."""
    if abs(value) < 2**63 * 10**9:
        assert Time().unpack(Time().pack(value)) == value


@given(st.binary(max_size=50))
def test_texts_of_the_system(data: bytes):
    """What is run or names files keeps every byte."""
    text = data.decode("utf-8", "surrogateescape")
    assert OsText().unpack(OsText().pack(text)) == text


def test_texts_for_people():
    """What a terminal might obey is shown, not done."""
    assert Text().unpack("a\x1b[31mred\r\x07\x9b") == "a\\x1b[31mred\\x0d\\x07\\x9b"
    assert Text().unpack("two\nlines, ünï") == "two lines, ünï"
