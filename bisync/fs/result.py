"""How one transition ended."""

from collections.abc import Collection, Iterable
from enum import Enum

from msgspec import Struct

from bisync.core.node import Place
from bisync.core.plan import Transition, keys_of


class Status(Enum):
    """How a transition ended."""

    DONE = "done"
    STALE = "stale"  # the place changed: observe again
    BUSY = "busy"  # a writer: come back later
    PROBLEM = "problem"
    SKIPPED = "skipped"  # deliberately left, e.g. a directory that holds ignored files


class Result(Struct, frozen=True):
    """One transition and how it ended."""

    step: Transition
    status: Status
    reason: str = ""
    size: int = 0  # content bytes that came from the other side
    matched: int = 0  # those of a new version that were here already
    kept: bytes | None = None  # where the displaced object went, below the store
    missed: tuple[str, ...] = ()  # attributes that could not be set
    beside: Place | None = None  # where a parked node got a name again, if not its old one


class Failed(dict[int, Result]):
    """What was not done so far, by archive number: the rest of such a node waits with it.

    After a save by backup that could not be followed, the name still has the old object: its
    other names and attributes would be given to it at the wrong place. Of what belongs together,
    nothing more is done either.
    """

    def __init__(self, together: Iterable[Collection[int]] = ()) -> None:
        super().__init__()
        self._with = {key: keys for keys in together for key in keys}

    def note(self, result: Result) -> None:
        """Remember a result that is not *done*."""
        if result.status is not Status.DONE:
            for key in keys_of(result.step):
                self.update(dict.fromkeys(self._with.get(key, (key,)), result))

    def stops(self, step: Transition) -> Result | None:
        """The result of a step that has to wait; ``None`` if it may be tried."""
        before = next((self[key] for key in keys_of(step) if key in self), None)
        return before and Result(step, before.status, before.reason)
