"""A cluster in virtual time: real machines, a store, links and agents that follow the rules of the real ones.

Deterministic by its seed. Latencies are those of ETCD.md and TORCH.md. Invariants are checked after every event.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from elasticd.core import keys, messages
from elasticd.core.machine import Machine, Settings
from elasticd.core.messages import Down, Write
from elasticd.core.model import BootId, Capacity, Failure, JobId, JobSpec, Node, NodeId, Round, Topology
from elasticd.core.records import from_json, to_json
from elasticd.core.stages import Stage
from elasticd.core.stragglers import Eviction, Grounds, Measured, Policy
from elasticd.core.view import Entry

TTL_S = 5.0
#: Heartbeats come every 0.1 s; a link is silent after 0.5 s.
SILENCE_S = {Down.REFUSED: 0.05, Down.SILENT: 0.5}


@dataclass
class Held:
    value: str
    create: int
    mod: int
    lease: int


def lost(node_id: NodeId, boot_id: BootId, how: Down) -> messages.PeerDown:
    return messages.PeerDown(node_id=node_id, boot_id=boot_id, how=how, silence_s=SILENCE_S[how])


class SimStore:
    """Revisions, leases and guarded transactions, as etcd has them."""

    def __init__(self, sim: Sim) -> None:
        self.sim, self.kv, self.revision, self.leases = sim, {}, 1, {}
        self.up = True
        self.rounds: dict[tuple[str, int], str] = {}
        self._ids = itertools.count(1)

    def grant(self, ttl_s: float = TTL_S) -> int:
        lease = next(self._ids)
        self.leases[lease] = self.sim.now + ttl_s
        return lease

    def apply(self, puts: dict[str, tuple[str, int]], deletes: list[str]) -> None:
        self.revision += 1
        entries = []
        for key, (value, lease) in puts.items():
            old = self.kv.get(key)
            self.kv[key] = Held(value, old.create if old else self.revision, self.revision, lease)
            entries.append(Entry(key=key, value=value, create_revision=self.kv[key].create, mod_revision=self.revision))
            if key.endswith("/round"):
                self._check_round(key, value)
        entries += [Entry(key=key, value=None) for key in deletes if self.kv.pop(key, None)]
        self.sim.broadcast(tuple(entries), self.revision)

    def _check_round(self, key: str, value: str) -> None:
        written = from_json(Round, value)
        seats = (written.number, tuple((s.node_id, s.boot_id) for s in written.seats))
        known = self.rounds.setdefault((key, written.number), repr(seats))
        assert known == repr(seats), f"two worlds in round {written.number}"
        ranks = [r for s in written.seats for r in range(s.first_rank, s.first_rank + s.nproc)]
        assert ranks == list(range(written.world_size))
        assert len({s.node_id for s in written.seats}) == len(written.seats)
        assert written.world_size % self.sim.spec.ranks_per_replica == 0

    def expire(self) -> None:
        if not self.up:
            return
        dead = [lease for lease, at in self.leases.items() if at <= self.sim.now]
        for lease in dead:
            del self.leases[lease]
            doomed = [key for key, held in self.kv.items() if held.lease == lease]
            if doomed:
                self.apply({}, doomed)


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
                    self.post(messages.SessionJoined(round_number=current.number, rank=seat.first_rank))

        self.sim.after(0.02, started)

    # the store, as this node reaches it
    def store_write(self, effect: messages.Effect) -> None:
        if not self.alive:
            return
        kinds = {messages.Register: Write.REGISTER, messages.ProposeRound: Write.ROUND}
        write = kinds.get(type(effect), Write.MEMBER)
        if not self.reachable or not self.sim.store.up:
            self.lost()
            self.sim.after(
                1.0, lambda: self.post(messages.WriteFinished(write=write, succeeded=False, known=False))
            )
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


class Sim:
    def __init__(
        self, seed: int = 0, *, spec: JobSpec | None = None, nproc: int = 1, policy: Policy | None = None
    ) -> None:
        self.random, self.now, self.nproc = random.Random(seed), 0.0, nproc
        self.spec = spec or JobSpec(job_id=JobId("job"), min_nodes=1, max_nodes=8, command=("x",))
        self._heap: list = []
        self._order = itertools.count()
        self.store = SimStore(self)
        self.nodes: dict[str, SimNode] = {}
        self.apart: set[frozenset[str]] = set()  # pairs that do not hear each other
        self._boots = itertools.count(1)
        self.policy = policy
        #: (when, node, spare) of each eviction.
        self.evictions: list[tuple[float, NodeId, str]] = []
        self._every(0.3, self._keep)
        self._every(1.0, self._measure)

    # time
    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when, next(self._order), action))

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s * self.random.uniform(0.8, 1.2), action)

    def run(self, seconds: float = 5.0, until: Callable[[], bool] = lambda: False) -> bool:
        """True as soon as the condition holds; False when the time is over."""
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            if until():
                return True
            self.now, _, action = heapq.heappop(self._heap)
            action()
        self.now = end
        return until()

    def _every(self, seconds: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self.at(self.now + seconds, again)

        self.at(self.now + seconds, again)

    def _keep(self) -> None:
        for node in list(self.nodes.values()):
            node.keepalive()
        self.store.expire()

    def _measure(self) -> None:
        """Sessions that step tell each other their speeds, some noise included; all micro-batches are shared equally."""
        current = self.round()
        if current is None or not self.world() or not all(self.nodes[s.node_id].sessions for s in current.seats):
            return
        if any(self.nodes[seat.node_id].boundary for seat in current.seats):
            return
        seconds = []
        for seat in current.seats:
            seconds += [self.nodes[seat.node_id].speed * self.random.uniform(0.9, 1.1)] * seat.nproc
        shares = tuple(4 for _ in seconds)
        measured = Measured(seconds=tuple(seconds), shares=shares, balanced=True)
        for seat in current.seats:
            event = messages.SpeedsMeasured(round_number=current.number, measured=measured)
            self.after(0.001, lambda node=self.nodes[seat.node_id], event=event: node.post(event))

    def evicted(self, effect: messages.ProposeRound) -> None:
        """What holds of every eviction, when it is written."""
        record = next(mark.record for mark in effect.marks if isinstance(mark.record, Eviction))
        assert len(effect.round.seats) >= self.spec.min_nodes, "an eviction broke the minimum"
        standing = [key for key in self.store.kv if key.startswith(keys.EVICTIONS)]
        nodes = [key for key in self.store.kv if key.startswith(keys.NODES)]
        policy = self.policy or Policy()
        assert len(standing) < policy.allowed(len(nodes)), "an eviction beyond the budget"
        if self.evictions and record.grounds is Grounds.SLOW:
            assert self.now - self.evictions[-1][0] >= self.spec.straggler_after_s, "an eviction within the cool-down"
        assert effect.round.seat_of(record.node_id) is None
        self.evictions.append((self.now, record.node_id, record.spare))

    # nodes
    def add(
        self, name: str, *, sessions: bool = False, fixed: bool = True, zone: str = "", nproc: int | None = None
    ) -> SimNode:
        node = Node(
            node_id=NodeId(name),
            boot_id=BootId(f"{name}-{next(self._boots)}"),
            host=name,
            address=name,
            peer_port=1,
            metrics_port=2,
            capacity=Capacity(cpu_count=2, memory_bytes=1),
            topology=Topology(zone=zone),
        )
        policy = {} if self.policy is None else {"stragglers": self.policy}
        machine = Machine(node, Settings(lease_ttl_s=TTL_S, fixed_job=self.spec if fixed else None, **policy))
        made = SimNode(self, machine, sessions=sessions, nproc=nproc or self.nproc)
        self.nodes[name] = made
        self.after(0.002, made.load)
        return made

    def live(self) -> list[SimNode]:
        return [node for node in self.nodes.values() if node.alive]

    def broadcast(self, entries: tuple[Entry, ...], revision: int) -> None:
        for node in self.live():
            if node.machine.view.revision < revision:
                self.at(self.now + 0.0013, lambda node=node: self._deliver(node, entries, revision))

    def _deliver(self, node: SimNode, entries: tuple[Entry, ...], revision: int) -> None:
        hears = node.alive and not node.cut and self.store.up and not node.store_down
        if hears and revision > node.machine.view.revision:
            node.post(messages.KeysChanged(entries=entries, revision=revision))

    # links
    def relink(self) -> None:
        for node in self.live():
            node.up &= {(p.node_id, p.boot_id) for p in node.peers}
            for peer in node.peers:
                other = self.nodes.get(peer.node_id)
                ok = other and other.machine.node.boot_id == peer.boot_id and other.reachable and node.reachable
                ok = ok and frozenset((node.node_id, peer.node_id)) not in self.apart
                if ok and (peer.node_id, peer.boot_id) not in node.up:
                    node.up.add((peer.node_id, peer.boot_id))
                    node.post(messages.PeerUp(node_id=peer.node_id, boot_id=peer.boot_id))

    def _down(self, victim: SimNode, how: Down, boot: str) -> None:
        for node in self.live():
            peer = (victim.node_id, boot)
            if node is not victim and peer in node.up:
                node.up.discard(peer)
                node.post(lost(victim.node_id, BootId(boot), how))

    # faults
    def kill(self, name: str) -> None:
        victim = self.nodes[name]
        victim.alive = False
        boot = victim.machine.node.boot_id
        self.after(0.001, lambda: self._down(victim, Down.REFUSED, boot))
        self._fail_peers(victim)

    def _fail_peers(self, victim: SimNode) -> None:
        number = victim.workers
        for node in self.live():
            if number and node.workers == number and node is not victim:
                self.after(0.05, lambda node=node: self.fail_worker(node.node_id, number))

    def fail_worker(self, name: str, number: int | None = None) -> None:
        node = self.nodes[name]
        number = node.workers if number is None else number
        if node.alive and node.workers == number and number:
            failure = Failure(node_id=node.node_id, rank=0, local_rank=0, exit_code=1, message="boom")
            node.workers = 0
            node.post(messages.WorkersFailed(round_number=number, failure=failure))

    def crash_script(self, name: str) -> None:
        node = self.nodes[name]
        self._fail_peers(node)
        self.fail_worker(name)

    def silence(self, name: str, *, frozen: bool) -> None:
        victim = self.nodes[name]
        victim.frozen, victim.cut = frozen, not frozen
        boot = victim.machine.node.boot_id

        def noticed() -> None:
            if not victim.reachable:
                self._down(victim, Down.SILENT, boot)
                if victim.cut:
                    for peer in list(victim.up):
                        victim.up.discard(peer)
                        victim.post(lost(peer[0], peer[1], Down.SILENT))

        self.at(self.now + 0.5, noticed)

    def partition(self, one: str, other: str) -> None:
        """Two nodes do not hear each other; both still reach everybody else, and the store."""
        self.apart.add(frozenset((one, other)))

        def noticed() -> None:
            for name, peer in ((one, other), (other, one)):
                node, boot = self.nodes[name], self.nodes[peer].machine.node.boot_id
                if (peer, boot) in node.up:
                    node.up.discard((NodeId(peer), boot))
                    node.post(lost(NodeId(peer), boot, Down.SILENT))

        self.at(self.now + 0.5, noticed)

    def reunite(self) -> None:
        self.apart.clear()
        self.after(0.1, self.relink)

    def heal(self, name: str) -> None:
        node = self.nodes[name]
        node.frozen = node.cut = False
        backlog, node.backlog = node.backlog, []
        for event in backlog:
            node.post(event)
        self.after(0.1, self.relink)
        self.after(0.1, node.load)

    def store_away(self) -> None:
        self.store.up = False

    def store_back(self) -> None:
        self.store.up = True
        for lease in self.store.leases:
            self.store.leases[lease] = self.now + TTL_S

    def boundary(self, number: int) -> None:
        for node in self.live():
            if node.workers == number and node.sessions and node.round:
                seat = node.round.seat_of(node.node_id)
                if seat:
                    node.post(messages.BoundaryReached(round_number=number, rank=seat.first_rank, step=7))

    def succeed(self) -> None:
        for node in self.live():
            if node.workers:
                node.post(messages.WorkersSucceeded(round_number=node.workers))

    # what holds
    def round(self, job: str = "job") -> Round | None:
        held = self.store.kv.get(keys.round_(JobId(job)))
        return from_json(Round, held.value) if held else None

    def world(self) -> list[str]:
        """Names of the seats, if every one of them runs the workers of the current round; else empty."""
        current = self.round()
        names = [seat.node_id for seat in current.seats] if current else []
        running = all(self.nodes[n].alive and self.nodes[n].workers == current.number for n in names)
        return list(names) if running else []

    def check(self) -> None:
        for node in self.live():
            if node.frozen or not node.round:
                continue
            known = node.machine.view.job(self.spec.job_id).round
            if known and known.value.number > node.workers > 0 and node.machine.stage is Stage.WAITING:
                raise AssertionError(f"{node.node_id} runs workers of a round that is over")
