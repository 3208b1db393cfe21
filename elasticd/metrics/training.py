"""What this node's ranks report of their steps, kept for the next scrape. Only the ranks of the newest round are shown.

Whatever a script sends, the exposition stays bounded: so many ranks, so many names. Not here: who sends it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.metrics_core import CounterMetricFamily, Metric

from elasticd.core.model import JobId
from elasticd.metrics import definitions

MAX_RANKS = 256
MAX_NAMES = 16
MAX_NAME_LENGTH = 64
_UNWANTED = re.compile(r"[^A-Za-z0-9_.:/-]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """One report: ``count`` completed steps, the newest being ``step``; the seconds are means over them."""

    step: int
    count: int
    seconds: float
    wait_seconds: float
    samples: int
    sent_bytes: int
    metrics: Mapping[str, float]

    @classmethod
    def from_message(cls, message: Mapping[str, object]) -> Steps:
        """ValueError or TypeError when it is malformed: a script sent it."""
        told = message.get("metrics", {})
        if not isinstance(told, Mapping):
            raise TypeError("metrics of a step must be an object")
        return cls(
            step=whole_of(message["step"]),
            count=whole_of(message.get("steps", 1)),
            seconds=number_of(message["seconds"]),
            wait_seconds=number_of(message.get("wait_seconds", 0.0)),
            samples=whole_of(message.get("samples", 0)),
            sent_bytes=whole_of(message.get("sent_bytes", 0)),
            metrics={str(name): number_of(value, finite=False) for name, value in told.items()},
        )

    @property
    def busy_seconds(self) -> float:
        return max(0.0, self.seconds - self.wait_seconds)


@dataclass(slots=True)
class _Rank:
    steps: int = 0
    samples: int = 0
    sent_bytes: int = 0
    busy_s: float = 0.0
    wait_s: float = 0.0
    heard_at: float | None = None
    latest: Steps | None = None

    def add(self, report: Steps, now: float) -> None:
        self.steps += report.count
        self.samples += report.samples
        self.sent_bytes += report.sent_bytes
        self.busy_s += report.count * report.busy_seconds
        self.wait_s += report.count * report.wait_seconds
        self.latest, self.heard_at = report, now


class Training:
    """One job's part on this node."""

    def __init__(self) -> None:
        self.begin(JobId(""))

    def begin(self, job_id: JobId) -> None:
        """Another job: what was known of the last one is void."""
        self._job_id = job_id
        self._ranks: dict[int, _Rank] = {}
        self._metrics: dict[str, float] = {}
        self._step = 0
        self._stepped_at: float | None = None

    def enter_round(self, ranks: range) -> None:
        """The ranks that this node holds in the newest round: the figures of others end, and all are yet to report."""
        self._ranks = {number: rank for number, rank in self._ranks.items() if number in ranks}
        for rank in self._ranks.values():
            rank.heard_at = rank.latest = None

    def heard_at(self, rank: int) -> float | None:
        """When this rank last reported a step of the newest round; None when it did not."""
        return self._ranks[rank].heard_at if rank in self._ranks else None

    def stepped(self, rank: int, report: Steps, now: float, wall_s: float) -> None:
        """``wall_s`` is Unix time."""
        if rank not in self._ranks and len(self._ranks) >= MAX_RANKS:
            return
        self._ranks.setdefault(rank, _Rank()).add(report, now)
        self._step, self._stepped_at = report.step, wall_s
        if rank == min(self._ranks):
            self._remember(report.metrics)

    def _remember(self, told: Mapping[str, float]) -> None:
        for name, value in told.items():
            clean = _UNWANTED.sub("_", name)[:MAX_NAME_LENGTH]
            if clean in self._metrics or len(self._metrics) < MAX_NAMES:
                self._metrics[clean] = value

    @property
    def imbalance(self) -> float | None:
        """Slowest over mean of the busy seconds; 1.0 is perfect, None before anybody was busy."""
        busy = [rank.latest.busy_seconds for rank in self._ranks.values() if rank.latest is not None]
        mean = sum(busy) / len(busy) if busy else 0.0
        return max(busy) / mean if mean > 0 else None

    def families(self) -> Iterator[Metric]:
        yield from self._rank_families()
        yield from self._job_families()

    def _rank_families(self) -> Iterator[Metric]:
        latest = definitions.RANK_STEP.family()
        counters: list[tuple[CounterMetricFamily, Callable[[_Rank], float]]] = [
            (definitions.RANK_STEPS.family(), lambda rank: rank.steps),
            (definitions.RANK_SAMPLES.family(), lambda rank: rank.samples),
            (definitions.RANK_SENT.family(), lambda rank: rank.sent_bytes),
            (definitions.RANK_BUSY.family(), lambda rank: rank.busy_s),
            (definitions.RANK_WAIT.family(), lambda rank: rank.wait_s),
        ]
        for number, rank in sorted(self._ranks.items()):
            labels = [self._job_id, str(number)]
            if rank.latest is not None:
                latest.add_metric(labels, rank.latest.seconds)
            for family, read in counters:
                family.add_metric(labels, read(rank))
        yield latest
        yield from (family for family, _ in counters)

    def _job_families(self) -> Iterator[Metric]:
        step, stepped_at = definitions.STEP.family(), definitions.LAST_STEP.family()
        imbalance, metrics = definitions.IMBALANCE.family(), definitions.SCRIPT_METRIC.family()
        if self._stepped_at is not None:
            step.add_metric([self._job_id], self._step)
            stepped_at.add_metric([self._job_id], self._stepped_at)
        if self.imbalance is not None:
            imbalance.add_metric([self._job_id], self.imbalance)
        for name, value in self._metrics.items():
            metrics.add_metric([self._job_id, name], value)
        yield from (step, stepped_at, imbalance, metrics)


def number_of(value: object, *, finite: bool = True) -> float:
    """A loss may well be NaN; a duration may not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    number = float(value)
    if finite and not 0 <= number < float("inf"):
        raise ValueError(f"{value!r} is not a duration")
    return number


def whole_of(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def one_of(known: tuple[str, ...], value: object) -> str:
    """ValueError when it is none of them."""
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)
