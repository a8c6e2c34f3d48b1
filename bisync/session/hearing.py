"""Events on their way to somebody who may be slow: whoever tells of them never waits."""

import threading
from collections import deque
from typing import Any

from bisync.session.report import Event, Listener, Progress, event_to_json

_MOST = 10_000  # events that wait; more are counted, not kept


class Ear:
    """What somebody who listens has not taken yet; of one or several sessions."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[dict[str, Any]] = deque()
        self._lost = 0

    def put(self, row: dict[str, Any]) -> None:
        """One more, unless too many wait already."""
        with self._changed:
            if len(self._waiting) < _MOST:
                self._waiting.append(row)
            else:
                self._lost += 1
            self._changed.notify_all()

    def listener(self, session: str) -> Listener:
        """Hears the events of a session, and says whose they are."""

        def hear(event: Event) -> None:
            if not isinstance(event, Progress):
                self.put({**event_to_json(event), "session": session})

        return hear

    def take(self, patience_s: float) -> list[dict[str, Any]]:
        """All there is, after a while nothing; the last one tells how many were lost."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting, patience_s)
            rows, lost = list(self._waiting), self._lost
            self._waiting.clear()
            self._lost = 0
        return [*rows, {"type": "lost", "events": lost}] if lost else rows
