"""What ``--files-from`` asks for, as a tree."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from bisync.errors import UsageError


@dataclass(slots=True)
class Wanted:
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
