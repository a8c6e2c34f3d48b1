"""A channel: which thread closes what."""

import os
import threading
from pathlib import Path

import pytest

from bisync.endpoint import channel
from bisync.endpoint.channel import Channel


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
