"""Ages on the command line."""

from bisync.errors import UsageError


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
