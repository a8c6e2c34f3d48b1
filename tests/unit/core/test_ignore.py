"""Filters: gitignore syntax, the last match decides; and the engine's own names."""

import pytest

from bisync.core.ignore import Ignore, filter_lines, reserved
from bisync.errors import UsageError

TEMP = b".bisync-" + b"0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("patterns", "path", "is_dir", "ignored"),
    [
        ((), b"x", False, False),
        (("*.o",), b"d/x.o", False, True),
        (("/x",), b"d/x", False, False),
        (("d/",), b"d", True, True),
        (("d/",), b"d", False, False),
        (("*.o", "!keep.o"), b"keep.o", False, False),
        (("!keep.o", "*.o"), b"keep.o", False, True),
        (("a/**/z",), b"a/b/c/z", False, True),
        (("# comment", "", "x"), b"x", False, True),
        (("\\#x",), b"#x", False, True),
        (("*\udcff*",), b"a\xffb", False, True),
    ],
)
def test_ignores(patterns: tuple[str, ...], path: bytes, is_dir: bool, ignored: bool):
    """One path against one filter."""
    assert Ignore(patterns).matcher().ignores(path, is_dir=is_dir) is ignored


def test_bad_pattern():
    """What cannot be understood is the user's to mend."""
    with pytest.raises(UsageError):
        Ignore(("!",)).matcher()


def test_filter_lines():
    """``--include`` is the negation, in the order given."""
    given = [("exclude", "*.o"), ("include", "keep.o"), ("include", "!odd")]
    assert filter_lines(given) == ("*.o", "!keep.o", "odd")


@pytest.mark.parametrize(
    ("name", "at_root", "ours"),
    [
        (b".bisync", True, True),
        (b".bisync", False, False),
        (b"rsync-rollback", True, True),
        (b"rsync-rollback", False, False),
        (TEMP, True, True),
        (TEMP, False, True),
        (TEMP + b"0", False, False),
        (TEMP[:-1] + b"g", False, False),
        (b".bisync-notes", False, False),
    ],
)
def test_reserved(name: bytes, at_root: bool, ours: bool):
    """State and store at the root, random names anywhere; anything else is the user's."""
    assert reserved(name, at_root=at_root) is ours
