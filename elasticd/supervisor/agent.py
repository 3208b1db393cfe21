"""torch's LocalElasticAgent, led by the daemon: one process a job and node, asleep until something happens.

What is kept of torch: the worker group, its environment and its events. What is replaced, and why (TORCH.md): the
polling loop (by select), ranks through the store (they are in the round), the fixed 30 s stop, restarts counted by
each node alone, logs removed by restarts. Not here: the decision to restart (core/).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
from dataclasses import dataclass, fields
from string import Template
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import Std
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError
from torch.distributed.elastic.utils.api import macros
from torch.distributed.run import determine_local_world_size

from elasticd.channel import Channel, Message
from elasticd.core.model import NodeId
from elasticd.errors import ChannelClosed
from elasticd.supervisor.context import Output, WarmContext, WorkerCommand
from elasticd.supervisor.handler import DaemonRendezvousHandler
from elasticd.supervisor.logs import RoundLogs
from elasticd.supervisor.script import CANNOT_RUN

log = logging.getLogger(__name__)

MESSAGE_LIMIT = 4096
TRACEBACK_LIMIT = 32768
#: torchrun's launcher puts its flag into the environment; a script that starts processes of its own may go by it.
SIGNALS_TO_HANDLE = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """All that an agent is told by the daemon; plain values, since it crosses a socket."""

    job_id: str
    node_id: str
    daemon_socket: str
    warm_socket: str
    command: tuple[str, ...]
    nproc_per_node: str = "1"
    is_module: bool = False
    no_python: bool = False
    max_restarts: int = 0
    working_dir: str = ""
    user: str = ""
    stop_timeout_s: float = 5.0
    role: str = "default"
    redirects: str = "0"
    tee: str = "0"
    log_dir: str = ""
    local_ranks_filter: str = ""
    log_line_prefix_template: str = ""
    virtual_local_rank: bool = False
    duplicate_stdout_filters: tuple[str, ...] = ()
    duplicate_stderr_filters: tuple[str, ...] = ()
    event_log_handler: str = "null"
    warm: bool = True

    @classmethod
    def from_message(cls, plain: Message) -> AgentConfig:
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k in known}
        return cls(**values)


class NodeAgent(LocalElasticAgent):
    """Starts and stops this node's workers as the daemon says, and reports what becomes of them at once."""

    def __init__(
        self, spec: WorkerSpec, logs: RoundLogs, config: AgentConfig, handler: DaemonRendezvousHandler, warm: Channel
    ) -> None:
        super().__init__(spec, logs, shutdown_timeout=config.stop_timeout_s)  # type: ignore[arg-type] # seconds
        self._config, self._handler, self._logs, self._warm = config, handler, logs, warm
        self._reported = 0  # the round whose end has been reported
        self._failures: dict[int, ProcessFailure] = {}  # of the current round, by rank: for torch's own events

    # --- the loop ---

    def _invoke_run(self, role: str = "default") -> RunResult:  # noqa: ARG002 - torch's signature
        group = self._worker_group
        while not self._handler.is_closed():
            if group.state in (WorkerState.INIT, WorkerState.STOPPED) or self._handler.has_newer_round:
                self._stop(group, self._config.stop_timeout_s)
                self._begin_round(group)
            self._wait_for_something()
            self._handler.drain()
            if self._handler.must_stop:
                self._stop(group, self._handler.stop_timeout_s)
            if group.state is WorkerState.HEALTHY:
                self._look_at_workers(group)
        ended_as = group.state
        self._stop(group, self._handler.stop_timeout_s)
        self._logs.close()
        return self._result(group, ended_as)

    def _begin_round(self, group: WorkerGroup) -> None:
        """Waits for a round, and starts its workers."""
        self._failures = {}
        try:
            self._initialize_workers(group)
        except (OSError, ValueError) as error:  # ValueError: a local rank that has no GPU
            self._cannot_start(group, error)
        self._handler.offer_next_store()

    def _cannot_start(self, group: WorkerGroup, error: Exception) -> None:
        """What a person must mend on this node (a full disk, a folder that is not ours) counts as the job's failure."""
        assert self._handler.round is not None
        message = f"workers cannot be started on node {self._config.node_id}: {error}"
        log.error("elasticd: %s", message)
        first_rank = self._handler.seat().first_rank
        failure = {"rank": first_rank, "local_rank": 0, "exit_code": CANNOT_RUN, "message": message, "traceback": ""}
        self._say({"type": "workers_failed", "round": self._handler.round.number, "failure": failure})
        group.state = WorkerState.FAILED

    def _wait_for_something(self) -> None:
        """Sleeps until the daemon speaks or a worker ends."""
        if self._handler.has_newer_round or self._warm.pending or self._handler.channel.pending:
            return
        poll = select.poll()
        for channel in (self._handler.channel, self._warm):
            poll.register(channel, select.POLLIN)
        poll.poll()

    def _look_at_workers(self, group: WorkerGroup) -> None:
        assert self._pcontext is not None
        assert self._handler.round is not None
        number = self._handler.round.number
        result = self._pcontext._poll()  # noqa: SLF001 - wait(0) is the same, with a sleep
        if result is None or self._reported == number:
            return
        self._reported = number
        if not result.is_failed():
            group.state = WorkerState.SUCCEEDED
            self._say({"type": "workers_succeeded", "round": number})
            return
        first_rank = self._handler.seat().first_rank
        self._failures = {first_rank + failure.local_rank: failure for failure in result.failures.values()}
        failure = describe(first_failure(result.failures), first_rank)
        self._say({"type": "workers_failed", "round": number, "failure": failure})
        self._stop(group, self._config.stop_timeout_s, state=WorkerState.FAILED)

    def _result(self, group: WorkerGroup, state: WorkerState) -> RunResult:
        """What torch's own events and metrics are made from."""
        others = dict.fromkeys(w.global_rank for w in group.workers if w.global_rank not in self._failures)
        return RunResult(state=state, return_values=others, failures=self._failures)

    def _stop(self, group: WorkerGroup, timeout_s: float, state: WorkerState = WorkerState.STOPPED) -> None:
        if self._pcontext is None:
            return
        self._pcontext.close(signal.SIGTERM, timeout_s)  # type: ignore[arg-type] # torch says int and means seconds
        self._pcontext = None
        group.state = state
        if self._handler.round is not None:
            self._say({"type": "workers_stopped", "round": self._handler.round.number})

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._stop(worker_group, self._config.stop_timeout_s)

    # --- starting ---

    def _assign_worker_ranks(
        self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Ranks come from the round: nodes may have different numbers of workers, and no store is asked."""
        del store, group_rank, group_world_size, spec
        current, seat = self._handler.round, self._handler.seat()
        assert current is not None
        return [
            Worker(
                local_rank=local_rank,
                global_rank=seat.first_rank + local_rank,
                role_rank=seat.first_rank + local_rank,
                world_size=current.world_size,
                role_world_size=current.world_size,
            )
            for local_rank in range(seat.nproc)
        ]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        current = self._handler.round
        assert current is not None
        self._logs.round_number = current.number
        envs = {w.local_rank: self._environment(worker_group, w) for w in worker_group.workers}
        self._setup_local_watchdog(envs=envs)
        commands = {rank: self._command(rank) for rank in envs}
        context = self._context(commands, envs)
        context.start()
        self._pcontext = context
        pids = context.pids()
        self._say({"type": "workers_started", "round": current.number, "pids": list(pids.values())})
        return pids

    def _environment(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """torchrun's list (LocalElasticAgent._start_workers, launch_agent), and ours; restarts are the job's."""
        current, spec = self._handler.round, group.spec
        assert current is not None
        env = {
            "RANK": str(worker.global_rank),
            "GROUP_RANK": str(group.group_rank),
            "ROLE_RANK": str(worker.role_rank),
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "WORLD_SIZE": str(worker.world_size),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "ROLE_WORLD_SIZE": str(worker.role_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(current.restart_count),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": self._config.job_id,
            "TORCHELASTIC_USE_AGENT_STORE": str(True),
            "TORCHELASTIC_SIGNALS_TO_HANDLE": os.getenv("TORCHELASTIC_SIGNALS_TO_HANDLE", SIGNALS_TO_HANDLE),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.getenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            "ELASTICD_SOCKET": self._config.daemon_socket,
            "ELASTICD_JOB_ID": self._config.job_id,
            "ELASTICD_ROUND": str(current.number),
            "ELASTICD_NODE_ID": self._config.node_id,
            "ELASTICD_LOCAL_RANK": str(worker.local_rank),  # torchrun's may be virtual
        }
        self._set_local_rank_env(env, worker.local_rank, spec)  # type: ignore[arg-type]
        if "OMP_NUM_THREADS" in os.environ or spec.local_world_size > 1:  # torchrun's own rule
            env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        return env

    def _command(self, local_rank: int) -> tuple[str, ...]:
        """Macros stand in arguments, and for Python the script is one, too."""
        untouched = self._config.command[: 1 if self._config.no_python else 0]
        return (*untouched, *macros.substitute(list(self._config.command[len(untouched) :]), str(local_rank)))

    def _prefixes(self, ranks: dict[int, Any]) -> dict[int, str] | None:
        template = self._config.log_line_prefix_template
        if not template:
            return None
        first = self._handler.seat().first_rank
        role = self._worker_group.spec.role
        return {
            local: Template(template).safe_substitute(role_name=role, rank=first + local, local_rank=local)
            for local in ranks
        }

    def _context(self, commands: dict[int, tuple[str, ...]], envs: dict[int, dict[str, str]]) -> WarmContext:
        config = self._config
        what = WorkerCommand(
            name=config.role,
            is_module=config.is_module,
            no_python=config.no_python,
            fresh=not config.warm,
            working_dir=config.working_dir,
            user=config.user,
        )
        output = Output(
            prefixes=self._prefixes(envs),
            stdout_filters=tuple(config.duplicate_stdout_filters),
            stderr_filters=tuple(config.duplicate_stderr_filters),
        )
        return WarmContext(self._warm, what, commands, envs, self._logs, output)

    def _say(self, message: Message) -> None:
        with contextlib.suppress(ChannelClosed):  # found out, and acted on, where the loop reads
            self._handler.channel.send(message)


def first_failure(failures: dict[int, ProcessFailure]) -> ProcessFailure:
    """The root cause: the earliest by the time in its error file (torch's own rule)."""
    return min(failures.values(), key=lambda failure: failure.timestamp)


def describe(failure: ProcessFailure, first_rank: int) -> Message:
    """The failure in the channel's terms, bounded."""
    message, traceback = str(failure.message), ""
    details = failure.error_file_data.get("message") if isinstance(failure.error_file_data, dict) else None
    if isinstance(details, dict):
        traceback = str(details.get("extraInfo", {}).get("py_callstack", ""))
        message = str(details.get("message", message))
    elif failure.exitcode > 0:
        message = "it ended by itself and left no traceback"
    return {
        "rank": first_rank + failure.local_rank,
        "local_rank": failure.local_rank,
        "exit_code": failure.exitcode,
        "message": message[:MESSAGE_LIMIT],
        "traceback": traceback[-TRACEBACK_LIMIT:],
    }


def run_agent(config: AgentConfig) -> None:
    """The agent process: connects to the daemon and the warm server, and runs until the daemon ends it."""
    try:
        agent = _connect(config)
    except (ChannelClosed, ValueError, KeyError, OSError) as error:
        log.error("elasticd: job %s cannot be started on node %s: %s", config.job_id, config.node_id, error)
        raise SystemExit(CANNOT_RUN) from None
    try:
        agent.run()
    except (ChannelClosed, RendezvousConnectionError, RendezvousGracefulExitError) as error:
        log.info("agent ends: %s", error)


def _connect(config: AgentConfig) -> NodeAgent:
    """ValueError when ``nproc_per_node`` means nothing on this node, KeyError when there is no such user."""
    nproc = determine_local_world_size(config.nproc_per_node)
    ranks = {int(rank) for rank in config.local_ranks_filter.split(",") if rank.strip()}
    redirects, tee = Std.from_str(config.redirects), Std.from_str(config.tee)
    logs = RoundLogs(config.log_dir, redirects, tee, ranks or None, config.user)
    channel, warm = Channel.connect(config.daemon_socket), Channel.connect(config.warm_socket)
    handler = DaemonRendezvousHandler(
        channel, job_id=config.job_id, node_id=NodeId(config.node_id), nproc=nproc, connect=False, asks=False
    )
    handler.hello(os.getpid())
    spec = WorkerSpec(
        role=config.role,
        local_world_size=nproc,
        rdzv_handler=handler,
        entrypoint=config.command[0],
        max_restarts=config.max_restarts,
        event_log_handler=config.event_log_handler,
        virtual_local_rank=config.virtual_local_rank,
    )
    return NodeAgent(spec, logs, config, handler, warm)
