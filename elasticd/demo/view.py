"""The demo in a terminal: a frame of one scene, and the summary at the end. Values in, things that rich can print out.

Not here: when a frame is drawn (stage.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elasticd.demo.chart import Chart, draw
from elasticd.demo.claims import Claim, Summary
from elasticd.demo.plan import Act
from elasticd.demo.record import Join, Kill, Mark
from elasticd.demo.scene import Happening, NodeRow, NodeState, Scene

_NODES_WIDTH = 39
_FRAME_ROWS = 14  # all of a frame but the chart's rows and what happened
_LEAST_ROWS = 24

_STATES = {
    NodeState.STARTING: ("○", "dim"),
    NodeState.PRELOADING: ("◔", "yellow"),
    NodeState.READY: ("◑", "yellow"),
    NodeState.ENTERING: ("◕", "yellow"),
    NodeState.TRAINING: ("●", "green"),
    NodeState.DONE: ("✔", "green"),
    NodeState.DEAD: ("✖", "red"),
}
_KINDS = {"kill": "bold red", "join": "bold cyan", "good": "green", "over": "bold", "failed": "bold red"}
_WORLDS = ("grey50", "red", "yellow", "green", "cyan")


@dataclass(frozen=True, slots=True)
class Frame:
    """One moment, as large as the terminal that it is printed on."""

    scene: Scene
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        rows = max(_LEAST_ROWS, options.size.height) - 1 - _FRAME_ROWS - max(0, len(self.scene.nodes) - 5)
        told = min(len(self.scene.happenings), max(3, rows // 2), 12)
        width = options.max_width
        top = Table.grid(expand=True)
        top.add_column(width=_NODES_WIDTH)
        top.add_column(ratio=1)
        top.add_row(_nodes_panel(self.scene.nodes), _job_panel(self.scene, width - _NODES_WIDTH))
        yield _header(self.scene, self.title)
        yield top
        yield _curve_panel(self.scene, width, min(12, max(3, rows - max(told, 5))))
        yield _happenings(self.scene.happenings[-told:] if told else ())


def _header(scene: Scene, title: str) -> Table:
    line = Table.grid(expand=True)
    line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    line.add_column(justify="right", no_wrap=True)
    line.add_row(Text.assemble((" elasticd demo ", "bold reverse"), f"  {title}"), f"{scene.elapsed_s:.0f} s ")
    return line


def _panel(content: RenderableType, title: str) -> Panel:
    return Panel(
        content, title=f"[bold]{title}[/bold]", title_align="left", box=box.ROUNDED, border_style="bright_black"
    )


def _nodes_panel(nodes: Sequence[NodeRow]) -> Panel:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0), expand=True)
    table.add_column("node", no_wrap=True)
    table.add_column("state", no_wrap=True, width=12)
    table.add_column("rank", justify="right")
    table.add_column("links", justify="right")
    table.add_column("", width=5)
    for node in nodes:
        sign, style = _STATES[node.state]
        dead = node.state is NodeState.DEAD
        table.add_row(
            Text(node.name, style="dim strike" if dead else "bold"),
            Text(f"{sign} {node.state.value}", style=style),
            "-" if node.rank is None else str(node.rank),
            str(node.links) if not dead else "-",
            Text("store", style="magenta") if node.hosts_store else "",
        )
    for _ in range(5 - len(nodes)):
        table.add_row("")
    return _panel(table, "nodes")


def _job_panel(scene: Scene, width: int) -> Panel:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=8)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    world = f"{scene.world} ranks, round {scene.round_number} ({scene.cause.replace('_', ' ')})" if scene.world else "-"
    grid.add_row("world", Text(world, style=_world_style(scene.world) if scene.world else ""))
    grid.add_row("step", _progress(scene, min(40, width - 24)))
    grid.add_row("loss", "-" if scene.loss is None else Text(f"{scene.loss:.3f}", style="bold"))
    grid.add_row("speed", f"{scene.steps_per_s:.1f} steps/s, {scene.bytes_per_s / 1000:.1f} kB/s")
    grid.add_row("saved", f"step {scene.checkpoint}" if scene.checkpoint else "-")
    grid.add_row("restarts", _restarts(scene, by_cause=width > 60))
    return _panel(grid, "job")


def _progress(scene: Scene, width: int) -> Table:
    line = Table.grid(padding=(0, 1, 0, 0))
    bar = ProgressBar(total=scene.steps or 1, completed=scene.step, width=max(5, width), complete_style="green")
    line.add_row(Text(f"{scene.step}/{scene.steps}", style="bold"), bar)
    return line


def _restarts(scene: Scene, *, by_cause: bool) -> str:
    counts = dict(scene.restarts or {})
    charged = counts.pop("worker_failed", 0)
    causes = ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in sorted(counts.items()))
    return f"{charged} charged, {sum(counts.values())} free" + (f" ({causes})" if by_cause and causes else "")


def _curve_panel(scene: Scene, width: int, height: int) -> Panel:
    chart = draw(scene.curve, steps=scene.steps or 1, width=width - 11, height=height)
    lines = [_curve_row(chart, row, _label(chart, row, height)) for row in range(height)]
    lines.append(_marks_row(chart, scene.marks, scene.steps))
    return _panel(Group(*lines, _legend(scene)), "loss")


def _legend(scene: Scene) -> Text:
    legend = Text("       ", no_wrap=True, overflow="crop")
    for world in sorted({point.world for point in scene.curve}, reverse=True):
        legend.append("█", style=_world_style(world)).append(f" {world} nodes   ")
    return legend.append("✖", style="bold red").append(" killed   ").append("▲", style="bold cyan").append(" started")


def _label(chart: Chart, row: int, height: int) -> str:
    if row not in (0, height - 1) or not chart.columns or chart.columns[0].loss is None:
        return ""
    return f"{chart.top if row == 0 else chart.bottom:.1f}"


def _curve_row(chart: Chart, row: int, label: str) -> Text:
    line = Text(f"{label:>4} │ ", style="dim", no_wrap=True)
    for column, cell in zip(chart.columns, chart.rows[row], strict=True):
        line.append(cell, style=f"not dim {_world_style(column.world)}")
    return line


def _marks_row(chart: Chart, marks: Sequence[Mark], steps: int) -> Text:
    cells: list[tuple[str, str]] = [("─", "dim")] * len(chart.columns)
    for mark in marks:
        sign = ("✖", "bold not dim red") if mark.act is Act.KILL else ("▲", "bold not dim cyan")
        at = chart.column_of(mark.step, steps)
        taken = cells[at][0] != "─" and at + 1 < len(cells)
        cells[at + taken] = sign
    return Text.assemble(("   0 └─", "dim"), *cells, (f" {steps}", "dim"), no_wrap=True)


def _world_style(world: int) -> str:
    return _WORLDS[min(world, len(_WORLDS) - 1)]


def _happenings(happenings: Sequence[Happening]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim", no_wrap=True, width=8)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for one in happenings:
        table.add_row(f"{one.t:.2f} s", Text(one.text, style=_KINDS.get(one.kind, "")))
    return table


# --- the summary ----------------------------------------------------------------------------------------------------


def summary_of(summary: Summary) -> Group:
    """What happened, what it cost, and which claims held."""
    return Group("", _costs(summary), "", _claims(summary.claims), "", _verdict(summary))


def _costs(summary: Summary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", border_style="bright_black")
    table.add_column("\nwhat happened", no_wrap=True)
    for name in ("at\nstep", "noticed\nin", "ready\nin", "no step\nfor", "steps done\nagain"):
        table.add_column(name, justify="right", no_wrap=True)
    changes: list[Kill | Join] = sorted([*summary.kills, *summary.joins], key=lambda change: change.mark.t)
    for change in changes:
        table.add_row(*_cost(change))
    return table


def _cost(change: Kill | Join) -> tuple[RenderableType, ...]:
    mark = change.mark
    if isinstance(change, Join):
        return (
            Text(f"▲ {mark.node} joined", style="cyan"),
            _or_never(change.first_step, "{}"),
            "",
            _or_never(change.ready_s, "{:.1f} s"),
            _or_never(change.stall_s, "{:.2f} s"),
            "0",
        )
    noticed_ms = None if change.detected_s is None else 1000 * change.detected_s
    return (
        Text(f"✖ {mark.node} killed{' (store)' if mark.hosts_store else ''}", style="red"),
        str(mark.step),
        _or_never(noticed_ms, "{:.0f} ms"),
        "",
        _or_never(change.next_step_s, "{:.2f} s"),
        _or_never(change.steps_redone, "{}"),
    )


def _or_never(value: float | None, form: str) -> str:
    return "never" if value is None else form.format(value)


def _claims(claims: Sequence[Claim]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    for claim in claims:
        sign = Text("✔", style="green") if claim.held else Text("✖", style="bold red")
        found = Text(claim.found, style="dim" if claim.held else "red")
        table.add_row(sign, Text.assemble(claim.promise, "\n", found))
    return table


def _verdict(summary: Summary) -> Text:
    broken = sum(not claim.held for claim in summary.claims)
    if broken:
        return Text(f"{broken} of {len(summary.claims)} claims did not hold.", style="bold red")
    first, last = summary.first_loss, summary.last_loss
    return Text(
        f"All {len(summary.claims)} claims held: {summary.steps} steps in {summary.seconds:.1f} s, "
        f"loss {first:.3f} to {last:.3f}.",
        style="bold green",
    )
