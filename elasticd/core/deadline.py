"""How long a step may take before it counts as stuck: learned from the steps seen. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class StepDeadline:
    """No deadline before ``warm_up`` steps; then ``factor`` times the slowest recent step, and at least ``floor_s``.

    The slowest step is forgotten slowly (2% a step), so that one slow epoch end is allowed for, and a job that grew
    faster is not watched with yesterday's patience. ``fixed_s`` above zero overrides what was learned.
    """

    floor_s: float = 60.0
    factor: float = 20.0
    warm_up: int = 5
    fixed_s: float = 0.0
    _seen: int = 0
    _slowest_s: float = 0.0
    _last_at: float = 0.0

    def completed(self, seconds: float, now: float) -> None:
        """A step completed at ``now`` and took ``seconds``."""
        self._seen += 1
        self._slowest_s = max(seconds, self._slowest_s * 0.98)
        self._last_at = now

    def postpone(self, now: float) -> None:
        """No step is under way: what is done between two steps takes as long as it takes."""
        self._last_at = max(self._last_at, now)

    def expires_at(self) -> float | None:
        """When the current step counts as stuck; None while too little was seen."""
        if self._seen < self.warm_up:
            return None
        return self._last_at + (self.fixed_s or max(self.floor_s, self.factor * self._slowest_s))

    def reset(self) -> None:
        """A new round: start-up takes as long as it takes."""
        self._seen, self._slowest_s = 0, 0.0
