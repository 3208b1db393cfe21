"""How far the training is, for a person who watches: a bar in a terminal, or a line now and then in a log file.

A step costs a look at the clock; what is shown is made and written a few times a second in a terminal, and every ten
seconds in a log. A terminal or a pipe that has gone away is no concern of the job: nothing more is shown.

Not here: figures for machines (link.py, metrics/).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elasticd.worker.step import Step

#: In a terminal; a frame takes 0.2 ms of the rank that draws it, and a step 0.2 us.
FRAME_S = 0.5
#: Speed is that of so many of the newest frames, or lines.
_MARKS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is shown. ``until``: steps in all, where that is known. Speeds are 0 as long as there is no measure.

    ``samples_per_s`` is of all ranks together; 0 too where the script does not say what a batch has. ``shares``: the
    micro-batches of each replica, empty when they are equal.
    """

    step: int
    until: int | None
    loss: float | None
    steps_per_s: float
    samples_per_s: float
    world_size: int
    shares: tuple[int, ...] = ()

    @property
    def left_s(self) -> float | None:
        if self.until is None or not self.steps_per_s:
            return None
        return (self.until - self.step) / self.steps_per_s

    def __str__(self) -> str:
        parts = [f"step {self.step}" if self.until is None else f"step {self.step}/{self.until}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4g}")
        if self.samples_per_s:
            parts.append(f"{self.samples_per_s:,.0f} samples/s")
        elif self.steps_per_s:
            parts.append(f"{self.steps_per_s:.3g} steps/s")
        if self.left_s is not None:
            parts.append(f"{timedelta(seconds=round(self.left_s))} left")
        parts.append(f"world {self.world_size}")
        if self.shares:
            parts.append(f"shares {':'.join(map(str, self.shares))}")
        return "  ".join(parts)


class Display(Protocol):
    #: Seconds between two of them.
    every_s: float

    def show(self, standing: Standing) -> None: ...

    def close(self) -> None: ...


class Lines:
    """A line each time."""

    def __init__(self, file: TextIO, every_s: float) -> None:
        self._file, self.every_s = file, every_s

    def show(self, standing: Standing) -> None:
        self._file.write(f"{standing}\n")
        self._file.flush()

    def close(self) -> None:
        pass


class Bar:
    """A line that is drawn anew, below what the script prints meanwhile."""

    every_s = FRAME_S

    def __init__(self, file: TextIO) -> None:
        console = Console(file=file)
        both = sys.stdout.isatty()  # what goes into a pipe must go on doing so
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=both, redirect_stderr=True)
        self._live.start()
        console.show_cursor(True)  # a process that is killed could not give it back

    def show(self, standing: Standing) -> None:
        frame = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=standing.until, completed=standing.step, width=20, pulse=standing.until is None)
        frame.add_row(bar, Text(str(standing), no_wrap=True, overflow="ellipsis"))
        self._live.update(frame, refresh=True)

    def close(self) -> None:
        self._live.stop()


class Progress:
    """Shows the steps that are completed, until the display fails. ``look``: world size, shares and ``until``, now."""

    def __init__(self, open_display: Callable[[], Display], look: Callable[[], dict[str, Any]]) -> None:
        self._look = look
        self._display: Display | None = None
        with contextlib.suppress(OSError, ValueError):
            self._display = open_display()
        self._samples = 0
        self._shown_at = 0.0
        self._last: Step | None = None
        #: (when, completed steps, samples since the beginning)
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=_MARKS)

    def follow(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps."""
        try:
            for step in steps:
                if not self._marks:
                    self._marks.append((time.monotonic(), step.index, 0))
                yield step
                if step.completed:
                    self._add(step)
        finally:
            self._finish()

    def _add(self, step: Step) -> None:
        self._last = step
        self._samples += step.batch_size
        now = time.monotonic()
        if self._display is not None and now - self._shown_at >= self._display.every_s:
            self._shown_at = now
            self._marks.append((now, step.index + 1, self._samples))
            self._show()

    def _show(self) -> None:
        if self._display is None or self._last is None:
            return
        (began, first, before), (now, step, samples) = self._marks[0], self._marks[-1]
        passed_s = now - began
        standing = Standing(
            step=step,
            loss=self._last.metrics.get("loss"),
            steps_per_s=(step - first) / passed_s if passed_s else 0.0,
            samples_per_s=(samples - before) / passed_s if passed_s else 0.0,
            **self._look(),
        )
        try:
            self._display.show(standing)
        except (OSError, ValueError):  # ValueError: the file is closed
            self.close()

    def _finish(self) -> None:
        """The last step is shown, whenever it was."""
        if self._last is not None and self._last.index + 1 > self._marks[-1][1]:
            self._marks.append((time.monotonic(), self._last.index + 1, self._samples))
            self._show()
        self.close()

    def close(self) -> None:
        """Nothing is shown from here on."""
        display, self._display = self._display, None
        if display is not None:
            with contextlib.suppress(OSError, ValueError):
                display.close()


def choose_display(file: TextIO | None, every_s: float) -> Callable[[], Display]:
    """A bar where the file is a terminal, lines where it is not."""
    where = file if file is not None else sys.stderr

    def open_display() -> Display:
        return Bar(where) if where.isatty() else Lines(where, every_s)

    return open_display
