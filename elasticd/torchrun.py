"""``torchrun --rdzv-backend=elasticd``: the node's loop in a thread of torchrun, and our handler for torchrun's agent.

Detection, rounds and stores are elasticd's; the workers are torchrun's: no warm server, its own stop time-out, its own
restart budget (``--max-restarts`` of each node). The endpoint is etcd's; several are separated by commas.

Not here: ``elasticd run``, which does better (commands/run.py).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable

from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousStateError,
)

from elasticd.channel import Channel, Message
from elasticd.cluster.jobs import prepare_job
from elasticd.config import DaemonConfig, LinksConfig, config_for_run
from elasticd.core.machine import Machine
from elasticd.core.messages import Report, ShutdownRequested
from elasticd.core.model import Capacity, JobId, JobSpec, NodeId
from elasticd.daemon.main import describe_node, make_setup, make_store
from elasticd.daemon.node import NodeLoop
from elasticd.errors import ConfigError, OperatorError, StoreUnavailable
from elasticd.supervisor.handler import DaemonRendezvousHandler
from elasticd.toml_form import NAME_PATTERN

log = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
#: torchrun counts restarts itself, node by node; the job's own budget must never be the one that ends it.
NO_LIMIT = 1_000_000


class _Foreign:
    """torchrun starts and ends its own agent; it has no metrics of ours. ``taken``: the node waits for an agent."""

    def __init__(self, taken: threading.Event) -> None:
        self._taken = taken

    def start_agent(self, spec: JobSpec) -> None:  # noqa: ARG002 - torchrun has started it
        self._taken.set()

    def end_agent(self, job_id: JobId, timeout_s: float) -> None: ...

    def reported(self, report: Report, machine: Machine, now: float) -> None: ...

    def stepped(self, rank: int, round_number: int, message: Message) -> None: ...


class _LoopThread:
    """A node's loop in a thread. ``start`` returns when it has taken the job: before that, an agent that says that it
    is ready would not be heard. Errors of the start are raised there.
    """

    def __init__(self, config: DaemonConfig, spec: JobSpec) -> None:
        self._config, self._spec = config, spec
        node = describe_node(config, Capacity(cpu_count=os.cpu_count() or 1, memory_bytes=0))
        self.setup = make_setup(config, node, spec)
        self._up = threading.Event()
        self._error: BaseException | None = None
        self._loop: NodeLoop | None = None
        self._thread = threading.Thread(target=self._main, name="elasticd", daemon=True)

    def start(self) -> None:
        self._thread.start()
        if not self._up.wait(START_TIMEOUT_S):
            raise RendezvousConnectionError("elasticd did not start in time")
        if self._error is not None:
            raise RendezvousStateError(str(self._error)) from self._error

    def stop(self) -> None:
        """Leaves the job: the others need not find out by themselves."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.post_threadsafe(ShutdownRequested(at_once=True))
            self._thread.join(5.0)
        shutil.rmtree(self._config.run_dir, ignore_errors=True)

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except OperatorError as error:
            log.error("elasticd: %s", error)
            self._error = error
        finally:
            self._up.set()

    async def _run(self) -> None:
        foreign = _Foreign(self._up)
        loop = NodeLoop(self.setup, make_store(self._config), foreign, foreign)
        try:
            await loop.start()
            self._loop = loop
            await loop.finished
        finally:
            await loop.close()


def creator() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torch's registry calls to get the function that makes handlers."""
    return create_handler


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """A handler for torchrun's agent. Every error of ours becomes one of torch's rendezvous errors."""
    run_dir = tempfile.mkdtemp(prefix="elasticd-")
    try:
        config, spec = _config(params, run_dir), _spec(params)
        with contextlib.closing(make_store(config)) as store:
            prepare_job(store, spec)
    except StoreUnavailable as error:
        shutil.rmtree(run_dir)
        raise RendezvousConnectionError(f"etcd at {params.endpoint} cannot be reached: {error}") from error
    except OperatorError as error:
        shutil.rmtree(run_dir)
        raise RendezvousStateError(str(error)) from error
    thread = _LoopThread(config, spec)
    thread.start()
    atexit.register(thread.stop)
    handler = DaemonRendezvousHandler(
        Channel.connect(str(thread.setup.socket_path)),
        job_id=spec.job_id,
        node_id=NodeId(config.node_id),
        nproc=int(params.get("nproc", 1)),
        connect=True,
        asks=True,
    )
    handler.hello(os.getpid())
    return handler


def _config(params: RendezvousParameters, run_dir: str) -> DaemonConfig:
    endpoints = tuple(filter(None, params.endpoint.split(",")))
    if not endpoints:
        raise ConfigError("--rdzv-endpoint is empty; name etcd's, as HOST:2379 (several: comma-separated)")
    links = LinksConfig(
        ca=str(params.get("links_ca", "")),
        cert=str(params.get("links_cert", "")),
        key=str(params.get("links_key", "")),
    )  # without them plain text, as torchrun's own
    return config_for_run(endpoints, run_dir=run_dir, address=params.local_addr or "", links=links)


def _spec(params: RendezvousParameters) -> JobSpec:
    if not NAME_PATTERN.fullmatch(params.run_id):
        raise ConfigError(f"--rdzv-id {params.run_id!r}: letters, digits, '.', '_' and '-' only, 63 at most")
    return JobSpec(
        job_id=JobId(params.run_id),
        min_nodes=params.min_nodes,
        max_nodes=params.max_nodes,
        command=("torchrun",),
        max_restarts=NO_LIMIT,
        spares=0,
        by_run=True,
    )
