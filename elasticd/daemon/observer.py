"""The metrics of a daemon: hears what happens, and answers scrapers. Joins metrics/ with the loop.

Nothing here may stop a step: what goes wrong is logged, once for each kind, and forgotten. Scrapers are served by
threads; what they need of the machine is read in the loop's own thread, which also shows whether the loop is alive.
Not here: names (metrics/definitions.py), HTTP (metrics/exporter.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NoAnswer
from http import HTTPStatus
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from elasticd.channel import Message
from elasticd.config import DaemonConfig
from elasticd.core.machine import Machine
from elasticd.core.messages import Report
from elasticd.core.model import JobId, NodeId, Round
from elasticd.daemon.node import NodeLoop
from elasticd.metrics import definitions
from elasticd.metrics.exporter import Endpoint, Exporter, Request, Response
from elasticd.metrics.gpu import Gpus
from elasticd.metrics.job import JobInstruments
from elasticd.metrics.machine import health, job_families, node_families, target_groups
from elasticd.metrics.memory import MemoryMetrics, held_families
from elasticd.metrics.node import NodeCollector, read_capacity
from elasticd.metrics.recovery import Recovered, Recovery
from elasticd.metrics.saving import SaveReport, SavingMetrics
from elasticd.metrics.training import Steps, Training, whole_of

log = logging.getLogger(__name__)

T = TypeVar("T")

#: A loop that takes longer than this to answer is not alive: it feeds heartbeats ten times a second.
LOOP_TIMEOUT_S = 2.0
#: One scrape is rendered at a time; another waits so long for its turn.
TURN_TIMEOUT_S = 5.0


class JobMetrics:
    """What is counted as it happens."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.store_outages = definitions.STORE_OUTAGES.instrument(registry)
        self.leases_lost = definitions.LEASES_LOST.instrument(registry)
        self.detection = definitions.DETECTION.instrument(registry)
        self._of_job = of_job = JobInstruments(registry)
        self.recovery = of_job.histogram(definitions.RECOVERY)
        self.proposed = of_job.counter(definitions.PROPOSED)
        self.worker_failures = of_job.counter(definitions.WORKER_FAILURES)
        self.commits = of_job.counter(definitions.CHECKPOINT_COMMITS, "committed", "refused")
        self.saving = SavingMetrics(of_job)
        self.memory = MemoryMetrics(of_job)
        for how in ("refused", "silent", "worker_exit"):
            self.detection.labels(how)

    def begin(self, job_id: JobId) -> None:
        self._of_job.begin(job_id)
        self.memory.begin(job_id)


class Tracker:
    """What the machine reported, as figures. In the loop's thread only."""

    def __init__(self, metrics: JobMetrics) -> None:
        self._metrics = metrics
        self._job_id = JobId("")
        self._round_number = 0
        self._recovery = Recovery()
        self._training = Training()
        self._committed: tuple[int, float] | None = None  # step, when in Unix time

    def reported(self, report: Report, machine: Machine, now: float) -> None:
        details = dict(report.details)
        match report.event:
            case "job_taken":
                self._begin(JobId(str(details["job"])))
            case "job_over":
                self._recovery.ended()
            case "store_lost":
                self._metrics.store_outages.inc()
            case "lease_lost":
                self._metrics.leases_lost.inc()
            case "peer_up" | "peer_down":
                self._link_changed(details, machine, now)
            case "boundary" | "agent_lost":
                self._recovery.suspected(now)
            case "workers_failed":
                self._workers_failed(int(str(details["rank"])), now)
            case "round_proposed":
                self._metrics.proposed.labels(self._job_id, details["cause"]).inc()
            case "round_seen":
                self._round_seen(details["round"], machine, now)
            case "workers_started" if details["round"] == self._round_number:
                self._observe(self._recovery.started(now))
            case event:
                self._state_told(event, details)

    def stepped(self, rank: int, round_number: int, message: Message, now: float) -> None:
        if round_number == self._round_number:
            self._training.stepped(rank, Steps.from_message(message), now, time.time())
            self._observe(self._recovery.stepped(now))

    def families(self, machine: Machine) -> Iterator[Metric]:
        """Samples of the job are there for as long as this node has it."""
        yield from node_families(machine)
        if machine.task is not None and machine.task.spec.job_id == self._job_id:
            yield from job_families(machine, machine.task)
            yield from self._training.families()
            yield from self._metrics.memory.families()
            if self._committed is not None:
                step, at = self._committed
                yield definitions.CHECKPOINT_STEP.of(step, self._job_id)
                yield definitions.CHECKPOINT_AT.of(at, self._job_id)

    def _begin(self, job_id: JobId) -> None:
        if job_id != self._job_id:
            self._metrics.begin(job_id)
            self._training.begin(job_id)
            self._committed = None
        self._job_id, self._round_number = job_id, 0
        self._recovery.ended()

    def _link_changed(self, details: dict[str, object], machine: Machine, now: float) -> None:
        peer = NodeId(str(details["peer"]))
        if "how" not in details:
            self._recovery.cleared(peer)
            return
        silence_s = details["silence_s"]
        if isinstance(silence_s, float):
            self._metrics.detection.labels(details["how"]).observe(silence_s)
        current = machine.task.last_round if machine.task is not None else None
        if current is not None and current.seat_of(peer) is not None:
            self._recovery.suspected(now, peer)

    def _workers_failed(self, rank: int, now: float) -> None:
        self._recovery.suspected(now)
        self._metrics.worker_failures.labels(self._job_id).inc()
        heard_at = self._training.heard_at(rank)
        if heard_at is not None:
            self._metrics.detection.labels("worker_exit").observe(now - heard_at)

    def _round_seen(self, current: object, machine: Machine, now: float) -> None:
        assert isinstance(current, Round)
        seat = current.seat_of(machine.node.node_id)
        self._round_number = current.number
        self._recovery.entered(current, now, seated=seat is not None)
        self._training.enter_round(range(seat.first_rank, seat.first_rank + seat.nproc) if seat else range(0))

    def _state_told(self, event: str, details: dict[str, object]) -> None:
        """Of checkpoints and copies in RAM: by the daemon, or by a worker, which may claim any job."""
        ours = details.get("job") == self._job_id
        message = details.get("message") if ours else None
        match event:
            case "memory_kept":
                self._metrics.memory.kept(details)
            case "memory_refused":
                self._metrics.memory.refused()
            case "commit" if ours:
                self._commit_answered(bool(details["committed"]), int(str(details["step"])))
            case "checkpoint" if isinstance(message, dict):
                self._metrics.saving.ended(self._job_id, SaveReport.from_message(message))
            case "passed_over" if isinstance(message, dict):
                self._metrics.saving.passed_over(self._job_id, whole_of(message["count"]))
            case "memory_copied" if isinstance(message, dict):
                self._metrics.memory.copied(message)
            case "restored" if isinstance(message, dict):
                self._metrics.memory.restored(message)

    def _commit_answered(self, done: bool, step: int) -> None:  # noqa: FBT001
        self._metrics.commits.labels(self._job_id, "committed" if done else "refused").inc()
        if done:
            self._committed = (step, time.time())

    def _observe(self, recovered: Recovered | None) -> None:
        if recovered is not None:
            labels = (self._job_id, recovered.cause.value, recovered.until)
            self._metrics.recovery.labels(*labels).observe(recovered.seconds)


class MetricsService:
    """``listen`` before the loop starts, ``attach`` once it runs. OperatorError where a person must act."""

    def __init__(self, config: DaemonConfig) -> None:
        where = config.metrics
        address = where.address or config.address
        self._endpoint = Endpoint(address=address, port=where.port, tls_cert=where.tls_cert, tls_key=where.tls_key)
        routes = {"/metrics": self._answer_metrics, "/healthz": self._answer_health, "/sd": self._answer_targets}
        self._exporter = Exporter(self._endpoint, routes)
        self._gpus = Gpus()
        self.capacity = read_capacity(self._gpus.found)
        self._registry = CollectorRegistry(auto_describe=False)
        self._tracker = Tracker(JobMetrics(self._registry))
        for collector in (NodeCollector(config.address, _paths(config)), self._gpus, self):
            self._registry.register(collector)
        self._turn = threading.Lock()
        self._loop: NodeLoop | None = None
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._complained: set[str] = set()

    def listen(self) -> int:
        return self._exporter.listen()

    @property
    def gpus(self) -> Gpus:
        return self._gpus

    def attach(self, loop: NodeLoop) -> None:
        """From within the loop."""
        self._loop, self._asyncio = loop, asyncio.get_running_loop()

    def close(self) -> None:
        self._loop = None
        self._exporter.close()
        self._gpus.close()

    # --- what the loop calls: never raises ---

    def reported(self, report: Report, machine: Machine, now: float) -> None:
        with self._harmless(report.event):
            self._tracker.reported(report, machine, now)

    def stepped(self, rank: int, round_number: int, message: Message) -> None:
        with self._harmless("step"):
            self._tracker.stepped(rank, round_number, message, time.monotonic())

    @contextlib.contextmanager
    def _harmless(self, about: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            if about not in self._complained:
                self._complained.add(about)
                log.exception("metrics: %s is not counted (said once)", about)

    # --- what scrapers call, in their threads ---

    def collect(self) -> Iterator[Metric]:
        """For the registry. What only the loop knows is left out while the loop does not answer."""
        asked_at = time.monotonic()
        try:
            families = self._ask(self._families)
        except _LoopSilent:
            return
        yield definitions.LOOP_DELAY.of(time.monotonic() - asked_at)
        yield from families
        memory = self._loop.memory if self._loop is not None else None
        if memory is not None:  # here and not in the loop: it may wait for files to be freed
            held = memory.held()
            yield from held_families(held.own_bytes, held.copied_bytes, memory.store.limit_bytes)

    def _families(self, loop: NodeLoop) -> list[Metric]:
        answered_at = loop.keeper.answered_at
        families = [*self._tracker.families(loop.machine), definitions.STORE_UP.of(loop.keeper.reachable)]
        if answered_at is not None:
            families.append(definitions.STORE_AGE.of(time.monotonic() - answered_at))
        return families

    def _answer_metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        if not self._turn.acquire(timeout=TURN_TIMEOUT_S):
            return Response.line(HTTPStatus.SERVICE_UNAVAILABLE, "an earlier scrape has not ended")
        try:
            return Response(body=encode(self._registry), content_type=content_type)
        finally:
            self._turn.release()

    def _answer_health(self, _: Request) -> Response:
        try:
            found = self._ask(lambda loop: health(loop.machine, store_up=loop.keeper.reachable))
        except _LoopSilent as silent:
            found = {"healthy": False, "reason": str(silent)}
        return _json(found, HTTPStatus.OK if found["healthy"] else HTTPStatus.SERVICE_UNAVAILABLE)

    def _answer_targets(self, _: Request) -> Response:
        """Prometheus keeps its last list when this fails, and would drop everything on an empty one."""
        try:
            groups = self._ask(lambda loop: target_groups(loop.machine.view, self._endpoint.scheme))
        except _LoopSilent as silent:
            return Response.line(HTTPStatus.SERVICE_UNAVAILABLE, str(silent))
        if not groups:
            return Response.line(HTTPStatus.SERVICE_UNAVAILABLE, "etcd has not said yet which nodes there are")
        return _json(groups)

    def _ask(self, read: Callable[[NodeLoop], T]) -> T:
        """Reads in the loop's thread. _LoopSilent when it does not answer."""
        loop, runner = self._loop, self._asyncio
        if loop is None or runner is None:
            raise _LoopSilent("the daemon starts or stops")

        async def run() -> T:
            return read(loop)

        reading = run()
        try:
            answer = asyncio.run_coroutine_threadsafe(reading, runner)
        except RuntimeError as error:  # the loop is closed
            reading.close()
            raise _LoopSilent("the daemon has stopped") from error
        try:
            return answer.result(LOOP_TIMEOUT_S)
        except NoAnswer as error:
            answer.cancel()
            raise _LoopSilent("the daemon's loop does not answer") from error


class _LoopSilent(Exception):
    """The loop gave no answer in time."""


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(body=json.dumps(value).encode() + b"\n", content_type="application/json", status=status)


def _paths(config: DaemonConfig) -> tuple[str, ...]:
    """Whose file systems matter to the daemon."""
    return tuple(dict.fromkeys(path for path in ("/", config.log_dir) if path))
