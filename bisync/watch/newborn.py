"""Names that were made a moment ago: nobody elsewhere knows them, so nobody misses them."""

import time
from typing import Generic, TypeVar

Key = TypeVar("Key")
_YOUNG_S = 10.0
_MOST = 1000


class Newborn(Generic[Key]):
    """Remembers the names that were made last."""

    def __init__(self) -> None:
        self._made: dict[Key, float] = {}  # the oldest first

    def made(self, key: Key) -> None:
        """A name was made."""
        self._made[key] = time.monotonic()
        if len(self._made) > _MOST:
            del self._made[next(iter(self._made))]

    def gone(self, key: Key) -> bool:
        """A name became free; whether it was made so short ago that nobody knows it."""
        made = self._made.pop(key, None)
        return made is not None and time.monotonic() - made < _YOUNG_S
