"""What operators ask of the cluster, on the store in memory; the commands themselves are in test_cli.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from elasticd.cluster.jobs import cancel_job, prepare_job, read_view, submit_job, undrain_node
from elasticd.commands.status import describe, render
from elasticd.core import keys
from elasticd.core.model import BootId, Cause, JobId, JobSpec, Member, NodeId, Phase, Round
from elasticd.core.records import to_json
from elasticd.core.stragglers import Eviction, Grounds, Offences, Quarantine
from elasticd.errors import JobRefused
from elasticd.testing.memory_store import MemoryStore

JOB = JobId("gpt")
SPEC = JobSpec(job_id=JOB, min_nodes=1, max_nodes=2, command=("train.py",))
RUN = replace(SPEC, by_run=True)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    made = MemoryStore()
    yield made
    made.close()


def join(store: MemoryStore) -> None:
    member = Member(node_id=NodeId("a"), boot_id=BootId("b"), address="127.0.0.1", nproc=1)
    store.put(keys.member(JOB, NodeId("a")), to_json(member))


def phase(store: MemoryStore) -> Phase | None:
    held = read_view(store).job(JOB).round
    return held.value.phase if held else None


def test_a_job_that_no_node_has_taken_is_over_when_it_is_cancelled_and_can_be_submitted_again(
    store: MemoryStore,
) -> None:
    submit_job(store, SPEC)
    cancel_job(store, JOB)
    assert phase(store) is Phase.CANCELLED
    with pytest.raises(JobRefused, match="is over: cancelled"):
        cancel_job(store, JOB)
    submit_job(store, SPEC)
    assert phase(store) is None
    assert not read_view(store).job(JOB).cancelled


def test_a_job_whose_nodes_are_all_gone_is_over_when_it_is_cancelled(store: MemoryStore) -> None:
    submit_job(store, SPEC)
    restarts = ((Cause.NODE_LOST, 2),)
    left = Round(number=7, phase=Phase.RUNNING, cause=Cause.NODE_LOST, restarts=restarts)
    store.put(keys.round_(JOB), to_json(left))
    cancel_job(store, JOB)
    held = read_view(store).job(JOB).round
    assert held is not None
    assert (held.value.number, held.value.phase, held.value.restarts) == (8, Phase.CANCELLED, restarts)


def test_a_job_that_has_nodes_is_ended_by_them(store: MemoryStore) -> None:
    submit_job(store, SPEC)
    join(store)
    for _ in range(2):  # asking twice is asking once
        cancel_job(store, JOB)
        assert phase(store) is None
        assert read_view(store).job(JOB).cancelled


def test_an_abandoned_run_with_other_limits_is_refused_until_it_is_cancelled(store: MemoryStore) -> None:
    prepare_job(store, RUN)
    with pytest.raises(JobRefused, match=r"--nnodes 1:2; you gave 1:3 .*elasticd cancel gpt"):
        prepare_job(store, replace(RUN, max_nodes=3))
    cancel_job(store, JOB)
    prepare_job(store, replace(RUN, max_nodes=3))
    held = read_view(store).job(JOB).spec
    assert held is not None
    assert held.value.max_nodes == 3


@pytest.mark.parametrize("ask", [submit_job, prepare_job, lambda store, spec: cancel_job(store, spec.job_id)])
def test_a_job_of_a_newer_version_is_refused_by_the_name_of_its_record(
    store: MemoryStore, ask: Callable[[MemoryStore, JobSpec], None]
) -> None:
    store.put(keys.spec(JOB), to_json(RUN))
    store.put(keys.round_(JOB), '{"number":1,"phase":"paused","cause":"join"}')
    with pytest.raises(JobRefused, match=r"jobs/gpt/round cannot be read \(Round.phase: 'paused' is not a Phase\)"):
        ask(store, RUN)


def test_a_quarantine_is_shown_with_its_reason_and_ends_when_the_operator_says_so(store: MemoryStore) -> None:
    node = NodeId("a")
    quarantine = Quarantine(node_id=node, grounds=Grounds.GPU, reason="GPU 0: lost", offences=2, seconds=60, until=1e9)
    store.put(keys.quarantine(node), to_json(quarantine))
    store.put(keys.offences(node), to_json(Offences(node_id=node, count=2)))
    eviction = Eviction(job_id=JOB, node_id=node, grounds=Grounds.GPU, reason="GPU 0: lost")
    store.put(keys.eviction(JOB, node), to_json(eviction))
    found = describe(read_view(store), {})
    assert [one["reason"] for one in found["quarantines"]] == ["GPU 0: lost"]
    texts = [str(part) for part in render(found).renderables]
    assert any("a is in quarantine until 2001-09-0" in text and "elasticd undrain a" in text for text in texts)
    assert undrain_node(store, node)
    view = read_view(store)
    assert (view.quarantines, view.offences, view.cordoned) == ({}, {}, frozenset())
    assert view.aside(JOB) == {node}  # the budget does not forget
    assert not undrain_node(store, node)
