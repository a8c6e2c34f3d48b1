"""A watcher at one end of a connection, and who wants to know at the other."""

import threading
from collections.abc import Callable

from bisync.endpoint.calls import MARKED
from bisync.endpoint.channel import Channel
from bisync.endpoint.talk import MARKS
from bisync.errors import BisyncError
from bisync.watch.interface import Pace, Sink, Spot
from bisync.wire.schema import Plain

_MOST = 20_000  # directories that wait to be told; beyond, it is said that all may have changed
_AT_A_TIME = 1000
_GATHER_S = 0.002


class Teller:
    """Takes what a watcher notices, and tells the other end, a little at a time."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._changed = threading.Condition()
        self._marks: dict[Spot, Pace] = {}
        self._everything, self._token, self._told = "", 0, 0
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="bisync-teller", daemon=True)
        self._thread.start()

    def touched(self, spot: Spot, pace: Pace) -> None:
        """Something happened in a directory."""
        with self._changed:
            known = self._marks.get(spot)
            if known is not None:
                pace = Pace(
                    min(known.due_s, pace.due_s), max(known.not_before_s, pace.not_before_s)
                )
            elif len(self._marks) >= _MOST:
                self._marks.clear()
                self._everything = "many directories were touched"
            self._marks[spot] = pace
            self._changed.notify_all()

    def lost(self, why: str) -> None:
        """Something may have happened anywhere."""
        with self._changed:
            self._marks.clear()
            self._everything = self._everything or why
            self._changed.notify_all()

    def token(self, number: int) -> None:
        """A token came out."""
        with self._changed:
            self._token = max(self._token, number)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._something)
                if not self._closing:
                    self._changed.wait(_GATHER_S)  # what comes with it
                if self._closing:
                    return
                marks, self._marks = self._marks, {}
                everything, self._everything = self._everything, ""
                token = self._told = self._token
            try:
                self._tell(list(marks.items()), everything, token)
            except BisyncError:
                return  # nobody is there to be told

    def _something(self) -> bool:
        return bool(self._closing or self._marks or self._everything or self._token != self._told)

    def _tell(self, marks: list[tuple[Spot, Pace]], everything: str, token: int) -> None:
        """The token comes last, as it did here."""
        for at in range(0, max(len(marks), 1), _AT_A_TIME):
            some = [
                (spot, round(pace.due_s * 1000), round(pace.not_before_s * 1000))
                for spot, pace in marks[at : at + _AT_A_TIME]
            ]
            last = at + _AT_A_TIME >= len(marks)
            self._channel.wait_for_room()
            body = MARKED.pack((some, everything, token if last else 0))
            self._channel.tell(MARKS, body)

    def close(self) -> None:
        """Stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()


def listener(sink: Sink) -> Callable[[Plain], None]:
    """Takes what the other end tells to a sink here."""

    def take(body: Plain) -> None:
        marks, everything, token = MARKED.unpack(body)
        if everything:
            sink.lost(everything)
        for spot, due, not_before in marks:
            pace = Pace(due / 1000, not_before / 1000)
            sink.touched(spot, pace)
        if token:
            sink.token(token)

    return take
