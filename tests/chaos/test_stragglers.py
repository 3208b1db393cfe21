"""Slow nodes, spares, and a minimum that is not met, under real daemons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticd.testing import validators
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.faults import SlowNode
from elasticd.testing.history import Event, Trained, events_of, read_trained

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]
JOB = "slow"
AFTER_S = 2
POLICY = "[stragglers]\neviction_budget = 5\nquarantine_after = 2\nquarantine_s = 600\neviction_window_s = 1\n"


@pytest.fixture(scope="module")
def cluster(namespaces: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(
        ClusterSpec(nodes=3, isolated=True, more=POLICY), folder=tmp_path_factory.mktemp("stragglers")
    ) as cluster:
        yield cluster


def submit(cluster: Cluster, job: str, **fields: object) -> Path:
    """Steps of some 50 ms on a free processor; the ledger of all ranks."""
    ledger = cluster.folder / "steps" / f"{job}.jsonl"
    arguments = {"--steps": 1_000_000, "--batch": 16, "--micro-batches": 8, "--width": 64, "--save-every": 10_000}
    arguments |= {"--ledger": ledger, "--checkpoint-dir": cluster.folder / f"{job}-checkpoints"}
    flags = [str(part) for pair in arguments.items() for part in pair]
    cluster.submit(job, ["elasticd.examples.byte_gpt", *flags], module=True, **fields)
    return ledger


def exchanged(cluster: Cluster, node: str, since: float) -> Event:
    def found(history: list[Event]) -> Event | None:
        events = events_of(history, "straggler_exchanged", job=JOB)
        return next((e for e in events if e.t > since and e.details["straggler"] == node), None)

    cluster.wait_for(found, 40, f"{node} is exchanged")
    cluster.wait_for(lambda _: node not in cluster.seated(JOB), 20, f"{node} has no seat")
    event = found(cluster.history())
    assert event is not None
    return event


def no_step_is_lost(trained: list[Trained]) -> None:
    """In the order of rounds, each step of each rank follows the last one of the world before."""
    rounds: dict[int, set[int]] = {}
    for line in trained:
        rounds.setdefault(line.round_number, set()).add(line.step)
    steps = [step for _, found in sorted(rounds.items()) for step in sorted(found)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_slow_node_is_exchanged_for_the_spare_and_the_second_time_quarantined(cluster: Cluster) -> None:
    ledger = submit(cluster, JOB, nodes="2", spares=1, straggler_factor=1.6, straggler_after_s=AFTER_S)
    cluster.wait_for(lambda _: len(cluster.seated(JOB)) == 2, 30, "a world of two")
    slow = cluster.seated(JOB)[1]
    (spare,) = {node.name for node in cluster.nodes} - set(cluster.seated(JOB))
    fault = SlowNode(node=cluster.index_of(slow), fraction=0.25)
    fault.apply(cluster)
    first = exchanged(cluster, slow, 0.0)
    assert (first.details["spare"], first.details["grounds"], first.details["quarantine_s"]) == (spare, "slow", 0)
    assert "times as slow as the median" in first.details["reason"]
    cluster.wait_step(first.t, world=2)
    fault.heal(cluster)

    # The record of its eviction lapses; it is a spare like any other, and comes back when its substitute is drained.
    assert cluster.cli("drain", spare).returncode == 0
    cluster.wait_for(lambda _: slow in cluster.seated(JOB), 30, f"{slow} is back")
    assert cluster.cli("undrain", spare).returncode == 0
    fault.apply(cluster)
    second = exchanged(cluster, slow, first.t)
    assert (second.details["spare"], second.details["quarantine_s"]) == (spare, 600)
    fault.heal(cluster)

    (shown,) = json.loads(cluster.cli("status", "--json").stdout)["quarantines"]
    assert (shown["node_id"], shown["grounds"], shown["offences"]) == (slow, "slow", 2)
    assert f"{slow} is in quarantine until" in " ".join(cluster.cli("status").stdout.split())
    cluster.wait_until(lambda: part(cluster, slow) == "", 20, "it has left the job")
    assert "takes jobs again" in cluster.cli("undrain", slow).stdout
    cluster.wait_until(lambda: part(cluster, slow) == JOB, 20, "it is a spare again")
    assert cluster.cli("cancel", JOB).returncode == 0
    cluster.wait_for(lambda history: events_of(history, "job_over", job=JOB), 20, "the end")
    no_step_is_lost(read_trained(ledger))
    history = cluster.history()
    assert [e.details["straggler"] for e in events_of(history, "straggler_exchanged")] == [slow, slow]
    assert validators.validate(history) + validators.budget_charged(history, JOB, 0) == []


def part(cluster: Cluster, node: str) -> str:
    """The job that it is in."""
    nodes = json.loads(cluster.cli("status", "--json").stdout)["nodes"]
    return str(next(one for one in nodes if one["node"] == node)["job"])
