"""Names as bytes, and how people see them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bisync.core.path import display, numbered, parse, shorten, valid_name


@given(st.binary(max_size=60))
def test_display_is_reversible(path: bytes):
    """Different bytes look different, and what is shown can be typed again."""
    shown = display(path)
    assert shown.isprintable()
    assert parse(shown) == path


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (b"plain/name", "plain/name"),
        ("größe".encode(), "größe"),
        (b"new\nline", r"new\x0aline"),
        (b"\x1b[31m", r"\x1b[31m"),
        (b"back\\slash", r"back\\slash"),
        (b"\xff\xfe", r"\xff\xfe"),
        ("\u202eevil".encode(), r"\xe2\x80\xaeevil"),
    ],
)
def test_display(path: bytes, shown: str):
    """Nothing reaches a terminal that is not printable."""
    assert display(path) == shown


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        (b"x", True),
        (b"...", True),
        (b"-rf", True),
        (b"\xff", True),
        (b"x" * 255, True),
        (b"x" * 256, False),
        (b"", False),
        (b".", False),
        (b"..", False),
        (b"a/b", False),
        (b"a\0b", False),
    ],
)
def test_valid_name(name: bytes, valid: bool):
    """One component, as the kernel sees it."""
    assert valid_name(name) is valid


@given(st.text(min_size=1, max_size=300), st.integers(1, 99))
def test_shorten_keeps_utf8(base: str, number: int):
    """A shortened name fits and is still text if it was."""
    raw = base.encode("utf-8", "surrogatepass")
    suffix = b".~%d~" % number
    short = shorten(raw, suffix)
    assert len(short) <= 255
    assert short.endswith(suffix)
    try:
        raw.decode()
    except UnicodeDecodeError:
        return
    short.decode()


def test_numbered():
    """The first version of a day has the plain name."""
    assert [numbered(b"x", n) for n in (1, 2, 11)] == [b"x", b"x.~2~", b"x.~11~"]
