"""Values survive the way through the database."""

import json

from hypothesis import given
from hypothesis import strategies as st

from bisync.core.node import Attributes, Content, Kind
from bisync.core.plan import Update
from bisync.core.rows import (
    attributes_from_text,
    attributes_to_list,
    content_from_list,
    content_to_list,
    update_from_list,
    update_to_list,
    xattrs_from_text,
    xattrs_to_text,
)

PAIRS = st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.binary(max_size=9)), max_size=3)
ATTRIBUTES = st.builds(
    Attributes,
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**66), 2**66),
    PAIRS.map(lambda p: tuple(sorted(p))),
    PAIRS.map(lambda p: tuple(sorted(p))),
)
CONTENT = st.builds(
    Content,
    st.sampled_from(list(Kind)),
    st.integers(0, 2**62),
    st.none() | st.binary(min_size=32, max_size=32),
    st.binary(max_size=20),
    st.integers(0, 2**32),
)
NAMES = st.frozensets(st.tuples(st.integers(1, 2**60), st.binary(min_size=1, max_size=9)))


@given(ATTRIBUTES | st.none())
def test_attributes(attributes):
    text = None if attributes is None else json.dumps(attributes_to_list(attributes))
    assert attributes_from_text(text) == attributes


@given(ATTRIBUTES)
def test_xattrs(attributes):
    text = xattrs_to_text(attributes.xattrs, attributes.acl)
    assert xattrs_from_text(text) == (attributes.xattrs, attributes.acl)


@given(CONTENT | st.none())
def test_content(content):
    assert content_from_list(content_to_list(content)) == content


@given(NAMES, CONTENT, ATTRIBUTES, st.booleans())
def test_update(names, content, attributes, presumed):
    update = Update(
        key=7,
        names=names,
        content=content,
        ids=(3, 4),
        attributes=(attributes, None),
        presumed=presumed,
    )
    assert update_from_list(update_to_list(update, (1, 2))) == (update, (1, 2))
