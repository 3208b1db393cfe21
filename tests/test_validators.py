"""Each validator finds the history that was forged to break its rule, and passes the clean ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from elasticd.core.model import BootId, Cause, NodeId, Phase, Round, Seat
from elasticd.core.records import to_plain
from elasticd.testing import validators
from elasticd.testing.history import Event, Tail, Trained, parse_event, parse_trained
from elasticd.testing.validators import Pause, Violation


def world(number: int, *nodes: str, cause: Cause = Cause.START, failures: int = 0, **changes: Any) -> dict[str, Any]:
    """A round of nodes with two workers each, as it stands in a history."""
    seats = tuple(
        Seat(node_id=NodeId(node), boot_id=BootId(f"{node}-1"), address=node, group_rank=i, first_rank=2 * i, nproc=2)
        for i, node in enumerate(nodes)
    )
    charged = ((Cause.WORKER_FAILED, failures),) if failures else ()
    record = Round(
        number=number,
        phase=Phase.RUNNING if nodes else Phase.WAITING,
        cause=cause,
        seats=seats,
        store_address=nodes[0] if nodes else "",
        store_port=40000 + number,
        restarts=charged,
    )
    return {**to_plain(record), **changes}


def event(t: float, node: str, name: str, *, boot: str = "", **details: Any) -> Event:
    return Event(t=t, node=node, boot=boot or f"{node}-1", name=name, details={"job": "j", **details})


def seen(t: float, node: str, number: int, *nodes: str, **changes: Any) -> Event:
    return event(t, node, "round_seen", round=world(number, *nodes, **changes))


def commit(t: float, node: str, number: int, step: int, *, committed: bool = True) -> Event:
    return event(t, node, "commit", round=number, step=step, committed=committed)


#: Three nodes; b is cut off and fenced, rejoins with a new boot, a worker fails once.
CLEAN = [
    *(seen(1.0, node, 1, "a", "b", "c") for node in "abc"),
    *(event(1.1, node, "workers_started", round=1) for node in "abc"),
    commit(2.0, "a", 1, 10),
    *(seen(3.0, node, 2, "a", "c", cause=Cause.NODE_LOST) for node in "ac"),
    *(event(3.1, node, "workers_started", round=2) for node in "ac"),
    commit(3.2, "a", 1, 11),  # its line is late: the store had taken it before round 2
    commit(3.9, "b", 1, 12, committed=False),
    commit(4.0, "a", 2, 20),
    seen(5.0, "b", 2, "a", "c", cause=Cause.NODE_LOST),
    event(5.0, "b", "fenced", round=2),
    event(5.2, "b", "workers_stopped", round=1),
    event(6.0, "b", "started", boot="b-2"),
    *(seen(7.0, node, 3, "a", "b", "c", cause=Cause.JOIN) for node in "ac"),
    event(7.0, "b", "round_seen", boot="b-2", round=world(3, "a", "b", "c", cause=Cause.JOIN)),
    *(seen(8.0, node, 4, "a", "b", "c", cause=Cause.WORKER_FAILED, failures=1) for node in "ac"),
    event(8.0, "b", "round_seen", boot="b-2", round=world(4, "a", "b", "c", cause=Cause.WORKER_FAILED, failures=1)),
    commit(9.0, "c", 4, 30),
    event(20.0, "a", "stopped"),
]


def rules(found: Sequence[Violation]) -> set[str]:
    return {violation.rule for violation in found}


def test_a_clean_history_passes_all() -> None:
    assert validators.validate(CLEAN) == []
    assert validators.healthy(CLEAN, "j", "abc") == []
    assert validators.budget_charged(CLEAN, "j", 1) == []


def test_an_empty_history_breaks_nothing_and_is_not_healthy() -> None:
    assert validators.validate([]) == []
    assert rules(validators.healthy([], "j", "abc")) == {"healthy"}


FORGED = {
    "two worlds under one number": (
        "one_world_per_round",
        [seen(1.0, "a", 1, "a", "b"), seen(1.0, "c", 1, "c")],
    ),
    "one number, two stores": (
        "one_world_per_round",
        [seen(1.0, "a", 1, "a", "b"), seen(1.0, "b", 1, "a", "b", store_port=9)],
    ),
    "a rank that nobody has": (
        "ranks_belong_to_one_seat",
        [
            seen(
                1.0,
                "a",
                1,
                "a",
                "b",
                seats=[{**s, "first_rank": s["first_rank"] * 2} for s in world(1, "a", "b")["seats"]],
            )
        ],
    ),
    "a rank with two owners": (
        "ranks_belong_to_one_seat",
        [seen(1.0, "a", 1, "a", "b", seats=[{**s, "first_rank": 0} for s in world(1, "a", "b")["seats"]])],
    ),
    "a node with two seats": ("ranks_belong_to_one_seat", [seen(1.0, "a", 1, "a", "a")]),
    "a commit under an older round": (
        "stale_rounds_commit_nothing",
        [seen(1.0, "a", 1, "a", "b"), seen(2.0, "b", 2, "b"), commit(2.6, "a", 1, 5)],
    ),
    "a commit by a node without a seat": (
        "stale_rounds_commit_nothing",
        [seen(1.0, "a", 1, "a", "b"), commit(1.1, "c", 1, 5)],
    ),
    "a committed step goes back in a round": (
        "committed_step_never_goes_back",
        [commit(1.0, "a", 1, 5), commit(2.0, "a", 1, 4)],
    ),
    "a committed step goes back in the next round": (
        "committed_step_never_goes_back",
        [commit(1.0, "a", 1, 5), commit(2.0, "b", 2, 4)],
    ),
    "a node sees an older round": (
        "rounds_never_go_back",
        [seen(1.0, "a", 2, "a"), seen(2.0, "a", 1, "a")],
    ),
    "a new life of a node sees an older round": (
        "rounds_never_go_back",
        [seen(1.0, "a", 2, "a"), event(2.0, "a", "round_seen", boot="a-2", round=world(1, "a"))],
    ),
    "a life of a node sees a round twice": (
        "rounds_never_go_back",
        [seen(1.0, "a", 1, "a"), seen(2.0, "a", 1, "a")],
    ),
    "fenced workers run on": (
        "fenced_workers_stop",
        [event(1.0, "a", "workers_started", round=1), event(2.0, "a", "fenced", round=2), event(9.0, "b", "step")],
    ),
    "fenced workers stop too late": (
        "fenced_workers_stop",
        [
            event(1.0, "a", "workers_started", round=1),
            event(2.0, "a", "fenced", round=2),
            event(8.5, "a", "workers_stopped", round=1),
        ],
    ),
    "fenced workers are started after the fence": (
        "fenced_workers_stop",
        [
            event(2.0, "a", "fenced", round=2),
            event(2.1, "a", "workers_started", round=1),
            event(9.0, "b", "step"),
        ],
    ),
    "another node's stop is not one's own": (
        "fenced_workers_stop",
        [
            event(1.0, "a", "workers_started", round=1),
            event(2.0, "a", "fenced", round=2),
            event(2.1, "b", "workers_stopped", round=1),
            event(9.0, "b", "step"),
        ],
    ),
    "a lost node is charged": (
        "lost_nodes_cost_no_restart",
        [seen(1.0, "a", 1, "a", "b"), seen(2.0, "a", 2, "a", cause=Cause.NODE_LOST, failures=1)],
    ),
    "a join is charged": (
        "lost_nodes_cost_no_restart",
        [seen(1.0, "a", 1, "a"), seen(2.0, "a", 2, "a", "b", cause=Cause.JOIN, failures=1)],
    ),
    "a failure is charged twice": (
        "lost_nodes_cost_no_restart",
        [seen(1.0, "a", 1, "a"), seen(2.0, "a", 2, "a", cause=Cause.WORKER_FAILED, failures=2)],
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_each_rule_finds_what_breaks_it_and_only_that(name: str) -> None:
    rule, history = FORGED[name]
    assert rules(validators.validate(history)) == {rule}


CLEAN_CASES = {
    "workers that had ended before the fence": [
        event(1.0, "a", "workers_started", round=1),
        event(1.5, "a", "workers_succeeded", round=1),
        event(2.0, "a", "fenced", round=2),
        event(9.0, "b", "step"),
    ],
    "a fenced node is let in again": [
        event(1.0, "a", "workers_started", round=1),
        event(2.0, "a", "fenced", round=2),
        event(3.0, "a", "workers_started", round=3),
        event(9.0, "b", "step"),
    ],
    "a fenced daemon dies": [
        event(1.0, "a", "workers_started", round=1),
        event(2.0, "a", "fenced", round=2),
        event(3.0, "a", "started", boot="a-2"),
        event(9.0, "b", "step"),
    ],
    "a history that ends right after the fence": [
        event(1.0, "a", "workers_started", round=1),
        event(2.0, "a", "fenced", round=2),
    ],
    "who wrote a round is no part of the world": [
        seen(1.0, "a", 1, "a", "b", proposer="a"),
        seen(1.0, "b", 1, "a", "b", proposer="b"),
    ],
    "the same round seen by two lives of a node": [
        seen(1.0, "a", 1, "a"),
        event(2.0, "a", "round_seen", boot="a-2", round=world(1, "a")),
    ],
    "two jobs count for themselves": [
        seen(1.0, "a", 5, "a"),
        Event(t=2.0, node="a", boot="a-1", name="round_seen", details={"job": "other", "round": world(1, "b")}),
    ],
}


@pytest.mark.parametrize("name", CLEAN_CASES)
def test_clean_cases_pass(name: str) -> None:
    assert validators.validate(CLEAN_CASES[name]) == []


def test_the_line_of_a_frozen_node_may_come_late() -> None:
    history = [seen(1.0, "a", 1, "a", "b"), seen(2.0, "b", 2, "b"), commit(9.0, "a", 1, 5)]
    assert rules(validators.validate(history)) == {"stale_rounds_commit_nothing"}
    assert validators.validate(history, [Pause(node="a", start=1.5, end=8.9)]) == []
    assert rules(validators.validate(history, [Pause(node="b", start=1.5, end=8.9)])) == {"stale_rounds_commit_nothing"}
    assert rules(validators.validate(history, [Pause(node="a", start=1.5, end=8.0)])) == {"stale_rounds_commit_nothing"}


def trained(t: float, number: int, rank: int, step: int, *samples: int, size: int = 4, node: str = "") -> Trained:
    return Trained(t=t, round_number=number, rank=rank, step=step, world=size, samples=samples, node=node)


def test_a_gap_between_steps_is_found() -> None:
    lines = [trained(t, 1, 0, step) for step, t in enumerate([1.0, 1.1, 1.2, 3.0, 3.1])]
    assert validators.steps_go_on(lines, 1.0, 3.2, 1.9) == []
    (gap,) = validators.steps_go_on(lines, 1.0, 3.2, 1.0)
    assert gap.t == 1.2
    assert validators.steps_go_on(lines, 1.0, 9.0, 1.9)[0].t == 3.1  # they never went on
    assert validators.steps_go_on([], 1.0, 3.0, 1.0)


def test_a_move_during_an_outage_is_found() -> None:
    assert validators.nobody_is_moved(CLEAN, 1.5, 2.5) == []
    assert rules(validators.nobody_is_moved(CLEAN, 2.5, 3.5)) == {"nobody_is_moved"}
    assert {v.node for v in validators.nobody_is_moved(CLEAN, 4.9, 5.1)} == {"b"}


def test_workers_of_a_world_that_does_not_exist_are_found() -> None:
    history = [seen(1.0, "a", 1, "a", "b")]
    good = [trained(1.5, 1, 0, 1, node="a"), trained(1.5, 1, 3, 1, node="b")]
    assert validators.workers_train_one_world(good, history, "j") == []
    for bad in (
        trained(1.5, 1, 0, 1, node="b"),  # another's rank
        trained(1.5, 1, 0, 1, node="a", size=2),  # a world of another size
        trained(1.5, 2, 0, 1, node="a"),  # a round that nobody saw
        trained(1.5, 1, 4, 1, node="b"),  # a rank that is not there
    ):
        assert rules(validators.workers_train_one_world([bad], history, "j")) == {"workers_train_one_world"}


LEDGER = [
    *(
        trained(s, 1, rank, s, 4 * (s - 1) + 2 * rank, 4 * (s - 1) + 2 * rank + 1, size=2)
        for s in (1, 2, 3)
        for rank in (0, 1)
    ),
    # Step 3 was not committed: the next round, of one worker, does it again with the same samples.
    *(trained(10 + s, 2, 0, s, *range(4 * (s - 1), 4 * s), size=1) for s in (3, 4)),
]


def test_a_redone_step_counts_once() -> None:
    assert validators.samples_count_once(LEDGER, committed_step=4, batch=4) == []


@pytest.mark.parametrize(
    "forged",
    [
        [*LEDGER, trained(15.0, 2, 0, 5, 0, 17, 18, 19)],  # sample 0 again
        [*LEDGER, trained(15.0, 2, 0, 5, 16, 17, 18)],  # a sample short
        [line for line in LEDGER if line.step != 2] + [trained(15.0, 2, 0, 5, 16, 17, 18, 19)],  # a step skipped
        [*LEDGER, trained(15.0, 2, 0, 5, 16, 17, 18, 19), trained(15.0, 2, 1, 5, 20)],  # one too many
    ],
)
def test_a_skipped_or_repeated_sample_is_found(forged: list[Trained]) -> None:
    assert rules(validators.samples_count_once(forged, committed_step=5, batch=4)) == {"samples_count_once"}


def test_the_budget_is_compared_with_what_the_script_did() -> None:
    assert rules(validators.budget_charged(CLEAN, "j", 0)) == {"budget_charged"}
    assert rules(validators.budget_charged(CLEAN, "j", 2)) == {"budget_charged"}


def test_health_is_exactly_the_wanted_nodes() -> None:
    assert rules(validators.healthy(CLEAN, "j", "ab")) == {"healthy"}
    assert rules(validators.healthy([seen(1.0, "a", 1)], "j", "")) == {"healthy"}  # waiting is not running


def test_a_history_is_read_as_it_grows(tmp_path) -> None:
    file = tmp_path / "history"
    tail = Tail()
    assert tail.read([file]) == []
    line = {"t": 1.0, "wall": 2.0, "node": "a", "boot": "b", "event": "round_seen", "job": "j", "round": world(3, "a")}
    text = json.dumps(line)
    file.write_text(text + "\n" + text[:10])
    (read,) = [parse_event(found) for found in tail.read([file])]
    assert (read.t, read.node, read.boot, read.name, read.job, read.round_number) == (
        1.0,
        "a",
        "b",
        "round_seen",
        "j",
        3,
    )
    with file.open("a") as stream:
        stream.write(text[10:] + "\n")
    assert len(tail.read([file])) == 1
    assert parse_trained({"t": 1.0, "round": 1, "rank": 0, "step": 2, "world": 3}).samples == ()
