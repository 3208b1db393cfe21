"""Figures as a table for people and as a document for programs. Not here: what a figure means (figures.py)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from elasticd.bench.figures import Figure, all_hold
from elasticd.bench.machine import MachineName

PLAIN_WIDTH = 132


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


def print_report(machine: MachineName, figures: Sequence[Figure], stream: TextIO = sys.stdout) -> None:
    """With colours and lines on a terminal, as plain text of a fixed width elsewhere."""
    terminal = stream.isatty()
    console = Console(file=stream, width=None if terminal else PLAIN_WIDTH, highlight=False)
    console.print(make_table(figures, plain=not terminal))
    for line in machine.lines():
        console.print(line, style="dim", markup=False)


def make_table(figures: Sequence[Figure], *, plain: bool) -> Table:
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("measured", "system"):
        table.add_column(name, overflow="fold")
    for name in ("n", "p50", "max", "goal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    before = ""
    for figure in figures:
        what = figure.what if figure.what != before else ""
        before = figure.what
        cells = (what, figure.system, str(len(figure.samples)), *_numbers(figure), _goal(figure), _verdict(figure))
        table.add_row(*cells)
    return table


def _numbers(figure: Figure) -> tuple[str, str]:
    """p50 and max; what happened instead, where that is all there is or in place of a largest value."""
    words = "; ".join(figure.words)
    if figure.p50 is None:
        return words, ""
    return quantity(figure.p50, figure.unit), words or quantity(figure.max or 0.0, figure.unit)


def _goal(figure: Figure) -> str:
    if figure.goal is None:
        return ""
    return f"{figure.goal.of} {quantity(figure.goal.at_most, figure.unit)}"


def _verdict(figure: Figure) -> str:
    return {True: "[green]holds[/]", False: "[bold red]MISSED[/]", None: ""}[figure.holds]


def quantity(value: float, unit: str) -> str:
    """A number with its unit, at the precision that it is worth."""
    match unit:
        case "s":
            return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"
        case "ms":
            return f"{value:.1f} ms"
        case "%":
            return f"{value:.2f} %"
        case _:
            return f"{value:.0f} {unit}"
