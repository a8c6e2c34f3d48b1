"""What a person approves: the deletions that were withheld, as they were shown, and no others."""

from msgspec import Struct, field

from bisync.core.node import NodeId


class Withheld(Struct):
    """Deletions that were withheld.

    Attributes:
        nodes: what was to be removed on each side, with how many entries each is.
        directories: declared ones, by path, with how many of their entries.
    """

    nodes: tuple[dict[NodeId, int], dict[NodeId, int]] = field(default_factory=lambda: ({}, {}))
    directories: dict[bytes, int] = field(default_factory=dict)
