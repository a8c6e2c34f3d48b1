"""What a root can say of itself without its peer, and while an engine works on it.

A small file beside the database, replaced after each run: who holds which epoch, when
everything was last complete, which files were busy. Failover decides by it.
"""

import json
import os
from typing import Any

from msgspec import Struct, ValidationError, convert, to_builtins

from bisync.core.location import Location
from bisync.core.path import STATE_DIR
from bisync.errors import UsageError

FILE = "facts.json"


def _is_at(recorded: str, where: Location) -> bool:
    """Whether a peer that was last reached there is the one that is meant."""
    if not where.is_remote:
        return recorded == os.path.realpath(os.fsdecode(where.path))
    path = recorded.removeprefix(f"{where.machine}:")
    asked = os.fsdecode(where.path).rstrip("/")  # may be below the home directory there
    return path != recorded and (path == asked or path.endswith(f"/{asked}"))


class PairFacts(Struct, frozen=True):
    """One pair that a root belongs to."""

    peer: str  # replica id
    location: str  # where the peer was last reached
    epoch: int
    nonce: str
    entries: int
    complete_ns: int | None  # when a run last ended with nothing left to do
    ended_ns: int  # when the last run ended
    busy: tuple[str, ...] = ()  # paths that wait for their writers
    left: int = 0  # nodes that the next run must look at again


class RootFacts(Struct, frozen=True):
    """One root."""

    path: str
    replica: str
    incarnation: str
    pairs: tuple[PairFacts, ...] = ()
    torn: tuple[str, ...] = ()  # files with an unfinished change in place

    def to_json(self) -> dict[str, Any]:
        """The facts for programs."""
        found: dict[str, Any] = to_builtins(self)
        return found

    def complete_with(self, peer: Location) -> int | None:
        """When the pair with a peer was last complete; ``None``: never, for all that is known."""
        times = [p.complete_ns for p in self.pairs if _is_at(p.location, peer)]
        return max((time for time in times if time is not None), default=None)

    def with_pair(self, pair: PairFacts) -> "RootFacts":
        """The same facts with one pair brought up to date."""
        others = tuple(p for p in self.pairs if p.peer != pair.peer)
        return RootFacts(self.path, self.replica, self.incarnation, (*others, pair), self.torn)


def from_json(row: dict[str, Any]) -> RootFacts:
    """Undo :meth:`RootFacts.to_json`.

    Raises:
        ValidationError: it is something else.
    """
    return convert(row, RootFacts)


def facts(root: str | bytes | os.PathLike[str], *, state: str | bytes | None = None) -> RootFacts:
    """Read what a root says of itself; needs neither its peer nor its lock.

    Args:
        root: the root directory.
        state: its state folder, where that is not ``ROOT/.bisync``.

    Raises:
        UsageError: it was never synchronised, or says nothing that can be read.
    """
    folder = os.fsencode(state) if state is not None else os.fsencode(root) + b"/" + STATE_DIR
    try:
        with open(folder + b"/" + FILE.encode(), encoding="utf-8") as file:
            return from_json(json.load(file))
    except FileNotFoundError as error:
        raise UsageError(f"{os.fsdecode(root)}: it was never synchronised") from error
    except (OSError, ValueError, ValidationError) as error:
        raise UsageError(f"{os.fsdecode(root)}: its facts cannot be read: {error}") from error
