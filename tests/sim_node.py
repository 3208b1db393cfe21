"""One node of a simulated cluster: a real machine, and what carries out its effects in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sim_store import TTL_S

from elasticd.core import keys, messages
from elasticd.core.machine import Machine
from elasticd.core.messages import Write
from elasticd.core.model import JobId, NodeId, Round, StepLimits
from elasticd.core.records import to_json
from elasticd.core.stages import Stage
from elasticd.core.view import Entry

if TYPE_CHECKING:
    from simulation import Sim


@dataclass
class SimNode:
    sim: Sim
    machine: Machine
    nproc: int = 1
    alive: bool = True
    frozen: bool = False
    cut: bool = False
    lease: int = 0
    store_down: bool = False
    agent: bool = False
    round: Round | None = None
    workers: int = 0  # number of the round whose workers run here; 0: none
    sessions: bool = False
    #: Seconds per micro-batch.
    speed: float = 0.01
    #: Micro-batches of a step that a rank takes at most, where the simulation says how many a step has.
    cap: int = 1_000_000
    exit_status: int | None = None
    peers: frozenset = frozenset()
    up: set = field(default_factory=set)
    ports: itertools.count = field(default_factory=lambda: itertools.count(1000))
    reports: list = field(default_factory=list)
    boundary: bool = False
    backlog: list = field(default_factory=list)

    @property
    def node_id(self) -> NodeId:
        return self.machine.node.node_id

    @property
    def reachable(self) -> bool:
        return self.alive and not self.cut and not self.frozen

    # events reach the machine; a frozen node sees them when it thaws
    def post(self, event: messages.Event) -> None:
        if not self.alive:
            return
        if self.frozen:
            self.backlog.append(event)
            return
        for effect in self.machine.handle(event, self.sim.now):
            self.perform(effect)
        if self.machine.wake_at is not None:
            self.sim.at(max(self.machine.wake_at, self.sim.now + 1e-6), self._tick(self.machine.wake_at))
        self.sim.check()

    def _tick(self, wanted: float) -> Callable[[], None]:
        return lambda: self.post(messages.Ticked()) if self.machine.wake_at == wanted else None

    def perform(self, effect: messages.Effect) -> None:
        sim = self.sim
        match effect:
            case messages.Register() | messages.PutMember() | messages.DeleteMember() | messages.ProposeRound():
                sim.after(0.0013, lambda: self.store_write(effect))
            case messages.Reload():
                sim.after(0.002, self.load)
            case messages.WatchPeers():
                self.peers = effect.peers
                sim.after(0.002, sim.relink)
            case messages.StartAgent():
                self.agent = True
                sim.after(sim.random.uniform(0.02, 0.3), self.agent_ready)
            case messages.StartRound():
                self.start_round(effect.round)
            case messages.StopWorkers():
                self.workers, self.round = 0, None
            case messages.EndAgent():
                self.workers, self.agent, self.round = 0, False, None
                sim.after(0.01, lambda: self.post(messages.AgentExited(job_id=effect.job_id)))
            case messages.RequestBoundary():
                self.boundary = True
                sim.after(0.06, lambda: sim.boundary(effect.round_number))
            case messages.Report():
                self.reports.append((sim.now, effect.event, dict(effect.details)))
            case messages.Exit():
                self.exit_status = effect.status
                self.alive = False
                sim.store.leases.pop(self.lease, None)

    def agent_ready(self) -> None:
        if self.agent:
            job = self.machine.task.spec.job_id if self.machine.task else JobId("job")
            self.post(messages.AgentReady(job_id=job, store_port=next(self.ports), nproc=self.nproc))

    def start_round(self, current: Round) -> None:
        assert self.machine.stage is Stage.RUNNING
        self.round, self.workers, self.boundary = current, 0, False

        def started() -> None:
            if self.alive and self.round is current and self.machine.task:
                self.workers = current.number
                self.post(messages.WorkersStarted(round_number=current.number))
                self.agent_ready()
                seat = current.seat_of(self.node_id)
                if self.sessions and seat:
                    self.join_session(current, seat.first_rank)

        self.sim.after(0.02, started)

    def join_session(self, current: Round, rank: int) -> None:
        """Workers whose caps cannot hold a step end with a ConfigError, each by itself."""
        whole = self.sim.micro_batches
        limits = StepLimits(micro_batches=whole, caps=(min(self.cap, whole),)) if whole else None
        self.post(messages.SessionJoined(round_number=current.number, rank=rank, limits=limits))
        if sum(self.sim.caps(current)) < whole:
            self.sim.after(0.01, lambda: self.sim.fail_worker(self.node_id, current.number))

    # the store, as this node reaches it
    def store_write(self, effect: messages.Effect) -> None:
        if not self.alive:
            return
        kinds = {messages.Register: Write.REGISTER, messages.ProposeRound: Write.ROUND}
        write = kinds.get(type(effect), Write.MEMBER)
        if not self.reachable or not self.sim.store.up:
            self.lost()
            self.sim.after(1.0, lambda: self.post(messages.WriteFinished(write=write, succeeded=False, known=False)))
            return
        succeeded = self._write(effect)
        self.post(
            messages.WriteFinished(
                write=write, succeeded=succeeded, revision=self.sim.store.revision if succeeded else 0
            )
        )

    def _write(self, effect: messages.Effect) -> bool:
        store, me = self.sim.store, self.node_id
        match effect:
            case messages.Register():
                if self.lease not in store.leases:
                    self.lease = store.grant()
                store.apply({keys.node(me): (to_json(self.machine.node), self.lease)}, [])
            case messages.PutMember():
                held = store.kv.get(keys.node(me))
                if self.lease not in store.leases or held is None or held.create != effect.node_create_revision:
                    return False
                store.apply({keys.member(effect.job_id, me): (to_json(effect.member), self.lease)}, [])
            case messages.DeleteMember():
                store.apply({}, [keys.member(effect.job_id, me)])
            case messages.ProposeRound():
                return self._propose(effect)
        return True

    def _propose(self, effect: messages.ProposeRound) -> bool:
        store, key = self.sim.store, keys.round_(effect.job_id)
        held = store.kv.get(key)
        if (held.mod if held else 0) != effect.expected_mod_revision:
            return False
        for guard in effect.guards:
            found = store.kv.get(guard.key)
            if (found.create if found else 0) != guard.create_revision:
                return False
        for mark in effect.marks:
            found = store.kv.get(mark.key)
            if mark.expected_mod_revision not in (None, found.mod if found else 0):
                return False
        puts = {key: (to_json(effect.round), 0)}
        for mark in effect.marks:
            puts[mark.key] = (to_json(mark.record), store.grant(mark.ttl_s) if mark.ttl_s else 0)
        if effect.marks:
            self.sim.evicted(effect)
        if effect.spec is not None:
            puts[keys.spec(effect.job_id)] = (to_json(effect.spec), 0)
        store.apply(puts, list(effect.delete_keys))
        return True

    def load(self) -> None:
        if not self.alive:
            return
        if not self.reachable or not self.sim.store.up:
            self.lost()
            return
        if self.store_down:
            self.store_down = False
            self.post(messages.StoreBack())
        store = self.sim.store
        entries = tuple(
            Entry(key=k, value=h.value, create_revision=h.create, mod_revision=h.mod) for k, h in store.kv.items()
        )
        self.post(messages.SnapshotLoaded(entries=entries, revision=store.revision))

    def lost(self) -> None:
        if not self.store_down:
            self.store_down = True
            self.post(messages.StoreLost())

    def keepalive(self) -> None:
        if not self.alive or self.frozen:
            return
        if not self.reachable or not self.sim.store.up:
            self.lost()
        elif self.store_down:
            self.load()
        elif self.lease in self.sim.store.leases:
            self.sim.store.leases[self.lease] = self.sim.now + TTL_S
        elif self.lease:
            self.lease = 0
            self.post(messages.LeaseLost())
            self.load()
