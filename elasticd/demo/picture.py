"""The loss curve over kills and joins as an SVG, for light and for dark pages. Pure: a record in, text out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from elasticd.demo.plan import Act, Plan
from elasticd.demo.record import Join, Kill, Line, Record, joins_of, kept_losses, kills_of

_WIDTH, _HEIGHT = 960, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 76, 64
_BAND = 16  # the height of the band that shows the size of the world
_SMOOTHING = 6  # the mean over so many steps before and after

_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #57606a }
  .title { font-size: 14px; font-weight: 600; fill: #24292f }
  .back { fill: #ffffff } .grid { stroke: #d8dee4 } .axis { stroke: #8c959f }
  .raw { fill: none; stroke: #9ec1ea } .loss { fill: none; stroke: #0969da; stroke-width: 2.2 }
  .again { fill: #cf222e } .kill { stroke: #cf222e; stroke-dasharray: 4 3 }
  .kill-text { fill: #cf222e; font-weight: 600 }
  .join { stroke: #1a7f37; stroke-dasharray: 4 3 } .join-text { fill: #1a7f37; font-weight: 600 }
  .world3 { fill: #2da44e } .world2 { fill: #d4a72c } .world1 { fill: #cf222e }
  .on-band { fill: #ffffff; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    text { fill: #9198a1 } .title { fill: #f0f6fc } .back { fill: #0d1117 }
    .grid { stroke: #21262d } .axis { stroke: #656c76 }
    .raw { stroke: #1f4b80 } .loss { stroke: #58a6ff } .again { fill: #ff7b72 }
    .kill { stroke: #f85149 } .kill-text { fill: #ff7b72 } .join { stroke: #3fb950 } .join-text { fill: #56d364 }
    .world3 { fill: #238636 } .world2 { fill: #9e6a03 } .world1 { fill: #da3633 } .on-band { fill: #ffffff }
  }
"""


def draw_picture(record: Record, plan: Plan) -> str:
    """Loss by step, the size of the world as a band below, kills and joins marked with what they cost."""
    kept = [line for _, line in sorted(kept_losses(record.lines).items())]
    if not kept:
        return _svg(["<text x='20' y='40'>no step was completed</text>"])
    scale = _Scale(plan.steps, min(line.loss for line in kept), max(line.loss for line in kept))
    parts = [*_grid(scale), *_band(scale, kept), *_curve(scale, kept), *_again(scale, record)]
    parts += [part for place, change in enumerate(_changes(record)) for part in _marker(scale, change, place)]
    return _svg(parts)


class _Scale:
    """From steps and losses to places in the picture."""

    def __init__(self, steps: int, lowest: float, highest: float) -> None:
        self.steps = steps
        self.bottom, self.top = float(int(2 * lowest)) / 2, highest

    def x(self, step: float) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * step / self.steps, 1)

    def y(self, loss: float) -> float:
        share = (loss - self.bottom) / (self.top - self.bottom)
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share, 1)


def _svg(parts: Iterable[str]) -> str:
    title = "elasticd demo: a byte-level GPT on Python's standard library loses two of its nodes and gets two others"
    return "\n".join(
        (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>",
            f"<title>{escape(title)}</title><style>{_STYLE}</style>",
            f"<rect class='back' width='{_WIDTH}' height='{_HEIGHT}' rx='8'/>",
            f"<text class='title' x='16' y='24'>{escape(title)}</text>",
            *parts,
            "</svg>\n",
        )
    )


def _grid(scale: _Scale) -> list[str]:
    parts = []
    loss = scale.bottom
    while loss <= scale.top:
        y = scale.y(loss)
        parts.append(f"<line class='grid' x1='{_LEFT}' y1='{y}' x2='{_WIDTH - _RIGHT}' y2='{y}'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{y + 4}' text-anchor='end'>{loss:g}</text>")
        loss += 0.5
    for tenth in range(0, 11, 2):
        step = scale.steps * tenth // 10
        end = "end" if tenth == 10 else "middle"
        parts.append(f"<text x='{scale.x(step)}' y='{_HEIGHT - 14}' text-anchor='{end}'>{step}</text>")
    parts.append(f"<text x='{_LEFT - 8}' y='{_TOP - 12}' text-anchor='end'>loss</text>")
    parts.append(f"<text x='{_LEFT - 8}' y='{_HEIGHT - 14}' text-anchor='end'>step</text>")
    return parts


def _band(scale: _Scale, kept: Sequence[Line]) -> list[str]:
    parts = []
    y = _HEIGHT - _BOTTOM + 14
    for world, group in groupby(kept, key=lambda line: line.world):
        steps = [line.step for line in group]
        x, end = scale.x(steps[0] - 1), scale.x(steps[-1])
        parts.append(
            f"<rect class='world{min(world, 3)}' x='{x}' y='{y}' width='{end - x:.1f}' height='{_BAND}'/>"
            f"<text class='on-band' x='{(x + end) / 2:.1f}' y='{y + 12}' text-anchor='middle'>{world} nodes</text>"
        )
    return parts


def _curve(scale: _Scale, kept: Sequence[Line]) -> list[str]:
    raw = [(line.step, line.loss) for line in kept]
    return [
        f"<polyline class='raw' points='{_points(scale, raw)}'/>",
        f"<polyline class='loss' points='{_points(scale, _smoothed(raw))}'/>",
    ]


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    smooth = []
    for at, (step, _) in enumerate(points):
        reach = min(_SMOOTHING, at, len(points) - 1 - at)
        near = [loss for _, loss in points[at - reach : at + reach + 1]]
        smooth.append((step, sum(near) / len(near)))
    return smooth


def _points(scale: _Scale, points: Sequence[tuple[int, float]]) -> str:
    return " ".join(f"{scale.x(step)},{scale.y(loss)}" for step, loss in points)


def _again(scale: _Scale, record: Record) -> list[str]:
    """What was computed before a kill and is not kept: it lies on the curve, since the steps were done again."""
    kept = kept_losses(record.lines)
    lost = {(line.step, line.round_number): line for line in record.lines}
    dots = [
        f"<circle class='again' cx='{scale.x(line.step)}' cy='{scale.y(line.loss)}' r='2'/>"
        for line in lost.values()
        if line.round_number != kept[line.step].round_number
    ]
    note = "computed before a kill, and again after it"
    key = f"<text x='{_WIDTH - _RIGHT}' y='44' text-anchor='end'><tspan class='again'>●</tspan> {note}</text>"
    return [*dots, key] if dots else []


def _changes(record: Record) -> list[Kill | Join]:
    changes: list[Kill | Join] = [*kills_of(record), *joins_of(record)]
    return sorted(changes, key=lambda change: change.mark.t)


def _marker(scale: _Scale, change: Kill | Join, place: int) -> list[str]:
    kind, step, (what, cost) = change.mark.act.value, change.mark.step, _told(change)
    if isinstance(change, Join) and change.first_step is not None:
        step = change.first_step
    x, top = scale.x(step), _TOP - 26 + 34 * (place % 2 == 1)
    return [
        f"<line class='{kind}' x1='{x}' y1='{top}' x2='{x}' y2='{_HEIGHT - _BOTTOM + 14}'/>",
        f"<text class='{kind}-text' x='{x + 6}' y='{top + 10}'>{escape(what)}</text>",
        f"<text x='{x + 6}' y='{top + 24}'>{escape(cost)}</text>",
    ]


def _told(change: Kill | Join) -> tuple[str, str]:
    mark = change.mark
    if isinstance(change, Join):
        stall = "never came in" if change.stall_s is None else f"the others stood still for {change.stall_s:.2f} s"
        return f"{mark.node} joins", stall
    assert mark.act is Act.KILL
    who = f"{mark.node} is killed" + (" (it hosts the store)" if mark.hosts_store else "")
    after = "no step came after it" if change.next_step_s is None else f"next step {change.next_step_s:.2f} s later"
    return who, after
