"""What a scrub found, as a text file for node_exporter's textfile collector: the command ends before anyone scrapes it.

Not here: the scrub (commands/checkpoints.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, write_to_textfile
from prometheus_client.registry import Collector

from elasticd.metrics import definitions


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubbed:
    """A directory, how many checkpoints of it were read, how many of those are damaged, and what that took."""

    directory: str
    checkpoints: int
    damaged: int
    size_bytes: int
    seconds: float


def write_metrics(found: Scrubbed, path: Path) -> None:
    """Replace the file as a whole. OSError when it cannot be written."""

    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            for definition, value in (
                (definitions.SCRUB_AT, time.time()),
                (definitions.SCRUB_CHECKED, found.checkpoints),
                (definitions.SCRUB_DAMAGED, found.damaged),
                (definitions.SCRUB_BYTES, found.size_bytes),
                (definitions.SCRUB_SECONDS, found.seconds),
            ):
                yield definition.of(value, found.directory)

    registry = CollectorRegistry()
    registry.register(Once())
    write_to_textfile(str(path), registry)
