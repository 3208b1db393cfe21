"""How fast every rank of the world is, for the daemons: what makes a straggler seen (core/stragglers.py).

The ranks tell each other a number with their exchange anyway (control.py): the seconds of a micro-batch, or of a step
without the waiting where a script divides its batch itself. The first rank of each node passes all of them on to its
daemon, at most once a second, as means over that time. Not here: what they are used for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

REPORT_EVERY_S = 1.0


class BusySteps:
    """Of a script that divides its batch itself. On CUDA its waits are known later: the mean is right all the same."""

    def __init__(self) -> None:
        self._seconds, self._steps = 0.0, 0

    def add(self, seconds: float) -> None:
        """One step, without the waiting: of an earlier step, on CUDA, so that one alone may come out negative."""
        self._seconds += seconds
        self._steps += 1

    def take(self) -> float:
        """The mean since the last call; NaN when there was none."""
        mean = self._seconds / self._steps if self._steps else float("nan")
        self._seconds, self._steps = 0.0, 0
        return mean


class SpeedReports:
    """Of one node's first rank. ``told``: nanoseconds of each rank, 0 where it had no measure."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._counts: list[int] = []
        self._next_at = 0.0

    def add(self, told: Sequence[int]) -> None:
        if not self._sums:
            self._sums, self._counts = [0] * len(told), [0] * len(told)
            self._next_at = time.monotonic() + REPORT_EVERY_S
        for rank, nanoseconds in enumerate(told):
            if nanoseconds > 0:
                self._sums[rank] += nanoseconds
                self._counts[rank] += 1

    def take(self) -> dict[str, Any] | None:
        """What to say now; None before it is time."""
        now = time.monotonic()
        if not self._sums or now < self._next_at:
            return None
        pairs = zip(self._sums, self._counts, strict=True)
        message = {"type": "speeds", "seconds": [total * 1e-9 / count if count else 0.0 for total, count in pairs]}
        self._sums, self._counts = [], []
        return message
