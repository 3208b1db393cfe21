"""Makes a daemon out of its parts and runs it: for ``elasticd serve`` and ``elasticd run``.

One asyncio loop in the main thread; systemd's watchdog is fed by that loop and by nothing else. Not here: what the
parts do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import signal
import sys
import uuid
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from elasticd import __version__
from elasticd.addresses import is_unspecified
from elasticd.cluster.etcd import EtcdStore, EtcdTls
from elasticd.cluster.jobs import prepare_job
from elasticd.cluster.peers import LinkSettings
from elasticd.config import DaemonConfig, EtcdConfig, LaunchOptions
from elasticd.core import messages
from elasticd.core.machine import Settings
from elasticd.core.model import BootId, Capacity, JobSpec, Node, NodeId, Phase
from elasticd.core.stragglers import Policy
from elasticd.daemon.launcher import LauncherSettings, WarmLauncher
from elasticd.daemon.lines import LineWriter
from elasticd.daemon.memory_files import MemorySettings
from elasticd.daemon.node import NodeLoop, Observer, Setup, world_log
from elasticd.daemon.notify import notify, watchdog_interval_s
from elasticd.daemon.storekeeper import wait_until_reachable
from elasticd.errors import OperatorError, StoreUnavailable
from elasticd.metrics.gpu import Gpus
from elasticd.metrics.gpu_health import GpuHealth

log = logging.getLogger(__name__)

RUN_STORE_PATIENCE_S = 10.0
GPU_CHECK_S = 2.0


def serve(config: DaemonConfig) -> int:
    """Runs until SIGTERM; returns the exit status. OperatorError for what a person must mend."""
    return asyncio.run(_run(config, None, None))


def run_job(config: DaemonConfig, spec: JobSpec, launch: LaunchOptions) -> int:
    """One job on this node; returns 0 when it succeeded, 1 otherwise."""
    store = make_store(config)
    try:
        wait_until_reachable(store, RUN_STORE_PATIENCE_S)
        prepare_job(store, spec)
    except StoreUnavailable as error:
        raise OperatorError(f"etcd at {', '.join(config.etcd.endpoints)} cannot be reached: {error}") from error
    finally:
        store.close()
    return asyncio.run(_run(config, spec, launch))


def make_store(config: DaemonConfig) -> EtcdStore:
    return make_etcd_store(config.etcd)


def make_etcd_store(etcd: EtcdConfig) -> EtcdStore:
    """Connects when it is first asked. ConfigError when a file that is named cannot be read."""
    tls = None
    if etcd.ca or etcd.cert or etcd.key:
        paths = {
            name: Path(value) for name, value in (("ca", etcd.ca), ("cert", etcd.cert), ("key", etcd.key)) if value
        }
        tls = EtcdTls(**paths)
    return EtcdStore(etcd.endpoints, tls=tls, credentials=etcd.credentials())


def describe_node(config: DaemonConfig, capacity: Capacity) -> Node:
    """What this node says of itself. The boot id is new with every daemon, and is what tells two lives apart."""
    return Node(
        node_id=NodeId(config.node_id),
        boot_id=BootId(uuid.uuid4().hex),
        host=platform.node(),
        address=config.address,
        peer_port=config.peer_port,
        metrics_port=config.metrics.port,
        capacity=capacity,
        topology=config.topology,
        elasticd_version=__version__,
        torch_version=_torch_version(),
        python_version=platform.python_version(),
        metrics_address="" if is_unspecified(config.metrics.address) else config.metrics.address,
    )


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def make_setup(config: DaemonConfig, node: Node, spec: JobSpec | None) -> Setup:
    contexts = config.links.contexts()
    detection = config.detection
    return Setup(
        node=node,
        settings=Settings(lease_ttl_s=detection.lease_ttl_s, fixed_job=spec, stragglers=_policy(config)),
        links=LinkSettings(
            heartbeat_s=detection.heartbeat_s,
            dead_after_s=detection.dead_after_s,
            server_tls=contexts[0] if contexts else None,
            client_tls=contexts[1] if contexts else None,
        ),
        socket_path=Path(config.run_dir) / f"{config.node_id}.sock",
        history_file=config.history_file,
        memory=_memory_settings(config, node.capacity),
    )


def _memory_settings(config: DaemonConfig, capacity: Capacity) -> MemorySettings | None:
    """None when this node is to keep no copies in RAM."""
    asked = config.memory
    limit_bytes = capacity.memory_bytes // 4 if asked.limit_bytes is None else asked.limit_bytes
    if not limit_bytes:
        return None
    return MemorySettings(folder=asked.folder, limit_bytes=limit_bytes, port=asked.port)


def _policy(config: DaemonConfig) -> Policy:
    said = config.stragglers
    return Policy(
        enabled=said.enabled,
        budget=said.eviction_budget,
        window_s=said.eviction_window_s,
        quarantine_after=said.quarantine_after,
        quarantine_s=said.quarantine_s,
    )


async def _run(config: DaemonConfig, spec: JobSpec | None, launch: LaunchOptions | None) -> int:
    from elasticd.daemon.observer import MetricsService

    metrics = MetricsService(config)
    node = replace(describe_node(config, metrics.capacity), metrics_port=metrics.listen())
    setup = make_setup(config, node, spec)
    launcher = WarmLauncher(
        LauncherSettings(
            node_id=node.node_id,
            socket_path=setup.socket_path,
            log_dir=config.log_dir,
            python=config.python,
            launch=launch,
        )
    )
    observer: Observer = metrics
    loop = NodeLoop(setup, make_store(config), launcher, observer)
    launcher.missed = loop.agent_missed
    try:
        await loop.start()
        metrics.attach(loop)
        launcher.start(spec)
        _handle_signals(loop, orderly=spec is None)
        notify(f"READY=1\nSTATUS=node {node.node_id} on {node.address}")
        beside = [asyncio.create_task(_feed_watchdog())]
        if config.stragglers.enabled:
            beside.append(asyncio.create_task(_watch_gpus(loop, metrics.gpus)))
        status = await loop.finished
        for task in beside:
            task.cancel()
        _explain_end(loop)
        return status
    finally:
        notify("STOPPING=1")
        await launcher.close()
        await loop.close()
        metrics.close()


def _handle_signals(loop: NodeLoop, *, orderly: bool) -> None:
    """The first SIGTERM leaves at a step boundary (a daemon) or at once (a run); a second one always at once."""
    running = asyncio.get_running_loop()
    seen: list[int] = []

    def stop(number: int) -> None:
        at_once = bool(seen) or not orderly
        seen.append(number)
        loop.post(messages.ShutdownRequested(at_once=at_once))

    for number in _signals_to_handle():
        running.add_signal_handler(number, stop, number)


def _signals_to_handle() -> set[signal.Signals]:
    """torchrun's own variable (--signals-to-handle); names that this system does not know are left out, as there."""
    names = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT").split(",")
    catchable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    return {number for number in catchable if isinstance(number, signal.Signals) and number.name in names}


async def _feed_watchdog() -> None:
    interval_s = watchdog_interval_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


async def _watch_gpus(loop: NodeLoop, gpus: Gpus) -> None:
    """NVML is asked in its own thread, and waited for in another: it may hang with a sick GPU."""
    health, told = GpuHealth(), ""
    while gpus.watched:
        samples = await asyncio.to_thread(gpus.samples)
        trouble = health.judge(samples, gpus.silent_s)
        if trouble != told:
            told = trouble
            loop.post(messages.GpuTroubled(trouble=trouble))
        await asyncio.sleep(GPU_CHECK_S)


def _explain_end(loop: NodeLoop) -> None:
    """For a run: how the job ended, with the first error's traceback."""
    ended = loop.machine.ended
    if ended is None or loop.setup.settings.fixed_job is None:
        return
    job_id = loop.setup.settings.fixed_job.job_id
    if ended.phase is Phase.SUCCEEDED:
        log.info("job %s succeeded", job_id)
        return
    failure = ended.failure
    text = f"elasticd: job {job_id} {ended.phase.value}"
    if failure is not None:
        how = f"exit code {failure.exit_code}" if failure.exit_code >= 0 else f"signal {-failure.exit_code}"
        text += f": first error on node {failure.node_id}, rank {failure.rank} ({how}): {failure.message}"
        if failure.traceback:
            text += f"\n{failure.traceback.rstrip()}"
    for handler in logging.root.handlers:  # what led there comes first
        handler.flush()
    print(text, file=sys.stderr, flush=True)  # noqa: T201


class _Lines(logging.Handler):
    """To a descriptor, by a thread of its own: a terminal that is paused does not hold the loop."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._lines = LineWriter(descriptor, self._lost)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put(self._bytes(record))
        except Exception:  # noqa: BLE001 - as logging's own handlers
            self.handleError(record)

    def flush(self) -> None:
        self._lines.drain()

    def _bytes(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")

    def _lost(self, count: int) -> bytes:
        text = f"{count} lines of this log are missing: they were not taken in time"
        return self._bytes(log.makeRecord(log.name, logging.WARNING, __file__, 0, text, (), None))


class _JsonLines(logging.Formatter):
    """One object a line, whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(level: str = "", *, as_json: bool = False, world_changes: bool = False) -> None:
    """Standard logging, since torch and grpc log there; JSON lines for log collectors.

    ``world_changes``: a change of the world is told at any level, since a person watches.
    """
    handler = _Lines(sys.stderr.fileno()) if sys.stderr else logging.NullHandler()
    handler.setFormatter(
        _JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname).1s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level or os.environ.get("ELASTICD_LOG_LEVEL", "INFO"), handlers=[handler])
    if world_changes:
        world_log.setLevel(logging.INFO)
