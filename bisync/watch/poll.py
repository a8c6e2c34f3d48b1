"""Where the kernel tells nothing: everything is looked at, again and again."""

import threading
from collections.abc import Sequence

from bisync.watch.interface import Coverage, Scope, Sink


class PollWatcher:
    """Says that anything may have changed, at intervals."""

    def __init__(self, scope: Scope, sink: Sink, why: Sequence[str] = ()) -> None:
        """``why``: nothing better works here."""
        self._scope, self._sink, self._why = scope, sink, tuple(why)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bisync-poll", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.wait(self._scope.poll_s):
            self._sink.lost("it is time to look")

    def send_token(self, number: int) -> bool:
        """Looking at everything is all there is."""
        self._sink.lost("somebody waits for all that happened until now")
        self._sink.token(number)
        return True

    def coverage(self) -> Coverage:
        """What it sees."""
        notes = [f"all is looked at each {self._scope.poll_s:g} s", *self._why]
        return Coverage("poll", polled=1, notes=notes)

    def close(self) -> None:
        """Stop."""
        self._closing.set()
        self._thread.join()
