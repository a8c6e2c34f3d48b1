"""Times as people write them."""

import re
import time
from datetime import datetime, timedelta

from bisync.errors import UsageError

_AGO = re.compile(r"(\d+)\s*(s|m|h|d|w|y)(?:\s+ago)?\Z")
_UNITS = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
    "y": timedelta(days=365),
}


def moment(text: str, now_ns: int) -> int:
    """A time in nanoseconds since 1970: ``2026-11-24 12:30``, ``12:30``, ``3d``, ``@1700000000``.

    Local time where the text does not say otherwise.

    Raises:
        UsageError: nobody can tell what is meant.
    """
    word = text.strip()
    try:
        if word.startswith("@"):
            return int(float(word[1:]) * 1e9) if "." in word else int(word[1:]) * 10**9
        ago = _AGO.match(word)
        if ago is not None:
            past = int(ago[1]) * _UNITS[ago[2]]
            return now_ns - int(past.total_seconds()) * 10**9
        if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", word):
            today = datetime.fromtimestamp(now_ns / 1e9).date()
            word = f"{today} {word.zfill(5 if word.count(':') == 1 else 8)}"
        return round(datetime.fromisoformat(word).timestamp() * 1e6) * 1000
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"--at {text}: give a time like '2026-11-24 12:30', 12:30, 3d or @1700000000"
        ) from None


def when(time_ns: int) -> str:
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns / 1e9))
