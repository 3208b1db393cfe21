"""Worker processes as torch's agent sees them (PContext), started by the warm server.

Exits arrive as messages on the server's socket, so the agent sleeps until something happens. A plain start is a fork
too, which then becomes a new interpreter: torch's own SubprocessContext waits 30 s whatever it was told, and leaves
its processes behind when the agent is killed (TORCH.md).
"""

from __future__ import annotations

import signal
import time
from dataclasses import asdict, dataclass

from torch.distributed.elastic.multiprocessing.api import LogsSpecs, PContext, RunProcsResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from elasticd.channel import Channel, Message
from elasticd.supervisor.process import ForkRequest
from elasticd.supervisor.warm import kill_group, signal_group

KILL_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCommand:
    """What all workers of a node have in common."""

    name: str
    is_module: bool = False
    no_python: bool = False
    fresh: bool = False
    working_dir: str = ""
    user: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What becomes of the workers' lines, beside the files that they go to."""

    prefixes: dict[int, str] | None = None
    stdout_filters: tuple[str, ...] = ()
    stderr_filters: tuple[str, ...] = ()


class WarmContext(PContext):
    """One round's workers of this node. ``channel``: this agent's connection to the warm server."""

    def __init__(
        self,
        channel: Channel,
        what: WorkerCommand,
        commands: dict[int, tuple[str, ...]],
        envs: dict[int, dict[str, str]],
        logs_specs: LogsSpecs,
        output: Output,
    ) -> None:
        super().__init__(
            what.name,
            commands[0][0],
            dict(commands),
            envs,
            logs_specs,
            output.prefixes,
            list(output.stdout_filters),
            list(output.stderr_filters),
        )
        self._channel, self._what, self._commands = channel, what, commands
        self._pids: dict[int, int] = {}
        self._statuses: dict[int, int] = {}

    def start(self) -> None:
        """Without torch's signal handlers: the agent's own are set once, and not at every restart (TORCH.md)."""
        self._start()
        for tail in self._tail_logs:
            tail.start()

    def _start(self) -> None:
        for local_rank in range(self.nprocs):
            request = ForkRequest(
                command=self._commands[local_rank],
                is_module=self._what.is_module,
                no_python=self._what.no_python,
                fresh=self._what.fresh,
                working_dir=self._what.working_dir,
                user=self._what.user,
                env=self.envs[local_rank],
                stdout=self.stdouts[local_rank],
                stderr=self.stderrs[local_rank],
            )
            self._channel.send({"type": "fork", "id": local_rank, **asdict(request)})
        while len(self._pids) < self.nprocs:
            message = self._channel.receive()
            assert message is not None
            self._hear(message)

    def hear(self) -> None:
        """Takes in what the warm server has said, without waiting."""
        while (message := self._channel.receive(0.0)) is not None:
            self._hear(message)

    def _hear(self, message: Message) -> None:
        if message["type"] == "forked":
            self._pids[int(message["id"])] = int(message["pid"])
        elif message["type"] == "exited":
            self._statuses[int(message["pid"])] = int(message["status"])

    def exits(self) -> dict[int, int]:
        """Exit codes by local rank, of those that have ended; negative: the signal."""
        return {rank: self._statuses[pid] for rank, pid in self._pids.items() if pid in self._statuses}

    def failures(self) -> dict[int, ProcessFailure]:
        return {rank: self._failure(rank, code) for rank, code in self.exits().items() if code != 0}

    def _failure(self, rank: int, code: int) -> ProcessFailure:
        pid = self._pids[rank]
        try:
            return ProcessFailure(local_rank=rank, pid=pid, exitcode=code, error_file=self.error_files[rank])
        except (ValueError, KeyError, TypeError):  # the worker was killed while it wrote, or wrote something else
            return ProcessFailure(local_rank=rank, pid=pid, exitcode=code, error_file="")

    def _poll(self) -> RunProcsResult | None:
        self.hear()
        failures = self.failures()
        if failures or len(self.exits()) == self.nprocs:
            return RunProcsResult(
                return_values=dict.fromkeys(range(self.nprocs)),
                failures=failures,
                stdouts=self.stdouts,
                stderrs=self.stderrs,
            )
        return None

    def pids(self) -> dict[int, int]:
        return dict(self._pids)

    def _close(self, death_sig: signal.Signals, timeout: float = 30) -> None:
        """The signal to each process group, SIGKILL to what is left after the time-out."""
        for pid in self._running():
            signal_group(pid, death_sig)
        self._wait(timeout)
        for pid in self._running():
            kill_group(pid)
        self._wait(KILL_PATIENCE_S)

    def _running(self) -> list[int]:
        return [pid for pid in self._pids.values() if pid not in self._statuses]

    def _wait(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._running() and (left_s := deadline - time.monotonic()) > 0:
            message = self._channel.receive(left_s)
            if message is not None:
                self._hear(message)
