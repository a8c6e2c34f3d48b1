"""How fast content may be read."""

import time
from collections.abc import Callable


class Pace:
    """``--bwlimit``: so many bytes in a second, with a burst of a tenth of that."""

    def __init__(self, bytes_per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._free_at = clock()

    def __call__(self, count: int) -> None:
        """Wait until ``count`` more bytes may pass."""
        now = self._clock()
        self._free_at = max(self._free_at, now - 0.1) + count / self._rate
        if self._free_at > now:
            time.sleep(self._free_at - now)
