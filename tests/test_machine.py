"""The machine in virtual time: what happens after each kind of fault, and the invariants under random ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sim_store import TTL_S
from simulation import Sim

from elasticd.core import keys, messages
from elasticd.core.model import Cause, JobId, JobSpec, NodeId, Phase
from elasticd.core.proposer import LONGEST_RETRY_S
from elasticd.core.records import to_json
from elasticd.core.stages import Stage
from elasticd.core.view import Entry


def spec(minimum: int = 1, maximum: int = 8, **more: object) -> JobSpec:
    return JobSpec(job_id=JobId("job"), min_nodes=minimum, max_nodes=maximum, command=("x",), **more)


def cluster(names: str = "abc", seed: int = 0, sessions: bool = False, **more: object) -> Sim:
    sim = Sim(seed, spec=spec(**more))
    for name in names:
        sim.add(name, sessions=sessions)
    assert sim.run(5, lambda: len(sim.world()) == min(len(names), sim.spec.max_nodes)), sim.round()
    return sim


def test_the_first_world_holds_everybody_who_came() -> None:
    sim = cluster("abc")
    assert sorted(sim.world()) == ["a", "b", "c"]
    assert sim.round().number == 1
    assert sim.round().restarts == ()


def test_a_killed_node_is_replaced_by_a_smaller_world_at_once() -> None:
    sim = cluster("abc")
    ranks = {s.node_id: s.group_rank for s in sim.round().seats}
    sim.kill("b")
    killed_at = sim.now
    assert sim.run(5, lambda: sorted(sim.world()) == ["a", "c"])
    assert sim.now - killed_at < 0.1
    assert sim.round().restarts == ((Cause.NODE_LOST, 1),)
    kept = [s for s in sim.round().seats if ranks[s.node_id] < 2]
    assert all(s.group_rank == ranks[s.node_id] for s in kept)


def test_every_node_can_be_the_one_that_dies() -> None:
    for name in "abc":
        sim = cluster("abc", seed=ord(name))
        sim.kill(name)
        assert sim.run(5, lambda name=name, sim=sim: len(sim.world()) == 2 and name not in sim.world())
        assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_a_silent_node_is_put_out_and_comes_back_by_itself(frozen: bool) -> None:
    sim = cluster("abc")
    sim.silence("b", frozen=frozen)
    cut_at = sim.now
    assert sim.run(5, lambda: sorted(sim.world()) == ["a", "c"])
    assert sim.now - cut_at < 0.7
    sim.run(3)
    sim.heal("b")
    assert sim.run(10, lambda: sorted(sim.world()) == ["a", "b", "c"])
    events = [event for _, event, _ in sim.nodes["b"].reports]
    assert "fenced" in events
    assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0


def test_the_one_that_is_cut_off_does_not_win() -> None:
    for name in "abc":
        sim = cluster("abc", seed=3)
        sim.silence(name, frozen=False)
        sim.run(2)
        assert name not in sim.world()
        sim.heal(name)
        assert sim.run(10, lambda sim=sim: len(sim.world()) == 3)
        assert sim.round().number == 3


@pytest.mark.parametrize("seed", range(6))
def test_two_that_do_not_hear_each_other_do_not_take_turns(seed: int) -> None:
    """One of the two goes, and stays out however often it asks; the job does not restart over and over."""
    sim = cluster("abc", seed=seed)
    sim.partition("a", "b")
    assert sim.run(5, lambda: len(sim.world()) == 2)
    after = sim.round().number
    sim.run(20)
    assert sim.round().number <= after + 1
    assert len(sim.world()) == 2
    assert "c" in sim.world()
    sim.reunite()
    assert sim.run(10, lambda: sorted(sim.world()) == ["a", "b", "c"])
    sim.run(5)
    assert sim.round().number <= after + 3


def test_a_spare_that_hears_nobody_does_not_take_over() -> None:
    sim = cluster("abc", maximum=2)
    spare = next(name for name in "abc" if name not in sim.world())
    for name in sim.world():
        sim.partition(spare, name)
    before = sim.round().number
    sim.run(20)
    assert sim.round().number == before
    for name in sim.world():
        sim.kill(name)
    assert sim.run(8, lambda: sim.world() == [spare])  # when the leases are gone too, it does


def test_a_joiner_is_let_in() -> None:
    sim = cluster("ab")
    sim.add("c")
    assert sim.run(5, lambda: sorted(sim.world()) == ["a", "b", "c"])
    assert sim.round().restarts == ((Cause.JOIN, 1),)
    assert [s.node_id for s in sim.round().seats][2] == "c"


def test_sessions_are_stopped_at_a_boundary_for_a_joiner() -> None:
    sim = cluster("ab", sessions=True)
    sim.add("c", sessions=True)
    assert sim.run(5, lambda: len(sim.world()) == 3)
    assert any(event == "boundary" for n in "ab" for _, event, _ in sim.nodes[n].reports)
    assert sim.round().number == 2


def test_members_over_the_maximum_are_spares_and_step_in() -> None:
    sim = cluster("abc", maximum=2)
    assert len(sim.world()) == 2
    sim.run(2)
    assert sim.round().number == 1
    (spare,) = set("abc") - set(sim.world())
    victim = sim.world()[0]
    sim.kill(victim)
    assert sim.run(5, lambda: len(sim.world()) == 2 and spare in sim.world())
    assert sim.world()[0] == spare  # the survivor keeps its rank, the spare takes the dead node's


def test_below_the_minimum_everybody_waits_and_goes_on_later() -> None:
    sim = cluster("ab", minimum=2)
    sim.kill("b")
    assert sim.run(5, lambda: sim.round().phase is Phase.WAITING)
    assert sim.run(1, lambda: sim.nodes["a"].workers == 0)
    sim.add("c")
    assert sim.run(5, lambda: sorted(sim.world()) == ["a", "c"])


def test_a_crash_of_the_script_costs_one_and_the_budget_ends_the_job() -> None:
    sim = cluster("ab", max_restarts=1)
    sim.crash_script("a")
    assert sim.run(5, lambda: len(sim.world()) == 2 and sim.round().number == 2)
    assert sim.round().restarts == ((Cause.WORKER_FAILED, 1),)
    sim.crash_script("b")
    assert sim.run(5, lambda: sim.round().phase is Phase.FAILED)
    assert sim.round().failure.message == "boom"
    sim.run(2)
    assert [n.exit_status for n in sim.nodes.values()] == [1, 1]


def test_success_ends_everybody_well() -> None:
    sim = cluster("abc")
    sim.succeed()
    sim.run(2)
    assert sim.round().phase is Phase.SUCCEEDED
    assert [n.exit_status for n in sim.nodes.values()] == [0, 0, 0]


def test_an_outage_of_the_store_stops_nobody() -> None:
    sim = cluster("abc")
    sim.store_away()
    sim.run(20)
    assert len(sim.world()) == 3
    sim.store_back()
    sim.run(15)
    assert len(sim.world()) == 3
    assert sim.round().number == 1


def test_a_node_lost_in_an_outage_is_put_out_after_it() -> None:
    sim = cluster("abc")
    sim.store_away()
    sim.run(3)
    sim.kill("c")
    sim.run(3)
    assert sim.round().number == 1
    sim.store_back()
    assert sim.run(10, lambda: sorted(sim.world()) == ["a", "b"])
    assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0


def test_a_store_that_came_back_empty_is_filled_again_and_training_goes_on() -> None:
    sim = cluster("abc")
    sim.store_away()
    sim.run(3)
    sim.store.kv.clear()
    sim.store.leases.clear()
    sim.store_back()
    sim.run(15)
    assert len(sim.world()) == 3
    assert sim.round().number == 1


def test_a_drained_node_leaves_and_comes_back() -> None:
    sim = cluster("abc", sessions=True)
    sim.store.apply({"/elasticd/v1/drains/b": ("{}", 0)}, [])
    assert sim.run(5, lambda: sorted(sim.world()) == ["a", "c"])
    assert sim.round().restarts == ((Cause.DRAIN, 1),)
    sim.store.apply({}, ["/elasticd/v1/drains/b"])
    assert sim.run(5, lambda: len(sim.world()) == 3)


def test_a_run_whose_node_was_drained_ends_with_its_job() -> None:
    sim = cluster("abc", sessions=True)
    sim.store.apply({keys.drain(NodeId("b")): ("1", 0)}, [])
    assert sim.run(5, lambda: sorted(sim.world()) == ["a", "c"] and sim.nodes["b"].machine.task is None)
    assert sim.nodes["b"].exit_status is None  # it may yet be let in again
    sim.succeed()
    assert sim.run(5, lambda: all(node.exit_status == 0 for node in sim.nodes.values()))


def test_a_round_that_cannot_be_read_is_left_alone() -> None:
    """A newer daemon wrote it: it is no store that came back empty, to be written to over and over."""
    sim = cluster("abc")
    newer = to_json(sim.round()).replace('"running"', '"paused"')
    revision = sim.store.revision + 1
    changed = messages.KeysChanged(
        entries=(Entry(key=keys.round_(JobId("job")), value=newer, mod_revision=revision),), revision=revision
    )
    for node in sim.nodes.values():
        effects = node.machine.handle(changed, sim.now) + node.machine.handle(messages.Ticked(), sim.now + 5)
        assert not [effect for effect in effects if isinstance(effect, messages.ProposeRound)]
        assert node.machine.stage is Stage.RUNNING


def test_what_the_store_refuses_again_and_again_is_not_proposed_at_its_pace() -> None:
    """The lost node's record cannot be read, so no guard holds on it, until its lease ends."""
    sim = cluster("abc")
    lost = sim.nodes["c"]
    sim.silence("c", frozen=True)
    sim.store.apply({keys.node(NodeId("c")): ("of a newer kind", lost.lease)}, [])
    assert sim.run(8, lambda: sorted(sim.world()) == ["a", "b"])
    proposals = [at for name in "ab" for at, event, _ in sim.nodes[name].reports if event == "round_proposed"]
    assert len(proposals) < 30
    assert sim.now < TTL_S + LONGEST_RETRY_S + 0.5


def test_a_node_that_shuts_down_leaves_in_order() -> None:
    from elasticd.core.messages import ShutdownRequested

    sim = cluster("abc", sessions=True)
    sim.nodes["a"].post(ShutdownRequested())
    assert sim.run(5, lambda: sorted(sim.world()) == ["b", "c"] and sim.nodes["a"].exit_status is not None)
    assert sim.round().restarts == ((Cause.LEAVE, 1),)


def test_who_leaves_ends_with_the_round_that_leaves_it_out() -> None:
    """In the same decision: no later event need come, and it waited for one, for half a minute."""
    sim = cluster("ab")
    node = sim.nodes["a"]
    node.post(messages.ShutdownRequested())
    assert sim.run(5, lambda: "fenced" in [event for _, event, _ in node.reports])
    assert node.machine.stage is Stage.ENDING


def test_a_cancelled_job_ends() -> None:
    sim = cluster("abc")
    sim.store.apply({keys.cancel(JobId("job")): ("{}", 0)}, [])
    sim.run(3)
    assert sim.round().phase is Phase.CANCELLED
    assert keys.cancel(JobId("job")) not in sim.store.kv  # or it would end the next job of this name, too
    assert [n.exit_status for n in sim.nodes.values()] == [1, 1, 1]


def test_a_node_that_reboots_faster_than_it_is_missed() -> None:
    sim = cluster("abc")
    sim.nodes["b"].alive = False  # no end-of-file reaches anybody
    sim.add("b")
    assert sim.run(10, lambda: len(sim.world()) == 3 and sim.round().number > 1)


def test_a_daemon_of_another_protocol_does_not_join() -> None:
    sim = cluster("ab")
    stranger = sim.add("c")
    stranger.machine.node = replace(stranger.machine.node, protocol=99)
    assert sim.run(5, lambda: stranger.exit_status is not None)
    assert stranger.exit_status == 2
    assert sorted(sim.world()) == ["a", "b"]
    assert keys.node(NodeId("c")) not in sim.store.kv


def test_different_versions_of_torch_in_a_world_are_told() -> None:
    sim = Sim(0, spec=spec())
    for name, version in (("a", "2.11.0"), ("b", "2.13.0")):
        sim.add(name)
        node = sim.nodes[name]
        node.machine.node = replace(node.machine.node, torch_version=version)
    assert sim.run(5, lambda: len(sim.world()) == 2)
    told = [details for _, event, details in sim.nodes["a"].reports if event == "torch_versions_differ"]
    assert told[-1]["versions"] == "2.11.0 2.13.0"


def test_idle_daemons_take_a_submitted_job() -> None:
    sim = Sim(1, spec=spec(minimum=2, maximum=2, spares=1))
    for name in "abc":
        sim.add(name, fixed=False)
    sim.run(1)
    sim.store.apply({"/elasticd/v1/jobs/job/spec": (to_json(sim.spec), 0)}, [])
    assert sim.run(5, lambda: len(sim.world()) == 2)
    sim.succeed()
    sim.run(3)
    assert sim.round().phase is Phase.SUCCEEDED
    assert all(n.alive and n.machine.task is None for n in sim.nodes.values())


@pytest.mark.parametrize("seed", range(60))
def test_random_faults_end_in_a_world_of_all_who_live(seed: int) -> None:
    """Invariants 1, 2 and 7: asserted inside the simulation, and at the end a world of everybody stands."""
    sim = cluster("abcd", seed=seed, sessions=seed % 2 == 0, max_restarts=1000)
    chaos = sim.random
    for _ in range(12):
        names = [n.node_id for n in sim.live()]
        name = chaos.choice(names)
        act = chaos.choice(["kill", "freeze", "cut", "crash", "join", "store", "heal", "empty"])
        if act == "kill" and len(names) > 2:
            sim.kill(name)
        elif act in ("freeze", "cut") and sim.nodes[name].reachable and len(names) > 2:
            sim.silence(name, frozen=act == "freeze")
        elif act == "crash":
            sim.crash_script(name)
        elif act == "join" and len(names) < 6:
            dead = [n for n, node in sim.nodes.items() if not node.alive]
            sim.add(chaos.choice([*dead, f"n{len(sim.nodes)}"]), sessions=seed % 2 == 0)
        elif act == "store":
            (sim.store_away if sim.store.up else sim.store_back)()
        elif act == "heal":
            for node in sim.live():
                if not node.reachable:
                    sim.heal(node.node_id)
        sim.run(chaos.choice([0.01, 0.1, 0.5, 2.0, 8.0]))
    sim.store_back()
    for node in sim.live():
        if not node.reachable:
            sim.heal(node.node_id)
    wanted = sorted(n.node_id for n in sim.live())[:8]
    assert sim.run(60, lambda: sorted(sim.world()) == wanted), (seed, sim.round(), wanted)


def stepping(steps: int = 5) -> Sim:
    """One node whose script has done some steps of 0.1 s, and from then on says nothing."""
    sim = cluster("a", sessions=True, max_restarts=1)
    for step in range(steps):
        done = messages.StepCompleted(round_number=1, rank=0, step=step + 1, seconds=0.1)
        sim.nodes["a"].post(done)
    return sim


def failures(sim: Sim) -> list[float]:
    return [at for at, event, _ in sim.nodes["a"].reports if event == "workers_failed"]


def test_a_step_that_hangs_is_found_out_and_the_job_starts_again() -> None:
    sim = stepping()
    began_at = sim.now
    assert sim.run(70, lambda: sim.round().number == 2)
    assert failures(sim)[0] - began_at == pytest.approx(60, abs=1)
    assert sim.round().restarts == ((Cause.WORKER_FAILED, 1),)


def test_a_script_that_says_nothing_of_its_steps_is_never_stuck() -> None:
    sim = stepping(steps=0)
    sim.run(1000)
    assert failures(sim) == []


def test_a_long_checkpoint_is_no_hanging_step_but_a_hang_after_it_is() -> None:
    sim = stepping()
    for _ in range(30):
        sim.run(10)
        sim.nodes["a"].post(messages.PauseReported(round_number=1, rank=0))
    assert failures(sim) == []
    ended_at = sim.now
    for _ in range(6):
        sim.run(10)
        sim.nodes["a"].post(messages.PauseReported(round_number=0, rank=0))  # of an older round: not meant
    assert sim.run(20, lambda: bool(failures(sim)))
    assert failures(sim)[0] - ended_at == pytest.approx(60, abs=1)
