"""A curve as rows of block characters, one column for each few steps. Pure.

Not here: colours and frames (view.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elasticd.demo.scene import Point

_SPAN = 2.0
_EIGHTHS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: the mean loss of its steps (None: none of them is completed) and the size of their world."""

    loss: float | None = None
    world: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """``rows`` from the top down, each as long as ``columns``; ``top`` and ``bottom`` are the losses of its edges.

    What is above the top is cut off there: the first losses of a training would leave the rest no room.
    """

    columns: tuple[Column, ...]
    rows: tuple[str, ...]
    top: float
    bottom: float

    def column_of(self, step: int, steps: int) -> int:
        return column_of(step, steps, len(self.columns))


def column_of(step: int, steps: int, width: int) -> int:
    return min(width - 1, max(0, (step - 1) * width // steps))


def draw(curve: Sequence[Point], *, steps: int, width: int, height: int) -> Chart:
    """The curve over ``steps`` steps in ``width`` columns; what is still to come stays blank."""
    columns = _columns(curve, steps, width)
    known = [column.loss for column in columns if column.loss is not None]
    # Half a unit is a scale that seldom changes while the loss falls.
    bottom = math.floor(2 * min(known, default=0.0) - 0.2) / 2
    top = min(bottom + _SPAN, max(known, default=1.0))
    levels = [_level(column.loss, bottom, top, 8 * height) for column in columns]
    rows = ["".join(_EIGHTHS[min(8, max(0, level - 8 * row))] for level in levels) for row in reversed(range(height))]
    return Chart(columns=tuple(columns), rows=tuple(rows), top=top, bottom=bottom)


def _columns(curve: Sequence[Point], steps: int, width: int) -> list[Column]:
    """A step in no column of its own fills those up to the next step's."""
    sums: dict[int, list[Point]] = {}
    for point in curve:
        sums.setdefault(column_of(point.step, steps, width), []).append(point)
    columns, last = [], Column()
    end = max(sums, default=-1)
    for at in range(width):
        if at in sums:
            points = sums[at]
            mean = sum(point.loss for point in points) / len(points)
            last = Column(loss=mean, world=points[-1].world)
        columns.append(last if at <= end else Column())
    return columns


def _level(loss: float | None, bottom: float, top: float, levels: int) -> int:
    """At least one eighth where there is a value."""
    if loss is None or top <= bottom:
        return 0
    return max(1, round((min(loss, top) - bottom) / (top - bottom) * levels))
