"""The store: what is let go of."""

import os
from pathlib import Path

from bisync.fs.store import Store


def test_what_is_gone_already_is_done(tmp_path: Path):
    """A version that went with its directory, or by hand, need not be discarded again."""
    inside = tmp_path / "rsync-rollback" / "2026-01-01" / "d"
    inside.mkdir(parents=True)
    (inside / "f").write_bytes(b"kept")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    store = Store(fd, b"rsync-rollback", "0123abcd")
    try:
        for kept in (b"2026-01-01/d", b"2026-01-01/d/f", b"2026-01-01/d", b"2026-01-02/x"):
            store.discard(kept)
    finally:
        store.close()
        os.close(fd)
    assert not inside.exists()
