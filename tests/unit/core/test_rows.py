"""Rows of the ancestor: there and back, and what somebody else may not have written."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bisync.core.node import Attributes, Content, Kind
from bisync.core.plan import Update
from bisync.core.rows import check_rows, update_from_list, update_to_list

NAMES = st.binary(min_size=1, max_size=20).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")
)
NUMBERS = st.integers(0, 2**60)
PAIRS = st.lists(st.tuples(NAMES, st.binary(max_size=9)), max_size=2, unique_by=lambda p: p[0])
ACLS = st.sampled_from([(), ((b"system.posix_acl_access", b"x"),)])
ATTRIBUTES = st.none() | st.builds(
    Attributes,
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**70), 2**70),
    PAIRS.map(tuple),
    ACLS,
)
CONTENT = st.none() | st.builds(
    Content,
    st.sampled_from(Kind),
    NUMBERS,
    st.none() | st.binary(min_size=32, max_size=32),
    st.binary(max_size=20).filter(lambda t: b"\0" not in t),
    NUMBERS,
)
UPDATES = st.builds(
    Update,
    key=NUMBERS,
    names=st.frozensets(st.tuples(NUMBERS, NAMES), max_size=3),
    content=CONTENT,
    ids=st.tuples(st.none() | NUMBERS, st.none() | NUMBERS),
    attributes=st.tuples(ATTRIBUTES, ATTRIBUTES),
    presumed=st.booleans(),
)
VERSIONS = st.tuples(st.integers(-1, 9), st.integers(-1, 9))


@given(UPDATES, VERSIONS)
def test_there_and_back(update: Update, versions: tuple[int, int]):
    """What is written is what is read, and what is allowed."""
    row = json.loads(json.dumps(update_to_list(update, versions)))
    assert check_rows([row]) == [row]
    assert update_from_list(row) == (update, versions)


GOOD: list[Any] = [
    7, [[1, "name"]], [2, 5, "ab" * 32, "", 0], [3, 4],
    [[420, 0, 0, 10**18], [420, 0, 0, 10**18, [["user.a", "b"]], []]], [1, 2], 0,
]  # fmt: skip


@pytest.mark.parametrize(
    ("at", "value"),
    [
        ((0,), -1), ((0,), 5.5), ((0,), True), ((0,), 2**63), ((0,), "7"), ((0,), None),
        ((1,), None), ((1, 0, 0), "1"), ((1, 0, 1), ".."), ((1, 0, 1), "a/b"), ((1, 0, 1), ""),
        ((1, 0, 1), "x" * 256), ((1, 0, 1), "\u1234"), ((1, 0, 1), 5), ((1, 0), [1]),
        ((2, 0), 9), ((2, 0), True), ((2, 1), -1), ((2, 2), "zz"), ((2, 2), "AB" * 32),
        ((2, 3), "a\0b"), ((2, 3), None), ((2, 4), 1.0), ((2,), [2, 5]),
        ((3,), [3]), ((3, 0), -4), ((3, 1), "4"),
        ((4, 0, 0), 0o10000), ((4, 0, 1), 2**32), ((4, 0, 2), -1), ((4, 0, 3), float("inf")),
        ((4, 0, 3), 2**100), ((4, 1, 4), [["", "x"]]), ((4, 1, 4), [["a", "\u1234"]]),
        ((4, 1, 4), [[1, 2]]), ((4, 1, 5), [["security.capability", "x"]]), ((4, 0), [1, 2, 3]),
        ((5, 0), -2), ((5, 1), 1.5), ((5,), [1]), ((6,), 2), ((6,), False), ((6,), None),
    ],
)  # fmt: skip
def test_refused(at: tuple[int, ...], value: object):
    """Each field, with what it cannot be."""
    assert check_rows([GOOD]) == [GOOD]
    row = copy.deepcopy(GOOD)
    inner = row
    for index in at[:-1]:
        inner = inner[index]
    inner[at[-1]] = value
    with pytest.raises((ValueError, TypeError)):
        check_rows([row])


@pytest.mark.parametrize("rows", [None, {}, "rows", [None], [[]], [GOOD[:-1]], [[*GOOD, 1]]])
def test_no_rows(rows: object):
    """What is no list of rows."""
    with pytest.raises(ValueError):
        check_rows(rows)
