"""From what the machine reports to the metrics, and the HTTP endpoint they are served on."""

from __future__ import annotations

from elasticd.channel import Message
from elasticd.config import DaemonConfig
from elasticd.core.machine import Machine
from elasticd.core.messages import Report
from elasticd.core.model import Capacity


class MetricsService:
    def __init__(self, config: DaemonConfig) -> None:
        self.capacity = Capacity(cpu_count=1, memory_bytes=1)
        self._config = config

    def listen(self) -> int:
        return self._config.metrics.port

    def attach(self, loop: object) -> None: ...

    def reported(self, report: Report, machine: Machine, now: float) -> None: ...

    def stepped(self, rank: int, round_number: int, message: Message) -> None: ...

    def close(self) -> None: ...
