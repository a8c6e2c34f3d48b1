"""Reading a whole version: what counts as one."""

import os
import time
from pathlib import Path

from bisync.fs.content import read_all, read_version


def test_written_to_a_moment_ago(tmp_path: Path):
    """Times of files are coarse: with a writer at work, fresh ones prove nothing."""
    path = tmp_path / "f"
    path.write_bytes(b"content")
    calls: list[int] = []
    folder = os.open(tmp_path, os.O_RDONLY)

    def scan(fd: int, size: int) -> bytes | None:
        calls.append(time.time_ns() - os.fstat(fd).st_ctime_ns)
        return read_all(fd, size)

    with path.open("r+b", buffering=0) as writer:
        for _ in range(100):  # a machine that is busy elsewhere may be late for the first look
            calls.clear()
            writer.write(b"CONTENT")
            version = read_version(folder, b"f", scan=scan)
            assert version.writer
            if len(calls) > 1:
                break
        assert len(calls) > 1
        assert calls[-1] >= 15_000_000
    calls.clear()
    path.write_bytes(b"closed")
    version = read_version(folder, b"f", scan=scan)
    assert not version.writer
    assert len(calls) == 1
    os.close(folder)
