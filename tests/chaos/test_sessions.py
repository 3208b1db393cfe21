"""Jobs with a Session under real daemons: their curve, slow nodes, sick GPUs, spares, a minimum that is not met.

One cluster for all: the curve's tests leave three of its four nodes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import need
from fake_gpus import ECC, HEALTHY, FakeGpus, why_not_fake_gpus

from elasticd.testing import curves, validators
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.curves import EXACT, FLOAT, CurveRun, Reference
from elasticd.testing.faults import SlowNode
from elasticd.testing.history import Event, Trained, events_of, read_trained, rounds_of

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]
NODES = 4
JOB = "slow"
SCRIPT = str(Path(__file__).with_name("train.py"))
CAPPED = str(Path(__file__).with_name("capped.py"))
AFTER_S = 1
POLICY = "[stragglers]\neviction_budget = 5\nquarantine_after = 2\nquarantine_s = 600\neviction_window_s = 1\n"


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> FakeGpus | None:
    """One on each node; None where they cannot be faked."""
    if why_not_fake_gpus():
        return None
    made = FakeGpus(tmp_path_factory.mktemp("gpus"))
    for index in range(NODES):
        made.set(0, f"node{index}", **HEALTHY, **ECC)
    return made


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Future[Reference]]]:
    """By whether it is exact; they run beside the first test."""
    folder = tmp_path_factory.mktemp("reference")
    with ThreadPoolExecutor(2) as threads:
        yield {task.exact: threads.submit(curves.run_reference, folder, task) for task in (FLOAT, EXACT)}


@pytest.fixture(scope="module")
def cluster(
    namespaces: None,
    references: dict[bool, Future[Reference]],
    gpus: FakeGpus | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    env = gpus.environment_by_node if gpus is not None else {}
    spec = ClusterSpec(nodes=NODES, isolated=True, more=POLICY, env=env)
    with Cluster(spec, folder=tmp_path_factory.mktemp("sessions")) as cluster:
        yield cluster


@pytest.fixture
def three(cluster: Cluster) -> Cluster:
    """With three nodes that run, whichever they are."""
    if len(running(cluster)) == NODES:
        cluster.kill_node(NODES - 1)
    return cluster


def running(cluster: Cluster) -> set[str]:
    return {node.name for node in cluster.nodes if node.running}


# --- the curve ---


def drained(cluster: Cluster, index: int) -> str:
    """A node whose daemon runs, with its imports done, and takes no job: it can join in the middle of short steps."""
    name = cluster.nodes[index].name
    if not cluster.nodes[index].running:
        cluster.start_node(index)
    cluster.wait_until(lambda: cluster.cli("drain", name).returncode == 0, 20, f"{name} registered")
    return name


@pytest.mark.parametrize(("exact", "balance"), [(False, "auto"), (True, "1:2:5")])
def test_a_killed_node_and_one_that_joins_do_not_show_in_200_steps(
    cluster: Cluster, references: dict[bool, Future[Reference]], exact: bool, balance: str
) -> None:
    joiner = drained(cluster, next((i for i, node in enumerate(cluster.nodes) if not node.running), 3))
    run = CurveRun(cluster, "exact" if exact else "float", EXACT if exact else FLOAT)
    run.submit(balance=balance, step_seconds=0.02, nodes="1:3")
    run.wait_step(30, world=3)
    if exact:
        assert {line.rank: len(line.samples) for line in run.trained if line.world == 3} == {0: 2, 1: 4, 2: 10}
    cluster.kill_node(cluster.index_of(cluster.seated(run.job)[1]))
    run.wait_step(60, world=2)
    assert cluster.cli("undrain", joiner).returncode == 0
    run.wait_step(100, world=3)
    run.wait_over()
    assert run.judge(references[exact].result()) == []


def test_the_judge_of_a_curve_finds_what_is_wrong(references: dict[bool, Future[Reference]]) -> None:
    """Forged ledgers: otherwise the test above would show nothing."""
    reference = references[False].result()
    good = list(reference.trained)
    assert curves.judge_curve(good, reference) == []
    assert good[199].loss < 0.8 * good[0].loss
    wrong_loss = replace(good[100], loss=good[100].loss * 1.001)
    twice = replace(good[100], samples=(*good[100].samples[:-1], good[99].samples[0]))
    for forged in (wrong_loss, twice):
        assert curves.judge_curve([*good[:100], forged, *good[101:]], reference)
    assert curves.judge_curve(good[:150], reference)


# --- slow and sick nodes, spares ---


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


def test_slow_and_sick_nodes_are_exchanged_for_a_spare_and_a_job_outlives_the_drain_of_its_last_node(
    three: Cluster, gpus: FakeGpus | None
) -> None:
    """One job, which loses no step in all of it."""
    cluster = three
    ledger = submit(cluster, JOB, nodes="1:2", spares=1, straggler_factor=1.6, straggler_after_s=AFTER_S)
    cluster.wait_for(lambda _: len(cluster.seated(JOB)) == 2, 30, "a world of two")
    slow = cluster.seated(JOB)[1]
    spare = exchange_slow_node_twice(cluster, slow)
    assert_quarantined(cluster, slow)
    assert "takes jobs again" in cluster.cli("undrain", slow).stdout
    cluster.wait_until(lambda: part(cluster, slow) == JOB, 20, "it is a spare again")
    if gpus is not None:
        exchange_sick_node(cluster, gpus, spare)

    for node in sorted(running(cluster)):  # up to the last one
        assert cluster.cli("drain", node).returncode == 0
    cluster.wait_for(lambda _: phase(cluster, JOB) == "waiting", 40, "the job waits")
    cluster.wait_until(lambda: {part(cluster, node) for node in running(cluster)} == {""}, 20, "all have left")
    at = time.monotonic()
    for node in sorted(running(cluster)):
        assert cluster.cli("undrain", node).returncode == 0
    cluster.wait_step(at, world=2)
    assert cluster.cli("cancel", JOB).returncode == 0
    cluster.wait_until(lambda: {part(cluster, node) for node in running(cluster)} == {""}, 20, "all nodes are idle")
    no_step_is_lost(read_trained(ledger))
    history = cluster.history()
    assert validators.validate(history) + validators.budget_charged(history, JOB, 0) == []
    need(why_not_fake_gpus())


def exchange_slow_node_twice(cluster: Cluster, slow: str) -> str:
    """By its control group. Returns the node that takes its seat, both times."""
    (spare,) = running(cluster) - set(cluster.seated(JOB))
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
    told = [event.details["straggler"] for event in events_of(cluster.history(), "straggler_exchanged", job=JOB)]
    assert told == [slow, slow]
    return spare


def assert_quarantined(cluster: Cluster, node: str) -> None:
    (shown,) = json.loads(cluster.cli("status", "--json").stdout)["quarantines"]
    assert (shown["node_id"], shown["grounds"], shown["offences"]) == (node, "slow", 2)
    assert f"{node} is in quarantine until" in " ".join(cluster.cli("status").stdout.split())
    cluster.wait_until(lambda: part(cluster, node) == "", 20, "it has left the job")


def exchange_sick_node(cluster: Cluster, gpus: FakeGpus, sick: str) -> None:
    at = time.monotonic()
    gpus.set(0, sick, **HEALTHY, **{**ECC, "ecc_uncorrected": 1})
    told = exchanged(cluster, sick, at)
    assert told.details["grounds"] == "gpu"
    assert "1 uncorrectable ECC errors" in told.details["reason"]
    assert told.details["quarantine_s"] == 600
    cluster.wait_step(told.t, world=2)
    cluster.wait_until(lambda: part(cluster, sick) == "", 20, "it has left the job")
    gpus.set(0, sick, **HEALTHY, **ECC)  # the card was exchanged, and the driver loaded anew
    assert cluster.cli("undrain", sick).returncode == 0
    cluster.wait_until(lambda: part(cluster, sick) == JOB, 20, "it is a spare again")


def part(cluster: Cluster, node: str) -> str:
    """The job that it is in; "" also of one that has been started and is not registered yet."""
    nodes = json.loads(cluster.cli("status", "--json").stdout)["nodes"]
    return next((str(one["job"]) for one in nodes if one["node"] == node), "")


def test_nodes_that_cannot_hold_a_step_are_no_world_for_a_straggler_nor_after_a_loss(three: Cluster) -> None:
    """At most 4 of a step's 8 micro-batches fall to a rank: a world of one would end in a ConfigError."""
    cluster = three
    job, folder = "capped", cluster.folder / "capped"
    folder.mkdir()
    third = drained(cluster, cluster.index_of(max(running(cluster))))
    cluster.wait_until(lambda: part(cluster, third) == "", 20, "it is in no other job")
    cluster.submit(job, [CAPPED, str(folder)], nodes="1:2", straggler_factor=1.6, straggler_after_s=AFTER_S)
    cluster.wait_step(time.monotonic(), world=2, timeout_s=40)
    other, slow = cluster.seated(job)

    (folder / slow).touch()
    kept = cluster.wait_for(lambda history: events_of(history, "straggler_kept", job=job), 30, "it is kept")
    assert {(event.details["straggler"], event.details["why"]) for event in kept} == {(slow, "too_few_nodes")}
    (folder / slow).unlink()
    assert cluster.seated(job) == [other, slow]

    cluster.kill_node(cluster.index_of(slow))
    cluster.wait_for(lambda _: phase(cluster, job) == "waiting", 8, "the job waits")
    assert "at most 4 of a step's 8 micro-batches" in " ".join(cluster.cli("status").stdout.split())
    at = time.monotonic()
    assert cluster.cli("undrain", third).returncode == 0
    cluster.wait_step(at, world=2, timeout_s=40)
    (folder / "finish").touch()
    cluster.wait_for(lambda history: over(history, job), 20, "the end")
    cluster.start_node(cluster.index_of(slow))
    history = cluster.history()
    assert validators.validate(history) + validators.budget_charged(history, job, 0) == []


def test_a_spare_takes_a_lost_seat_at_once_and_below_the_minimum_the_job_waits(three: Cluster) -> None:
    cluster = three
    job, folder = "spares", cluster.folder / "spares"
    folder.mkdir()
    cluster.submit(job, [SCRIPT, str(folder)], nodes="2", spares=1)
    cluster.wait_until(lambda: all(part(cluster, node) == job for node in running(cluster)), 30, "two and a spare")
    cluster.wait_step(time.monotonic(), world=2)
    (spare,) = running(cluster) - set(cluster.seated(job))
    lost, other = cluster.seated(job)

    at = time.monotonic()
    cluster.kill_node(cluster.index_of(lost))
    cluster.wait_for(lambda _: set(cluster.seated(job)) == {spare, other}, 8, "the spare has the seat")
    step = cluster.wait_step(at, world=2)
    print(f"from the kill to a step with the spare: {step.t - at:.3f} s")

    cluster.kill_node(cluster.index_of(other))  # one is left, of two
    cluster.wait_for(lambda _: phase(cluster, job) == "waiting", 8, "the job waits")
    stopped_at = time.monotonic()
    cluster.start_node(cluster.index_of(other))
    cluster.wait_for(lambda _: set(cluster.seated(job)) == {spare, other}, 30, "the minimum is met again")
    first = cluster.wait_step(stopped_at, world=2)
    assert not [line for line in cluster.trained() if stopped_at + 0.5 < line.t < first.t - 0.5]

    (folder / "finish").touch()
    cluster.wait_for(lambda history: over(history, job), 20, "the end")
    history = cluster.history()
    assert validators.validate(history) + validators.budget_charged(history, job, 0) == []


def phase(cluster: Cluster, job: str) -> str:
    return str(max(rounds_of(cluster.history(), job).items())[1]["phase"])


def over(history: list[Event], job: str) -> bool:
    return [event.details["phase"] for event in events_of(history, "job_over", job=job)] == ["succeeded"] * 2
