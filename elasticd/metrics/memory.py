"""Copies in RAM, as figures: what ranks and the daemon say of them. Not here: the copies (daemon/memory*.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import Metric

from elasticd.core.model import JobId
from elasticd.metrics import definitions
from elasticd.metrics.job import JobInstruments
from elasticd.metrics.training import number_of, one_of, whole_of

RESULTS = ("committed", "void")
SOURCES = ("memory", "buddy", "disk")


class MemoryMetrics:
    """TypeError, ValueError or KeyError for a message that is not of its form."""

    def __init__(self, of_job: JobInstruments) -> None:
        self._copies = of_job.counter(definitions.MEMORY_COPIES, *RESULTS)
        self._stall = of_job.counter(definitions.MEMORY_STALL)
        self._refusals = of_job.counter(definitions.MEMORY_REFUSALS)
        self._sent = of_job.counter(definitions.MEMORY_SENT)
        self._sending = of_job.histogram(definitions.MEMORY_SEND_SECONDS)
        self._restores = of_job.counter(definitions.RESTORES, *SOURCES)
        self._restoring = of_job.histogram(definitions.RESTORE_SECONDS)
        self._job_id = JobId("")
        self._newest: tuple[int, float] | None = None  # step, when in Unix time
        self._at_buddy: bool | None = None

    def begin(self, job_id: JobId) -> None:
        self._job_id, self._newest, self._at_buddy = job_id, None, None

    def copied(self, message: Mapping[str, object]) -> None:
        """How a copy of one rank ended."""
        result = one_of(RESULTS, message["result"])
        self._copies.labels(self._job_id, result).inc()
        self._stall.labels(self._job_id).inc(number_of(message["stall_seconds"]))
        if result == "committed":
            self._newest = whole_of(message["step"]), time.time()

    def kept(self, details: Mapping[str, object]) -> None:
        """This node's parts of a generation are where they are to be: at a buddy's too, or not."""
        self._at_buddy = bool(details["buddy"])
        if self._at_buddy:
            self._sent.labels(self._job_id).inc(whole_of(details["size_bytes"]))
            self._sending.labels(self._job_id).observe(number_of(details["seconds"]))

    def refused(self) -> None:
        self._refusals.labels(self._job_id).inc()

    def restored(self, message: Mapping[str, object]) -> None:
        source = one_of(SOURCES, message["source"])
        self._restores.labels(self._job_id, source).inc()
        self._restoring.labels(self._job_id, source).observe(number_of(message["seconds"]))

    def families(self) -> Iterator[Metric]:
        """Of the newest copy, once there is one."""
        if self._newest is not None:
            step, at = self._newest
            yield definitions.MEMORY_STEP.of(step, self._job_id)
            yield definitions.MEMORY_AT.of(at, self._job_id)
        if self._at_buddy is not None:
            yield definitions.MEMORY_AT_BUDDY.of(self._at_buddy, self._job_id)


def held_families(own_bytes: int, copied_bytes: int, limit_bytes: int) -> Iterator[Metric]:
    """What the node holds, whatever the job."""
    held = definitions.MEMORY_HELD.family()
    held.add_metric(["own"], own_bytes)
    held.add_metric(["copied"], copied_bytes)
    yield held
    yield definitions.MEMORY_LIMIT.of(limit_bytes)
