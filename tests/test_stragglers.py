"""Who is a straggler, what is done about it, and that it is done in measure: tables, then machines in virtual time."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from simulation import Sim

from elasticd.core import keys, messages
from elasticd.core.model import BootId, Cause, JobId, JobSpec, Member, NodeId, Phase, Round, Seat
from elasticd.core.records import to_json
from elasticd.core.ring import seat_members
from elasticd.core.stragglers import (
    WINDOWS,
    Exchange,
    Grounds,
    Measured,
    Policy,
    SpeedWatch,
    Suspect,
    SuspectKept,
    Why,
    _ranks_without,
    find_suspect,
    judge_suspect,
)

FACTOR, AFTER_S = 1.5, 20.0
A, B, C, D = map(NodeId, "abcd")
GENEROUS = Policy(budget=10, window_s=600, quarantine_after=2, quarantine_s=300)


def seats(*sizes: int) -> list[Seat]:
    found, first = [], 0
    for place, size in enumerate(sizes):
        name = "abcdefgh"[place]
        found.append(
            Seat(
                node_id=NodeId(name),
                boot_id=BootId(name),
                address=name,
                group_rank=place,
                first_rank=first,
                nproc=size,
            )
        )
        first += size
    return found


def watched(*seconds: float, times: int = 40, world: list[Seat] | None = None, **more: object) -> SpeedWatch:
    """The same measures once a second."""
    watch = SpeedWatch()
    for now in range(times):
        watch.add(Measured(seconds=seconds, **more), world or seats(*[1] * len(seconds)), FACTOR, float(now))
    return watch


# --- who is slow ---


def test_the_slowest_rank_of_a_node_over_the_median_of_the_world_is_its_slowdown() -> None:
    watch = watched(0.1, 0.1, 0.1, 0.3, 0.1, 0.11, world=seats(2, 2, 2))
    assert watch.slowdowns == pytest.approx({A: 1.0, B: 3.0, C: 1.1})
    assert watch.slowest(AFTER_S, 39.0)[0] == B


def test_of_two_nodes_the_faster_one_is_the_measure() -> None:
    assert watched(0.1, 0.2).slowdowns == pytest.approx({A: 1.0, B: 2.0})


def test_nobody_is_slow_before_the_time_is_up() -> None:
    watch = watched(0.1, 0.1, 0.4, times=WINDOWS + 10)
    assert watch.slowest(AFTER_S, 14.0) is None
    assert watch.slowest(AFTER_S, WINDOWS - 1 + AFTER_S)[0] == C


def test_one_bad_window_is_no_slowness_and_does_not_end_one() -> None:
    watch = SpeedWatch()
    for now in range(40):
        odd = 0.1 if now % 7 == 3 else 0.4
        watch.add(Measured(seconds=(0.1, 0.1, odd)), seats(1, 1, 1), FACTOR, float(now))
    assert watch.slowest(AFTER_S, 39.0)[0] == C
    watch.reset()
    for now in range(40):
        odd = 0.4 if now % 7 == 3 else 0.1
        watch.add(Measured(seconds=(0.1, 0.1, odd)), seats(1, 1, 1), FACTOR, float(now))
    assert watch.slowest(0.0, 39.0) is None


def test_who_recovers_is_forgiven_and_who_hovers_at_the_factor_is_not() -> None:
    for slowdown, suspect in ((1.2, False), (1.45, True)):
        watch = watched(0.1, 0.1, 0.2)
        for now in range(40, 60):
            watch.add(Measured(seconds=(0.1, 0.1, 0.1 * slowdown)), seats(1, 1, 1), FACTOR, float(now))
        assert (watch.slowest(AFTER_S, 59.0) is not None) == suspect


def test_time_without_measures_does_not_count() -> None:
    watch = watched(0.1, 0.1, 0.4, times=WINDOWS + 5)
    watch.add(Measured(seconds=(0.1, 0.1, 0.4)), seats(1, 1, 1), FACTOR, 1000.0)
    assert watch.slowest(AFTER_S, 1000.0) is None
    assert watch.slowest(AFTER_S, 1000.0 + AFTER_S)[0] == C


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_measure_is_left_out(wrong: float) -> None:
    watch = watched(0.1, wrong, 0.1, 0.4)
    assert watch.slowest(AFTER_S, 39.0)[0] == D
    assert B not in watch.slowdowns
    assert watch.unknown() == (1,)
    assert watched(wrong, wrong).slowest(0.0, 39.0) is None


def test_figures_of_another_world_are_refused() -> None:
    with pytest.raises(ValueError, match="speeds of 2 ranks in a world of 3"):
        SpeedWatch().add(Measured(seconds=(1.0, 1.0)), seats(1, 1, 1), FACTOR, 0.0)
    with pytest.raises(ValueError, match="shares of 2 replicas in a world of 3"):
        SpeedWatch().add(Measured(seconds=(1.0, 1.0, 1.0), shares=(1, 2)), seats(1, 1, 1), FACTOR, 0.0)


def test_replicas_within_a_node_are_judged_and_those_that_span_nodes_are_not() -> None:
    within = watched(0.1, 0.1, 0.1, 0.1, 0.4, 0.4, world=seats(2, 2, 2), shares=(4, 4, 4))
    assert within.slowest(AFTER_S, 39.0)[0] == C
    assert within.gain_without(C) == pytest.approx(1 - 0.6 / 1.6)
    across = watched(0.1, 0.1, 0.4, 0.4, world=seats(1, 1, 1, 1), shares=(4, 4))
    assert across.slowest(AFTER_S, 39.0) is None


# --- what is done ---


def test_a_balanced_job_is_better_off_with_a_slow_node_and_an_unbalanced_one_without() -> None:
    # 12 micro-batches; at a third of the speed c takes 2 of them, as long as the others take for 5 and 5.
    balanced = watched(0.1, 0.1, 0.3, shares=(5, 5, 2), balanced=True)
    assert balanced.gain_without(C) == pytest.approx(1 - 0.6 / 0.6)
    assert watched(0.1, 0.1, 0.2, shares=(5, 5, 2), balanced=True).gain_without(C) < 0
    fixed = watched(0.1, 0.1, 0.3, shares=(4, 4, 4))
    assert fixed.gain_without(C) == pytest.approx(1 - 0.6 / 1.2)
    equal_batches = watched(0.1, 0.1, 0.3)
    assert equal_batches.gain_without(C) == pytest.approx(1 - 0.15 / 0.3)
    assert watched(0.1, 0.1, 0.14).gain_without(C) < 0


def test_the_others_take_no_more_than_their_caps_in_a_world_without_the_slow_node() -> None:
    speeds = (0.1, 0.1, 1.0)
    assert watched(*speeds, shares=(4, 4, 4), balanced=True).gain_without(C) == pytest.approx(1 - 0.6 / 4.0)
    capped = watched(*speeds, shares=(4, 4, 4), balanced=True, caps=(4, 9, 9))
    assert capped.gain_without(C) == pytest.approx(1 - 0.8 / 4.0)  # 4 and 8
    for balanced in (True, False):
        watch = watched(0.1, 1.0, shares=(4, 4), balanced=balanced, caps=(4, 4))
        assert watch.gain_without(B) == -math.inf, "nobody can hold the 8 micro-batches alone"


def test_the_caps_of_replicas_within_nodes_go_with_them() -> None:
    watch = watched(0.1, 0.1, 0.1, 0.1, 0.4, 0.4, world=seats(2, 2, 2), shares=(4, 4, 4), caps=(3, 9, 12))
    assert watch.gain_without(C) == pytest.approx(1 - 0.9 / 1.6)
    # c is the first then.
    assert watch.gain_without(A) == pytest.approx(1 - 2.4 / 1.6)


def test_shares_in_given_proportions_are_those_of_a_world_without_the_slow_node_too() -> None:
    watch = watched(0.1, 0.4, 0.1, shares=(1, 2, 5), weights=(1.0, 2.0, 5.0))
    # 3 and 5, by weights 1 and 2: equal shares would be 4 and 4.
    assert watch.gain_without(B) == pytest.approx(1 - 0.5 / 0.8)
    # c takes the place of a, and its weight; b keeps its own.
    assert watch.gain_without(A) == pytest.approx(1 - 2.0 / 0.8)


@pytest.mark.parametrize("sizes", [(1,), (1, 1), (1, 2, 3), (2, 1, 2, 1)])
def test_ranks_without_a_node_are_in_the_order_of_the_world_that_follows(sizes: tuple[int, ...]) -> None:
    before = seats(*sizes)
    current = Round(number=1, phase=Phase.RUNNING, cause=Cause.START, seats=tuple(before))
    for gone in before:
        members = {
            seat.node_id: Member(node_id=seat.node_id, boot_id=seat.boot_id, address="", nproc=seat.nproc)
            for seat in before
            if seat is not gone
        }
        after = seat_members(members, current)
        first = {seat.node_id: seat.first_rank for seat in before}
        expected = [first[seat.node_id] + rank for seat in after for rank in range(seat.nproc)]
        assert _ranks_without(gone.node_id, before) == expected


@pytest.mark.parametrize(
    "junk",
    [
        {"shares": (0, 0)},
        {"shares": (9, -1)},
        {"shares": (4, 4), "caps": (4,)},
        {"shares": (4, 4), "caps": (9, -1)},
        {"shares": (4, 4), "weights": (1.0, math.nan)},
        {"shares": (4, 4), "weights": (0.0,)},
    ],
)
def test_figures_that_would_break_a_decision_are_refused(junk: dict) -> None:
    with pytest.raises(ValueError, match=next(reversed(junk))):
        SpeedWatch().add(Measured(seconds=(0.1, 0.1), **junk), seats(1, 1), FACTOR, 0.0)


def suspect(gain: float = 0.5, *, budget_left: bool = True) -> Suspect:
    return Suspect(node_id=B, grounds=Grounds.SLOW, reason="slow", gain=gain, budget_left=budget_left)


@pytest.mark.parametrize(
    ("who", "without", "verdict"),
    [
        (suspect(-1.0), [A, C, D], Exchange(suspect=suspect(-1.0), spare=D)),
        (suspect(0.5), [A, C], Exchange(suspect=suspect(0.5), spare=None)),
        (suspect(0.05), [A, C], SuspectKept(B, Why.BETTER_WITH_IT)),
        (suspect(0.9), [A], SuspectKept(B, Why.BETTER_WITH_IT)),  # C would have no whole replica
        (
            replace(suspect(1.0), grounds=Grounds.GPU),
            [A],
            Exchange(suspect=replace(suspect(1.0), grounds=Grounds.GPU), spare=None),
        ),
        (suspect(0.5), [], SuspectKept(B, Why.TOO_FEW_NODES)),
        (suspect(0.5, budget_left=False), [A, C, D], SuspectKept(B, Why.BUDGET_SPENT)),
    ],
)
def test_an_exchange_a_smaller_world_or_none(
    who: Suspect, without: list[NodeId], verdict: Exchange | SuspectKept
) -> None:
    assert judge_suspect(who, {A, B, C}, without) == verdict


def test_a_sick_gpu_comes_before_a_slow_node_and_waits_for_nothing() -> None:
    watch = watched(0.1, 0.1, 0.4)
    found = find_suspect(watch, {A: "", B: "row remapping failed", C: ""}, after_s=1e9, budget_left=True, now=0.0)
    assert (found.node_id, found.grounds, found.reason) == (B, Grounds.GPU, "row remapping failed")


def test_the_budget_is_a_number_or_a_part_of_the_nodes() -> None:
    assert [Policy(budget=0.1).allowed(nodes) for nodes in (1, 9, 20, 199)] == [1, 1, 2, 19]
    assert Policy(budget=3).allowed(1000) == 3
    assert Policy(budget=0).allowed(1000) == Policy(enabled=False).allowed(1000) == 0


def test_sentences_double_and_have_an_end() -> None:
    policy = Policy(quarantine_after=2, quarantine_s=100, longest_quarantine_s=1000)
    assert [policy.sentence_s(Grounds.SLOW, count) for count in (1, 2, 3, 4, 9, 99)] == [0, 100, 200, 400, 1000, 1000]
    assert [policy.sentence_s(Grounds.GPU, count) for count in (1, 2)] == [100, 200]


# --- machines in virtual time ---


def spec(minimum: int = 1, maximum: int = 2, **more: object) -> JobSpec:
    settings = {"spares": 2, "straggler_after_s": AFTER_S, **more}
    return JobSpec(job_id=JobId("job"), min_nodes=minimum, max_nodes=maximum, command=("x",), **settings)


def cluster(
    names: str = "abc", *, seed: int = 0, policy: Policy = GENEROUS, slow: str = "", fixed: bool = True, **more: object
) -> Sim:
    sim = Sim(seed, spec=spec(**more), policy=policy)
    if not fixed:
        sim.store.apply({keys.spec(sim.spec.job_id): (to_json(sim.spec), 0)}, [])
    for name in names:
        sim.add(name, sessions=True, fixed=fixed).speed = 0.04 if name in slow else 0.01
    assert sim.run(10, lambda: len(sim.world()) == min(len(names), sim.spec.max_nodes)), sim.round()
    return sim


def events(sim: Sim, name: str) -> list[dict]:
    return [details for node in sim.nodes.values() for _, event, details in node.reports if event == name]


def slow_seat(sim: Sim) -> str:
    """One of the world becomes slow."""
    name = sim.world()[-1]
    sim.nodes[name].speed = 0.04
    return name


def test_a_straggler_is_exchanged_for_the_spare_once_and_costs_no_restart_budget() -> None:
    sim = cluster("abc")
    slow = slow_seat(sim)
    (spare,) = set("abc") - set(sim.world())
    before = sim.now
    assert sim.run(60, lambda: spare in sim.world() and slow not in sim.world())
    assert AFTER_S <= sim.now - before < AFTER_S + 15
    assert sim.round().cause is Cause.STRAGGLER
    assert f"{slow} is slow: 4." in sim.round().reason
    assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0
    (told,) = events(sim, "straggler_exchanged")
    assert (told["straggler"], told["spare"], told["quarantine_s"]) == (slow, spare, 0)
    number = sim.round().number
    sim.run(400)
    assert sim.round().number == number  # it does not come back while its record stands


def test_without_a_spare_it_is_kept_and_that_is_said_once() -> None:
    sim = cluster("ab", policy=GENEROUS)
    for node in sim.nodes.values():
        node.speed = 0.01
    name = sim.world()[-1]
    sim.nodes[name].speed = 0.017  # shares of 8 are 5 and 3 then: without it a step would take longer
    sim.run(200)
    assert sim.round().number == 1
    (told,) = events(sim, "straggler_kept")
    assert (told["straggler"], told["why"]) == (name, "better_with_it")


def test_the_minimum_is_never_broken() -> None:
    sim = cluster("ab", minimum=2)
    slow_seat(sim)
    sim.run(200)
    assert sorted(sim.world()) == ["a", "b"]
    assert [told["why"] for told in events(sim, "straggler_kept")] == ["too_few_nodes"]


def test_without_budget_or_when_switched_off_nobody_goes() -> None:
    for policy in (replace(GENEROUS, budget=0.0), replace(GENEROUS, enabled=False)):
        sim = cluster("abc", policy=policy)
        slow_seat(sim)
        sim.run(200)
        assert sim.round().number == 1
        assert sim.evictions == []
    sim = cluster("abc", straggler_factor=0.0)
    slow_seat(sim)
    sim.run(200)
    assert sim.evictions == []


def test_who_was_put_aside_is_the_last_resort_and_gives_way_again() -> None:
    sim = cluster("abc", minimum=2)
    slow = slow_seat(sim)
    assert sim.run(60, lambda: sim.world() and slow not in sim.world())
    victim = sim.world()[0]
    sim.kill(victim)
    assert sim.run(10, lambda: slow in sim.world())  # two are the minimum
    sim.add("d", sessions=True)
    assert sim.run(30, lambda: sorted(sim.world()) == sorted({"b", "c", "a", "d"} - {slow, victim}))
    assert len(sim.evictions) == 1


def test_a_repeat_offender_is_quarantined_for_a_time_and_then_takes_part_again() -> None:
    sim = cluster("abcd", policy=replace(GENEROUS, window_s=60))
    slow = slow_seat(sim)
    assert sim.run(60, lambda: len(sim.evictions) == 1)
    sim.run(90)  # its record has lapsed: it is a spare like others
    (other,) = set(sim.world()) & set("abcd") - {sim.evictions[0][2]}
    for name in set("abcd") - set(sim.world()) - {slow}:
        sim.kill(name)
    sim.kill(other)
    assert sim.run(20, lambda: slow in sim.world())
    sim.add("e", sessions=True)
    assert sim.run(60, lambda: len(sim.evictions) == 2)
    assert sim.evictions[1][1] == slow
    key = keys.quarantine(NodeId(slow))
    assert sim.run(5, lambda: key in sim.store.kv)
    assert sim.run(20, lambda: not sim.nodes[slow].alive or sim.nodes[slow].machine.task is None)
    assert sim.run(400, lambda: key not in sim.store.kv)
    assert sorted(told["quarantine_s"] for told in events(sim, "straggler_exchanged")) == [0, 300]


def test_a_quarantined_node_is_free_again_when_the_operator_says_so() -> None:
    sim = cluster("abc", policy=replace(GENEROUS, quarantine_after=1), fixed=False)
    slow = slow_seat(sim)
    assert sim.run(60, lambda: sim.evictions)
    assert sim.run(20, lambda: sim.nodes[slow].machine.task is None)
    sim.run(30)
    assert sim.nodes[slow].machine.task is None
    sim.store.apply({}, [keys.quarantine(NodeId(slow)), keys.offences(NodeId(slow))])
    assert sim.run(20, lambda: sim.nodes[slow].machine.task is not None)
    assert slow not in sim.world()


def test_nobody_is_evicted_while_the_tally_cannot_be_read() -> None:
    """The world would stand still at a boundary, for a transaction that never holds."""
    sim = cluster("abc")
    sim.store.apply({keys.TALLY: ("of a newer kind", 0)}, [])
    slow_seat(sim)
    sim.run(60)
    assert (sim.round().number, len(sim.world())) == (1, 2)
    assert not any(node.boundary for node in sim.nodes.values())


def test_the_exchange_and_its_records_are_one_whoever_dies() -> None:
    """The proposer is killed at any moment around the exchange: the round and its records are both there, or neither."""
    for delay_ms in range(0, 120, 20):
        sim = cluster("abcd", seed=delay_ms, policy=replace(GENEROUS, quarantine_after=1), maximum=3)
        slow = slow_seat(sim)
        oldest = sim.world()[0]
        assert sim.run(60, lambda sim=sim: any(node.boundary for node in sim.nodes.values()))
        sim.run(delay_ms / 1000)
        if oldest != slow:
            sim.kill(oldest)
        assert sim.run(120, lambda sim=sim, slow=slow: sim.world() and slow not in sim.world())
        assert keys.quarantine(NodeId(slow)) in sim.store.kv
        assert len(sim.evictions) == 1


def test_a_store_that_is_away_delays_the_exchange_and_nothing_else() -> None:
    sim = cluster("abc")
    slow = slow_seat(sim)
    sim.run(AFTER_S - 5)
    sim.store_away()
    sim.run(60)
    assert slow in sim.world()
    sim.store_back()
    assert sim.run(60, lambda: slow not in sim.world() and len(sim.world()) == 2)
    assert len(sim.evictions) == 1


def test_a_sick_gpu_is_exchanged_at_once_and_quarantined() -> None:
    sim = cluster("abc", fixed=False)
    sick = sim.world()[0]
    sim.nodes[sick].post(messages.GpuTroubled(trouble="GPU 0: uncorrectable ECC errors"))
    assert sim.run(10, lambda: sim.world() and sick not in sim.world())
    assert sim.round().cause is Cause.GPU_TROUBLE
    assert keys.quarantine(NodeId(sick)) in sim.store.kv
    assert sim.run(10, lambda: sim.nodes[sick].machine.task is None)


def test_a_spare_with_a_sick_gpu_takes_no_job() -> None:
    sim = cluster("abc", fixed=False)
    (spare,) = set("abc") - set(sim.world())
    sim.nodes[spare].post(messages.GpuTroubled(trouble="GPU 0: lost"))
    assert sim.run(10, lambda: sim.nodes[spare].machine.task is None)
    sim.kill(sim.world()[0])
    sim.run(20)
    assert len(sim.world()) == 1
    sim.nodes[spare].post(messages.GpuTroubled(trouble=""))
    assert sim.run(20, lambda: spare in sim.world())


def test_a_run_on_one_node_alone_has_no_other_than_the_one_with_the_sick_gpu() -> None:
    """It would wait for ever: it runs, with a warning, as one whose GPU falls sick later does."""
    sim = Sim(spec=spec(maximum=1))
    sim.add("a")
    assert sim.run(1, lambda: sim.nodes["a"].machine.task is not None)
    sim.nodes["a"].post(messages.GpuTroubled(trouble="GPU 0: row remapping has failed"))
    assert sim.run(10, lambda: sim.world() == ["a"])
    assert events(sim, "gpu_trouble")


def test_figures_that_cannot_be_are_said_once_and_decide_nothing() -> None:
    sim = cluster("abc")
    node = sim.nodes[sim.world()[0]]
    for _ in range(5):
        wrong = Measured(seconds=(1.0,) * 7)
        node.post(messages.SpeedsMeasured(round_number=sim.round().number, measured=wrong))
    (told,) = events(sim, "speeds_refused")
    assert "speeds of 7 ranks in a world of 2" in told["reason"]
    assert sim.evictions == []


@pytest.mark.parametrize("seed", [4, 10, 12, 17, 18, 24, 25, 26])
def test_random_mixtures_keep_the_minimum_the_budget_and_the_peace(seed: int) -> None:
    """The simulation asserts at each eviction: minimum, budget, cool-down. Then all is well, and nothing moves."""
    chance = random.Random(seed)
    policy = Policy(budget=chance.choice([1, 2, 0.5]), window_s=chance.choice([60, 300]), quarantine_s=60)
    minimum, maximum = chance.choice([(1, 2), (2, 3), (3, 4)])
    sim = cluster("abcdef", seed=seed, policy=policy, minimum=minimum, maximum=maximum, fixed=False)
    for _ in range(12):
        name = chance.choice(sorted(sim.nodes))
        node = sim.nodes[name]
        match chance.randrange(5):
            case 0 | 1:
                node.speed = chance.choice([0.01, 0.013, 0.016, 0.03, 0.08])
            case 2 if node.alive and len(sim.live()) > minimum + 1:
                sim.kill(name)
            case 3 if not node.alive:
                sim.add(name, sessions=True, fixed=False)
            case 4:
                sim.store_away()
                sim.run(chance.uniform(1, 20))
                sim.store_back()
        sim.run(chance.uniform(1, 60))
    for name in sorted(sim.nodes):
        if not sim.nodes[name].alive:
            sim.add(name, sessions=True, fixed=False)
        sim.nodes[name].speed = 0.01
    sim.run(400)  # every record of the window has lapsed, and every first quarantine
    assert len(sim.world()) == maximum
    number = sim.round().number
    sim.run(100)
    assert sim.round().number == number, "the world changes without a cause"
