"""A channel: which thread closes what, and how much is taken from a peer."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from bisync.endpoint import channel
from bisync.endpoint.channel import Channel
from bisync.endpoint.stream import Stream
from bisync.errors import BisyncError, ProtocolError
from bisync.wire.letters import Letter, Piece
from bisync.wire.schema import Plain


def test_a_writer_that_waits_keeps_its_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Closed while the writer waits for its pace: what is opened then gets none of its bytes."""
    monkeypatch.setattr(channel, "_GOODBYE_S", 0.05)
    go, waits = threading.Event(), threading.Event()

    def pace(_count: int) -> None:
        waits.set()
        go.wait(30)

    theirs, writing = os.pipe()
    reading, ours = os.pipe()
    made = Channel(reading, writing, first=1, pace=pace)
    try:
        assert waits.wait(30)
        made.close()
        files = [(tmp_path / str(n)).open("wb") for n in range(8)]
        go.set()
        for thread in made._threads[1:]:
            thread.join(30)
            assert not thread.is_alive()
        for file in files:
            file.close()
        assert [path.stat().st_size for path in tmp_path.iterdir()] == [0] * 8
        with pytest.raises(OSError):
            os.fstat(writing)
    finally:
        go.set()
        os.close(ours)
        made.join()
        os.close(theirs)


class _Floods:
    """Answers with parts, and more parts, for as long as anybody takes them."""

    def ask(self, letter: Letter, part: Callable[[Plain], None]) -> Plain:
        while True:
            part(bytes(100_000))

    def want(self, stream: Stream, first: Piece) -> None:
        raise AssertionError

    def told(self, letter: Letter) -> None:
        raise AssertionError


@pytest.mark.parametrize("parts", [False, True])
def test_an_answer_that_nobody_reads(monkeypatch: pytest.MonkeyPatch, *, parts: bool):
    """What a peer may send unasked for is bounded: then it is no peer."""
    monkeypatch.setattr(channel, "_MOST_UNREAD", 20_000_000)
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    ours = Channel(our_in, our_out, first=1)
    theirs = Channel(their_in, their_out, first=2, drives=False)
    theirs.service = _Floods()

    def serve() -> None:
        with contextlib.suppress(BisyncError):
            theirs.serve()
        theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ours.begun()
        number = ours.ask(1, None, parts=parts)
        ours._threads[0].join(60)  # the reader ends
        assert not ours._threads[0].is_alive()
        limit = 25_000_000 if parts else 2_000_000
        assert ours.received < limit
        with pytest.raises(ProtocolError):
            ours.answer(number, lambda _part: None)
    finally:
        ours.close()
        thread.join(60)
