"""The three-way merge of places and attributes, as tables and laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from bisync.core.merge import merge_attributes, merge_places
from bisync.core.node import Attributes, Content, Kind, Node, Side


def places(text: str) -> frozenset[tuple[int, bytes]]:
    return frozenset((1, word.encode()) for word in text.split())


# fmt: off
PLACES = {
    #                      base     alpha    beta     result
    "untouched":           ("x",     "x",     "x",     "x"),
    "renamed once":        ("x",     "y",     "x",     "y"),
    "renamed alike":       ("x",     "y",     "y",     "y"),
    "renamed twice":       ("x",     "z",     "y",     "y"),
    "move beats delete":   ("x",     "y",     "",      "y"),
    "deleted twice":       ("x",     "",      "",      ""),
    "linked":              ("x",     "x y",   "x",     "x y"),
    "linked and renamed":  ("x",     "x y",   "z",     "y z"),
    "one name less":       ("x y",   "x",     "x y",   "x"),
    "each another less":   ("x y",   "x",     "y",     "x"),
    "new":                 ("",      "x",     "",      "x"),
}
# fmt: on


@pytest.mark.parametrize(("base", "alpha", "beta", "result"), PLACES.values(), ids=PLACES)
def test_places(base: str, alpha: str, beta: str, result: str):
    """One node's names, and the same with the sides swapped."""
    for one, two in ((alpha, beta), (beta, alpha)):
        merged = merge_places(
            places(base), places(one), places(two), order=lambda p: (p[1], b"%d" % p[0])
        )
        assert merged.places == places(result)


SOME = st.frozensets(st.tuples(st.integers(1, 2), st.sampled_from([b"a", b"b", b"c"])), max_size=3)


@given(base=SOME, alpha=SOME, beta=SOME)
def test_places_are_symmetric(base, alpha, beta):
    """The side never matters, and a node that a side kept is never lost."""

    def order(place):
        return (place[1], b"%d" % place[0])

    one = merge_places(base, alpha, beta, order=order)
    two = merge_places(base, beta, alpha, order=order)
    assert one == two
    if alpha == beta:
        assert one.places == alpha
    if alpha == base and beta:
        assert one.places == beta


PLAIN = Attributes(0o644, 1, 1, 100)


def node(attributes: Attributes, ctime: int = 0) -> Node:
    return Node(2, Content(Kind.FILE, 1, b"d"), attributes, ctime)


def merge(alpha: Attributes, beta: Attributes, columns=(PLAIN, PLAIN), leader=None):
    return merge_attributes(columns, (node(alpha, 1), node(beta, 2)), leader)


def test_each_attribute_alone():
    """Mode from one side, owner from the other, an extended attribute each: no dispute."""
    alpha = replace(PLAIN, mode=0o600, xattrs=((b"user.a", b"1"),))
    beta = replace(PLAIN, uid=7, xattrs=((b"user.b", b"2"),))
    merged = merge(alpha, beta)
    wanted = Attributes(0o600, 7, 1, 100, ((b"user.a", b"1"), (b"user.b", b"2")))
    assert merged.alpha == merged.beta == wanted
    assert merged.disputes == ()


def test_weak_side_never_rewrites_the_strong_one():
    """A side's change is a difference to its own column: what it could not hold is none."""
    weak = replace(PLAIN, uid=99)
    merged = merge(PLAIN, weak, columns=(PLAIN, weak))
    assert (merged.alpha.uid, merged.beta.uid) == (1, 99)
    merged = merge(replace(PLAIN, mode=0o600), weak, columns=(PLAIN, weak))
    assert merged.alpha == replace(PLAIN, mode=0o600)
    assert merged.beta == replace(weak, mode=0o600)


def test_dispute():
    """Set on both sides: the later change wins and it is listed; the time is the newer one."""
    merged = merge(replace(PLAIN, mode=0o600, mtime_ns=5), replace(PLAIN, mode=0o640, mtime_ns=7))
    assert merged.alpha == merged.beta == replace(PLAIN, mode=0o640, mtime_ns=7)
    assert merged.disputes == ("mode",)


def test_content_leads():
    """The side whose content wins leads: its time goes along, and it wins disputes."""
    alpha, beta = replace(PLAIN, mode=0o600, mtime_ns=5), replace(PLAIN, mode=0o640, mtime_ns=7)
    merged = merge(alpha, beta, leader=Side.ALPHA)
    assert merged.alpha == alpha
    assert merged.disputes == ("mode",)


def test_removed_attribute():
    """An extended attribute removed on one side goes; changed on the other, it stays."""
    old = replace(PLAIN, xattrs=((b"user.a", b"1"),))
    merged = merge(PLAIN, old, columns=(old, old))
    assert merged.beta.xattrs == ()
    merged = merge(PLAIN, replace(PLAIN, xattrs=((b"user.a", b"2"),)), columns=(old, old))
    assert merged.alpha.xattrs == ((b"user.a", b"2"),)
