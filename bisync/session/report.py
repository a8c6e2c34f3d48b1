"""What a run did: counters, and the events along the way."""

import os
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from msgspec import Struct, field

from bisync.core.conflict import Conflict
from bisync.core.node import SIDES, Side
from bisync.core.path import display
from bisync.core.plan import (
    Exchange,
    Link,
    Make,
    Move,
    Park,
    Plan,
    Remove,
    Replace,
    Transition,
    Unlink,
)
from bisync.fs.result import Result
from bisync.fs.sizes import Sizes
from bisync.fs.walk import Problem
from bisync.session.approval import Withheld
from bisync.watch.interface import Spot

_WORST_FIRST = (1, 2, 3, 12, 30, 25, 23, 40, 24, 0)


class Change(Struct, frozen=True):
    """One applied (or planned) transition, for people."""

    side: str  # where it is applied: alpha | beta
    action: str  # create | update | move | delete | link | unlink | attributes
    path: bytes
    reason: str
    old_path: bytes | None = None  # of a move
    size: int = 0


class Met(Struct, frozen=True):
    """A path that was not handled, or something a person should hear about it."""

    side: str
    kind: str  # problem | busy | skipped | boundary | withheld | note
    path: bytes
    reason: str


class Progress(Struct, frozen=True):
    """How far the run is; ``phase`` is scan, read, apply, or file: one large file.

    ``done`` counts entries. Of a file, ``name`` is its name, ``bytes`` what of ``total`` is done,
    ``literal`` what of it had to come from the other side.
    """

    phase: str
    done: int
    bytes: int = 0
    name: str = ""
    total: int = 0
    literal: int = 0


Event: TypeAlias = Change | Met | Conflict | Progress


class Report(Struct):
    """The outcome of one run. Counts are entries unless the name says bytes."""

    files_scanned: int = 0
    moves: int = 0
    bytes_sent: int = 0  # content bytes towards beta
    bytes_received: int = 0  # content bytes towards alpha
    literal_bytes: int = 0
    matched_bytes: int = 0
    created: int = 0
    updated: int = 0
    deleted: int = 0
    conflicts: int = 0
    problems: int = 0
    busy: int = 0
    kept: int = 0
    presumed: int = 0
    skipped: int = 0
    withheld: int = 0
    waiting: int = 0  # conflicts that wait for a person
    elapsed_s: float = 0.0
    exit_code: int = 0
    error: str | None = None
    messages: list[str] = field(default_factory=list)
    met: list[Met] = field(default_factory=list)
    conflict_list: list[Conflict] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)  # only of a plan
    sizes: tuple[Sizes, Sizes] | None = None  # if they were asked for
    weak: int = 0  # displaced files that nobody could be held off from, still looked at
    held: Withheld = field(default_factory=Withheld)
    _start: float = field(default_factory=time.monotonic)
    _met_before: set[Met] = field(default_factory=set)

    def add(self, met: Met) -> bool:
        """Count and keep one path that was not handled; ``False`` if it was said already."""
        if met in self._met_before:
            return False
        self._met_before.add(met)
        match met.kind:
            case "problem" | "boundary":
                self.problems += 1
            case "busy":
                self.busy += 1
            case "skipped":
                self.skipped += 1
            case _:
                pass
        self.met.append(met)
        return True

    def busy_paths(self, side: Side) -> list[str]:
        """The paths of one side that wait for their writers."""
        return [display(m.path) for m in self.met if m.kind == "busy" and m.side == side.label]

    def finish(self) -> None:
        """Settle the time and the exit code; the worst of what happened wins."""
        self.elapsed_s = round(time.monotonic() - self._start, 3)
        codes = {self.exit_code}
        if self.withheld:
            codes.add(25)
        if self.problems:
            codes.add(23)
        if self.waiting:
            codes.add(40)
        if self.busy:
            codes.add(24)
        if self.exit_code not in (130, 143):
            self.exit_code = next(code for code in _WORST_FIRST if code in codes)

    def summary(self) -> dict[str, Any]:
        """The counters as the last JSON line shows them."""
        names = (
            "files_scanned", "moves", "bytes_sent", "bytes_received", "literal_bytes",
            "matched_bytes", "created", "updated", "deleted", "conflicts", "problems", "busy",
            "kept", "presumed", "skipped", "withheld", "waiting", "elapsed_s", "exit_code",
            "error",
        )  # fmt: skip
        return {"type": "summary", **{name: getattr(self, name) for name in names}}


Listener: TypeAlias = Callable[[Event], None]


def spots_of(standing: list[Met]) -> tuple[set[Spot], set[Spot]]:
    """Where problems were met, on each side: no mark tells of their end."""
    found: tuple[set[Spot], set[Spot]] = (set(), set())
    for met in standing:
        spots = Spot(os.path.dirname(met.path)), Spot(met.path)
        found[met.side == SIDES[1].label].update(spots)
    return found


def met_from(side: str, problem: Problem) -> Met:
    """A scan's problem as an event."""
    return Met(side, problem.kind, problem.path, problem.reason)


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as one JSON object."""
    match event:
        case Change():
            row: dict[str, Any] = {
                "type": "change",
                "side": event.side,
                "action": event.action,
                "path": display(event.path),
                "reason": event.reason,
            }
            if event.old_path is not None:
                row["old_path"] = display(event.old_path)
            if event.size:
                row["bytes"] = event.size
            return row
        case Met():
            return {
                "type": event.kind,
                "side": event.side,
                "path": display(event.path),
                "reason": event.reason,
            }
        case Conflict():
            return {
                "type": "conflict",
                "kind": event.kind.value,
                "path": display(event.path),
                "winner": None if event.winner is None else event.winner.label,
                "kept_as": None if event.kept_as is None else display(event.kept_as),
                "reason": event.reason,
            }
        case Progress():
            return {
                "type": "progress",
                "phase": event.phase,
                "done": event.done,
                "bytes": event.bytes,
                **_file_progress(event),
            }


def _file_progress(event: Progress) -> dict[str, object]:
    if event.phase != "file":
        return {}
    return {"name": event.name, "total": event.total, "literal": event.literal}


ACTIONS: dict[type[Transition], str] = {
    Make: "create",
    Link: "link",
    Move: "move",
    Exchange: "move",
    Park: "move",
    Replace: "update",
    Unlink: "unlink",
    Remove: "delete",
}


def reasons(plan: Plan, results: tuple[list[Result], list[Result]]) -> dict[int, str]:
    """What was decided about each node, by archive number, and by which rule."""
    found: dict[int, str] = {}
    for conflict in plan.conflicts:
        if conflict.winner is not None:
            key = plan.archived.get(conflict.key, conflict.key)
            found[key] = f"conflict: {conflict.reason}; {conflict.winner.label} wins"
    for side in SIDES:
        for result in results[side]:
            step = result.step
            action = ACTIONS.get(type(step), "attributes")
            why = step.reason or f"changed on {side.other.label}"
            found.setdefault(step.key, f"{side.label} <- {action}: {why}")
    return found
