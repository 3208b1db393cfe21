"""The daemon's end of the node-local socket: agents and training scripts connect, their messages become events.

A connection that sends something malformed is closed; it cannot hurt the others. Not here: what events mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from elasticd.channel import MAX_LINE_BYTES, Channel, Message, decode, encode
from elasticd.core import messages
from elasticd.core.messages import Event
from elasticd.core.model import Failure, JobId, NodeId, StepLimits
from elasticd.core.stragglers import Measured
from elasticd.errors import ChannelClosed, OperatorError, ProtocolError

log = logging.getLogger(__name__)


#: Why a worker's request for copies in RAM is refused by a daemon that keeps none.
NO_MEMORY = "this node keeps no copies in RAM: memory.limit_bytes is 0"


class Caller:
    """One connection. ``kind`` is set by its hello."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.kind = ""
        self.job_id = JobId("")
        self.round_number = 0
        self.rank = 0

    def send(self, message: Message) -> None:
        """Never blocks: what a caller does not read, asyncio keeps, and a caller that is gone does not matter."""
        if not self.writer.is_closing():
            self.writer.write(encode(message))


class Commits(Protocol):
    """What a worker asks of its round's fence; each answers by itself."""

    def commit(self, caller: Caller, round_number: int, step: int, path: str) -> None: ...

    def confirm(self, caller: Caller, round_number: int, question: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalancing:
    """What the workers of a job decided about their shares of a step, and why."""

    round_number: int
    step: int
    shares: tuple[int, ...]
    reason: str
    before_s: float
    after_s: float


class MemoryDesk(Protocol):
    """What becomes of workers' requests for copies in RAM, and that a worker is gone."""

    def handle(self, caller: Caller, message: Message) -> None: ...

    def left(self, caller: Caller) -> None: ...


class LocalServer:
    """``post`` takes events; ``commits`` answers by itself.

    ``observe`` gets what is only for the metrics, and ``rebalanced`` what workers decided about their shares.
    """

    def __init__(
        self,
        node_id: NodeId,
        post: Callable[[Event], None],
        observe: Callable[[Caller, Message], None],
        commits: Commits,
        rebalanced: Callable[[Caller, Rebalancing], None],
        memory: MemoryDesk | None = None,
    ) -> None:
        self._node_id, self._post, self._observe, self._commits = node_id, post, observe, commits
        self._rebalanced, self._memory = rebalanced, memory
        self._server: asyncio.Server | None = None
        self._callers: set[Caller] = set()
        self._agent: Caller | None = None
        self._agent_pid = 0

    async def listen(self, path: Path) -> None:
        """OperatorError when the socket cannot be made there."""
        try:
            _make_room(path)
            mask = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(self._serve, str(path), limit=MAX_LINE_BYTES)
            finally:
                os.umask(mask)
        except OSError as error:
            raise OperatorError(
                f"cannot make the socket {path}: {error.strerror or error}; set node.run_dir"
            ) from error

    def tell_agent(self, message: Message) -> bool:
        """Whether an agent was there to be told."""
        if self._agent is None:
            return False
        self._agent.send(message)
        return True

    def has_met(self, agent_pid: int) -> bool:
        """Whether an agent of this process has said hello: the end of its connection tells when it is gone."""
        return agent_pid == self._agent_pid != 0

    def tell_workers(self, round_number: int, message: Message) -> None:
        for caller in self._callers:
            if caller.kind == "worker" and caller.round_number == round_number:
                caller.send(message)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for caller in list(self._callers):
            caller.writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = Caller(reader, writer)
        self._callers.add(caller)
        try:
            while line := await reader.readline():
                self._receive(caller, decode(line))
        except (ProtocolError, ValueError, KeyError, TypeError) as error:
            log.warning("closing a local connection (%s): %s", caller.kind or "no hello", error)
        except (OSError, asyncio.CancelledError):
            pass  # the other end is gone, or the loop ends with callers still connected: nothing more is to be said
        finally:
            self._callers.discard(caller)
            self._gone(caller)
            with contextlib.suppress(OSError):
                writer.close()

    def _gone(self, caller: Caller) -> None:
        if caller is self._agent:
            self._agent = None
            self._post(messages.AgentExited(job_id=caller.job_id, reason="its connection ended"))
        elif caller.kind == "worker":
            if self._memory is not None:
                self._memory.left(caller)
            self._post(messages.SessionLeft(round_number=caller.round_number, rank=caller.rank))

    def _receive(self, caller: Caller, message: Message) -> None:
        match message["type"]:
            case "agent_hello":
                caller.kind, caller.job_id = "agent", JobId(str(message["job"]))
                self._agent, self._agent_pid = caller, int(message.get("pid", 0))
            case "worker_hello":
                caller.kind, caller.job_id = "worker", JobId(str(message["job"]))
                caller.round_number, caller.rank = int(message["round"]), int(message["rank"])
                number, rank = caller.round_number, caller.rank
                self._post(messages.SessionJoined(round_number=number, rank=rank, limits=_limits(message)))
            case _ if caller.kind == "agent":
                self._from_agent(caller, message)
            case _ if caller.kind == "worker":
                self._from_worker(caller, message)
            case other:
                raise ProtocolError(f"{other!r} before a hello")

    def _from_agent(self, caller: Caller, message: Message) -> None:
        match message["type"]:
            case "ready":
                port, nproc = int(message["store_port"]), int(message["nproc"])
                self._post(messages.AgentReady(job_id=caller.job_id, store_port=port, nproc=nproc))
            case "round_wanted":
                self._post(messages.RoundWanted(after=int(message["after"])))
            case "workers_started":
                self._post(messages.WorkersStarted(round_number=int(message["round"])))
            case "workers_succeeded":
                self._post(messages.WorkersSucceeded(round_number=int(message["round"])))
            case "workers_stopped":
                self._post(messages.WorkersStopped(round_number=int(message["round"])))
            case "workers_failed":
                failure = _failure(self._node_id, message["failure"])
                self._post(messages.WorkersFailed(round_number=int(message["round"]), failure=failure))
            case other:
                raise ProtocolError(f"an agent does not say {other!r}")

    def _from_worker(self, caller: Caller, message: Message) -> None:
        number = int(message["round"])
        match message["type"]:
            case "step":
                step, seconds = int(message["step"]), float(message["seconds"])
                self._observe(caller, message)
                self._post(messages.StepCompleted(round_number=number, rank=caller.rank, step=step, seconds=seconds))
            case "pause":
                self._post(messages.PauseReported(round_number=number, rank=caller.rank))
            case "boundary":
                step = int(message["step"])
                self._post(messages.BoundaryReached(round_number=number, rank=caller.rank, step=step))
            case "speeds":
                self._post(messages.SpeedsMeasured(round_number=number, measured=_measured(message)))
            case "rebalanced":
                self._rebalanced(caller, _rebalancing(number, message))
            case "memory" if self._memory is not None:
                self._memory.handle(caller, message)
            case "memory":
                caller.send({"type": "memory_answer", "id": int(message["id"]), "ok": False, "reason": NO_MEMORY})
            case "checkpoint" | "passed_over" | "restored" | "memory_copied":
                self._observe(caller, message)
            case "commit":
                self._commits.commit(caller, number, int(message["step"]), str(message["path"]))
            case "fence":
                self._commits.confirm(caller, number, int(message["id"]))
            case other:
                raise ProtocolError(f"a worker does not say {other!r}")


def _make_room(path: Path) -> None:
    """Removes what a daemon that was killed left there; the socket of one that lives is not ours to take."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ChannelClosed):
        Channel.connect(str(path), timeout_s=1.0).close()
        raise OperatorError(
            f"a daemon listens at {path} already: stop it, or give this one a node.id or a node.run_dir of its own"
        )
    path.unlink(missing_ok=True)


def _rebalancing(round_number: int, plain: Message) -> Rebalancing:
    return Rebalancing(
        round_number=round_number,
        step=int(plain["step"]),
        shares=tuple(int(share) for share in plain["shares"]),
        reason=str(plain["reason"])[:256],
        before_s=float(plain.get("before_s", 0.0)),
        after_s=float(plain.get("after_s", 0.0)),
    )


def _limits(plain: Message) -> StepLimits | None:
    """Of one rank; None where it says nothing of them."""
    micro_batches = int(plain.get("micro_batches", 0))
    if micro_batches < 1:
        return None
    size = max(1, int(plain.get("replica_size", 1)))
    return StepLimits(micro_batches=micro_batches, caps=(max(0, int(plain["cap"])),), replica_size=size)


def _measured(plain: Message) -> Measured:
    return Measured(
        seconds=tuple(float(each) for each in plain["seconds"]),
        shares=tuple(int(share) for share in plain.get("shares", ())),
        balanced=bool(plain.get("balanced", False)),
        caps=tuple(int(cap) for cap in plain.get("caps", ())),
        weights=tuple(float(weight) for weight in plain.get("weights", ())),
    )


def _failure(node_id: NodeId, plain: Message) -> Failure:
    return Failure(
        node_id=node_id,
        rank=int(plain["rank"]),
        local_rank=int(plain["local_rank"]),
        exit_code=int(plain["exit_code"]),
        message=str(plain["message"])[:4096],
        traceback=str(plain.get("traceback", ""))[-32768:],
        final=bool(plain.get("final", False)),
    )
