"""Reading at a bounded rate, so that whoever verifies old checkpoints leaves the disk to those that train."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Holds a reader to ``bytes_per_s``, by sleeping. 0: as fast as it goes."""

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s, self._clock, self._sleep = bytes_per_s, clock, sleep
        self._ahead_s, self._at = 0.0, clock()

    def read(self, size_bytes: int) -> None:
        """So much was read: sleep until that was allowed. Time that was not used is not saved up."""
        if not self._bytes_per_s:
            return
        now = self._clock()
        self._ahead_s = max(0.0, self._ahead_s - (now - self._at)) + size_bytes / self._bytes_per_s
        self._at = now
        self._sleep(self._ahead_s)
