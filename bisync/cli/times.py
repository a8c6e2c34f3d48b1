"""Ages on the command line."""

import re

from bisync.core.retention import Retention
from bisync.errors import UsageError

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}


def retention(keep: str, every: str) -> Retention:
    """``--keep`` and ``--keep-every``.

    Raises:
        UsageError: one of them is no time.
    """
    return Retention(keep_days(keep), keep_every(every))


def keep_every(text: str) -> int | None:
    """``--keep-every``: a time in seconds; ``None`` keeps all.

    Raises:
        UsageError: it is no time.
    """
    if text == "all":
        return None
    number = text.rstrip("smindh")
    unit = text[len(number) :]
    if not number.isdecimal() or not int(number) or unit not in _SECONDS:
        raise UsageError(f"--keep-every {text}: give a time like 1h, 15min or 1d, or all")
    return int(number) * _SECONDS[unit]


def keep_days(text: str) -> int | None:
    """``--keep``: an age in days; ``None`` for ever.

    Raises:
        UsageError: it is no age.
    """
    if text == "forever":
        return None
    number, unit = text[:-1], text[-1:]
    if text.isdecimal():
        number, unit = text, "d"
    factors = {"d": 1, "w": 7, "m": 30, "y": 365}
    if not number.isdecimal() or unit not in factors:
        raise UsageError(f"--keep {text}: give a number of days like 90d (or w, m, y), or forever")
    return int(number) * factors[unit]


def seconds(text: str, option: str, least: float = 0.0) -> float:
    """A length of time: ``90``, ``1.5``, ``30s``, ``15min``, ``1h``, ``2d``.

    Raises:
        UsageError: it is none, or shorter than ``least``.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?", text.strip())
    if found is None:
        raise UsageError(f"{option} {text}: give a time like 30s, 15min or 1h")
    value = float(found[1]) * (_SECONDS | {"m": 60})[found[2] or "s"]
    if value < least:
        raise UsageError(f"{option} {text}: at least {least:g} s")
    return value
