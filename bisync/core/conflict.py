"""Conflict: changes on both sides that cannot both stand, and what was decided."""

from enum import Enum

from msgspec import Struct

from bisync.core.node import Content, Side


class ConflictKind(Enum):
    """Which aspect of a node the sides disagree about."""

    CONTENT = "content"  # two versions of one node
    NAME = "name"  # one node with two new names, or two nodes that want one name
    TYPE = "type"  # a directory against something else
    ATTRIBUTES = "attributes"  # one attribute set differently on both sides
    CYCLE = "cycle"  # two directory moves, each into the other


class Conflict(Struct, frozen=True):
    """One disagreement. ``winner`` is ``None`` while a person has to decide.

    ``loser`` is the content that left its name, ``None`` where no content was at stake;
    ``kept_as`` is the path of a copy that stays in the tree, else the loser is in the
    rollback store of ``loser_side``.
    """

    kind: ConflictKind
    key: int
    path: bytes
    winner: Side | None
    reason: str
    loser: Content | None = None
    loser_mtime_ns: int = 0
    kept_as: bytes | None = None
    detail: str = ""

    @property
    def loser_side(self) -> Side | None:
        return None if self.winner is None else self.winner.other
