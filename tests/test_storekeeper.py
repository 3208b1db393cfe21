"""The daemon's end of the store, thread by thread, on the store in memory; whole loops are in test_node_loop.py."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from elasticd.cluster.store import Compare
from elasticd.core import keys, messages
from elasticd.core.messages import Event, Mark, WriteFinished
from elasticd.core.model import BootId, Capacity, Cause, JobId, JobSpec, Member, Node, NodeId, Phase, Round
from elasticd.core.records import from_json, to_json
from elasticd.core.stragglers import Eviction, Grounds, Offences, Tally
from elasticd.daemon.storekeeper import StoreKeeper
from elasticd.errors import LeaseLost, OperatorError
from elasticd.testing.memory_store import MemoryStore

ME = NodeId("a")
JOB = JobId("job")
NODE = Node(
    node_id=ME,
    boot_id=BootId("life"),
    host="a",
    address="127.0.0.1",
    peer_port=1,
    metrics_port=1,
    capacity=Capacity(cpu_count=1, memory_bytes=1),
)
MEMBER = Member(node_id=ME, boot_id=NODE.boot_id, address=NODE.address, nproc=1)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    made = MemoryStore()
    yield made
    made.close()


def keeper_of(store: MemoryStore, heard: list[Event]) -> StoreKeeper:
    """One whose threads are not started: the test is each of them in turn."""
    return StoreKeeper(store, NODE, 1, heard.append, lambda error: pytest.fail(str(error)), lambda _node: False)


def test_a_lease_that_is_found_lost_late_does_not_cost_the_new_one(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer registers on a new lease while the answer about the old one is on its way."""
    keeper = keeper_of(store, [])
    keeper._carry_out(messages.Register())
    old = keeper._lease

    def keepalive(lease: int) -> float:
        store.revoke(old)
        keeper._lease = 0
        keeper._carry_out(messages.Register())
        keeper._closing.set()
        raise LeaseLost(str(lease))

    monkeypatch.setattr(store, "keepalive", keepalive)
    keeper._lease_loop()
    held = store.get(keys.node(ME))
    assert held is not None
    assert keeper._lease == held.lease != old


def test_no_member_record_is_written_without_a_lease(store: MemoryStore) -> None:
    """It would outlive its node."""
    heard: list[Event] = []
    keeper = keeper_of(store, heard)
    keeper._carry_out(messages.Register())
    held = store.get(keys.node(ME))
    assert held is not None
    keeper._lease = 0
    put = messages.PutMember(job_id=JOB, member=MEMBER, node_create_revision=held.create_revision)
    keeper._carry_out(put)
    assert store.get(keys.member(JOB, ME)) is None
    assert heard[-1] == WriteFinished(write=messages.Write.MEMBER, succeeded=False)
    keeper._lease = held.lease
    keeper._carry_out(put)
    assert store.get(keys.member(JOB, ME)) is not None


def test_all_that_a_run_leaves_behind_goes_with_its_last_record(store: MemoryStore) -> None:
    heard: list[Event] = []
    keeper = keeper_of(store, heard)
    spec = JobSpec(job_id=JOB, min_nodes=1, max_nodes=1, command=("x",), by_run=True)
    for key, value in ((keys.spec(JOB), to_json(spec)), (keys.checkpoint(JOB), "{}"), (keys.cancel(JOB), "1")):
        store.put(key, value)
    last = Round(number=1, phase=Phase.CANCELLED, cause=Cause.CANCELLED)
    wanted = messages.ProposeRound(
        job_id=JOB, round=last, expected_mod_revision=0, guards=(), delete_keys=(keys.cancel(JOB),), linger_s=60
    )
    keeper._carry_out(wanted)
    leases = set(store._leases)
    keeper._carry_out(wanted)  # as another node would, a moment too late
    assert set(store._leases) == leases
    left = {entry.key: entry.lease for entry in store.snapshot(keys.PREFIX).entries}
    assert set(left) == {keys.spec(JOB), keys.round_(JOB), keys.checkpoint(JOB)}
    assert 0 not in left.values()


def test_an_eviction_is_written_with_its_round_or_not_at_all(store: MemoryStore) -> None:
    """Each record on a lease of its own, which says in Unix time when it ends; the tally for good."""
    keeper = keeper_of(store, [])
    eviction = Eviction(job_id=JOB, node_id=NodeId("b"), grounds=Grounds.SLOW, reason="slow")
    marks = (
        Mark(key=keys.TALLY, record=Tally(evictions=1), expected_mod_revision=0),
        Mark(key=keys.eviction(JOB, NodeId("b")), record=eviction, ttl_s=60),
        Mark(key=keys.offences(NodeId("b")), record=Offences(node_id=NodeId("b"), count=1), ttl_s=600),
    )

    def propose(number: int) -> None:
        held = store.get(keys.round_(JOB))
        written = Round(number=number, phase=Phase.RUNNING, cause=Cause.STRAGGLER)
        expected = held.mod_revision if held else 0
        keeper._carry_out(
            messages.ProposeRound(job_id=JOB, round=written, expected_mod_revision=expected, guards=(), marks=marks)
        )

    propose(1)
    records = {entry.key: entry for entry in store.snapshot(keys.PREFIX).entries}
    leases = [records[mark.key].lease for mark in marks]
    assert leases[0] == 0
    assert 0 not in leases[1:]
    assert leases[1] != leases[2]
    until = from_json(Eviction, records[marks[1].key].value).until
    assert 50 < until - time.time() <= 60
    propose(2)  # the tally has moved on: another eviction was counted meanwhile
    held = store.get(keys.round_(JOB))
    assert held is not None
    assert from_json(Round, held.value).number == 1


def test_a_record_whose_own_lease_ended_meanwhile_does_not_cost_the_nodes(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node's keys would stand on a lease that nobody keeps alive, and no member record could be written."""
    heard: list[Event] = []
    keeper = keeper_of(store, heard)
    keeper._carry_out(messages.Register())
    held = store.get(keys.node(ME))
    assert held is not None
    grant = store.grant

    def too_late(ttl_s: int) -> int:
        lease = grant(ttl_s)
        store.revoke(lease)
        return lease

    monkeypatch.setattr(store, "grant", too_late)
    last = Round(number=1, phase=Phase.CANCELLED, cause=Cause.CANCELLED)
    keeper._carry_out(messages.ProposeRound(job_id=JOB, round=last, expected_mod_revision=0, guards=(), linger_s=60))
    assert heard[1:] == [WriteFinished(write=messages.Write.ROUND, succeeded=False)]
    assert keeper._lease == held.lease


def test_a_record_of_our_own_id_that_cannot_be_read_is_the_operators(store: MemoryStore) -> None:
    store.put(keys.node(ME), '{"from": "the future"}')
    with pytest.raises(OperatorError, match="node id 'a' in etcd cannot be read"):
        keeper_of(store, [])._carry_out(messages.Register())


def test_whether_a_guard_holds_is_told_by_the_store_or_by_nobody(store: MemoryStore) -> None:
    """A fence that cannot be asked must not say yes, nor hold up what is written after it."""
    keeper, heard = keeper_of(store, []), []
    revision = store.put(keys.round_(JOB), "{}")

    def ask(mod_revision: int) -> None:
        guard = Compare(key=keys.round_(JOB), mod_revision=mod_revision)
        keeper._confirm(guard, lambda stands, reason: heard.append((stands, reason)))

    ask(revision)
    store.fail()
    ask(revision)
    store.heal()
    ask(revision)
    store.put(keys.round_(JOB), "{}")
    ask(revision)
    assert heard == [(True, ""), (None, "etcd gives no answer"), (True, ""), (False, "a newer round stands")]
    keeper._seen_down()  # no thread takes from the queue here: an answer is one that did not wait in it
    keeper.confirm(Compare(key=keys.round_(JOB), mod_revision=revision), lambda *answer: heard.append(answer))
    assert heard[-1] == (None, "etcd is away")
