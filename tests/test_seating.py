"""Who gets a seat, and where: held against every other choice there is; then worlds of replicas in virtual time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import Sim

from elasticd.core.model import (
    BootId,
    Cause,
    JobId,
    JobSpec,
    Member,
    MemberState,
    NodeId,
    Phase,
    Round,
    StepLimits,
    Topology,
)
from elasticd.core.rendezvous import NothingToChange, NoWholeReplicas, Situation, Wait, decide_round
from elasticd.core.ring import LEVELS, crossings, seat_members
from elasticd.core.seating import Room, choose_members, count_room, why_spare
from elasticd.core.view import Keyed


def spec(minimum: int = 1, maximum: int = 8, per_replica: int = 1) -> JobSpec:
    return JobSpec(
        job_id=JobId("job"), min_nodes=minimum, max_nodes=maximum, command=("x",), ranks_per_replica=per_replica
    )


def member(name: str, nproc: int = 1, zone: str = "", rack: str = "", switch: str = "") -> Member:
    topology = Topology(zone=zone, rack=rack, switch=switch)
    state = MemberState.READY
    return Member(
        node_id=NodeId(name),
        boot_id=BootId(name),
        address=name,
        nproc=nproc,
        topology=topology,
        state=state,
        store_port=1,
    )


def world(*members: Member, per_replica: int = 1) -> Round:
    seats = seat_members({m.node_id: m for m in members}, None, per_replica)
    return Round(number=1, phase=Phase.RUNNING, cause=Cause.START, seats=seats)


def seated(members: Sequence[Member], previous: Round | None, per_replica: int = 1) -> list[Member]:
    known = {m.node_id: m for m in members}
    return [known[seat.node_id] for seat in seat_members(known, previous, per_replica)]


@st.composite
def crowds(draw: st.DrawFn, largest: int = 7) -> list[Member]:
    """Nodes in two zones of two racks each, with one or two ranks, or three."""
    count = draw(st.integers(1, largest))
    places = st.tuples(st.integers(1, draw(st.integers(1, 3))), st.sampled_from("uv"), st.sampled_from("pq"))
    return [
        member(f"n{i}", nproc, zone, rack) for i, (nproc, zone, rack) in enumerate(draw(places) for _ in range(count))
    ]


def taking(name: str, *caps: int, of: int = 8, together: int = 1) -> Member:
    return replace(member(name, len(caps)), limits=StepLimits(micro_batches=of, caps=caps, replica_size=together))


@pytest.mark.parametrize(
    ("ring", "held"),
    [
        ([taking("a", 4, 4), taking("b", 1)], 9),
        ([taking("a", 4, 4, together=2), taking("b", 1, 9, together=2)], 5),
        ([taking("a", 4, together=2), taking("b", 1, together=2)], 1),  # a replica on two nodes
        ([taking("a", 4, 1), member("b", 3)], 29),  # b has not run: it may take all
        ([taking("a", 0, 0)], 0),
        ([taking("a", 0, 0), member("b")], 8),
        ([member("a"), member("b")], None),
    ],
)
def test_the_room_for_a_step_is_that_of_whole_replicas(ring: list[Member], held: int | None) -> None:
    assert count_room(ring) == (None if held is None else Room(held, 8))


def test_the_room_is_that_of_the_order_in_which_they_will_sit() -> None:
    """Halves of replicas on nodes of their own: a newcomer takes the place of the one that is lost, beside a."""
    a, lost, c, d, newcomer = (
        taking(name, cap, of=5, together=2) for name, cap in zip("abcde", (4, 4, 1, 1, 4), strict=True)
    )
    current = world(a, lost, c, d, per_replica=2)
    members = {m.node_id: Keyed(m, age, age) for age, m in enumerate((a, c, d, newcomer))}
    decision = decide_round(
        Situation(
            spec=spec(per_replica=2),
            round=current,
            members=members,
            reachable=frozenset(members),
            lost=frozenset({lost.node_id}),
        )
    )
    assert not isinstance(decision, Wait)
    assert [seat.node_id for seat in decision.round.seats] == ["a", "e", "c", "d"]


# --- who ---


def every_choice(candidates: Sequence[Member], job: JobSpec) -> Iterator[tuple[Member, ...]]:
    for size in range(job.min_nodes, job.max_nodes + 1):
        for some in itertools.combinations(candidates, size):
            if sum(m.nproc for m in some) % job.ranks_per_replica == 0:
                yield some


@given(crowds(), st.integers(1, 5), st.integers(1, 3), st.integers(0, 5), st.data())
@settings(max_examples=300, deadline=None)
def test_the_choice_is_whole_keeps_seats_and_is_as_large_as_can_be(
    candidates: list[Member], per_replica: int, minimum: int, room: int, data: st.DataObject
) -> None:
    job = spec(minimum, minimum + room, per_replica)
    before = data.draw(st.sampled_from([(), *every_choice(candidates, job)]))
    previous = world(*before, per_replica=per_replica) if before else None
    held = {m.node_id for m in before}

    def worth(some: Sequence[Member]) -> tuple[int, int]:
        return sum(m.nproc for m in some if m.node_id in held), sum(m.nproc for m in some)

    here = [m for m in candidates if data.draw(st.booleans()) or m.node_id not in held]
    chosen = choose_members(here, previous, job)
    possible = list(every_choice(here, job))
    assert bool(chosen) == bool(possible)
    if not chosen:
        return
    found = [m for m in here if m.node_id in chosen]
    assert len(found) == len(chosen)
    assert tuple(found) in possible
    oldest = sorted(here, key=lambda m: m.node_id not in held)[: job.max_nodes]
    if sum(m.nproc for m in oldest) % per_replica == 0:  # nobody is passed over for one with more ranks
        assert {m.node_id for m in oldest} == set(chosen)
    else:
        assert worth(found) >= max((worth(some) for some in possible if set(some) <= set(oldest)), default=(0, 0))


@given(crowds(), st.integers(1, 5))
@settings(deadline=None)
def test_a_world_that_stands_is_left_alone(candidates: list[Member], per_replica: int) -> None:
    job = spec(1, 8, per_replica)
    chosen = set(choose_members(candidates, None, job))
    members = {m.node_id: Keyed(m, 1 + i, 1 + i) for i, m in enumerate(candidates)}
    known = frozenset(members)
    if not chosen:
        waits = decide_round(Situation(spec=job, round=None, members=members, reachable=known))
        assert waits == Wait(NoWholeReplicas(sum(m.nproc for m in candidates), per_replica))
        return
    current = world(*(m for m in candidates if m.node_id in chosen), per_replica=per_replica)
    assert decide_round(Situation(spec=job, round=current, members=members, reachable=known)) == Wait(NothingToChange())


def test_of_like_nodes_those_stay_out_that_leave_whole_replicas_in_each_zone() -> None:
    here = [member(name, zone=zone) for name, zone in zip("abcde", "uuvvu", strict=True)]
    assert choose_members(here, None, spec(per_replica=2)) == ["a", "b", "c", "d"]
    here = [member(name, zone=zone) for name, zone in zip("abcde", "uvuuv", strict=True)]
    chosen = seated([m for m in here if m.node_id in choose_members(here, None, spec(per_replica=2))], None, 2)
    assert [m.topology.zone for m in chosen] == ["u", "u", "v", "v"]


def test_a_broken_replica_in_another_zone_gives_up_its_rest() -> None:
    """Of six nodes in three zones one is lost: the whole replicas are those of the other two zones."""
    here = [member(name, zone=zone) for name, zone in zip("abcdef", "uuvvww", strict=True)]
    previous = world(*here, per_replica=2)
    left = [m for m in here if m.node_id != "b"]
    chosen = [m for m in left if m.node_id in choose_members(left, previous, spec(per_replica=2))]
    assert [m.topology.zone for m in seated(chosen, previous, 2)] == ["w", "w", "v", "v"]


def test_a_large_cluster_of_unlike_nodes_is_rounded_quickly() -> None:
    here = [member(f"n{i:04}", 1 + i % 8, f"z{i % 4}", f"r{i % 40}") for i in range(1000)]
    for limit in (1000, 701):
        chosen = choose_members(here, None, spec(1, limit, 16))
        assert sum(m.nproc for m in here if m.node_id in set(chosen)) % 16 == 0
        assert len(chosen) > limit - 16


@pytest.mark.parametrize(
    ("current", "job", "why"),
    [(None, spec(per_replica=2), ""), (world(member("a"), member("b")), spec(1, 2), "the job has its 2 nodes"),
     (world(member("a"), member("b")), spec(1, 3, 2), "no whole replica of 2 ranks"),
     (world(member("a")), spec(1, 3), "")],
)  # fmt: skip
def test_a_spare_is_told_why(current: Round | None, job: JobSpec, why: str) -> None:
    assert why_spare(job, current) == why


# --- where ---


@given(crowds(6), st.integers(1, 4), st.data())
@settings(max_examples=300, deadline=None)
def test_ranks_cross_as_few_boundaries_as_they_must(here: list[Member], per_replica: int, data: st.DataObject) -> None:
    """Against every way to fill the gaps that survivors leave."""
    before = data.draw(st.lists(st.sampled_from([*here, *map(member, "xyz")]), unique_by=lambda m: m.node_id))
    previous = world(*before, per_replica=per_replica) if before else None
    found = seated(here, previous, per_replica)
    fixed = {s.group_rank: s.node_id for s in (previous.seats if previous else ()) if s.group_rank < len(here)}
    for place, name in fixed.items():
        if name in {m.node_id for m in here}:
            assert found[place].node_id == name
    stay = {name for name in fixed.values() if name in {m.node_id for m in here}}
    places = [m if m.node_id in stay else None for m in found]
    rest = [m for m in here if m.node_id not in stay]
    every = []
    for order in itertools.permutations(rest):
        left = iter(order)
        every.append(crossings([m or next(left) for m in places], per_replica))
    assert crossings(found, per_replica) == min(every)


@given(
    st.lists(st.tuples(st.sampled_from("uv"), st.sampled_from("pqr"), st.sampled_from("st")), min_size=2), st.randoms()
)
@settings(deadline=None)
def test_a_first_world_crosses_into_each_domain_once(places: list[tuple[str, str, str]], random) -> None:
    here = [member(f"n{i:03}", 1, *place) for i, place in enumerate(places)]
    random.shuffle(here)
    crossed = crossings(seated(here, None))[LEVELS:]
    for level in range(LEVELS):
        domains = {place[: level + 1] for place in places}
        assert crossed[level] == (len(domains) if len(domains) > 1 else 0)


def test_a_large_world_that_loses_a_rack_is_ordered_quickly() -> None:
    here = [member(f"n{i:04}", 8, f"z{i // 500}", f"r{i // 20}", f"s{i // 10}") for i in range(1000)]
    previous = world(*here, per_replica=16)
    assert not any(crossings(here, 16)[:LEVELS])
    left = [m for m in here if m.topology.rack != "r7"]
    found = seated(left, previous, 16)
    assert sorted(m.node_id for m in found) == sorted(m.node_id for m in left)
    assert crossings(found, 16)[:LEVELS] == (0, 0, 0)


# --- in virtual time ---


def start(names: str, nproc: Sequence[int] = (), **settings: int) -> Sim:
    sim = Sim(0, spec=spec(**settings))
    for name, ranks in itertools.zip_longest(names, nproc, fillvalue=1):
        sim.add(name, nproc=ranks)
    return sim


def test_the_world_is_rounded_and_the_spare_takes_the_place_of_the_dead() -> None:
    sim = start("abc", per_replica=2)
    assert sim.run(5, lambda: len(sim.world()) == 2)
    sim.run(2)
    assert sim.round().number == 1
    (spare,) = set("abc") - set(sim.world())
    kept, victim = sim.world()
    sim.kill(victim)
    assert sim.run(5, lambda: sim.world() == [kept, spare])
    sim.kill(spare)
    assert sim.run(5, lambda: sim.round().phase is Phase.WAITING)
    assert sim.run(1, lambda: sim.nodes[kept].workers == 0)
    sim.add("d")
    assert sim.run(5, lambda: sorted(sim.world()) == sorted([kept, "d"]))
    assert sim.round().restarts_by(Cause.WORKER_FAILED) == 0


def test_nodes_with_different_numbers_of_ranks_make_one_world() -> None:
    """4 + 2 + 1 ranks and replicas of 2: the odd one waits until another like it comes."""
    sim = start("abc", nproc=(4, 2, 1), per_replica=2)
    assert sim.run(5, lambda: sorted(sim.world()) == ["a", "b"])
    assert sim.round().world_size == 6
    sim.add("d", nproc=1)
    assert sim.run(5, lambda: len(sim.world()) == 4)
    assert sim.round().world_size == 8
    sim.kill("a")
    assert sim.run(5, lambda: sim.round().world_size == 4 and len(sim.world()) == 3)


@pytest.mark.parametrize("seed", range(20))
def test_random_faults_end_in_a_world_beside_which_no_replica_is_idle(seed: int) -> None:
    """That every world on the way is one of whole replicas is asserted inside the simulation."""
    sim = Sim(seed, spec=spec(1, 99, 3))
    chance, names = sim.random, iter(f"n{i}" for i in range(100))
    for _ in range(5):
        sim.add(next(names), nproc=chance.randint(1, 3), zone=chance.choice("uv"), sessions=seed % 2 == 0)
    for _ in range(8):
        sim.run(chance.uniform(0.1, 2))
        if chance.random() < 0.5 or len(sim.live()) < 3:
            sim.add(next(names), nproc=chance.randint(1, 3), sessions=seed % 2 == 0)
        else:
            sim.kill(chance.choice(sim.live()).node_id)

    def whole(names: list[str]) -> bool:
        """Whether some of these nodes make replicas."""
        ranks = [sim.nodes[name].nproc for name in names]
        return any(sum(some) % 3 == 0 for n in range(1, 9) for some in itertools.combinations(ranks, n))

    live = [node.node_id for node in sim.live()]
    assert sim.run(30, lambda: sim.round() is not None and bool(sim.world()) == whole(live))
    sim.run(5)
    assert bool(sim.world()) == whole(live)
    full = len(sim.world()) == sim.spec.max_nodes
    assert not sim.world() or full or not whole([name for name in live if name not in sim.world()])
