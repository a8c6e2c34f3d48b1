"""What a schema gives it takes; of what it does not give, it takes nothing."""

from enum import Enum
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from bisync.errors import ProtocolError
from bisync.wire import schema as s
from bisync.wire.frames import message_of


class Colour(Enum):
    RED = "red"
    ONE = 1


class Point(Struct, frozen=True):
    x: int
    name: bytes
    also: "Point | None" = None


class Other(Struct, frozen=True):
    flag: bool


POINT = s.Record(Point, x=s.Int(0, 9), name=s.Name(), also=s.Maybe(s.Record(
    Point, x=s.Int(0, 9), name=s.Name(), also=s.Maybe(s.Int(0, 0)))))  # fmt: skip
EITHER = s.OneOf({1: POINT, 7: s.Record(Other, flag=s.Bool())})
names = st.binary(min_size=1, max_size=255).filter(
    lambda n: n not in (b".", b"..") and not set(n) & {0, 0x2F}
)
points = st.builds(Point, st.integers(0, 9), names, st.none())
KINDS: list[tuple[s.Schema, st.SearchStrategy[Any]]] = [
    (s.Int(), st.integers(-(2**63), 2**63 - 1)),
    (s.Int(3, 5), st.integers(3, 5)),
    (s.Bool(), st.booleans()),
    (s.Bytes(8, 2), st.binary(min_size=2, max_size=8)),
    (s.Text(20), st.text(max_size=20).filter(str.isprintable)),
    (s.Name(), names),
    (s.Path(600), st.lists(names, max_size=2).map(b"/".join)),
    (s.Maybe(s.Int(0, 1)), st.none() | st.integers(0, 1)),
    (s.Several(s.Int(), 4), st.lists(st.integers(0, 9), max_size=4).map(tuple)),
    (s.Several(s.Int(), 4, frozenset), st.frozensets(st.integers(0, 9), max_size=4)),
    (s.Each((s.Int(), s.Bool())), st.tuples(st.integers(0, 9), st.booleans())),
    (s.Table(s.Int(), s.Name(), 3), st.dictionaries(st.integers(0, 9), names, max_size=3)),
    (s.Member(Colour), st.sampled_from(Colour)),
    (POINT, points | st.builds(Point, st.integers(0, 9), names, points)),
    (EITHER, points | st.builds(Other, st.booleans())),
]
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=9)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=20,
)


@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_there_and_back(kind: s.Schema, values: st.SearchStrategy[Any]):
    @given(values)
    def law(value: Any) -> None:
        sent = msgpack.packb(kind.pack(value), use_bin_type=True)
        found = kind.unpack(message_of(sent))
        assert found == value
        assert type(found) is type(value)

    law()


@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_whatever_comes(kind: s.Schema, values: st.SearchStrategy[Any]):
    """Refused, or a value that the schema gives itself."""
    del values

    @given(plain)
    def law(value: Any) -> None:
        try:
            found = kind.unpack(value)
        except ProtocolError:
            return
        assert kind.unpack(kind.pack(found)) == found

    law()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (s.Int(0, 9), True),
        (s.Int(0, 9), 1.0),
        (s.Int(), 2**63),
        (s.Bool(), 1),
        (s.Name(), b".."),
        (s.Name(), b"a/b"),
        (s.Name(), b"a\0"),
        (s.Name(), b""),
        (s.Name(), b"a" * 256),
        (s.Name(), "a"),
        (s.Path(), b"/etc"),
        (s.Path(), b"a//b"),
        (s.Path(), b"a/../b"),
        (s.Path(), b"a/" + b"b" * 5000),
        (s.Bytes(3), b"1234"),
        (s.Text(3), "1234"),
        (s.Text(3), b"1"),
        (s.Several(s.Int(), 2), [1, 2, 3]),
        (s.Table(s.Int(), s.Int(), 9), [[1, 1], [1, 2]]),
        (s.Table(s.Int(), s.Int(), 9), [[1, 1, 1]]),
        (s.Member(Colour), True),  # equals 1, and is none
        (s.Member(Colour), "blue"),
        (POINT, [1, b"a"]),
        (POINT, [1, b"a", None, None]),
        (EITHER, [2, True]),
        (EITHER, [True, 1, b"a", None]),
        (EITHER, []),
    ],
)
def test_refused(kind: s.Schema, value: Any):
    with pytest.raises(ProtocolError):
        kind.unpack(value)


def test_a_record_knows_all_fields():
    with pytest.raises(TypeError):
        s.Record(Point, x=s.Int())
