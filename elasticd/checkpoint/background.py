"""Saving behind the steps: the step waits for a copy of its state, a thread does the rest. One save at a time.

A save that is due while one is under way waits for it, on every rank alike, so that the ranks need not agree on it and
no checkpoint is left out: a disk that is too slow for the interval slows training down, visibly (``Counts.waited``),
rather than letting more and more steps hang on one copy. Not here: the save itself (save.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elasticd.checkpoint.save import Saved, Saver
from elasticd.checkpoint.staging import Staging, wait_for_device
from elasticd.errors import SaveFailed


@dataclass(slots=True, kw_only=True)
class Counts:
    """What saving has done and cost on this rank. ``stall_s``: all that steps have waited for it; ``waited``: how often
    a save that was due found another one under way."""

    saved: int = 0
    failed: int = 0
    waited: int = 0
    written_bytes: int = 0
    stall_s: float = 0.0
    last_stall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """For how long a step waited for a save, and whether that was for an earlier one too."""

    seconds: float
    waited: bool


#: Told of how each save ended, in the thread that saved: what stands, or why not, and what the step had to wait.
Told = Callable[[int, Saved | SaveFailed, Stall], None]


class BackgroundSaver:
    """All ranks call the same methods in the same order, from their training threads.

    What ends a save other than SaveFailed (a rank died or was silent; a bug) is raised by whatever is called next:
    after that the group's ranks may be out of step, and nothing more can be saved.
    """

    def __init__(self, saver: Saver, told: Told) -> None:
        self._saver, self._told = saver, told
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._broken: BaseException | None = None
        self.counts = Counts()

    @property
    def in_flight(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def began_at(self, step: int) -> None:
        """So many steps were completed when training was taken up."""
        self._saver.began_at(step)

    def start(self, state: dict[str, Any], step: int) -> None:
        """Copy the state and save the copy in the background. Returns once the state may be changed again."""
        started, waited = time.monotonic(), self.in_flight
        self.counts.waited += waited
        self.wait()
        problem, copied = None, {}
        try:
            copied = self._staging.copy(state)
        except (MemoryError, RuntimeError) as error:  # no memory for the buffers: every rank must hear of it
            problem = error
        stall = Stall(seconds=time.monotonic() - started, waited=waited)
        self._launch(lambda: self._told(step, self._save(copied, step, problem), stall))
        self._stalled(started)

    def save(self, state: dict[str, Any], step: int) -> Saved:
        """Save it as it is, and return once it stands. SaveFailed when the storage refused."""
        started = time.monotonic()
        self.wait()
        wait_for_device()
        ended: list[Saved | SaveFailed] = []

        def work() -> None:
            ended.append(self._save(state, step, None, patient=True))
            self._told(step, ended[0], Stall(seconds=time.monotonic() - started, waited=False))

        self._launch(work)
        self.wait()
        self._stalled(started)
        if isinstance(ended[0], SaveFailed):
            raise ended[0]
        return ended[0]

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until no save is under way, or the time is over. Whether none is."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        self.check()
        return not self.in_flight

    def check(self) -> None:
        """Raise what broke a save. Costs nothing: call it each step."""
        if self._broken is not None:
            raise self._broken

    def _launch(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - the top of a thread: raised again in the training thread
                self._broken = error

        # Not a daemon thread: a script that ends waits for what it has begun to save.
        self._thread = threading.Thread(target=run, name="elasticd-save")
        self._thread.start()

    def _save(
        self, state: dict[str, Any], step: int, problem: Exception | None, *, patient: bool = False
    ) -> Saved | SaveFailed:
        try:
            saved = self._saver.save(state, step, problem=problem, patient=patient)
        except SaveFailed as error:
            self.counts.failed += 1
            return error
        self.counts.saved += 1
        self.counts.written_bytes += saved.size_bytes
        return saved

    def _stalled(self, started: float) -> None:
        self.counts.last_stall_s = time.monotonic() - started
        self.counts.stall_s += self.counts.last_stall_s
