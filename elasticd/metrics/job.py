"""Instruments of the job that this node has. Not here: which there are (definitions.py), what they are told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from elasticd.core.model import JobId
from elasticd.metrics.definitions import JOB, CounterDefinition, HistogramDefinition


class JobInstruments:
    """Cleared when another job is taken: samples of old jobs would pile up."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._counters: list[tuple[Counter, list[tuple[str, ...]]]] = []
        self._histograms: list[Histogram] = []

    def counter(self, definition: CounterDefinition, *known: str) -> Counter:
        """Told from 0 on where the job is its only label, otherwise for the ``known`` values of its second one."""
        made = definition.instrument(self._registry)
        self._counters.append((made, [()] if definition.labels == JOB else [(value,) for value in known]))
        return made

    def histogram(self, definition: HistogramDefinition) -> Histogram:
        made = definition.instrument(self._registry)
        self._histograms.append(made)
        return made

    def begin(self, job_id: JobId) -> None:
        for histogram in self._histograms:
            histogram.clear()
        for counter, from_zero in self._counters:
            counter.clear()
            for labels in from_zero:
                counter.labels(job_id, *labels)
