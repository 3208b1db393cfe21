"""Figures as a table for people and as a document for programs. Not here: what a figure means (figures.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elasticd.bench.figures import Figure, all_hold
from elasticd.bench.machine import MachineName

PLAIN_WIDTH = 160


def document(machine: MachineName, figures: Sequence[Figure], wall_s: float) -> dict[str, Any]:
    return {
        "machine": machine.to_plain(),
        "wall_s": round(wall_s, 1),
        "all_hold": all_hold(figures),
        "figures": [figure.to_plain() for figure in figures],
    }


def write_document(path: Path, written: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=1) + "\n")


def print_report(machine: MachineName, figures: Sequence[Figure], stream: TextIO | None = None) -> None:
    """To stdout, or to ``stream``: with colours and lines on a terminal, as plain text of a fixed width elsewhere."""
    stream = stream or sys.stdout
    terminal = stream.isatty()
    console = Console(file=stream, width=None if terminal else PLAIN_WIDTH, highlight=False)
    console.print(make_table(figures, plain=not terminal))
    for line in machine.lines():
        console.print(line, style="dim", markup=False)


def make_table(figures: Sequence[Figure], *, plain: bool) -> Table:
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("measured", "system"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "p50", "max", "goal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for figure, cells in zip(figures, _cells(figures), strict=True):
        table.add_row(*cells, _verdict(figure))
    return table


def make_markdown(machine: MachineName, figures: Sequence[Figure]) -> str:
    """The same table for a README."""
    lines = ["| measured | system | n | p50 | max | goal | |", "|---|---|--:|--:|--:|--:|---|"]
    for figure, cells in zip(figures, _cells(figures), strict=True):
        lines.append(f"| {' | '.join([*cells, _verdict(figure).plain])} |")
    return "\n".join([*lines, "", *machine.lines()]) + "\n"


def _cells(figures: Sequence[Figure]) -> Iterator[list[str]]:
    before = ""
    for figure in figures:
        what = figure.what if figure.what != before else ""
        before = figure.what
        numbers = [_quantity(number, figure.unit) for number in (figure.p50, figure.max)]
        yield [what, figure.system, str(len(figure.samples)), *numbers, _goal(figure)]


def _goal(figure: Figure) -> str:
    if figure.goal is None or not figure.unit:
        return ""
    return f"{figure.goal.of} {quantity(figure.goal.at_most, figure.unit)}"


def _verdict(figure: Figure) -> Text:
    """Whether the goal is reached, and what happened where there was nothing to measure."""
    text = {True: Text("holds", "green"), False: Text("MISSED", "bold red"), None: Text()}[figure.holds]
    return text.append(" " if text and figure.words else "").append("; ".join(figure.words), "default")


def _quantity(value: float | None, unit: str) -> str:
    return "" if value is None else quantity(value, unit)


def quantity(value: float, unit: str) -> str:
    """A number with its unit, at the precision that it is worth."""
    match unit:
        case "s":
            return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"
        case "ms":
            return f"{value:.1f} ms"
        case "copies":
            return f"{value:.2f} x"
        case "%" | "% of a core":
            return f"{value:.2f} %"
        case _:
            return f"{value:.0f} {unit}"
