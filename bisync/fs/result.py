"""How one transition ended."""

from dataclasses import dataclass
from enum import Enum

from bisync.core.plan import Transition


class Status(Enum):
    """How a transition ended."""

    DONE = "done"
    STALE = "stale"  # the place changed: observe again
    BUSY = "busy"  # a writer: come back later
    PROBLEM = "problem"
    SKIPPED = "skipped"  # deliberately left, e.g. a directory that holds ignored files


@dataclass(frozen=True, slots=True)
class Result:
    """One transition and how it ended."""

    step: Transition
    status: Status
    reason: str = ""
    size: int = 0  # content bytes that came from the other side
    kept: bytes | None = None  # where the displaced object went, below the store
    missed: tuple[str, ...] = ()  # attributes that could not be set
