"""What every watcher is, whatever the kernel lends it."""

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct, field


class Spot(Struct, frozen=True):
    """A directory in which something may have changed.

    Its path is where it was when that was noticed; by the time that somebody looks, it or one above
    it may have been moved. The handle finds it all the same, if it was known before.
    """

    path: bytes  # below the root; b"" is the root
    handle: bytes = b""  # b"": the path is all there is
    above: bool = False  # it changed itself: the one that it lies in is meant


class Sink(Protocol):
    """Takes what a watcher notices. Called on the watcher's thread; must not wait."""

    def touched(self, spot: Spot, pace: "Pace") -> None:
        """Something happened in a directory."""
        ...

    def lost(self, why: str) -> None:
        """Something may have happened anywhere."""
        ...

    def token(self, number: int) -> None:
        """Everything that happened before this token was made has been told."""
        ...


class Pace(Struct, frozen=True):
    """How soon to look at a directory."""

    due_s: float = 0.0  # a sooner one of the same directory wins
    not_before_s: float = 0.0  # a later one wins


AT_ONCE = Pace()
CREATED = Pace(due_s=0.05)  # who made it closes it in a moment
WRITTEN = Pace(due_s=0.3)  # it is still open
VACATED = Pace(not_before_s=0.2)  # a name that became free may get a new owner


class Coverage(Struct):
    """What a watcher sees, for people."""

    kind: str  # fanotify | inotify | poll
    directories: int = 0  # that are watched one by one
    polled: int = 0  # directories at the top of what is not watched, and looked at now and then
    notes: list[str] = field(default_factory=list)


class Scope(Struct, frozen=True):
    """What to watch."""

    root: bytes  # an absolute path
    skip: Callable[[bytes], bool] = lambda _path: False  # directories of no interest
    tokens: bytes | None = None  # a directory for tokens; None: there is none
    poll_s: float = 30.0  # between two looks at what cannot be watched


class Watcher(Protocol):
    """Watches one root until it is closed."""

    def coverage(self) -> Coverage:
        """What it sees."""
        ...

    def send_token(self, number: int) -> bool:
        """Make a token; it arrives behind all that happened before. Whether it can arrive."""
        ...

    def close(self) -> None:
        """Stop; nothing is told any more when this returns."""
        ...


class UnavailableError(Exception):
    """This kind of watcher does not work here."""
