"""A cluster in virtual time: real machines, a store, links and agents that follow the rules of the real ones.

Deterministic by its seed. Latencies are those of ETCD.md and TORCH.md. Invariants are checked after every event.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

from sim_node import SimNode
from sim_store import TTL_S, SimStore

from elasticd.core import keys, messages
from elasticd.core.balance import choose_first
from elasticd.core.machine import Machine, Settings
from elasticd.core.messages import Down
from elasticd.core.model import BootId, Capacity, Failure, JobId, JobSpec, Node, NodeId, Round, Topology
from elasticd.core.records import from_json
from elasticd.core.stages import Stage
from elasticd.core.stragglers import Eviction, Grounds, Measured, Policy
from elasticd.core.view import Entry

#: Heartbeats come every 0.1 s; a link is silent after 0.5 s.
SILENCE_S = {Down.REFUSED: 0.05, Down.SILENT: 0.5}


def lost(node_id: NodeId, boot_id: BootId, how: Down) -> messages.PeerDown:
    return messages.PeerDown(node_id=node_id, boot_id=boot_id, how=how, silence_s=SILENCE_S[how])


class Sim:
    def __init__(
        self,
        seed: int = 0,
        *,
        spec: JobSpec | None = None,
        nproc: int = 1,
        policy: Policy | None = None,
        micro_batches: int = 0,
    ) -> None:
        """``micro_batches`` of a step, with one rank a node; 0: scripts without caps, of four for each rank."""
        self.random, self.now, self.nproc = random.Random(seed), 0.0, nproc
        self.spec = spec or JobSpec(job_id=JobId("job"), min_nodes=1, max_nodes=8, command=("x",))
        self._heap: list = []
        self._order = itertools.count()
        self.store = SimStore(self)
        self.nodes: dict[str, SimNode] = {}
        self.apart: set[frozenset[str]] = set()  # pairs that do not hear each other
        self._boots = itertools.count(1)
        self.policy, self.micro_batches = policy, micro_batches
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
        """Sessions that step tell each other their speeds, some noise included; shares are equal but for the caps."""
        current = self.round()
        if current is None or not self.world() or not all(self.nodes[s.node_id].sessions for s in current.seats):
            return
        if any(self.nodes[seat.node_id].boundary for seat in current.seats):
            return
        seconds = []
        for seat in current.seats:
            seconds += [self.nodes[seat.node_id].speed * self.random.uniform(0.9, 1.1)] * seat.nproc
        caps = self.caps(current) if self.micro_batches else ()
        shares = choose_first(self.micro_batches, caps) if caps else tuple(4 for _ in seconds)
        measured = Measured(seconds=tuple(seconds), shares=shares, balanced=True, caps=caps)
        for seat in current.seats:
            event = messages.SpeedsMeasured(round_number=current.number, measured=measured)
            self.after(0.001, lambda node=self.nodes[seat.node_id], event=event: node.post(event))

    def caps(self, current: Round) -> tuple[int, ...]:
        return tuple(min(self.nodes[seat.node_id].cap, self.micro_batches) for seat in current.seats)

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
