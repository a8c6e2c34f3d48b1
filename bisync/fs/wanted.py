"""What ``--files-from`` asks for, as a tree."""

import os
from collections.abc import Iterable, Iterator

from msgspec import Struct, field

from bisync.errors import UsageError


class Wanted(Struct):
    """A node of ``--files-from``: itself, and what is asked for below it."""

    below: dict[bytes, "Wanted"] = field(default_factory=dict)
    whole: bool = False  # named itself, not only on the way
    contents: bool = False  # named with a slash: what it holds, too


class Shallow(Wanted):
    """What a directory holds, but nothing below that unless it is named."""


class All(Wanted):
    """All that is below a directory, and what is named there even if a rule hides its parents."""


def wanted_files(names: Iterator[bytes]) -> Wanted:
    """The tree of ``--files-from``."""
    root = Wanted()
    for text in names:
        parts = [p for p in text.split(b"/") if p not in (b"", b".")]
        if b".." in parts:
            raise UsageError(f"--files-from: {os.fsdecode(text)!r} leads out of the source")
        node = root
        for part in parts:
            node = node.below.setdefault(part, Wanted())
        if parts:
            node.whole = True
            root.whole = root.whole or text.startswith(b"./")
            node.contents = node.contents or text.endswith((b"/", b"/."))
        else:
            root.contents = root.whole = True
    return root


def flattened(wanted: Wanted) -> list[tuple[bytes, bool, bool]]:
    """The tree as rows: path below the source ("" is that itself), if named, if with a slash."""
    rows: list[tuple[bytes, bool, bool]] = []
    stack = [(b"", wanted)]
    while stack:
        path, node = stack.pop()
        rows.append((path, node.whole, node.contents))
        for name, below in node.below.items():
            stack.append((path + b"/" + name if path else name, below))
    return rows


def wanted_again(rows: Iterable[tuple[bytes, bool, bool]]) -> Wanted:
    """Undo :func:`flattened`.

    Raises:
        UsageError: a path leads out of the source.
    """
    root = Wanted()
    for path, whole, contents in rows:
        node = root
        for part in path.split(b"/") if path else ():
            if part in (b"", b".", b".."):
                raise UsageError("a name that leads out of the source")
            node = node.below.setdefault(part, Wanted())
        node.whole, node.contents = whole, contents
    return root
