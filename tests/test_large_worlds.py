"""What only shows when a job has more nodes than a test can start: one machine among hundreds of records."""

from __future__ import annotations

from dataclasses import replace

from elasticd.core import keys, messages
from elasticd.core.machine import Machine, Settings
from elasticd.core.messages import Down, ProposeRound
from elasticd.core.model import (
    BootId,
    Capacity,
    Cause,
    JobId,
    JobSpec,
    Member,
    MemberState,
    Node,
    NodeId,
    Phase,
    Round,
)
from elasticd.core.records import to_json
from elasticd.core.rendezvous import seat_members
from elasticd.core.stages import Stage
from elasticd.core.view import Entry
from elasticd.daemon.node import merge_changes

JOB = JobId("large")
#: etcd's --max-txn-ops, by default.
MOST = 128


def node(number: int) -> Node:
    return Node(
        node_id=NodeId(f"n{number:03}"),
        boot_id=BootId(f"boot{number}"),
        host="h",
        address="10.0.0.1",
        peer_port=7420,
        metrics_port=0,
        capacity=Capacity(cpu_count=1, memory_bytes=1),
    )


def member(one: Node) -> Member:
    return Member(
        node_id=one.node_id,
        boot_id=one.boot_id,
        address=one.address,
        nproc=1,
        state=MemberState.READY,
        store_port=5000 + int(one.node_id[1:]),
    )


class World:
    """A machine, node 0 of ``count``, in a round that all of them hold a seat in."""

    def __init__(self, count: int) -> None:
        self.nodes = [node(number) for number in range(count)]
        members = {one.node_id: member(one) for one in self.nodes}
        spec = JobSpec(job_id=JOB, min_nodes=1, max_nodes=count, command=("x",))
        current = Round(
            number=1, phase=Phase.RUNNING, cause=Cause.START, seats=seat_members(members, None), store_port=1
        )
        values = {keys.spec(JOB): to_json(spec), keys.round_(JOB): to_json(current)}
        for one in self.nodes:
            values |= {
                keys.node(one.node_id): to_json(one),
                keys.member(JOB, one.node_id): to_json(members[one.node_id]),
            }
        self.entries = {
            key: Entry(key=key, value=value, create_revision=at, mod_revision=at)
            for at, (key, value) in enumerate(values.items(), 1)
        }
        self.revision = len(self.entries)
        self.machine = Machine(self.nodes[0], Settings())
        self.handle(messages.SnapshotLoaded(entries=tuple(self.entries.values()), revision=self.revision), 0.0)
        self.handle(messages.AgentReady(job_id=JOB, store_port=5000, nproc=1), 0.0)
        assert self.machine.stage is Stage.RUNNING
        self.handle(messages.WriteFinished(write=messages.Write.MEMBER, succeeded=True), 0.0)
        for peer in self.watched():
            self.handle(messages.PeerUp(node_id=peer, boot_id=self.boot(peer)), 0.0)

    def handle(self, event: messages.Event, now: float) -> list[messages.Effect]:
        return self.machine.handle(event, now)

    def vanish(self, gone: list[NodeId], now: float) -> list[messages.Effect]:
        """Their leases lapse."""
        doomed = [key for one in gone for key in (keys.node(one), keys.member(JOB, one))]
        self.revision += 1
        entries = tuple(Entry(key=key, value=None) for key in doomed)
        return self.handle(messages.KeysChanged(entries=entries, revision=self.revision), now)

    def watched(self) -> list[NodeId]:
        return sorted(peer.node_id for peer in self.machine._watched)

    def boot(self, node_id: NodeId) -> BootId:
        return self.nodes[int(node_id[1:])].boot_id

    def proposals(self, effects: list[messages.Effect]) -> list[ProposeRound]:
        return [effect for effect in effects if isinstance(effect, ProposeRound)]


def test_a_large_world_is_written_by_a_transaction_that_etcd_takes() -> None:
    world = World(300)
    near = set(world.watched())
    gone = [one.node_id for one in world.nodes[1:] if one.node_id not in near][:100]
    found = world.proposals(world.vanish(gone, 10.0) + world.handle(messages.Ticked(), 11.0))
    (proposal,) = found[:1]
    assert len(proposal.round.seats) == 200
    assert not {seat.node_id for seat in proposal.round.seats} & set(gone)
    assert 1 + len(proposal.guards) <= MOST  # and the round record itself
    assert 2 + len(proposal.delete_keys) <= MOST  # and the round, and a spec
    assert proposal.guards[0].key == keys.node(world.machine.node.node_id)
    deleted = {key for key in proposal.delete_keys if key.startswith(keys.NODES)}
    assert deleted <= {guard.key for guard in proposal.guards}  # none without being the life that was judged


def test_what_was_heard_of_a_former_neighbour_puts_nobody_out() -> None:
    """It fell silent while it was a neighbour, and came back when others had joined in between."""
    world = World(40)
    far = world.nodes[20].node_id
    assert far not in world.watched()
    effects = world.handle(
        messages.PeerDown(node_id=far, boot_id=world.boot(far), how=Down.SILENT, silence_s=0.5), 10.0
    )
    assert world.proposals(effects + world.handle(messages.Ticked(), 20.0)) == []
    near = world.watched()[0]
    effects = world.handle(
        messages.PeerDown(node_id=near, boot_id=world.boot(near), how=Down.SILENT, silence_s=0.5), 30.0
    )
    assert world.proposals(effects + world.handle(messages.Ticked(), 40.0)) != []


def test_a_former_neighbour_that_vanishes_is_lost_like_any_other() -> None:
    """Its link was up when it stopped being a neighbour: that says nothing of it now, and its lease decides."""
    world = World(40)
    far = world.nodes[20].node_id
    world.handle(messages.PeerUp(node_id=far, boot_id=world.boot(far)), 10.0)
    world.handle(messages.Ticked(), 11.0)
    (proposal,) = world.proposals(world.vanish([far], 20.0) + world.handle(messages.Ticked(), 21.0))[:1]
    assert far not in {seat.node_id for seat in proposal.round.seats}


def test_a_step_neither_decides_anew_nor_forgets_what_was_due() -> None:
    world = World(3)
    world.handle(messages.Ticked(), 10.0)
    before = world.machine.view
    world.machine.wake_at = 12.0
    done = messages.StepCompleted(round_number=1, rank=0, step=1, seconds=1.0)
    assert [world.handle(replace(done, step=step), 11.0) for step in range(1, 9)] == [[]] * 8
    assert world.machine.wake_at == 12.0
    assert world.machine.view is before


def test_what_piles_up_while_the_loop_is_busy_is_decided_upon_once() -> None:
    def changed(revision: int) -> messages.KeysChanged:
        return messages.KeysChanged(entries=(Entry(key=f"k{revision}", value="v"),), revision=revision)

    back = messages.StoreBack()
    merged = merge_changes([changed(1), changed(2), back, changed(3), changed(4), changed(5), back])
    assert [type(event) for event in merged] == [
        messages.KeysChanged,
        messages.StoreBack,
        messages.KeysChanged,
        messages.StoreBack,
    ]
    assert [entry.key for entry in merged[2].entries] == ["k3", "k4", "k5"]
    assert merged[2].revision == 5
