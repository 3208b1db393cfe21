"""The promise of the plan, under real daemons: the same curve, the same samples, and in exact mode the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from elasticd.testing import curves
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.curves import CurveRun, Reference

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Future[Reference]]]:
    """By whether it is exact; they run beside the first test."""
    folder = tmp_path_factory.mktemp("reference")
    with ThreadPoolExecutor(2) as threads:
        yield {exact: threads.submit(curves.run_reference, folder, exact=exact) for exact in (False, True)}


@pytest.fixture(scope="module")
def cluster(
    namespaces: None, references: dict[bool, Future[Reference]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    with Cluster(ClusterSpec(nodes=4, isolated=True), folder=tmp_path_factory.mktemp("curve")) as cluster:
        yield cluster


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
    run = CurveRun(cluster, "exact" if exact else "float", exact=exact)
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
