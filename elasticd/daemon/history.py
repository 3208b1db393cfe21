"""Everything that happened on this node, as JSON lines: for validators, drills and post-mortems.

One write(2) a line, so that a killed daemon leaves whole lines, but for the last one, and loses what it had said in its
last moment (lines.py). Not here: the log for people (logging).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from elasticd.core.model import Node
from elasticd.core.records import to_plain
from elasticd.daemon.lines import LineWriter
from elasticd.errors import OperatorError


class History:
    """Appends to ``path``; an empty path keeps nothing."""

    def __init__(self, path: str, node: Node) -> None:
        self._node = node
        self._lines: LineWriter | None = None
        if path:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise OperatorError(f"cannot write node.history_file {path}: {error.strerror}") from error
            self._lines = LineWriter(self._file, lambda count: self._line("lines_lost", {"count": count}))

    def write(self, event: str, **details: object) -> None:
        if self._lines is not None:
            self._lines.put(self._line(event, details))

    def _line(self, event: str, details: Mapping[str, object]) -> bytes:
        line = {
            "t": time.monotonic(),
            "wall": time.time(),
            "node": self._node.node_id,
            "boot": self._node.boot_id,
            "event": event,
            **{name: to_plain(value) for name, value in details.items()},
        }
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"

    def close(self) -> None:
        if self._lines is not None and self._lines.close():
            os.close(self._file)
        self._lines = None
