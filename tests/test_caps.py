"""Worlds that must hold a step: ranks that take no more than so many micro-batches, on daemons in virtual time."""

from __future__ import annotations

import random

import pytest
from simulation import Sim
from test_stragglers import GENEROUS, events, slow_seat, spec

from elasticd.commands.status import describe, render
from elasticd.core import keys, messages
from elasticd.core.model import Cause, NodeId, Phase
from elasticd.core.rendezvous import NoRoomForStep


def capped(names: str, micro_batches: int, *, seed: int = 0, maximum: int = 3) -> Sim:
    """A step has so many micro-batches, of which a rank takes 4 at most."""
    sim = Sim(seed, spec=spec(maximum=maximum), policy=GENEROUS, micro_batches=micro_batches)
    for name in names:
        sim.add(name, sessions=True).cap = 4
    assert sim.run(10, lambda: len(sim.world()) == min(len(names), maximum)), sim.round()
    sim.run(1)
    return sim


@pytest.mark.parametrize("sick", [False, True])
def test_no_eviction_leaves_a_world_that_cannot_hold_a_step(sick: bool) -> None:
    sim = capped("ab", 8)
    name = sim.world()[-1]
    if sick:
        sim.nodes[name].post(messages.GpuTroubled(trouble="GPU 0: uncorrectable ECC errors"))
    else:
        sim.nodes[name].speed = 0.1
    sim.run(200)
    assert (sim.round().number, sorted(sim.world())) == (1, ["a", "b"])
    assert [told["why"] for told in events(sim, "straggler_kept")] == ["too_few_nodes"]


def test_a_slow_node_goes_where_the_others_can_hold_a_step() -> None:
    sim = capped("abc", 8)
    slow = slow_seat(sim)
    assert sim.run(60, lambda: len(sim.world()) == 2 and slow not in sim.world())
    assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0


def test_nodes_that_cannot_hold_a_step_wait_for_others_and_say_so() -> None:
    """Whoever comes back has not run yet and may take anything: when it has said what, they wait again, uncharged."""
    sim = capped("abc", 12)
    left, *lost = sim.world()
    for name in lost:
        sim.kill(name)
    assert sim.run(10, lambda: sim.round().phase is Phase.WAITING)
    assert "at most 4 of a step's 12 micro-batches" in sim.round().reason
    sim.add(lost[0], sessions=True).cap = 4
    assert sim.run(10, lambda: len(sim.world()) == 2)
    sim.run(10)
    assert sim.round().phase is Phase.WAITING
    assert sim.nodes[left].machine._proposer.reason == NoRoomForStep(8, 12)
    found = describe(sim.nodes[left].machine.view, {})
    (told,) = [job["reason"] for job in found["jobs"]]
    assert "at most 8 of a step's 12 micro-batches" in told
    assert [str(part) for part in render(found).renderables if told in str(part)] == [f"job: {told}"]
    sim.add(lost[1], sessions=True).cap = 4
    assert sim.run(10, lambda: len(sim.world()) == 3)
    sim.run(10)
    assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0
    (job,) = describe(sim.nodes[left].machine.view, {})["jobs"]
    assert job["reason"] == ""


def test_a_start_that_is_too_small_waits_for_the_others() -> None:
    sim = Sim(0, spec=spec(max_restarts=0), policy=GENEROUS, micro_batches=8)
    sim.add("a", sessions=True).cap = 4
    assert sim.run(10, lambda: bool(sim.world()))
    sim.run(10)
    assert sim.round().phase is Phase.WAITING
    sim.add("b", sessions=True).cap = 4
    assert sim.run(10, lambda: len(sim.world()) == 2)
    sim.run(10)
    assert (sim.round().phase, sim.round().restarts_by(Cause.WORKER_FAILED)) == (Phase.RUNNING, 0)


def test_the_node_with_the_most_room_is_let_in_again() -> None:
    sim = Sim(0, spec=spec(), policy=GENEROUS, micro_batches=16)
    for name, cap in (("a", 4), ("b", 12)):
        sim.add(name, sessions=True).cap = cap
    assert sim.run(10, lambda: len(sim.world()) == 2)
    sim.run(1)
    sim.kill("b")
    assert sim.run(10, lambda: sim.round().phase is Phase.WAITING)
    sim.add("b", sessions=True).cap = 12
    assert sim.run(10, lambda: len(sim.world()) == 2)
    sim.run(10)
    assert sim.round().phase is Phase.RUNNING


def test_a_drained_node_without_which_no_step_fits_leaves_and_the_job_waits() -> None:
    sim = capped("ab", 8)
    name = sim.world()[-1]
    sim.store.apply({keys.drain(NodeId(name)): ("1", 0)}, [])
    assert sim.run(20, lambda: sim.round().phase is Phase.WAITING)
    sim.store.apply({}, [keys.drain(NodeId(name))])
    assert sim.run(20, lambda: sorted(sim.world()) == ["a", "b"])
    assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_mixtures_run_no_world_that_cannot_hold_a_step(seed: int) -> None:
    """Two nodes hold one. Its workers would fail, and without a budget of restarts the job with them."""
    chance = random.Random(seed)
    sim = capped("abcde", 8, seed=seed)
    for _ in range(15):
        name = chance.choice(sorted(sim.nodes))
        node = sim.nodes[name]
        match chance.randrange(4):
            case 0:
                node.speed = chance.choice([0.01, 0.08])
            case 1 | 2 if node.alive and len(sim.live()) > 1:
                sim.kill(name)
            case 3 if not node.alive:
                sim.add(name, sessions=True).cap = 4
        sim.run(chance.uniform(2, 60))
        current = sim.round()
        assert len(current.seats) >= 2 if current.phase is Phase.RUNNING else current.phase is Phase.WAITING
    for name in sorted(sim.nodes):
        if not sim.nodes[name].alive:
            sim.add(name, sessions=True).cap = 4
    assert sim.run(60, lambda: len(sim.world()) == 3)
    assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0
