"""What the metrics say: names and units, and one node in a simulated cluster; behind HTTP: test_metrics_endpoint.py."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from simulation import Sim

from elasticd.config import DaemonConfig, MetricsConfig
from elasticd.core import messages
from elasticd.core.messages import Report
from elasticd.core.model import Capacity, Cause, JobId, JobSpec, NodeId, Phase, Round
from elasticd.daemon.main import describe_node
from elasticd.daemon.observer import JobMetrics, Tracker
from elasticd.metrics import definitions, training
from elasticd.metrics.machine import target_groups
from elasticd.metrics.recovery import Recovered, Recovery
from elasticd.metrics.saving import SaveReport
from elasticd.metrics.training import Steps, Training

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


# --- definitions ---


def test_every_metric_is_defined_once_and_named_by_the_conventions() -> None:
    names = [definition.name for definition in definitions.ALL]
    assert len(names) == len(set(names))
    for definition in definitions.ALL:
        assert re.fullmatch(r"elasticd_[a-z0-9]+(_[a-z0-9]+)*", definition.name)
        assert definition.name.endswith("_total") == isinstance(definition, definitions.CounterDefinition)
        assert definition.help.endswith(".")
        assert not {"job", "instance", "node", "round", "step", "le"} & set(definition.labels)


def test_units_are_base_units() -> None:
    scaled = r"_(ms|milliseconds|minutes|hours|kb|mb|gb|kilobytes|megabytes|percent|milliwatts)(_|$)"
    assert not [definition.name for definition in definitions.ALL if re.search(scaled, definition.name)]
    assert definitions.STORE_AGE.unit == "seconds"
    assert definitions.SENT.unit == "bytes"
    assert definitions.ROUND.unit == ""


# --- recovery ---


def round_of(number: int, cause: Cause, phase: Phase = Phase.RUNNING) -> Round:
    return Round(number=number, phase=phase, cause=cause)


def running(recovery: Recovery, now: float = 0.0) -> None:
    recovery.entered(round_of(1, Cause.START), now, seated=True)
    assert recovery.started(now) is None
    assert recovery.stepped(now) is None


def test_recovery_counts_from_the_first_evidence_to_the_workers_and_to_the_step() -> None:
    recovery = Recovery()
    running(recovery)
    recovery.suspected(10.0, NodeId("b"))
    recovery.suspected(10.5)  # the workers fail because of it
    assert recovery.stepped(10.6) is None  # a step of the old world: nothing has changed yet
    recovery.entered(round_of(2, Cause.NODE_LOST), 11.0, seated=True)
    assert recovery.started(12.0) == Recovered(cause=Cause.NODE_LOST, until="workers", seconds=2.0)
    assert recovery.stepped(13.0) == Recovered(cause=Cause.NODE_LOST, until="step", seconds=3.0)
    assert recovery.stepped(14.0) is None


def test_a_wait_for_nodes_belongs_to_the_loss_that_caused_it() -> None:
    recovery = Recovery()
    running(recovery)
    recovery.entered(round_of(2, Cause.NODE_LOST, Phase.WAITING), 10.0, seated=False)
    recovery.entered(round_of(3, Cause.JOIN), 70.0, seated=True)
    assert recovery.started(71.0) == Recovered(cause=Cause.NODE_LOST, until="workers", seconds=61.0)


def test_a_peer_that_comes_back_in_time_was_no_interruption() -> None:
    recovery = Recovery()
    running(recovery)
    recovery.suspected(10.0, NodeId("b"))
    recovery.cleared(NodeId("b"))
    recovery.entered(round_of(2, Cause.JOIN), 50.0, seated=True)
    assert recovery.started(51.0) == Recovered(cause=Cause.JOIN, until="workers", seconds=1.0)


def test_a_script_without_a_session_never_completes_a_step_and_still_counts_anew() -> None:
    recovery = Recovery()
    running(recovery)
    for at in (10.0, 500.0):
        recovery.suspected(at)
        recovery.entered(round_of(int(at), Cause.WORKER_FAILED), at + 1, seated=True)
        assert recovery.started(at + 2) == Recovered(cause=Cause.WORKER_FAILED, until="workers", seconds=2.0)


def test_joiners_and_spares_have_nothing_to_recover() -> None:
    joiner, spare = Recovery(), Recovery()
    joiner.suspected(1.0)
    joiner.entered(round_of(2, Cause.JOIN), 2.0, seated=True)
    assert joiner.started(3.0) is None
    running(spare)
    spare.entered(round_of(2, Cause.NODE_LOST), 2.0, seated=False)
    spare.entered(round_of(3, Cause.NODE_LOST), 9.0, seated=True)
    assert spare.started(10.0) is None


# --- training ---


def steps(step: int = 1, **more: Any) -> Steps:
    return Steps.from_message({"step": step, "seconds": 1.0, "wait_seconds": 0.25, "samples": 4, **more})


def exposed(found: Training) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in found.families()
        for sample in family.samples
    }


def of_rank(rank: int) -> tuple[tuple[str, str], ...]:
    return (("job_id", "j"), ("rank", str(rank)))


def test_steps_add_up_by_rank() -> None:
    found = Training()
    found.begin(JobId("j"))
    found.stepped(2, steps(1), 0.0, 100.0)
    found.stepped(2, steps(4, steps=3, samples=12, sent_bytes=900, metrics={"loss": 0.5}), 1.0, 101.0)
    seen = exposed(found)
    assert seen["elasticd_rank_steps_total", of_rank(2)] == 4
    assert seen["elasticd_rank_samples_total", of_rank(2)] == 16
    assert seen["elasticd_rank_sent_bytes_total", of_rank(2)] == 900
    assert seen["elasticd_rank_busy_seconds_total", of_rank(2)] == 3.0
    assert seen["elasticd_rank_wait_seconds_total", of_rank(2)] == 1.0
    assert seen["elasticd_job_step", (("job_id", "j"),)] == 4
    assert seen["elasticd_job_last_step_timestamp_seconds", (("job_id", "j"),)] == 101.0
    assert seen["elasticd_job_metric", (("job_id", "j"), ("name", "loss"))] == 0.5


def test_imbalance_is_the_slowest_over_the_mean_without_the_waiting() -> None:
    found = Training()
    assert found.imbalance is None
    found.stepped(0, steps(seconds=4.0, wait_seconds=3.0), 0.0, 0.0)
    assert found.imbalance == 1.0
    found.stepped(1, steps(seconds=4.0, wait_seconds=1.0), 0.0, 0.0)
    assert found.imbalance == pytest.approx(1.5)


def test_a_new_world_ends_the_figures_of_ranks_that_moved_away() -> None:
    found = Training()
    found.begin(JobId("j"))
    for rank in (0, 1):
        found.stepped(rank, steps(), 0.0, 0.0)
    found.enter_round(range(1, 3))
    seen = exposed(found)
    assert {labels for name, labels in seen if name == "elasticd_rank_steps_total"} == {of_rank(1)}
    assert not [name for name, _ in seen if name == "elasticd_rank_step_seconds"]
    found.stepped(1, steps(), 1.0, 1.0)
    assert exposed(found)["elasticd_rank_steps_total", of_rank(1)] == 2


def test_whatever_a_script_reports_the_exposition_stays_bounded() -> None:
    found = Training()
    for turn in range(50):
        told = {f"loss {turn}\n{'é' * 100}": float(turn), "loss": float("nan")}
        found.stepped(0, steps(metrics=told), 0.0, 0.0)
        found.stepped(1000 + 100 * turn, steps(), 0.0, 0.0)
    for rank in range(1, 2 * training.MAX_RANKS):
        found.stepped(rank, steps(), 0.0, 0.0)
    seen = exposed(found)
    names = [dict(labels)["name"] for name, labels in seen if name == "elasticd_job_metric"]
    assert len(names) == training.MAX_NAMES
    assert all(re.fullmatch(r"[A-Za-z0-9_.:/-]{1,64}", name) for name in names)
    assert len([name for name, _ in seen if name == "elasticd_rank_steps_total"]) == training.MAX_RANKS


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": "1"},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"wait_seconds": float("inf")},
        {"samples": 1.5},
        {"step": True},
        {"metrics": [1]},
        {"metrics": {"loss": None}},
    ],
)
def test_a_malformed_report_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        steps(**wrong)


# --- one node of a simulated cluster ---


class Watched(list[Any]):
    """Takes a simulated node's reports, as its observer."""

    def __init__(self, sim: Sim, name: str) -> None:
        super().__init__()
        self.sim, self.node = sim, sim.nodes[name]
        self.registry = CollectorRegistry()
        self.tracker = Tracker(JobMetrics(self.registry))
        self.node.reports = self

    def append(self, item: Any) -> None:
        at, event, details = item
        self.tracker.reported(Report(event=event, details=tuple(details.items())), self.node.machine, at)

    def step(self, rank: int = 0, **more: Any) -> None:
        message = {"type": "step", "step": 1, "seconds": 0.1, **more}
        self.tracker.stepped(rank, self.node.machine.task.started_round, message, self.sim.now)

    def samples(self) -> Samples:
        families = [*self.registry.collect(), *self.tracker.families(self.node.machine)]
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, tuple(sorted(labels.items()))))


def cluster_of(names: str, *, sessions: bool = False, **spec: Any) -> tuple[Sim, Watched]:
    sim = Sim(7, spec=JobSpec(job_id=JobId("j"), min_nodes=1, max_nodes=8, command=("x",), **spec))
    for name in names:
        sim.add(name, sessions=sessions)
    watched = Watched(sim, names[0])
    assert sim.run(5, lambda: world_of(watched) == len(names) and watched.node.workers > 0)
    return sim, watched


def world_of(watched: Watched) -> float | None:
    return watched.value("elasticd_job_world_size", job_id="j")


def test_a_world_as_one_of_its_nodes_tells_it() -> None:
    _, watched = cluster_of("abc", max_restarts=2)
    told = {name: watched.value(f"elasticd_job_{name}", job_id="j") for name in (
        "nodes", "members", "min_nodes", "max_nodes", "seated", "restart_budget")}  # fmt: skip
    assert told == {"nodes": 3, "members": 3, "min_nodes": 1, "max_nodes": 8, "seated": 1, "restart_budget": 2}
    assert watched.value("elasticd_stage", stage="running") == 1
    assert watched.value("elasticd_stage", stage="idle") == 0
    assert watched.value("elasticd_peers", state="up") == 2
    assert watched.value("elasticd_registered") == 1
    assert watched.value("elasticd_cluster_nodes") == 3
    assert watched.value("elasticd_cluster_jobs", phase="running") == 1


def test_exactly_one_node_hosts_the_store() -> None:
    sim, first = cluster_of("ab")
    second = Watched(sim, "b")
    sim.crash_script("a")  # so that the second hears of a round, too
    second.append((sim.now, "job_taken", {"job": "j"}))
    hosts = [watched.value("elasticd_job_store_host", job_id="j") for watched in (first, second)]
    assert sorted(hosts) == [0, 1]


def test_a_lost_node_is_detected_and_recovered_from() -> None:
    sim, watched = cluster_of("abc")
    watched.step()
    sim.silence("c", frozen=False)
    cut_at = sim.now
    assert sim.run(5, lambda: world_of(watched) == 2 and watched.node.workers > 0)
    watched.step()
    stood_still_s = sim.now - (cut_at + 0.5)
    assert watched.value("elasticd_detection_seconds_sum", how="silent") == 0.5
    assert watched.value("elasticd_detection_seconds_count", how="refused") == 0
    assert watched.value("elasticd_job_restarts_total", job_id="j", cause="node_lost") == 1
    assert watched.value("elasticd_job_restarts_total", job_id="j", cause="worker_failed") == 0
    for until in ("workers", "step"):
        told = watched.value("elasticd_recovery_seconds_sum", job_id="j", cause="node_lost", until=until)
        assert told is not None
        assert 0 < told <= stood_still_s


def test_a_join_stops_the_others_from_the_step_boundary_on() -> None:
    sim, watched = cluster_of("a", sessions=True)
    asked_at = sim.now
    sim.add("b", sessions=True)
    assert sim.run(10, lambda: world_of(watched) == 2 and watched.node.workers > 1)
    told = watched.value("elasticd_recovery_seconds_sum", job_id="j", cause="join", until="workers")
    assert told is not None
    assert 0 < told < (sim.now - asked_at) / 2  # what came before the boundary was spent training


def test_a_crashed_worker_is_detected_by_its_last_step() -> None:
    sim, watched = cluster_of("a", max_restarts=3)
    watched.step()
    sim.run(0.2)
    sim.crash_script("a")
    assert watched.value("elasticd_worker_failures_total", job_id="j") == 1
    assert watched.value("elasticd_detection_seconds_sum", how="worker_exit") == pytest.approx(0.2, abs=0.01)
    assert sim.run(5, lambda: watched.node.workers > 1)
    restarts = watched.value("elasticd_job_restarts_total", job_id="j", cause="worker_failed")
    assert restarts == 1
    recovered = {"job_id": "j", "cause": "worker_failed", "until": "workers"}
    assert watched.value("elasticd_recovery_seconds_count", **recovered) == 1


def test_a_step_of_an_older_round_is_not_counted() -> None:
    _, watched = cluster_of("a")
    watched.tracker.stepped(0, 99, {"type": "step", "step": 1, "seconds": 0.1}, 1.0)
    assert watched.value("elasticd_job_step", job_id="j") is None


def test_outages_and_leases_are_counted() -> None:
    sim, watched = cluster_of("a")
    sim.silence("a", frozen=False)
    sim.run(8)
    assert watched.value("elasticd_store_outages_total") == 1
    assert world_of(watched) == 1
    watched.node.post(messages.LeaseLost())
    assert watched.value("elasticd_leases_lost_total") == 1


def test_many_rounds_do_not_grow_the_exposition() -> None:
    sim, watched = cluster_of("abc", max_restarts=1000)
    sizes = []
    for turn in range(12):
        sim.crash_script("a") if turn % 3 == 0 else sim.kill("b")
        sim.run(3)
        watched.step(rank=watched.node.round.seat_of(NodeId("a")).first_rank if watched.node.round else 0)
        if turn % 3:
            sim.add("b")
            assert sim.run(10, lambda: world_of(watched) == 3)
        sizes.append(len(watched.samples()))
    assert watched.value("elasticd_job_round", job_id="j") > 12
    assert max(sizes[6:]) <= max(sizes[:6])  # by then, every cause has been seen


def test_another_job_ends_the_samples_of_the_last() -> None:
    sim, watched = cluster_of("a")
    watched.step()
    watched.append((sim.now, "commit", {"job": "j", "round": 1, "step": 5, "committed": True}))
    watched.append((sim.now, "commit", {"job": "j", "round": 1, "step": 6, "committed": False}))
    assert watched.value("elasticd_checkpoint_step", job_id="j") == 5
    assert watched.value("elasticd_checkpoint_commits_total", job_id="j", result="refused") == 1
    watched.append((sim.now, "commit", {"job": "made up", "round": 1, "step": 7, "committed": False}))
    assert {dict(labels).get("job_id") for _, labels in watched.samples()} == {None, "j"}
    watched.append((sim.now, "job_taken", {"job": "k"}))
    jobs = {dict(labels).get("job_id") for _, labels in watched.samples()}
    assert jobs == {None, "k"}


SAVED = {"result": "saved", "size_bytes": 1000, "seconds": 0.3, "stall_seconds": 0.02, "waited": True}


def test_what_saving_cost_is_counted_for_this_nodes_job_alone() -> None:
    sim, watched = cluster_of("a")
    watched.step()
    for job, message in (
        ("j", SAVED),
        ("j", {**SAVED, "waited": False}),
        ("j", {**SAVED, "result": "failed", "size_bytes": 0}),
        ("made up", SAVED),
    ):
        watched.append((sim.now, "checkpoint", {"job": job, "rank": 0, "message": message}))
    watched.append((sim.now, "passed_over", {"job": "j", "rank": 0, "message": {"count": 2}}))
    counted = {
        name: watched.value(f"elasticd_checkpoint_{name}", job_id="j")
        for name in ("written_bytes_total", "waits_total", "damaged_total", "save_seconds_count")
    }
    assert counted == {"written_bytes_total": 2000, "waits_total": 2, "damaged_total": 2, "save_seconds_count": 2}
    assert watched.value("elasticd_checkpoint_stall_seconds_total", job_id="j") == pytest.approx(0.06)
    for result, count in (("saved", 2), ("failed", 1)):
        assert watched.value("elasticd_checkpoint_saves_total", job_id="j", result=result) == count


@pytest.mark.parametrize(
    "wrong", [{"result": "lost"}, {"size_bytes": -1}, {"seconds": "soon"}, {"stall_seconds": 1e999}]
)
def test_a_report_of_a_save_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        SaveReport.from_message({**SAVED, **wrong})


def test_service_discovery_names_every_node_of_the_view() -> None:
    sim, watched = cluster_of("ab")
    sim.store.up = False
    sim.run(1)
    view = watched.node.machine.view
    groups = target_groups(view, "https")
    assert [group["targets"] for group in groups] == [["a:2"], ["b:2"]]
    assert groups[0]["labels"]["node"] == "a"
    assert groups[0]["labels"]["__scheme__"] == "https"
    assert groups[0]["labels"]["__meta_elasticd_job_id"] == "j"
    assert all(isinstance(value, str) for group in groups for value in group["labels"].values())


@pytest.mark.parametrize(
    ("listens_on", "target"),
    [
        ("", "10.0.0.1:9"),
        ("0.0.0.0", "10.0.0.1:9"),
        ("::", "10.0.0.1:9"),
        ("192.0.2.7", "192.0.2.7:9"),
        ("2001:db8::7", "[2001:db8::7]:9"),
    ],
)
def test_scrapers_are_sent_to_where_the_metrics_are(listens_on: str, target: str) -> None:
    config = DaemonConfig(node_id="m", address="10.0.0.1", metrics=MetricsConfig(address=listens_on, port=9))
    assert describe_node(config, Capacity(cpu_count=1, memory_bytes=1)).metrics_target == target
