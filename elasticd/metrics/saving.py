"""What ranks say of their checkpoints, as counters. Not here: commits, which the store answers (daemon/observer.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from elasticd.core.model import JobId
from elasticd.metrics import definitions
from elasticd.metrics.training import number_of, whole_of

RESULTS = ("saved", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """How a save of one rank ended. ``size_bytes``: what it wrote; ``stall_seconds``: for how long its step waited."""

    result: str
    size_bytes: int
    seconds: float
    stall_seconds: float
    waited: bool

    @classmethod
    def from_message(cls, message: Mapping[str, object]) -> SaveReport:
        """TypeError, ValueError or KeyError when it is not one."""
        result = str(message["result"])
        if result not in RESULTS:
            raise ValueError(f"{result!r} is not how a save ends")
        return cls(
            result=result,
            size_bytes=whole_of(message["size_bytes"]),
            seconds=number_of(message["seconds"]),
            stall_seconds=number_of(message["stall_seconds"]),
            waited=bool(message["waited"]),
        )


class SavingMetrics:
    """Cleared when another job is taken."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._saves = definitions.CHECKPOINT_SAVES.instrument(registry)
        self._bytes = definitions.CHECKPOINT_BYTES.instrument(registry)
        self._seconds = definitions.CHECKPOINT_SECONDS.instrument(registry)
        self._stall = definitions.CHECKPOINT_STALL.instrument(registry)
        self._waits = definitions.CHECKPOINT_WAITS.instrument(registry)
        self._damaged = definitions.CHECKPOINT_DAMAGED.instrument(registry)

    def begin(self, job_id: JobId) -> None:
        for of_a_job in (self._saves, self._bytes, self._seconds, self._stall, self._waits, self._damaged):
            of_a_job.clear()
        for result in RESULTS:
            self._saves.labels(job_id, result)
        for counter in (self._bytes, self._stall, self._waits, self._damaged):
            counter.labels(job_id)

    def ended(self, job_id: JobId, report: SaveReport) -> None:
        self._saves.labels(job_id, report.result).inc()
        self._bytes.labels(job_id).inc(report.size_bytes)
        self._stall.labels(job_id).inc(report.stall_seconds)
        self._waits.labels(job_id).inc(report.waited)
        if report.result == "saved":
            self._seconds.labels(job_id).observe(report.seconds)

    def passed_over(self, job_id: JobId, count: int) -> None:
        self._damaged.labels(job_id).inc(count)
