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
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from string import Template
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import Std, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError
from torch.distributed.elastic.utils.api import macros
from torch.distributed.run import determine_local_world_size

from elasticd.channel import Channel, Message
from elasticd.core.model import NodeId
from elasticd.errors import ChannelClosed
from elasticd.supervisor.context import WarmContext, WorkerCommand
from elasticd.supervisor.handler import DaemonRendezvousHandler
from elasticd.supervisor.logs import RoundLogs

log = logging.getLogger(__name__)

MESSAGE_LIMIT = 4096
TRACEBACK_LIMIT = 32768


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
    warm: bool = True
    virtual_local_rank: bool = False
    duplicate_stdout_filters: tuple[str, ...] = ()
    duplicate_stderr_filters: tuple[str, ...] = ()
    event_log_handler: str = "null"

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
        super().__init__(spec, logs, log_line_prefix_template=config.log_line_prefix_template or None)
        self._config, self._handler, self._logs, self._warm = config, handler, logs, warm
        self._reported = 0  # the round whose end has been reported
        self._result: RunResult | None = None  # what torch's own events are made from

    # --- the loop ---

    def _invoke_run(self, role: str = "default") -> RunResult:  # noqa: ARG002 - torch's signature
        group = self._worker_group
        while not self._handler.is_closed():
            if group.state in (WorkerState.INIT, WorkerState.STOPPED) or self._handler.has_newer_round:
                self._stop(group, self._config.stop_timeout_s)
                self._initialize_workers(group)
                self._handler.offer_next_store()
            self._wait_for_something()
            self._handler.drain()
            if self._handler.must_stop:
                self._stop(group, self._handler.stop_timeout_s)
            if group.state is WorkerState.HEALTHY:
                self._look_at_workers(group)
        self._stop(group, self._handler.stop_timeout_s)
        return self._result or self._stopped_result(group)

    def _wait_for_something(self) -> None:
        """Sleeps until the daemon speaks or a worker ends."""
        if self._handler.has_newer_round or self._warm.pending or self._handler.channel.pending:
            return
        watched: list[Any] = [self._handler.channel, self._warm]
        pidfds = self._pidfds() if self._worker_group.state is WorkerState.HEALTHY else []
        try:
            select.select([*watched, *pidfds], [], [])
        finally:
            for fd in pidfds:
                os.close(fd)

    def _pidfds(self) -> list[int]:
        if not isinstance(self._pcontext, SubprocessContext):
            return []
        found = []
        for pid in self._pcontext.pids().values():
            with contextlib.suppress(ProcessLookupError):
                found.append(os.pidfd_open(pid))
        return found

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
            self._result = self._stopped_result(group)
            self._say({"type": "workers_succeeded", "round": number})
            return
        first = first_failure(result.failures)
        failure = describe(first, self._handler.seat().first_rank)
        self._say({"type": "workers_failed", "round": number, "failure": failure})
        self._stop(group, self._config.stop_timeout_s, state=WorkerState.FAILED)

    def _stopped_result(self, group: WorkerGroup) -> RunResult:
        return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(w.global_rank for w in group.workers))

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
        context = self._warm_context(commands, envs) if self._config.warm else self._plain_context(commands, envs)
        context.start()
        self._pcontext = context
        pids = context.pids()
        self._say({"type": "workers_started", "round": current.number, "pids": list(pids.values())})
        return pids

    def _environment(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """torchrun's list (LocalElasticAgent._start_workers), and ours. The restart count is the job's."""
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
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.getenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            "ELASTICD_SOCKET": self._config.daemon_socket,
            "ELASTICD_JOB_ID": self._config.job_id,
            "ELASTICD_ROUND": str(current.number),
            "ELASTICD_NODE_ID": self._config.node_id,
        }
        self._set_local_rank_env(env, worker.local_rank, spec)  # type: ignore[arg-type]
        return env

    def _command(self, local_rank: int) -> tuple[str, ...]:
        first, *rest = self._config.command
        return (first, *macros.substitute(list(rest), str(local_rank)))

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

    def _warm_context(self, commands: dict[int, tuple[str, ...]], envs: dict[int, dict[str, str]]) -> WarmContext:
        what = WorkerCommand(
            command=self._config.command,
            is_module=self._config.is_module,
            no_python=self._config.no_python,
            working_dir=self._config.working_dir,
            user=self._config.user,
        )
        return WarmContext(self._warm, what, commands, envs, self._logs, self._prefixes(envs), self._filters())

    def _plain_context(
        self, commands: dict[int, tuple[str, ...]], envs: dict[int, dict[str, str]]
    ) -> SubprocessContext:
        """A new interpreter for each worker, as torchrun starts them."""
        interpreter = [] if self._config.no_python else [sys.executable, "-u"]
        interpreter += ["-m"] if self._config.is_module else []
        full = {rank: (*interpreter, *command) for rank, command in commands.items()}
        if self._config.working_dir:
            os.chdir(self._config.working_dir)
        return SubprocessContext(
            name=self._worker_group.spec.role,
            entrypoint=full[0][0],
            args={rank: command[1:] for rank, command in full.items()},
            envs=envs,
            logs_specs=self._logs,
            log_line_prefixes=self._prefixes(envs),
            **self._filters(),
        )

    def _filters(self) -> dict[str, Any]:
        """torchrun's --duplicate-stdout-filters and --duplicate-stderr-filters, as torch's contexts take them."""
        return {
            "duplicate_stdout_filters": list(self._config.duplicate_stdout_filters),
            "duplicate_stderr_filters": list(self._config.duplicate_stderr_filters),
        }

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
        channel = Channel.connect(config.daemon_socket)
        warm = Channel.connect(config.warm_socket)
        nproc = determine_local_world_size(config.nproc_per_node)
        handler = DaemonRendezvousHandler(
            channel, job_id=config.job_id, node_id=NodeId(config.node_id), nproc=nproc, connect=False, asks=False
        )
        handler.hello(os.getpid())
        agent = _make_agent(config, handler, warm, nproc)
        agent.run()
    except (ChannelClosed, RendezvousConnectionError, RendezvousGracefulExitError) as error:
        log.info("agent ends: %s", error)


def _make_agent(config: AgentConfig, handler: DaemonRendezvousHandler, warm: Channel, nproc: int) -> NodeAgent:
    unused: Callable[[], None] = lambda: None  # noqa: E731 - WorkerSpec wants an entry point; ours is the command
    spec = WorkerSpec(
        role=config.role,
        local_world_size=nproc,
        rdzv_handler=handler,
        entrypoint=unused,
        max_restarts=config.max_restarts,
        virtual_local_rank=config.virtual_local_rank,
        event_log_handler=config.event_log_handler,
    )
    ranks = {int(rank) for rank in config.local_ranks_filter.split(",") if rank.strip()}
    logs = RoundLogs(config.log_dir, Std.from_str(config.redirects), Std.from_str(config.tee), ranks or None)
    return NodeAgent(spec, logs, config, handler, warm)
