"""Lines for a file, a pipe or a terminal, written by a thread of their own.

Whatever hangs below them (a disk, a mount, a terminal that somebody paused, a pipe that nobody reads) must not hold the
daemon's loop: its peers would hear no heartbeat, and count the node as lost. So it costs lines instead, and those are
counted. Not here: what a line is (history.py, main.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable

#: As long as a history of two hours at a step a second; some megabytes.
KEPT_LINES = 10_000
#: How long the end of a process waits for what hangs.
PATIENCE_S = 1.0


class LineWriter:
    """Each line is one write(2) where the kernel takes it whole, microseconds after ``put``, in that order.

    ``explain``: the line that stands where that many lines are missing.
    """

    def __init__(self, descriptor: int, explain: Callable[[int], bytes]) -> None:
        self._descriptor, self._explain = descriptor, explain
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._changed = threading.Condition()
        self._written = True
        self._closed = False
        self._thread: threading.Thread | None = None

    def put(self, line: bytes) -> None:
        """From any thread; does not wait for the write. With its end of line."""
        with self._changed:
            if len(self._lines) >= KEPT_LINES:
                self._lost += 1
                return
            if self._lost:
                self._lines.append(self._explain(self._lost))
                self._lost = 0
            self._lines.append(line)
            self._written = False
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="lines", daemon=True)
                self._thread.start()

    def drain(self, timeout_s: float = PATIENCE_S) -> bool:
        """Waits until all is written; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._written, timeout_s)

    def close(self) -> bool:
        """The thread ends when all is written; the descriptor is free for its owner to close if that was in time."""
        written = self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if written and self._thread is not None:
            self._thread.join()
        return written

    def _write(self) -> None:
        while (line := self._next()) is not None:
            with contextlib.suppress(OSError):  # a full disk must not stop a step (invariant 8)
                self._write_whole(line)

    def _next(self) -> bytes | None:
        """The next line, when there is one; None at the end."""
        with self._changed:
            if not self._lines:
                self._written = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._lines or self._closed)
            return self._lines.popleft() if self._lines else None

    def _write_whole(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # somebody who has the same terminal or pipe wants it so
                select.select([], [self._descriptor], [])
