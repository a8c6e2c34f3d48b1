"""How long displaced versions are kept."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retention:
    """Two rules: how old a kept version may get, and how many of the engine's own are kept."""

    days: int | None = 90
    """Drop what was kept longer ago; ``None``: keep for ever."""

    every_s: int | None = 3600
    """Of the versions of a file that the engine had installed itself, keep the last one in each
    so many seconds; ``None``: all. Edits, conflict losers and deletions are never thinned."""
