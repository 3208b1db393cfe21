"""What ranks say of their checkpoints, as counters. Not here: commits, which the store answers (daemon/observer.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elasticd.core.model import JobId
from elasticd.metrics import definitions
from elasticd.metrics.job import JobInstruments
from elasticd.metrics.training import number_of, one_of, whole_of

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
        return cls(
            result=one_of(RESULTS, message["result"]),
            size_bytes=whole_of(message["size_bytes"]),
            seconds=number_of(message["seconds"]),
            stall_seconds=number_of(message["stall_seconds"]),
            waited=bool(message["waited"]),
        )


class SavingMetrics:
    def __init__(self, of_job: JobInstruments) -> None:
        self._saves = of_job.counter(definitions.CHECKPOINT_SAVES, *RESULTS)
        self._bytes = of_job.counter(definitions.CHECKPOINT_BYTES)
        self._seconds = of_job.histogram(definitions.CHECKPOINT_SECONDS)
        self._stall = of_job.counter(definitions.CHECKPOINT_STALL)
        self._waits = of_job.counter(definitions.CHECKPOINT_WAITS)
        self._damaged = of_job.counter(definitions.CHECKPOINT_DAMAGED)

    def ended(self, job_id: JobId, report: SaveReport) -> None:
        self._saves.labels(job_id, report.result).inc()
        self._bytes.labels(job_id).inc(report.size_bytes)
        self._stall.labels(job_id).inc(report.stall_seconds)
        self._waits.labels(job_id).inc(report.waited)
        if report.result == "saved":
            self._seconds.labels(job_id).observe(report.seconds)

    def passed_over(self, job_id: JobId, count: int) -> None:
        self._damaged.labels(job_id).inc(count)
