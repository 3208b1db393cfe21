"""One node's loop: events in, the machine decides, effects out. The only loop there is.

Runs in the daemon's main thread (serve, run) or in a thread of torchrun's process. Not here: any decision, and how
agents are started (the Launcher that it is given).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from elasticd.channel import Message
from elasticd.cluster.peers import LinkSettings, PeerLinks, probe
from elasticd.cluster.store import Compare, Store
from elasticd.core import keys, messages
from elasticd.core.machine import Machine, Settings
from elasticd.core.messages import Effect, Event, Report
from elasticd.core.model import JobId, JobSpec, Node, Round
from elasticd.core.records import to_plain
from elasticd.daemon.history import History
from elasticd.daemon.local import Caller, LocalServer, Rebalancing
from elasticd.daemon.memory_copies import Place
from elasticd.daemon.memory_files import MemorySettings
from elasticd.daemon.memory_service import MemoryService, World
from elasticd.daemon.storekeeper import StoreKeeper
from elasticd.errors import OperatorError

log = logging.getLogger(__name__)
#: Changes of the world, told even where the rest is not.
world_log = logging.getLogger(f"{__name__}.world")


class Launcher(Protocol):
    """Starts and ends the agent of a job. torchrun brings its own agent: its launcher does nothing."""

    def start_agent(self, spec: JobSpec) -> None: ...

    def end_agent(self, job_id: JobId, timeout_s: float) -> None: ...


class Observer(Protocol):
    """Hears what happened, for the metrics. Must not raise."""

    def reported(self, report: Report, machine: Machine, now: float) -> None: ...

    def stepped(self, rank: int, round_number: int, message: Message) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a node is made of. ``peer_port`` 0 lets the kernel choose."""

    node: Node
    settings: Settings
    links: LinkSettings
    socket_path: Path
    history_file: str = ""
    memory: MemorySettings | None = None


class NodeLoop:
    """Make it inside the running event loop; ``finished`` yields the exit status."""

    def __init__(self, setup: Setup, store: Store, launcher: Launcher, observer: Observer) -> None:
        self.setup = setup
        self._loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[int] = self._loop.create_future()
        self._store, self.launcher, self._observer = store, launcher, observer
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False
        self._parts = contextlib.AsyncExitStack()
        self._inbox: list[Event] = []
        self._inbox_lock = threading.Lock()
        self.memory = self._make_memory(setup)
        self.local = LocalServer(setup.node.node_id, self.post, self._observe, self, self._rebalanced, self.memory)

    async def start(self) -> None:
        """Listens, then registers. OperatorError when it cannot."""
        node = self.setup.node
        self._parts.callback(self._store.close)
        self.peers = PeerLinks(node.node_id, node.boot_id, self.setup.links, self.post)
        self._parts.push_async_callback(self.peers.close)
        peer_port = await self.peers.listen(node.address, node.peer_port)
        node = replace(node, peer_port=peer_port)
        if self.memory is not None:
            self._parts.push_async_callback(self.memory.close)
            assert self.setup.memory is not None
            node = replace(node, memory_port=self.memory.listen(node.address, self.setup.memory.port))
        self._parts.push_async_callback(self.local.close)
        await self.local.listen(self.setup.socket_path)
        self.history = History(self.setup.history_file, node)
        self._parts.callback(self._end_history)
        self.machine = Machine(node, self.setup.settings)
        ttl_s = max(1, round(self.setup.settings.lease_ttl_s))
        self.keeper = StoreKeeper(self._store, node, ttl_s, self.post_threadsafe, self._fail_threadsafe, self._is_alive)
        self.history.write("started")
        self.keeper.start()
        self._parts.push_async_callback(self._loop.run_in_executor, None, self.keeper.close)

    async def close(self) -> None:
        """Ends what start() has begun, however far it came; the lease is given back first."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
        await self._parts.aclose()

    def _end_history(self) -> None:
        self.history.write("stopped")
        self.history.close()

    def post(self, event: Event) -> None:
        """From the loop's thread: the one way in."""
        if self._closing:
            return
        now = time.monotonic()
        for effect in self.machine.handle(event, now):
            self._perform(effect, now)
        self._schedule(now)

    def post_threadsafe(self, event: Event) -> None:
        """From any thread, in order. What piles up while the loop is busy is decided upon once."""
        with self._inbox_lock:
            self._inbox.append(event)
            first = len(self._inbox) == 1
        if first and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take_inbox)

    def _take_inbox(self) -> None:
        with self._inbox_lock:
            events, self._inbox = self._inbox, []
        for event in merge_changes(events):
            self.post(event)

    def agent_missed(self, pid: int, reason: str) -> None:
        """The launcher's agent is gone; if it never said hello here, nobody else will tell the machine."""
        task = self.machine.task
        if task is not None and not self.local.has_met(pid):
            self.post(messages.AgentExited(job_id=task.spec.job_id, reason=reason))

    def _schedule(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.machine.wake_at is not None:
            delay_s = max(0.0, self.machine.wake_at - now)
            self._timer = self._loop.call_later(delay_s, self.post, messages.Ticked())

    def _perform(self, effect: Effect, now: float) -> None:
        match effect:
            case messages.Register() | messages.PutMember() | messages.DeleteMember() | messages.ProposeRound():
                self.keeper.write(effect)
            case messages.Reload():
                self.keeper.reload()
            case messages.WatchPeers():
                self.peers.watch(effect.peers)
            case messages.StartAgent():
                self.launcher.start_agent(effect.spec)
            case messages.StartRound():
                self._start_round(effect.round)
            case messages.StopWorkers():
                self.local.tell_agent({"type": "stop", "round": effect.round_number, "timeout_s": effect.timeout_s})
            case messages.EndAgent():
                self._end_agent(effect)
            case messages.RequestBoundary():
                wanted = {"type": "boundary_wanted", "round": effect.round_number, "need": effect.need.value}
                self.local.tell_workers(effect.round_number, wanted)
            case Report():
                self._report(effect, now)
            case messages.Exit():
                self._finish(effect)

    def _finish(self, effect: messages.Exit) -> None:
        if self.finished.done():
            return
        if effect.message:
            self.finished.set_exception(OperatorError(effect.message))
        else:
            self.finished.set_result(effect.status)

    def _start_round(self, current: Round) -> None:
        task = self.machine.task
        if self.memory is not None and task is not None:
            self.memory.enter_round(task.spec.job_id, task.spec.user)
        self.local.tell_agent({"type": "round", "round": to_plain(current)})

    def _end_agent(self, effect: messages.EndAgent) -> None:
        if self.memory is not None:
            self.memory.end_job()
        told = self.local.tell_agent({"type": "exit", "timeout_s": effect.timeout_s})
        self.launcher.end_agent(effect.job_id, effect.timeout_s)
        if not told:
            gone = messages.AgentExited(job_id=effect.job_id, reason="no agent was connected")
            self._loop.call_soon(self.post, gone)

    def _report(self, report: Report, now: float) -> None:
        details = dict(report.details)
        self.history.write(report.event, **details)
        brief = {name: _brief(value) for name, value in details.items()}
        logger = world_log if report.event in _WORLD_EVENTS else log
        level = logging.WARNING if report.event in _WARNINGS else logging.INFO
        logger.log(level, "%s %s", report.event, " ".join(f"{name}={value}" for name, value in brief.items()))
        self._observer.reported(report, self.machine, now)

    def _observe(self, caller: Caller, message: Message) -> None:
        if message["type"] == "step":
            self._observe_step(caller, message)
            return
        details = (("job", caller.job_id), ("rank", caller.rank), ("message", message))
        self._observer.reported(Report(event=message["type"], details=details), self.machine, time.monotonic())

    def _observe_step(self, caller: Caller, message: Message) -> None:
        self.history.write(
            "step",
            job=caller.job_id,
            round=caller.round_number,
            rank=caller.rank,
            step=message["step"],
            metrics=message.get("metrics", {}),
        )
        self._observer.stepped(caller.rank, caller.round_number, message)

    def _rebalanced(self, caller: Caller, what: Rebalancing) -> None:
        details = (
            *(("job", caller.job_id), ("round", what.round_number), ("step", what.step), ("shares", list(what.shares))),
            *(("reason", what.reason), ("before_s", what.before_s), ("after_s", what.after_s)),
        )
        self._report(Report(event="rebalanced", details=details), time.monotonic())

    def _make_memory(self, setup: Setup) -> MemoryService | None:
        if setup.memory is None:
            return None
        return MemoryService(
            setup.memory, setup.node.node_id, setup.links, world=self._memory_world, tell=self._memory_told
        )

    def _memory_world(self) -> World:
        """The newest round that this node knows, and where its nodes serve copies."""
        task, view = self.machine.task, self.machine.view
        current = task.last_round if task is not None else None
        if current is None:
            return World()
        known = {seat.node_id: view.nodes[seat.node_id].value for seat in current.seats if seat.node_id in view.nodes}
        places = {
            node_id: Place(node_id=node_id, address=node.address, port=node.memory_port)
            for node_id, node in known.items()
            if node.memory_port
        }
        return World(seats=current.seats, places=places)

    def _memory_told(self, event: str, details: Mapping[str, object]) -> None:
        """For the history and the metrics: it comes with every few steps, too often for a line in the log."""
        self.history.write(event, **details)
        report = Report(event=event, details=tuple(details.items()))
        self._observer.reported(report, self.machine, time.monotonic())

    def commit(self, caller: Caller, round_number: int, step: int, path: str) -> None:
        """The record of a checkpoint, under the fence of the round that wrote it."""

        def answer(done: bool, reason: str) -> None:  # noqa: FBT001
            self._loop.call_soon_threadsafe(self._committed, caller, round_number, step, done, reason)

        fence = self._fence_of(caller, round_number)
        if isinstance(fence, str):
            answer(False, fence)
            return
        value = json.dumps({"step": step, "path": path, "round": round_number}, sort_keys=True)
        self.keeper.commit(keys.checkpoint(caller.job_id), value, fence, answer)

    def confirm(self, caller: Caller, round_number: int, question: int) -> None:
        """Whether the round stands, for a worker that is about to give a checkpoint its name. ``question``: its id."""

        def answer(stands: bool | None, reason: str) -> None:  # noqa: FBT001
            told = {"type": "fence_result", "id": question, "stands": stands, "reason": reason}
            self._loop.call_soon_threadsafe(caller.send, told)

        fence = self._fence_of(caller, round_number)
        if isinstance(fence, str):
            answer(False, fence)
        else:
            self.keeper.confirm(fence, answer)

    def _fence_of(self, caller: Caller, round_number: int) -> Compare | str:
        """What holds in the store while the caller's round stands; why it does not where this node knows already."""
        held = self.machine.view.job(caller.job_id).round
        task = self.machine.task
        if task is None or task.spec.job_id != caller.job_id:
            return f"this node is not in job {caller.job_id}"
        if task.started_round != round_number or (held and held.value.number != round_number):
            return f"round {round_number} is over"
        return Compare(key=keys.round_(caller.job_id), mod_revision=held.mod_revision if held else 0)

    def _committed(self, caller: Caller, round_number: int, step: int, done: bool, reason: str) -> None:  # noqa: FBT001
        details = (("job", caller.job_id), ("round", round_number), ("step", step), ("committed", done))
        self._report(Report(event="commit", details=details), time.monotonic())
        caller.send({"type": "commit_result", "step": step, "committed": done, "reason": reason})

    def _is_alive(self, other: Node) -> bool:
        """Called from the store's thread: whether the daemon of an earlier registration still answers."""
        links = self.setup.links
        answer = probe(other.address, other.peer_port, links.dead_after_s, links.client_tls)
        return answer == other.boot_id

    def _fail_threadsafe(self, error: OperatorError) -> None:
        def fail() -> None:
            if not self.finished.done():
                self.finished.set_exception(error)

        self._loop.call_soon_threadsafe(fail)


_WORLD_EVENTS = ("round_seen", "fenced", "workers_failed")
_WARNINGS = (
    *("workers_failed", "torch_versions_differ", "lease_lost", "agent_lost"),
    *("straggler_exchanged", "speeds_refused", "gpu_trouble"),
)


def merge_changes(events: Iterable[Event]) -> list[Event]:
    """Changes of the store that follow one another as one: at a thousand nodes each decision costs milliseconds, and
    only the last of them matters."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, messages.KeysChanged) and isinstance(last, messages.KeysChanged):
            merged[-1] = messages.KeysChanged(entries=last.entries + event.entries, revision=event.revision)
        else:
            merged.append(event)
    return merged


def _brief(value: object) -> object:
    if isinstance(value, Round):
        seats = ",".join(f"{seat.node_id}:{seat.first_rank}+{seat.nproc}" for seat in value.seats)
        why = f"; {value.reason}" if value.reason else ""
        return f"{value.number}({value.phase.value}, {value.cause.value}, world {value.world_size}: {seats}{why})"
    return value
