"""200 steps in every layout under real daemons, with a node killed and one joined: the curve of an undisturbed process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_runs import byte_gpt, run_world

from elasticd.testing import curves, validators
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.curves import BATCH, RANKS, RELATIVE, SMALL, STEPS, CurveRun, Reference
from elasticd.testing.history import read_trained
from elasticd.worker.gradients import MeanGradients

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]
#: Two in the job, and one that joins.
NODES = 3
#: Where a gradient is made wrong, and the number of that micro-batch: in the middle of the curve, and of the step.
WRONG_STEP = STEPS // 2
WRONG = (WRONG_STEP - 1) * SMALL.micro_batches + 2
#: Steps after it, each of which must show it.
SHOWN = 5


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Reference]]:
    """Runs beside the first test."""
    folder = tmp_path_factory.mktemp("reference")
    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(curves.run_reference, folder, SMALL)


@pytest.fixture(scope="module")
def cluster(
    namespaces: None, reference: Future[Reference], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    with Cluster(ClusterSpec(nodes=NODES, isolated=True), folder=tmp_path_factory.mktemp("layouts")) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("parallel", "lost", "balance"),
    [
        ("pp", 0, "auto"),
        ("fsdp2", 0, "1:3"),
        pytest.param("hsdp", 1, "auto", marks=pytest.mark.campaign),
        pytest.param("tp", 1, "auto", marks=pytest.mark.campaign),
        pytest.param("tp-ddp", 0, "auto", marks=pytest.mark.campaign),
    ],
)
def test_a_killed_node_and_one_that_joins_do_not_show_in_200_steps(
    cluster: Cluster, reference: Future[Reference], parallel: str, lost: int, balance: str
) -> None:
    """``lost``: whose seat; the first node has rank 0, and writes the checkpoints' metadata."""
    joiner = next((i for i, node in enumerate(cluster.nodes) if not node.running), NODES - 1)
    if not cluster.nodes[joiner].running:
        cluster.start_node(joiner)
    name = cluster.nodes[joiner].name
    cluster.wait_until(lambda: cluster.cli("drain", name).returncode == 0, 20, f"{name} registered")
    run = CurveRun(cluster, parallel, SMALL)
    each = RANKS[parallel].get("nproc_per_node", 1)
    run.submit(parallel=parallel, balance=balance, step_seconds=0.03, nodes="1:2")
    run.wait_step(30, world=2 * each)
    cluster.kill_node(cluster.index_of(cluster.seated(run.job)[lost]))
    run.wait_step(100, world=each)
    assert cluster.cli("undrain", name).returncode == 0
    run.wait_step(130, world=2 * each)
    run.wait_over()
    print(f"{parallel}: {largest_deviation(run, reference.result()):.1e} off the curve of one process")
    assert run.judge(reference.result()) == []


def largest_deviation(run: CurveRun, reference: Reference) -> float:
    """For the reader: what RELATIVE is chosen by."""
    known = {line.step: line.loss or math.nan for line in reference.trained}
    return max(abs((line.loss or math.nan) / known[line.step] - 1) for line in run.trained)


def train_wrongly(path: Path, factor: float) -> None:
    """Run by a rank: the gradient of one micro-batch counts ``factor`` times. The ledger shows nothing of it."""
    right, done = MeanGradients.backward, 0

    def backward(self: MeanGradients, loss: torch.Tensor, **how: Any) -> None:
        nonlocal done
        right(self, loss * factor if done == WRONG else loss, **how)
        done += 1

    MeanGradients.backward = backward  # type: ignore[method-assign]
    byte_gpt(*SMALL.arguments, "--steps", str(WRONG_STEP + SHOWN), "--ledger", str(path))


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_a_micro_batch_that_is_skipped_or_doubled_shows_in_the_curve(
    reference: Future[Reference], tmp_path: Path, factor: float
) -> None:
    """By the losses alone; otherwise the test above would show nothing of what is computed."""
    run_world(1, train_wrongly, tmp_path / "ledger", factor)
    trained, known = read_trained(tmp_path / "ledger"), reference.result().trained
    assert validators.samples_count_once(trained, WRONG_STEP + SHOWN, BATCH) == []
    assert validators.same_as(known[:WRONG_STEP], trained[:WRONG_STEP], RELATIVE) == []
    assert len(validators.same_as(known[WRONG_STEP:][:SHOWN], trained[WRONG_STEP:], RELATIVE)) == SHOWN
