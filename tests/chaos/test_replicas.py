"""Real daemons and a replica over two nodes: the world is rounded, and the spare takes the place of the dead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worker_runs import byte_gpt, ledger, run_world

from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.history import events_of

STEPS = 25
TRAINING = ("--steps", str(STEPS), "--batch", "8", "--micro-batches", "4")
TINY = ("--length", "16", "--width", "16", "--print-every", "1000")


@pytest.mark.timeout(120)
def test_a_tensor_parallel_job_on_three_nodes_survives_the_loss_of_one(tmp_path: Path) -> None:
    """One rank a node, replicas of two: two nodes train and one waits. The curve is that of one process."""
    lines, alone = tmp_path / "ledger", tmp_path / "alone"
    paced = ("--step-seconds", "0.1", "--save-every", "5", "--checkpoint-dir", str(tmp_path / "checkpoints"))
    script = ["elasticd.examples.byte_gpt", "--parallel", "tp", *TRAINING, *TINY, *paced, "--ledger", str(lines)]
    with Cluster(ClusterSpec(nodes=3, isolated=False), folder=tmp_path / "cluster") as cluster:
        cluster.submit("gpt", script, module=True, nodes="1:3", ranks_per_replica=2)
        cluster.wait_until(lambda: any(line["step"] == 7 for line in ledger(lines)), 60, "seven steps")
        before = cluster.seated("gpt")
        assert len(before) == 2
        (spare,) = {node.name for node in cluster.nodes} - set(before)
        told = {node["node"]: node for node in json.loads(cluster.cli("status", "--json").stdout)["nodes"]}
        assert (told[spare]["state"], told[spare]["reason"]) == ("spare", "no whole replica of 2 ranks")
        cluster.kill_node(cluster.index_of(before[1]))
        cluster.wait_until(lambda: cluster.seated("gpt") == [before[0], spare], 20, "the spare seated")
        cluster.wait_for(lambda history: events_of(history, "job_over"), 60, "the end")
        (phase,) = {event.details["phase"] for event in events_of(cluster.history(), "job_over")}
        assert phase == "succeeded"
    found = ledger(lines)
    assert len({line["round"] for line in found}) == 2
    run_world(1, byte_gpt, *TRAINING, "--ledger", str(alone))
    for line in ledger(alone):
        again = [other for other in found if other["step"] == line["step"]]
        counted = [(other["round"], other["ids"]) for other in again if other["ids"]]  # by one rank of the replica
        # Once in a round. A rank that was killed may not have written its line of a step that the other one did.
        assert counted
        assert counted == [(number, line["ids"]) for number in sorted({other["round"] for other in again})[-len(counted):]]
        for other in again:
            assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
