"""The pure parts by tables and properties: records, membership, the choice of a round, scheduling, stages, deadlines."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticd.core.deadline import StepDeadline
from elasticd.core.membership import Evidence, Link, Verdict, neighbours
from elasticd.core.messages import Down
from elasticd.core.model import (
    BootId,
    Cause,
    Failure,
    JobId,
    JobSpec,
    Member,
    MemberState,
    NodeId,
    Phase,
    Round,
    Seat,
    StepLimits,
    Topology,
)
from elasticd.core.records import from_json, to_json
from elasticd.core.rendezvous import (
    SETTLE_JOIN_S,
    NoFreshStore,
    NoRoomForStep,
    NothingToChange,
    Over,
    Proposal,
    Situation,
    StillPreparing,
    TooFewNodes,
    Unsettled,
    Wait,
    decide_round,
    seat_members,
)
from elasticd.core.scheduling import choose_job
from elasticd.core.stages import TABLE, Stage, Trigger, advance, mermaid
from elasticd.core.task import Task
from elasticd.core.view import Entry, Job, Keyed, View
from elasticd.errors import ProtocolError


def member(name: str, *, state: MemberState = MemberState.READY, about: int = 0, **more: object) -> Member:
    values: dict[str, object] = {"nproc": 2, "store_port": 900, "address": name, "boot_id": BootId(name + "1")}
    return Member(node_id=NodeId(name), state=state, round_number=about, **{**values, **more})


def keyed(*members: Member) -> dict[NodeId, Keyed[Member]]:
    return {m.node_id: Keyed(m, 10 + i, 20 + i) for i, m in enumerate(members)}


def spec(minimum: int = 1, maximum: int = 4, **more: object) -> JobSpec:
    return JobSpec(job_id=JobId("j"), min_nodes=minimum, max_nodes=maximum, command=("x",), **more)


def world(*members: Member, number: int = 3, **more: object) -> Round:
    seats = seat_members({m.node_id: m for m in members}, None)
    return Round(number=number, phase=Phase.RUNNING, cause=Cause.START, seats=seats, **more)


def situation(current: Round | None, *members: Member, **more: object) -> Situation:
    known = keyed(*members)
    return Situation(**{"spec": spec(), "round": current, "members": known, "reachable": frozenset(known), **more})


def limits(*caps: int, of: int = 9, replica_size: int = 1) -> StepLimits:
    return StepLimits(micro_batches=of, caps=caps, replica_size=replica_size)


A, B, C, D = (member(name) for name in "abcd")
FOUR, FIVE, NINE = member("a", limits=limits(4, 4)), member("b", limits=limits(2, 3)), member("b", limits=limits(4, 5))
FAILURE = Failure(node_id=NodeId("a"), rank=0, local_rank=0, exit_code=1, message="ConfigError")
WAITING = Round(number=3, phase=Phase.WAITING, cause=Cause.NODE_LOST)

DECISIONS = [
    ("nobody else comes: start alone", situation(None, A), ("running", "start", "a")),
    ("too few", situation(None, A, spec=spec(2)), TooFewNodes(1, 2)),
    ("one still prepares", situation(None, A, member("b", state=MemberState.PREPARING)), StillPreparing((NodeId("b"),))),
    ("not linked yet", situation(None, A, B, reachable=frozenset({NodeId("a")})), StillPreparing((NodeId("b"),))),
    ("full without the one that prepares", situation(None, A, member("b", state=MemberState.PREPARING), spec=spec(1, 1)),
     ("running", "start", "a")),
    ("nothing to change", situation(world(A, B), A, B), NothingToChange()),
    ("a joiner", situation(world(A, B), A, B, C), ("running", "join", "abc")),
    ("no room for a joiner", situation(world(A, B), A, B, C, spec=spec(1, 2)), NothingToChange()),
    ("a joiner out of reach", situation(world(A, B), A, B, C, reachable=frozenset("ab")), NothingToChange()),
    ("a lost node", situation(world(A, B, C), A, B, C, lost=frozenset("b")), ("running", "node_lost", "ac")),
    ("a lost node and a spare", situation(world(A, B), A, B, C, lost=frozenset("b")), ("running", "node_lost", "ac")),
    ("lost below the minimum", situation(world(A, B), A, B, lost=frozenset("b"), spec=spec(2)),
     ("waiting", "node_lost", "")),
    ("a rebooted node", situation(world(A, B), A, B, rebooted=frozenset("b")), ("running", "node_lost", "a")),
    ("an agent that starts again", situation(world(A, B), A, member("b", state=MemberState.PREPARING)),
     ("running", "node_lost", "a")),
    ("a seat that registers again", situation(world(A, B), A, unsettled=frozenset("b")), Unsettled((NodeId("b"),))),
    ("a drained node", situation(world(A, B), A, B, drained=frozenset("b")), ("running", "drain", "a")),
    ("a leaving node", situation(world(A, B), A, member("b", state=MemberState.LEAVING)), ("running", "leave", "a")),
    ("cancelled", situation(world(A, B), A, B, cancelled=True), ("cancelled", "cancelled", "")),
    ("over", situation(Round(number=4, phase=Phase.FAILED, cause=Cause.WORKER_FAILED), A), Over(Phase.FAILED)),
    ("one has finished", situation(world(A, B), A, member("b", state=MemberState.SUCCEEDED, about=3)), NothingToChange()),
    ("all have finished", situation(world(A, B), A, B, finished=frozenset("ab")), ("succeeded", "finished", "")),
    ("finished, then gone", situation(world(A, B), A, lost=frozenset("b"), finished=frozenset("ab")),
     ("succeeded", "finished", "")),
    ("stood still for somebody who went away", situation(world(A, B), A, B, parked=True), ("running", "join", "ab")),
    ("the rest cannot hold a step", situation(world(FOUR, FIVE), FOUR, FIVE, lost=frozenset("b")),
     ("waiting", "node_lost", "")),
    ("the rest can", situation(world(FOUR, NINE), FOUR, NINE, lost=frozenset("a")), ("running", "node_lost", "b")),
    ("a spare that has not run may take all", situation(world(FOUR, FIVE), FOUR, FIVE, C, lost=frozenset("b")),
     ("running", "node_lost", "ac")),
    ("one that is no more than the others", situation(WAITING, FOUR, spec=spec(1, 1)), NoRoomForStep(8, 9)),
    ("who had the most room comes back", situation(WAITING, FOUR, C), ("running", "join", "ac")),
    ("workers that end for want of room",
     situation(world(FOUR), member("a", state=MemberState.FAILED, about=3, failure=FAILURE, limits=limits(4, 4)),
               spec=spec(max_restarts=0)), ("waiting", "node_lost", "")),
    ("workers that end for want of room, and no more can come",
     situation(world(FOUR), member("a", state=MemberState.FAILED, about=3, failure=FAILURE, limits=limits(4, 4)),
               spec=spec(1, 1, max_restarts=9)), ("failed", "worker_failed", "")),
    ("workers that end for want of room in place of who is lost",
     situation(world(FOUR, restarts={Cause.NODE_LOST: 1}),
               member("a", state=MemberState.FAILED, about=3, failure=FAILURE, limits=limits(4, 4)), spec=spec(1, 1)),
     ("waiting", "node_lost", "")),
    ("workers that end for want of room, and a spare",
     situation(world(FOUR), member("a", state=MemberState.FAILED, about=3, failure=FAILURE, limits=limits(4, 4)), C,
               spec=spec(1, 1)), ("running", "node_lost", "c")),
    ("more nodes than seats, and not the oldest hold a step",
     situation(WAITING, FOUR, FIVE, member("c", limits=limits(4, 5)), spec=spec(1, 1)), ("running", "join", "c")),
    ("workers that end with room enough",
     situation(world(NINE), member("b", state=MemberState.FAILED, about=3, failure=FAILURE, limits=limits(4, 5)),
               spec=spec(max_restarts=0)), ("failed", "worker_failed", "")),
    ("as many who were put aside as it takes",
     situation(WAITING, FOUR, member("b", limits=limits(0, 0)), member("c", limits=limits(1, 0)), aside=frozenset("bc"),
               spec=spec(2)), ("running", "join", "abc")),
    ("what an earlier agent's ranks said", situation(WAITING, replace(FOUR, nproc=3)), ("running", "join", "a")),
    ("who contradict each other", situation(WAITING, FOUR, replace(FIVE, limits=limits(5, 5, of=99))),
     ("running", "join", "ab")),
    ("every store is used", situation(None, member("a", store_port=0)), NoFreshStore()),
]  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), [d[1:] for d in DECISIONS], ids=[d[0] for d in DECISIONS])
def test_decide_round(case: Situation, expected: object) -> None:
    decision = decide_round(case)
    if isinstance(decision, Wait):
        assert decision.reason == expected
        return
    wanted = decision.round
    assert (wanted.phase.value, wanted.cause.value, "".join(s.node_id for s in wanted.seats)) == expected
    assert wanted.number == (case.round.number + 1 if case.round else 1)


def test_what_a_node_takes_of_a_step_is_known_once_all_its_ranks_have_said_so() -> None:
    task = Task(spec=spec(), nproc=2)
    for number, said, known in (
        (1, {3: limits(2)}, None),
        (1, {2: limits(5)}, limits(5, 2)),
        (2, {2: limits(7)}, limits(5, 2)),  # of the round before
        (2, {3: limits(1)}, limits(7, 1)),
        (3, {2: limits(7), 3: None}, None),
    ):
        if number != task.started_round:
            task.enter(number)
        for rank, of_rank in said.items():
            task.join(rank, of_rank)
        assert task.limits == known
        assert set(task.sessions) >= set(said)


def test_nobody_is_waited_for_once_a_job_has_all_the_nodes_it_may_have() -> None:
    joins = [situation(None, A, B), situation(world(A), A, B)]
    for maximum, settle_s in ((3, SETTLE_JOIN_S), (2, 0.0)):
        for case in joins:
            decision = decide_round(dataclasses.replace(case, spec=spec(1, maximum)))
            assert isinstance(decision, Proposal)
            assert decision.settle_s == settle_s


def failed(name: str, about: int = 3) -> Member:
    failure = Failure(node_id=NodeId(name), rank=0, local_rank=0, exit_code=1, message=f"{name} broke")
    return member(name, state=MemberState.FAILED, about=about, failure=failure)


def test_a_failure_within_the_budget_starts_everybody_again() -> None:
    decision = decide_round(situation(world(A, B), A, failed("b"), spec=spec(max_restarts=1)))
    assert isinstance(decision, Proposal)
    assert decision.round.restarts == ((Cause.WORKER_FAILED, 1),)
    assert len(decision.round.seats) == 2


def test_a_failure_beyond_the_budget_ends_the_job_with_the_first_failure() -> None:
    spent = world(A, B, restarts=((Cause.NODE_LOST, 7), (Cause.WORKER_FAILED, 1)))
    decision = decide_round(situation(spent, failed("a"), failed("b"), spec=spec(max_restarts=1)))
    assert isinstance(decision, Proposal)
    assert decision.round.phase is Phase.FAILED
    assert decision.round.failure is not None
    assert decision.round.failure.message == "a broke"  # the lower mod_revision


def test_a_final_failure_ends_the_job_whatever_the_budget() -> None:
    """torchrun's agent has restarts of its own; the others then ask for a new round, maybe before it gives up."""
    last = failed("b")
    assert last.failure is not None
    last = dataclasses.replace(last, failure=dataclasses.replace(last.failure, final=True))
    decision = decide_round(situation(world(A, B), failed("a"), last, spec=spec(max_restarts=1000)))
    assert isinstance(decision, Proposal)
    assert decision.round.phase is Phase.FAILED
    assert decision.round.failure == last.failure


def test_a_failure_of_an_older_round_does_not_count() -> None:
    assert decide_round(situation(world(A, B), A, failed("b", about=2))) == Wait(NothingToChange())


def test_lost_nodes_and_failures_together_are_the_nodes_fault() -> None:
    decision = decide_round(situation(world(A, B, C), failed("a"), B, C, lost=frozenset("c")))
    assert isinstance(decision, Proposal)
    assert decision.round.cause is Cause.NODE_LOST
    assert decision.evict == {"c"}


def test_a_round_never_uses_the_store_of_the_last() -> None:
    current = dataclasses.replace(world(A, B), store_address="a", store_port=900)
    decision = decide_round(situation(current, A, B, C))
    assert isinstance(decision, Proposal)
    assert (decision.round.store_address, decision.round.store_port) == ("b", 900)


names = st.lists(st.sampled_from([f"n{i}" for i in range(12)]), min_size=1, max_size=12, unique=True)


@given(before=names, after=names)
def test_ranks_are_whole_and_stick(before: list[str], after: list[str]) -> None:
    previous = world(*(member(n) for n in before))
    seats = seat_members({NodeId(n): member(n) for n in after}, previous)
    assert sorted(s.node_id for s in seats) == sorted(after)
    assert [s.group_rank for s in seats] == list(range(len(after)))
    assert [s.first_rank for s in seats] == [2 * i for i in range(len(after))]
    held = {s.node_id: s.group_rank for s in previous.seats}
    for seat in seats:
        if held.get(seat.node_id, 99) < len(after):
            assert seat.group_rank == held[seat.node_id]


def test_ranks_follow_the_topology() -> None:
    members = [member(n, topology=Topology(zone=z, rack=r)) for n, z, r in [
        ("a", "z2", "r1"), ("b", "z1", "r2"), ("c", "z2", "r1"), ("d", "z1", "r1"), ("e", "z1", "r2")]]  # fmt: skip
    seats = seat_members({m.node_id: m for m in members}, None)
    assert [s.node_id for s in seats] == ["d", "b", "e", "a", "c"]


def test_a_newcomer_is_seated_beside_its_like() -> None:
    old = [member(n, topology=Topology(rack=r)) for n, r in [("a", "r1"), ("b", "r1"), ("c", "r2"), ("d", "r2")]]
    previous = world(*old)
    now = [old[0], old[2], member("x", topology=Topology(rack="r2")), member("y", topology=Topology(rack="r1"))]
    assert [s.node_id for s in seat_members({m.node_id: m for m in now}, previous)] == ["a", "y", "c", "x"]


# --- membership ---

SEAT = Seat(node_id=NodeId("b"), boot_id=BootId("b1"), address="b", group_rank=1, first_rank=1, nproc=1)
UP = {NodeId("b"): Link(boot_id=BootId("b1"), down=None, since=0)}
DOWN = {NodeId("b"): Link(boot_id=BootId("b1"), down=Down.REFUSED, since=0)}
OTHER_LIFE = {NodeId("b"): Link(boot_id=BootId("b0"), down=Down.REFUSED, since=0)}
HELD = Keyed(B, 1, 1)


@pytest.mark.parametrize(
    ("links", "held", "store_up_s", "verdict"),
    [
        (UP, HELD, 99, Verdict.ALIVE),
        (DOWN, HELD, 99, Verdict.LOST),
        (DOWN, HELD, 0, Verdict.LOST),
        (OTHER_LIFE, HELD, 99, Verdict.ALIVE),
        ({}, HELD, 0, Verdict.ALIVE),
        (UP, None, 99, Verdict.REGISTERING),
        (DOWN, None, 0, Verdict.LOST),
        ({}, None, 99, Verdict.LOST),
        ({}, None, 1, Verdict.UNCLEAR),
        (UP, Keyed(member("b", boot_id=BootId("b2")), 1, 1), 99, Verdict.REBOOTED),
    ],
)
def test_judge_seat(links: dict, held: Keyed[Member] | None, store_up_s: float, verdict: Verdict) -> None:
    evidence = Evidence(me=NodeId("a"), links=links, store_up_s=store_up_s, lease_ttl_s=5)
    assert evidence.judge_seat(SEAT, held) is verdict


@given(st.sets(st.integers(0, 200), min_size=1, max_size=60), st.integers(2, 20))
def test_neighbours_are_mutual_and_few(ids: set[int], degree: int) -> None:
    nodes = frozenset(NodeId(f"{i:03}") for i in ids)
    near = {node: neighbours(node, nodes, degree) for node in nodes}
    for node, found in near.items():
        assert node not in found
        assert len(found) <= degree
        assert all(node in near[other] for other in found)
        assert len(nodes) == 1 or found


# --- scheduling ---


def job(minimum: int, maximum: int, created: int, members: str = "", over: bool = False, seats: str = "") -> Job:
    current = world(*(member(n) for n in seats)) if seats else None
    if over:
        current = Round(number=9, phase=Phase.SUCCEEDED, cause=Cause.FINISHED)
    return Job(
        spec=Keyed(spec(minimum, maximum), created, created),
        round=Keyed(current, 1, 1) if current else None,
        members=keyed(*(member(n) for n in members)),
    )


@pytest.mark.parametrize(
    ("jobs", "current", "chosen"),
    [
        ({}, None, None),
        ({"one": job(1, 2, 1)}, None, "one"),
        ({"one": job(1, 2, 1, over=True)}, None, None),
        ({"late": job(1, 2, 9), "early": job(1, 2, 1)}, None, "early"),
        ({"full": job(1, 2, 1, "ab", seats="ab"), "short": job(1, 2, 2)}, None, "short"),
        ({"full": job(1, 2, 1, "ab", seats="ab")}, None, "full"),  # as its one spare
        ({"full": job(1, 2, 1, "abc", seats="ab")}, None, None),
        ({"mine": job(1, 2, 1, "abx", seats="ab"), "short": job(1, 2, 2)}, "mine", "short"),
        ({"mine": job(1, 2, 1, "xab", seats="xa"), "short": job(1, 2, 2)}, "mine", "mine"),
        ({"mine": job(1, 2, 1, "abx", seats="ab")}, "mine", "mine"),
    ],
)
def test_choose_job(jobs: dict, current: str | None, chosen: str | None) -> None:
    assert choose_job(jobs, NodeId("x"), JobId(current) if current else None) == chosen


# --- records, view, stages, deadline ---


def test_records_survive_the_store() -> None:
    value = dataclasses.replace(world(A, B), failure=failed("a").failure, restarts=((Cause.JOIN, 2),))
    assert from_json(Round, to_json(value)) == value
    assert from_json(Member, to_json(A)) == A
    assert from_json(JobSpec, to_json(spec(env=(("A", "1"),)))) == spec(env=(("A", "1"),))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"number":"1"}', json.dumps({"number": 1, "phase": "odd", "cause": "join"})]
)
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        from_json(Round, text)


def test_unknown_fields_are_for_newer_versions() -> None:
    plain = json.loads(to_json(A)) | {"new": 1}
    assert from_json(Member, json.dumps(plain)) == A


def test_the_view_leaves_out_what_it_cannot_read() -> None:
    view = View()
    good = Entry(key="/elasticd/v1/jobs/j/members/a", value=to_json(A), create_revision=1, mod_revision=1)
    bad = Entry(key="/elasticd/v1/jobs/j/round", value="\x80pickle", create_revision=2, mod_revision=2)
    view.replace([good, bad], 2)
    assert view.job(JobId("j")).members[NodeId("a")].value == A
    assert view.job(JobId("j")).round is None
    assert list(view.unreadable) == [bad.key]
    view.change([Entry(key=good.key, value=None)], 3)
    assert view.jobs == {}


def test_a_pair_that_is_not_listed_raises() -> None:
    assert advance(Stage.IDLE, Trigger.JOB_TAKEN) is Stage.PREPARING
    with pytest.raises(LookupError):
        advance(Stage.IDLE, Trigger.ADMITTED)


def test_every_stage_can_be_left_and_reached() -> None:
    reached = {target for row in TABLE.values() for target in row.values()}
    assert reached == set(Stage) == set(TABLE)


def test_the_diagram_in_the_documentation_is_the_table() -> None:
    from pathlib import Path

    text = (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text()
    assert mermaid() in text, "run python -m elasticd.core.stages and put its output into ARCHITECTURE.md"


def test_a_deadline_is_learned_and_forgets_slowly() -> None:
    deadline = StepDeadline(floor_s=1, factor=10, warm_up=3)
    for at in range(2):
        deadline.completed(0.5, float(at))
    assert deadline.expires_at() is None
    deadline.completed(0.5, 2.0)
    assert deadline.expires_at() == 7.0
    for at in range(3, 300):
        deadline.completed(0.01, float(at))
    assert deadline.expires_at() == 300.0  # the floor
    deadline.postpone(350.0)  # a checkpoint is being saved
    assert deadline.expires_at() == 351.0
    deadline.postpone(340.0)
    assert deadline.expires_at() == 351.0
    deadline.reset()
    assert deadline.expires_at() is None
