"""What a panel of the dashboard is; each subject lists its own. Not here: Grafana's JSON (generate.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

J = 'job_id="$job"'
N = 'node=~"$node"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """``queries``: by legend. ``unit``: one of Grafana's. ``low`` and ``high``: the axis, where it has natural ends."""

    title: str
    queries: dict[str, str]
    about: str
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 7
    low: float | None = 0
    high: float | None = None
    stacked: bool = False
    names: dict[int, str] = field(default_factory=dict)


def stat(title: str, expr: str, about: str, **more: Any) -> Panel:
    return Panel(title=title, queries={"": expr}, about=about, kind="stat", width=4, height=4, **more)


def plot(title: str, expr: str, legend: str, about: str, **more: Any) -> Panel:
    return lines(title, {legend: expr}, about, **more)


def lines(title: str, queries: dict[str, str], about: str, **more: Any) -> Panel:
    return Panel(title=title, queries=queries, about=about, **more)
