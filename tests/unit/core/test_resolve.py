"""Who wins, and what a conflict copy is called."""

import pytest

from bisync.core.node import Attributes, Content, Kind, Node, Side
from bisync.core.resolve import Policy, conflict_name, winner


def node(mtime: int, digest: str) -> Node:
    content = Content(Kind.FILE, 1, digest.encode())
    return Node(2, content, Attributes(0o644, 0, 0, mtime))


OLD, NEW = node(10, "b"), node(20, "c")
TIE = node(20, "a")

# fmt: off
ROWS = {
    "newest":              (Policy.NEWEST, OLD, NEW, Side.BETA),
    "newest, swapped":     (Policy.NEWEST, NEW, OLD, Side.ALPHA),
    "oldest":              (Policy.OLDEST, OLD, NEW, Side.ALPHA),
    "oldest, swapped":     (Policy.OLDEST, NEW, OLD, Side.BETA),
    "tie":                 (Policy.NEWEST, NEW, TIE, Side.BETA),
    "tie, swapped":        (Policy.NEWEST, TIE, NEW, Side.ALPHA),
    "tie, oldest":         (Policy.OLDEST, NEW, TIE, Side.BETA),
    "alpha":               (Policy.ALPHA, OLD, NEW, Side.ALPHA),
    "beta":                (Policy.BETA, NEW, OLD, Side.BETA),
    "keep both":           (Policy.KEEP_BOTH, OLD, NEW, Side.BETA),
    "manual":              (Policy.MANUAL, OLD, NEW, None),
}
# fmt: on


@pytest.mark.parametrize(("policy", "alpha", "beta", "wins"), ROWS.values(), ids=ROWS)
def test_winner(policy: Policy, alpha: Node, beta: Node, wins: Side | None):
    """Values decide, never the side."""
    assert winner(policy, alpha, beta) is wins


@pytest.mark.parametrize(
    ("name", "mtime_ns", "attempt", "copy"),
    [
        (b"x.txt", 0, 0, b"x.txt.conflict-abc-19700101T000000"),
        (b"x.txt", 1_700_000_000 * 10**9, 1, b"x.txt.conflict-abc-20231114T221320.2"),
        (b"x", -(10**19), 0, b"x.conflict-abc-16530210T061320"),
        (b"x", 10**22, 0, b"x.conflict-abc-83071001T193320"),
    ],
)
def test_conflict_name(name: bytes, mtime_ns: int, attempt: int, copy: bytes):
    """The version's own time, so that every run gives it the same name."""
    assert conflict_name(name, "abc", mtime_ns, attempt) == copy


def test_conflict_name_fits():
    """A long name is shortened, and is still text."""
    copy = conflict_name("ö".encode() * 127, "abcdefg", 0)
    assert len(copy) <= 255
    assert copy.decode().endswith(".conflict-abcdefg-19700101T000000")
