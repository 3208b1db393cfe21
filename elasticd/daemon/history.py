"""Everything that happened on this node, as JSON lines: for validators, drills and post-mortems.

One write(2) a line, so that a killed daemon loses at most its last line. Not here: the log for people (logging).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from elasticd.core.model import Node
from elasticd.core.records import to_plain
from elasticd.errors import OperatorError


class History:
    """Appends to ``path``; an empty path keeps nothing."""

    def __init__(self, path: str, node: Node) -> None:
        self._node = node
        self._file = -1
        if path:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise OperatorError(f"cannot write node.history_file {path}: {error.strerror}") from error

    def write(self, event: str, **details: object) -> None:
        if self._file < 0:
            return
        line = {
            "t": time.monotonic(),
            "wall": time.time(),
            "node": self._node.node_id,
            "boot": self._node.boot_id,
            "event": event,
            **{name: to_plain(value) for name, value in details.items()},
        }
        with contextlib.suppress(OSError):  # a full disk must not stop a step (invariant 8)
            os.write(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
