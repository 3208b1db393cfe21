"""Where the demo is shown: live in a terminal, or as plain lines. Both take one scene after the other.

Not here: what a scene looks like (view.py).
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live

from elasticd.demo.claims import Summary
from elasticd.demo.scene import Scene
from elasticd.demo.view import Frame, summary_of

_FRAME_S = 0.15
_LEAST_WIDTH = 70
_PLAIN_WIDTH = 100


class Stage(Protocol):
    """A context manager: inside, scenes are shown."""

    def __enter__(self) -> Stage: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, scene: Scene) -> None: ...

    def conclude(self, summary: Summary) -> None:
        """After the end of the context."""
        ...


def open_stage(output: TextIO, title: str, *, plain: bool) -> Stage:
    """A live one where the output is a terminal that can show it."""
    console = Console(file=output)
    able = console.is_terminal and not console.is_dumb_terminal and console.encoding.lower().startswith("utf")
    return PlainStage(output, title) if plain or not able or console.width < _LEAST_WIDTH else LiveStage(console, title)


class LiveStage:
    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._due_at = 0.0
        self._newest = Scene()

    def __enter__(self) -> LiveStage:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw()
        self._live.__exit__(kind, error, trace)

    def show(self, scene: Scene) -> None:
        self._newest = scene
        if time.monotonic() >= self._due_at:
            self._draw()

    def _draw(self) -> None:
        self._live.update(Frame(self._newest, self._title), refresh=True)
        self._due_at = time.monotonic() + _FRAME_S

    def conclude(self, summary: Summary) -> None:
        self._console.print(summary_of(summary))


class PlainStage:
    """A line for each happening, and one for every twentieth part of the steps."""

    def __init__(self, output: TextIO, title: str) -> None:
        self._output, self._title = output, title
        self._told = 0
        self._next_step = 0

    def __enter__(self) -> PlainStage:
        self._say(f"elasticd demo: {self._title}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, scene: Scene) -> None:
        for happening in scene.happenings[self._told :]:
            self._say(f"{happening.t:7.2f} s  {happening.text}")
        self._told = max(self._told, len(scene.happenings))
        if scene.step >= self._next_step and scene.loss is not None:
            self._say(
                f"{scene.elapsed_s:7.2f} s  step {scene.step} of {scene.steps}, world {scene.world}, "
                f"loss {scene.loss:.3f}, {scene.steps_per_s:.1f} steps/s"
            )
            self._next_step = scene.step + max(1, scene.steps // 20)

    def conclude(self, summary: Summary) -> None:
        console = Console(file=self._output, width=_PLAIN_WIDTH, color_system=None, force_terminal=False)
        console.print(summary_of(summary))

    def _say(self, line: str) -> None:
        print(line, file=self._output, flush=True)
