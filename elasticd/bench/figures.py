"""Figures and their goals, as values: what was measured, of which system, how often, and whether that is enough. Pure.

Not here: how anything is measured (the experiments), how figures are shown (report.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

ELASTICD = "elasticd"
TUNED = "torchrun, tuned"
DEFAULT = "torchrun, defaults"

#: A measurement that succeeded, or what happened instead.
Sample = float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """``at_most`` in the figure's unit, for its median or for its largest sample."""

    at_most: float
    of: Literal["p50", "max"] = "p50"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One row. ``samples`` holds numbers in ``unit``, and words where there was nothing to measure."""

    experiment: str
    what: str
    system: str
    unit: str
    samples: tuple[Sample, ...]
    goal: Goal | None = None

    @property
    def values(self) -> list[float]:
        return [sample for sample in self.samples if not isinstance(sample, str)]

    @property
    def words(self) -> list[str]:
        """What happened instead of a number, each once, in order."""
        return list(dict.fromkeys(sample for sample in self.samples if isinstance(sample, str)))

    @property
    def p50(self) -> float | None:
        return median(self.values) if self.values else None

    @property
    def max(self) -> float | None:
        return max(self.values, default=None)

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached; None without a goal. A sample that is no number reaches none."""
        if self.goal is None:
            return None
        judged = self.p50 if self.goal.of == "p50" else self.max
        return judged is not None and not self.words and judged <= self.goal.at_most

    def to_plain(self) -> dict[str, Any]:
        goal = None if self.goal is None else {"at_most": self.goal.at_most, "of": self.goal.of}
        return {
            "experiment": self.experiment,
            "what": self.what,
            "system": self.system,
            "unit": self.unit,
            "n": len(self.samples),
            "p50": self.p50,
            "max": self.max,
            "goal": goal,
            "holds": self.holds,
            "samples": list(self.samples),
        }


def all_hold(figures: Sequence[Figure]) -> bool:
    """Whether every goal is reached; without any goal nothing was proven."""
    judged = [figure.holds for figure in figures if figure.goal is not None]
    return bool(judged) and all(judged)
