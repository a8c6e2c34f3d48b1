"""Marks of one side on their way from a watcher to the runs."""

import threading
import time
from collections.abc import Callable

from msgspec import Struct

from bisync.watch.interface import Pace, Spot

_MOST = 20_000  # directories; beyond, looking at everything is cheaper
_HELD_S = 10.0  # the longest that a mark is held back by others


class _Mark(Struct):
    first: float
    due: float
    not_before: float

    @property
    def ready(self) -> float:
        return min(max(self.due, self.not_before), self.first + _HELD_S)


class Batch(Struct, frozen=True):
    """What to look at now."""

    directories: frozenset[Spot] = frozenset()
    everything: str = ""  # why all has to be looked at; "": it need not
    vacated: bool = False  # a name became free a moment ago: removals had better wait
    oldest: float | None = None  # when the first of it was noticed


class Marks:
    """Collects marks, any thread; gives out those that are due.

    Args:
        notify: called after each mark, on the thread that brings it.
    """

    def __init__(
        self,
        notify: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notify, self._clock = notify, clock
        self._lock = threading.Lock()
        self._marks: dict[Spot, _Mark] = {}
        self._everything, self._since = "", 0.0
        self._vacated = float("-inf")
        self._token = 0

    # -- from the watcher ----------------------------------------------------

    def touched(self, spot: Spot, pace: Pace) -> None:
        """Something happened in a directory."""
        now = self._clock()
        due, not_before = now + pace.due_s, now + pace.not_before_s
        with self._lock:
            if pace.not_before_s:
                self._vacated = now
            known = self._marks.get(spot)
            if known is not None:
                known.due = min(known.due, due)
                known.not_before = max(known.not_before, not_before)
            elif len(self._marks) >= _MOST:
                self._all("many directories were touched", now)
            else:
                self._marks[spot] = _Mark(now, due, not_before)
        self._notify()

    def lost(self, why: str) -> None:
        """Something may have happened anywhere."""
        with self._lock:
            self._all(why, self._clock())
        self._notify()

    def _all(self, why: str, now: float) -> None:
        if not self._everything:
            self._since = min([now, *(mark.first for mark in self._marks.values())])
        self._everything = self._everything or why
        self._marks.clear()

    def token(self, number: int) -> None:
        """A token came out."""
        with self._lock:
            self._token = max(self._token, number)
        self._notify()

    # -- for the runs --------------------------------------------------------

    @property
    def last_token(self) -> int:
        """The last token that came out."""
        with self._lock:
            return self._token

    def next(self) -> float | None:
        """When something is due, by the clock; ``None``: nothing is marked."""
        with self._lock:
            if self._everything:
                return self._since
            return min((mark.ready for mark in self._marks.values()), default=None)

    def oldest(self) -> float | None:
        """When the oldest mark was made, by the clock; ``None``: there is none."""
        with self._lock:
            times = [mark.first for mark in self._marks.values()]
            if self._everything:
                times.append(self._since)
            return min(times, default=None)

    def count(self) -> int:
        """How many directories are marked."""
        with self._lock:
            return len(self._marks)

    def take(self, *, quiet_s: float, all_now: bool = False) -> Batch:
        """What is due; it is not marked any more.

        Args:
            quiet_s: names that became free later than so long ago make removals wait.
            all_now: give out what is not due yet, too.
        """
        with self._lock:
            now = self._clock()
            vacated = now - self._vacated < quiet_s
            if self._everything:
                batch = Batch(frozenset(), self._everything, vacated, self._since)
                self._everything = ""
                self._marks.clear()
                return batch
            ready = [
                (spot, mark) for spot, mark in self._marks.items() if all_now or mark.ready <= now
            ]
            for spot, _ in ready:
                del self._marks[spot]
            return Batch(
                directories=frozenset(spot for spot, _ in ready),
                vacated=vacated,
                oldest=min((mark.first for _, mark in ready), default=None),
            )
