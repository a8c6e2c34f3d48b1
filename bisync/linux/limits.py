"""How much of the machine may be used."""

import os

from bisync.errors import UsageError


def workers() -> int:
    """How many threads read, hash and flush; the environment may say so.

    Raises:
        UsageError: what it says is no number.
    """
    text = os.environ.get("BISYNC_WORKERS", "2")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"BISYNC_WORKERS={text}: give a number of threads, at least 1")
    return int(text)
