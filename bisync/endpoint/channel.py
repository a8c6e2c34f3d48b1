"""One connection to another bisync: calls both ways, and streams of content.

One thread always reads, one always writes; neither waits for a disk, a lock or the other. The
engine itself stays on its own thread: whoever waits for an answer serves what the other end asks
meanwhile, so each end does one thing at a time, and its files are looked at by one thread only.
"""

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from msgspec import Struct, field

from bisync.endpoint.faults import error_from, number_of
from bisync.endpoint.stream import Stream
from bisync.endpoint.talk import MARKS, MOST_PATIENCE_S, PATIENCE, STOP, Service
from bisync.errors import (
    BisyncError,
    EndpointError,
    Interrupted,
    ProtocolError,
    TimedOutError,
)
from bisync.linux.pipe import widen
from bisync.wire.frames import BULK, NONCE_SIZE, VERSIONS, Frame, Lane, Preamble
from bisync.wire.letters import Assembler, Letter, Op, Piece, Word, parts_of, piece_of, rows_of
from bisync.wire.link import PREAMBLE_S, SILENCE_S, Link
from bisync.wire.schema import Int, Plain, refuse

log = logging.getLogger(__name__)
_READ = 256 << 10  # bytes at a time
_WRITE = 64 << 10  # what is shorter goes with others; joining more costs more than it saves
_PIPE = 1 << 20  # bytes that a pipe to or from ssh may hold
_NAP_S = 0.001  # in which it does not get empty
_AHEAD = 2 << 20  # bytes that wait to be written before who makes more has to wait
_MOST_WAITING = 8192  # things asked for that nobody has begun
_MOST_ASKS = 4  # letters among them
_MOST_UNREAD = 256 << 20  # bytes of an answer that comes faster than it is read
_MOST_BATCH = 512  # small files in one frame
_LOOK_S = 0.2  # between two looks whether to stop
_GOODBYE_S = 10.0
_LAST_WORDS_S = 0.05
_UNHEARD_S = 4.0  # of beats that come each second; then a stop does not wait for that end
_STOPS_S = 30.0  # for the other end to end what is in hand
_DEEPEST = 8  # things in hand for the other end, one in the other


class _Call(Struct):
    """A call that waits for its answer."""

    has_parts: bool
    parts: deque[tuple[Plain, int]] = field(default_factory=deque)  # with bytes of their frames
    last: Letter | None = None
    unread: int = 0  # bytes of those frames


class Channel:
    """One end of a connection.

    Args:
        reading, writing: descriptors; each is closed by the thread that uses it.
        first: the number of this end's first call or stream; the other end's are odd if these
            are even.
        stop: asked now and then while something is waited for; may raise.
        patience, silence: see :class:`bisync.wire.link.Link`.
        pace: waits for the right to send so many bytes.
        drives: whether a stop here is one for the other end first, so that it ends cleanly.
    """

    def __init__(
        self,
        reading: int,
        writing: int,
        *,
        first: int,
        compress: bool = True,
        stop: Callable[[], None] = lambda: None,
        patience: float = PREAMBLE_S,
        silence: float = SILENCE_S,
        pace: Callable[[int], None] | None = None,
        drives: bool = True,
    ) -> None:
        self._drives = drives
        self.sent = self.received = 0  # bytes
        self.stop_asked = False  # by the other end
        self.service: Service | None = None
        # On the reader's thread, must not wait: with what a watching end tells, and when it ended.
        self.marked: Callable[[Plain], None] | None = None
        self.ended: Callable[[], None] = lambda: None
        mine = Preamble(*VERSIONS, 0, os.urandom(NONCE_SIZE))
        self._link = Link(
            mine, compress=compress, now=time.monotonic(), patience=patience, silence=silence
        )
        self._reading, self._writing = reading, writing
        self._stop, self.pace = stop, pace
        self._serving = 0  # things that the other end asked for and that are in hand
        self._asked = False  # a call of the other end's is
        self._told_to_stop = 0.0  # when
        self._changed = threading.Condition()
        self._packing = threading.Lock()
        self._letters = Assembler()
        self._letter_size = 0  # bytes of frames since the last letter was whole
        self._calls: dict[int, _Call] = {}
        self._streams: dict[int, Stream] = {}
        self._inbox: deque[Letter | tuple[Stream, Piece]] = deque()
        self._batch: list[tuple[list[Plain], bytes | memoryview]] = []  # small files that wait
        self._batch_size = 0
        self._next = first
        self._broken: BisyncError | None = None
        self._closing = self._closed = False
        os.set_blocking(writing, False)
        widen(reading, _PIPE)
        self._is_wide = widen(writing, _PIPE)
        self._threads = [
            threading.Thread(target=self._read, name="bisync-reader", daemon=True),
            threading.Thread(target=self._write, name="bisync-writer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def broken(self) -> bool:
        """Whether nothing can be said any more."""
        return self._broken is not None

    @property
    def is_silent(self) -> bool:
        """Whether the other end may well be gone."""
        return self.unheard_s > _UNHEARD_S

    @property
    def unheard_s(self) -> float:
        """Seconds since the other end was heard; it says something each second."""
        return self._link.unheard(time.monotonic())

    def begun(self) -> None:
        """Wait until the other end has begun.

        Raises:
            EndpointError: it did not, or is no bisync that is understood.
        """
        self.wait(lambda: self._link.version > 0)

    # -- the two threads -----------------------------------------------------

    def _read(self) -> None:
        try:
            while data := os.read(self._reading, _READ):
                with self._changed:
                    self.received += len(data)
                    before = self._link.came
                    for frame in self._link.received(data, time.monotonic()):
                        self._came(frame)
                    if self._link.came != before:  # half a frame need not wake anybody
                        self._changed.notify_all()
            with self._changed:
                self._link.lost()
        except BisyncError as error:
            self._break(error)
        except OSError as error:
            self._break(EndpointError(f"the connection was lost: {error.strerror}"))
        except Exception as error:  # noqa: BLE001 -- nobody else would hear of it
            log.info("reader-failed error=%r", error)
            self._break(EndpointError(f"internal error: {type(error).__name__}: {error}"))
        else:
            self._break(EndpointError("the connection was closed"))
        finally:
            os.close(self._reading)

    def _came(self, frame: Frame) -> None:
        if frame.lane is Lane.BULK:
            piece = piece_of(frame)
            if self._piece_came(piece, frame):
                self._link.done(frame)
            return
        letter = self._letters.take(frame)
        self._link.done(frame)
        self._letter_size += frame.size
        if letter is None:
            return
        size, self._letter_size = self._letter_size, 0
        if letter.word is Word.TELL and letter.about == STOP:
            self.stop_asked = True
        elif letter.word is Word.TELL and letter.about == PATIENCE:
            self._link.silence = float(Int(1, MOST_PATIENCE_S).unpack(letter.body))
        elif letter.word is Word.TELL and letter.about == MARKS and self.marked is not None:
            self.marked(letter.body)
        elif letter.word in (Word.ASK, Word.TELL):
            self._put(letter)
        else:
            self._answered(letter, size)

    def _piece_came(self, piece: Piece, frame: Frame) -> bool:
        """Take a piece; whether its credit may go back at once."""
        match piece.op:
            case Op.WANT | Op.WANT_CHANGES:
                self._want_came(piece)
            case Op.WANTS:
                for number, values in rows_of(piece.values):
                    self._want_came(Piece(number, Op.WANT, values, piece.payload[:0]))
            case Op.BATCH:
                at = 0
                for number, values in rows_of(piece.values):
                    size = Int(0, len(piece.payload) - at).unpack(values[0] if values else None)
                    known = self._streams.get(number)
                    part = Piece(number, Op.WHOLE, values, piece.payload[at : at + size])
                    if known is not None and not known.came(part, frame):
                        refuse("a file among others that was wanted alone")
                    at += size
            case _:
                known = self._streams.get(piece.stream)
                return known is None or known.came(piece, frame)
        return True

    def _want_came(self, piece: Piece) -> None:
        if piece.stream in self._streams or piece.stream % 2 == self._next % 2:
            refuse("a stream that there is already")
        stream = self._streams[piece.stream] = Stream(self, piece.stream, given=True)
        self._put(stream, piece)

    def _put(self, *what: Letter | Stream | Piece) -> None:
        if len(what) == 1 and sum(isinstance(w, Letter) for w in self._inbox) >= _MOST_ASKS:
            refuse("more questions than anybody has")
        if len(self._inbox) >= _MOST_WAITING:
            refuse("more questions than anybody has")
        self._inbox.append(what if len(what) == 2 else what[0])  # type: ignore[arg-type]

    def _answered(self, letter: Letter, size: int) -> None:
        call = self._calls.get(letter.number)
        if call is None or call.last is not None:
            refuse("an answer that nobody waits for")
        if letter.word is Word.PART:
            call.unread += size
            if not call.has_parts or call.unread > _MOST_UNREAD:
                refuse("a part of an answer that has none, or more than anybody reads")
            call.parts.append((letter.body, size))
        else:
            call.last = letter

    def _write(self) -> None:
        try:
            while True:
                with self._changed:
                    now = time.monotonic()
                    wait = self._link.tick(now) - now
                    data = self._gathered()
                    if not data:
                        if self._closed:
                            return
                        self._changed.wait(max(wait, 0.01))  # credit, or something new, wakes us
                        continue
                    self.sent += len(data)
                if self.pace is not None:
                    self.pace(len(data))
                self._write_all(data)
                with self._changed:
                    self._changed.notify_all()
        except BisyncError as error:
            self._break(error)
        except OSError as error:
            self._threads[0].join(_LAST_WORDS_S)  # what the other end said before it went says more
            self._break(EndpointError(f"the connection was lost: {error.strerror}"))
        finally:
            # Nobody else may: while this thread waits, the number could become another file's.
            os.close(self._writing)

    def _gathered(self) -> bytes:
        found: list[bytes] = []
        size = 0
        while size < _WRITE and (data := self._link.to_send(time.monotonic())):
            found.append(data)
            size += len(data)
        return b"".join(found)

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._writing, view) :]
            except BlockingIOError:
                with self._changed:
                    wait = self._link.tick(time.monotonic()) - time.monotonic()
                if self._is_wide:
                    time.sleep(_NAP_S)  # it says that it has room as soon as a page is free
                select.select([], [self._writing], [], max(wait, 0.01))
                if self._broken is not None:
                    raise EndpointError("the connection was lost") from None

    def _break(self, error: BisyncError) -> None:
        with self._changed:
            if self._broken is None:
                self._broken = error
            self._changed.notify_all()
        self.ended()

    def give_up(self, why: str) -> None:
        """Take the other end for gone."""
        self._break(TimedOutError(f"the other end was silent, and {why}"))

    # -- waiting, and serving meanwhile --------------------------------------

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until something is there; do what the other end asks meanwhile.

        Raises:
            EndpointError: the connection ended.
        """
        while True:
            if self._batch and not self._inbox:
                self._flush()
            with self._changed:
                if ready():
                    return
                work = self._inbox.popleft() if self._may_serve() else None
                if work is None:
                    if self._broken is not None:
                        raise self._broken
                    self._changed.wait(_LOOK_S)
                    if ready():
                        return
                    if self._may_serve() or self._broken is not None:
                        continue
            if work is None:
                self._look_for_a_stop()
            else:
                self._serve(work)

    def _may_serve(self) -> bool:
        """Whether something is asked for that may be begun now: not for ever deeper."""
        return bool(self._inbox) and self._serving < _DEEPEST

    def _look_for_a_stop(self) -> None:
        """A stop that a person asked for here is one for the other end, too: it ends cleanly."""
        try:
            self._stop()
        except Interrupted:
            if not (self._drives and self._link.version):
                raise
            now = time.monotonic()
            if not self._told_to_stop:
                self._told_to_stop = now
                self.tell(STOP, None)
            elif now - self._told_to_stop > _STOPS_S or self.is_silent:
                raise

    def _serve(self, work: Letter | tuple[Stream, Piece]) -> None:
        self._serving += 1
        try:
            self._do(work)
        finally:
            self._serving -= 1

    def _do(self, work: Letter | tuple[Stream, Piece]) -> None:
        service = self.service
        if service is None:
            raise ProtocolError("the other end asks for something, and nothing is offered")
        if isinstance(work, tuple):
            stream, first = work
            try:
                service.want(stream, first)
            finally:
                stream.close()
            return
        if work.word is Word.TELL:
            service.told(work)
            return

        if self._asked:
            refuse("a call before the last one was answered")

        def part(body: Plain) -> None:
            self._send(Letter(Word.PART, work.number, work.about, body))

        self._asked = True
        try:
            answer = service.ask(work, part)
        except BisyncError as error:
            if self.broken or isinstance(error, ProtocolError):
                raise
            about, body = number_of(error)
            self._send(Letter(Word.FAULT, work.number, about, body))
            return
        finally:
            self._asked = False
        self._send(Letter(Word.ANSWER, work.number, work.about, answer))

    def serve(self) -> None:
        """Do what the other end asks until it has said goodbye.

        Raises:
            EndpointError: the connection ended before.
        """
        self.wait(lambda: self._link.ended)

    # -- saying --------------------------------------------------------------

    def call(self, about: int, body: Plain, part: Callable[[Plain], None] | None = None) -> Plain:
        """Ask, and wait for the answer; see :meth:`ask` and :meth:`answer`."""
        return self.answer(self.ask(about, body, parts=part is not None), part)

    def ask(self, about: int, body: Plain, *, parts: bool = False) -> int:
        """Ask, and go on; more may be asked meanwhile, and is answered in that order.

        But for a call that the other end asks something back for: nothing may follow that before
        it is answered.

        Args:
            parts: some of the answer may come before its end.

        Returns:
            What :meth:`answer` takes.

        Raises:
            BisyncError: the connection ended.
        """
        number = self._number()
        with self._changed:
            self._calls[number] = _Call(parts)
        self._send(Letter(Word.ASK, number, about, body))
        return number

    def answer(self, number: int, part: Callable[[Plain], None] | None = None) -> Plain:
        """Wait for the answer to what was asked.

        Args:
            part: takes what of the answer comes before its end.

        Raises:
            BisyncError: what the other end raised, or the connection ended.
        """
        call = self._calls[number]
        try:
            while True:
                self.wait(lambda: bool(call.parts) or call.last is not None)
                while call.parts:
                    body, size = call.parts.popleft()
                    call.unread -= size
                    if part is not None:
                        part(body)
                if call.last is not None:
                    break
        finally:
            with self._changed:
                del self._calls[number]
        if call.last.word is Word.FAULT:
            error = error_from(call.last.about, call.last.body)
            if isinstance(error, Interrupted):
                self._stop()  # it was asked for here, with a signal of its own
            raise error
        return call.last.body

    def tell(self, about: int, body: Plain) -> None:
        """Say what needs no answer."""
        self._send(Letter(Word.TELL, self._number(), about, body))

    def open(self, *, bounded: int | None = None) -> Stream:
        """A new stream."""
        number = self._number()
        stream = Stream(self, number, bounded=bounded)
        with self._changed:
            self._streams[number] = stream
        return stream

    def _number(self) -> int:
        with self._changed:
            self._next += 2
            return self._next

    def _send(self, letter: Letter) -> None:
        for message, payload in parts_of(letter):
            with self._packing:
                self._send_batch()
                packed = self._link.pack(Lane.SMALL, message, payload)
                with self._changed:
                    if self._broken is not None:
                        raise self._broken
                    self._link.put(Lane.SMALL, packed)
                    self._changed.notify_all()

    def send_piece(
        self, stream: int, op: Op, values: list[Plain], payload: bytes | memoryview
    ) -> None:
        """Send a piece of a stream; waits while too much waits to be written."""
        with self._packing:
            self._send_batch()
            self._put_bulk([stream, int(op), *values], payload, stream)
        self.wait_for_room()

    def send_small(self, stream: int, values: list[Plain], payload: bytes | memoryview) -> None:
        """Send all of a small file that was asked for ahead, together with others.

        They go when there are enough, when something else is sent, or nothing else is to be done.
        """
        with self._packing:
            if self._batch_size + len(payload) > BULK or len(self._batch) >= _MOST_BATCH:
                self._send_batch()
            self._batch.append(([stream, *values], payload))
            self._batch_size += len(payload)
        self.wait_for_room()

    def _flush(self) -> None:
        with self._packing:
            self._send_batch()

    def _send_batch(self) -> None:
        """Send the small files that wait; the packing lock is held."""
        batch, self._batch, self._batch_size = self._batch, [], 0
        if batch:
            rows: list[Plain] = [row for row, _ in batch]
            self._put_bulk([1, int(Op.BATCH), *rows], b"".join(data for _, data in batch), 0)

    def _put_bulk(self, message: list[Plain], payload: bytes | memoryview, stream: int) -> None:
        packed = self._link.pack(Lane.BULK, message, payload)
        with self._changed:
            if self._broken is not None:
                raise self._broken
            self._link.put(Lane.BULK, packed, stream=stream)
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Wait while much waits to be written."""
        while True:
            with self._changed:
                if self._link.queued_size <= _AHEAD or self._broken is not None:
                    return
                self._changed.wait(_LOOK_S)
            self._look_for_a_stop()

    def done(self, frame: Frame) -> None:
        """What a frame brought was dealt with."""
        with self._changed:
            self._link.done(frame)
            self._changed.notify_all()

    def forget(self, stream: int) -> None:
        """A stream is over."""
        with self._changed:
            self._streams.pop(stream, None)

    # -- the end -------------------------------------------------------------

    def close(self) -> None:
        """Say goodbye, if there is anybody, and end."""
        if self._closing:
            return
        self._closing = True
        until = time.monotonic() + _GOODBYE_S
        with self._changed:
            if self._link.version and self._broken is None:
                with contextlib.suppress(ProtocolError):
                    self._link.close()
                self._changed.notify_all()
                while self._link.queued_size or not self._link.said_bye:
                    gone = self._broken is not None or self.is_silent
                    if gone or time.monotonic() > until:
                        break
                    self._changed.wait(_LOOK_S)
            self._closed = True
            self._changed.notify_all()
        self._threads[1].join(_GOODBYE_S)  # then the other end knows; the reader ends with it

    def join(self) -> None:
        """Wait until the other end has gone."""
        self._threads[0].join(_GOODBYE_S)
