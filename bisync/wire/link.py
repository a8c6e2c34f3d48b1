"""One end of a connection: frames in order of their lanes, credit, signs of life; sans-I/O.

Nobody ever waits by not reading. Each end may send so many bytes on a lane as the other has
granted; what was dealt with is granted again. So a reader can always take all that comes, whatever
waits for disks or locks behind it, and both directions may be full without either standing still.
Control frames need no credit and overtake everything; of bulk, the streams take turns.

Time is told from outside, in seconds of one clock that never goes back.
"""

from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

from msgspec import Struct

from bisync.errors import ProtocolError, TimedOutError
from bisync.wire.frames import (
    LINE,
    MAGIC,
    MOST,
    PREAMBLE_SIZE,
    Frame,
    Lane,
    Packer,
    Preamble,
    Unpacker,
    common_version,
    refuse_other,
)
from bisync.wire.schema import Plain, refuse

PREAMBLE_S = 15.0  # until the other end has begun
BEAT_S = 1.0  # without a frame of ours: a sign of life
_ALIVE = 4096  # bytes
REST_S = 1.0  # for the rest of the first line of somebody else
SILENCE_S = 60.0  # without a frame of theirs: it is gone
WINDOWS = {Lane.SMALL: 4 * MOST, Lane.BULK: 8 * MOST}  # bytes on their way, or not dealt with yet
_CREDIT, _BEAT, _BYE = range(3)


Packed: TypeAlias = tuple[bytes, int]
"""A frame's bytes, and what it takes of its lane's credit."""


class _Credit(Struct):
    """Of one lane."""

    window: int
    mine: int  # bytes that may be sent
    theirs: int  # bytes that they may send
    owed: int = 0  # bytes that were dealt with, and not granted again yet


class Link:
    """One end. Feed it what was received, send what it has, and let it know the time.

    Args:
        mine: how this end begins.
        compress: whether frames are packed.
        now: the time.
        windows: bytes per lane that the *other* end may have on their way; both ends have to use
            the same ones.
        patience: seconds until the other end has to have begun.
        silence: seconds after which an end that says nothing is gone.
    """

    def __init__(
        self,
        mine: Preamble,
        *,
        compress: bool,
        now: float,
        windows: dict[Lane, int] | None = None,
        patience: float = PREAMBLE_S,
        silence: float = SILENCE_S,
    ) -> None:
        self.mine = mine
        self._patience, self.silence = patience, silence
        self.theirs: Preamble | None = None
        self.version = 0  # that both speak; 0: not known yet
        self.ended = False  # the other end said that it is done
        self._first = bytearray()
        self._packer, self._unpacker = Packer(compress=compress), Unpacker()
        self._control_packer = Packer(compress=False)
        self._credit = {
            lane: _Credit(size, size, size) for lane, size in (windows or WINDOWS).items()
        }
        self._out: deque[bytes] = deque([mine.to_bytes()])
        self._control: deque[Packed] = deque()
        self._small: deque[Packed] = deque()
        self._bulk: dict[int, deque[Packed]] = {}  # by stream, in the order of their turns
        self._began = self._sent = self._heard = now
        self._closing = self._said_bye = False
        self._since = 0  # bytes since the last sign of life
        self.queued_size = 0  # bytes of frames that wait
        self.came = 0  # frames, and parts of how the other end begins

    # -- sending -------------------------------------------------------------

    def send(self, lane: Lane, message: Plain, payload: bytes = b"", *, stream: int = 0) -> None:
        """Queue a frame; of one lane and stream, the order stays.

        Args:
            stream: bulk frames of different streams take turns.
        """
        self.put(lane, self.pack(lane, message, payload), stream=stream)

    def pack(self, lane: Lane, message: Plain, payload: bytes | memoryview = b"") -> Packed:
        """A frame's bytes. Takes time, and touches nothing that :meth:`received` touches."""
        return self._packer.pack(Frame(lane, message, payload))

    def put(self, lane: Lane, packed: Packed, *, stream: int = 0) -> None:
        """Queue a frame that :meth:`pack` made."""
        if self._closing:
            raise ProtocolError("the connection is being closed")
        self.queued_size += len(packed[0])
        match lane:
            case Lane.CONTROL:
                self._control.append(packed)
            case Lane.SMALL:
                self._small.append(packed)
            case Lane.BULK:
                self._bulk.setdefault(stream, deque()).append(packed)

    @property
    def queued(self) -> int:
        """Frames that wait, for credit or to be taken."""
        return len(self._control) + len(self._small) + sum(map(len, self._bulk.values()))

    def to_send(self, now: float) -> bytes:
        """The next bytes to be sent; none while there is nothing that may be sent."""
        if not self._out:
            data = self._next()
            if data is None:
                return b""
            self._out.append(data)
        self._sent = now
        return self._out.popleft()

    def _next(self) -> bytes | None:
        if self.version == 0:
            return None  # what may be said depends on who is there
        if self._control:
            return self._taken(self._control.popleft())
        if self._small and (data := self._paid(Lane.SMALL, self._small)) is not None:
            return data
        for stream, frames in self._bulk.items():
            data = self._paid(Lane.BULK, frames)
            if data is not None:
                del self._bulk[stream]
                if frames:
                    self._bulk[stream] = frames  # the others first
                return data
        if self._closing and not self._said_bye and not self.queued:
            self._said_bye = True
            return self._control_packer.pack(Frame(Lane.CONTROL, [_BYE]))[0]
        return None

    def _paid(self, lane: Lane, frames: deque[Packed]) -> bytes | None:
        """The first of some frames, if there is credit for it."""
        _, size = frames[0]
        credit = self._credit[lane]
        if size > credit.mine:
            return None
        credit.mine -= size
        return self._taken(frames.popleft())

    def _taken(self, packed: Packed) -> bytes:
        self.queued_size -= len(packed[0])
        return packed[0]

    def _say(self, *words: int) -> None:
        packed = self._control_packer.pack(Frame(Lane.CONTROL, list(words)))
        self.queued_size += len(packed[0])
        self._control.append(packed)

    # -- receiving -----------------------------------------------------------

    def received(self, data: bytes | memoryview, now: float) -> Iterator[Frame]:
        """Take what came; the frames for the engine. Those of control are dealt with here.

        Raises:
            ProtocolError: it is not what it should be. The connection is of no use any more.
        """
        self._since += len(data)
        if self._since >= _ALIVE or self.theirs is None:
            self._hear(now)
        if self.theirs is None:
            self.came += 1  # what has come tells how long to wait for the rest
            self._first += data
            if self._is_another() and not (b"\n" in self._first or len(self._first) > LINE):
                return  # the rest of its first line says more
            refuse_other(bytes(self._first))
            if len(self._first) < PREAMBLE_SIZE:
                return
            self.theirs = Preamble.of(bytes(self._first[:PREAMBLE_SIZE]))
            self.version = common_version(self.mine, self.theirs)
            data = bytes(self._first[PREAMBLE_SIZE:])
            self._first.clear()
        for frame in self._unpacker.feed(data):
            self._hear(now)
            self.came += 1
            if frame.lane is Lane.CONTROL:
                self._control_came(frame)
                continue
            if self.ended:
                refuse("a frame after the last one")
            credit = self._credit[frame.lane]
            credit.theirs -= frame.size
            if credit.theirs < 0:
                refuse("more than it was granted")
            yield frame

    def _hear(self, now: float) -> None:
        """There was a sign of life: a frame, or a good part of one; not a byte now and then."""
        self._heard, self._since = now, 0

    def _is_another(self) -> bool:
        """Whether who begins is none of our kind."""
        return not MAGIC.startswith(self._first[: len(MAGIC)])

    def _control_came(self, frame: Frame) -> None:
        message = frame.message
        if type(message) is not list or not message or {*map(type, message)} != {int}:
            refuse("a control frame that no end makes")
        match message:
            case [0, lane, size] if lane in self._credit:
                credit = self._credit[Lane(lane)]
                if not 0 < size <= credit.window - credit.mine:
                    refuse("more credit than there is")
                credit.mine += size
            case [1, unheard] if 0 <= unheard < 1 << 32:
                if unheard >= self.silence:
                    raise TimedOutError(f"the other end has heard nothing for {unheard} s")
            case [2]:
                self.ended = True
            case _:
                refuse("a control frame that no end makes")
        if frame.payload:
            refuse("a control frame with content")

    def done(self, frame: Frame) -> None:
        """A frame was dealt with: so much may come again."""
        credit = self._credit[frame.lane]
        credit.owed += frame.size
        if credit.owed * 4 >= credit.window or credit.theirs < MOST:
            self._say(_CREDIT, int(frame.lane), credit.owed)
            credit.theirs += credit.owed
            credit.owed = 0

    # -- time, and the end ---------------------------------------------------

    def unheard(self, now: float) -> float:
        """Seconds since anything came."""
        return now - self._heard

    def tick(self, now: float) -> float:
        """Let it know the time; when to do so again, at the latest.

        Raises:
            TimedOutError: the other end is late, or gone.
            ProtocolError: it is none of our kind.
        """
        if self.theirs is None and self._is_another() and now - self._heard >= REST_S:
            refuse_other(bytes(self._first))
        if self.theirs is None and now - self._began >= self._patience:
            raise TimedOutError(f"the other end said nothing of itself for {self._patience:.0f} s")
        if self.theirs is not None and now - self._heard >= self.silence:
            raise TimedOutError(f"the other end was silent for {self.silence:.0f} s")
        if now - self._sent >= BEAT_S and self.version and not self._said_bye:
            self._say(_BEAT, max(0, int(now - self._heard)))
            self._sent = now
        if self.theirs is None:
            rest = self._heard + REST_S if self._is_another() else self._began + self._patience
            return min(rest, self._began + self._patience)
        return min(self._heard + self.silence, self._sent + BEAT_S)

    def close(self) -> None:
        """Say that there will be nothing but control; what is queued goes before."""
        self._closing = True

    @property
    def said_bye(self) -> bool:
        """Whether all that was queued, and the end of it, was taken."""
        return self._said_bye

    def lost(self) -> None:
        """The connection ended.

        Raises:
            ProtocolError: before the other end had said that it is done.
        """
        if self.theirs is None:
            said = bytes(self._first)
            refuse_other(said)
            raise ProtocolError(
                "the other end ended before it began"
                + (f"; it said: {said!r}" if said else "; is `bisync` there?")
            )
        if not self.ended:
            raise ProtocolError("the connection was lost")
