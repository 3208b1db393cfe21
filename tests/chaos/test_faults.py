"""Real daemons, real etcd, real gloo training on hosts of their own; one fault each, and then the validators."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator

import pytest
from conftest import PASSED
from drill import LEASE_TTL_S, RECOVERY_S, SEED, Drill, make_cluster

from elasticd.testing import validators
from elasticd.testing.cluster import Cluster
from elasticd.testing.faults import (
    CutNode,
    Fault,
    FreezeNode,
    KillEtcdMember,
    KillNode,
    KillWorker,
    Partition,
    StopEtcd,
    choose_fault,
)
from elasticd.testing.validators import Pause

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]
chance = random.Random(SEED)


class Holder:
    """The cluster that the tests share; one that a test has left broken is thrown away."""

    cluster: Cluster | None = None
    dirty = False

    def drop(self) -> None:
        if self.cluster is not None:
            self.cluster.__exit__(None, None, None)
        self.cluster, self.dirty = None, False


@pytest.fixture(scope="module")
def holder(namespaces: None) -> Iterator[Holder]:
    held = Holder()
    yield held
    held.drop()


@pytest.fixture
def drill(holder: Holder, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    print(f"seed {SEED}")
    if holder.dirty:
        holder.drop()
    if holder.cluster is None:
        holder.cluster = make_cluster(tmp_path_factory.mktemp("cluster")).__enter__()
    holder.dirty = True
    job = re.sub("[^a-z0-9]+", "-", request.node.name.removeprefix("test_"))[-60:].strip("-")
    drill = Drill(holder.cluster, job)
    drill.start()
    yield drill
    if request.node.stash[PASSED]:  # otherwise the fault may still be there, and what follows proves nothing
        judge(drill, holder)


def judge(drill: Drill, holder: Holder) -> None:
    drill.finish()
    drill.judge(failures=getattr(drill, "failures", 0))
    holder.dirty = False


def apply(fault: Fault, drill: Drill) -> float:
    """When it was applied."""
    print(f"{time.monotonic():.3f} {fault}")
    at = time.monotonic()
    fault.apply(drill.cluster)
    return at


def goes_on(drill: Drill, since: float, within_s: float = RECOVERY_S) -> None:
    """From then on to a full world that steps, there was no longer standstill."""
    end = drill.whole().t
    assert validators.steps_go_on(drill.trained(), since, end, within_s) == []


def test_a_killed_worker_is_replaced_and_charged(drill: Drill) -> None:
    at = apply(KillWorker(rank=chance.randrange(3)), drill)
    failed = drill.cluster.wait_until(lambda: drill.events("workers_failed"), RECOVERY_S, "workers_failed")
    assert failed[0].details["exit_code"] == -9  # the killed one, and not a survivor that lost its neighbour
    drill.cluster.wait_for(lambda _: len(drill.events("round_seen")) >= 6, RECOVERY_S, "a new round")
    goes_on(drill, at)
    assert drill.cluster.seated(drill.job) == drill.nodes  # everybody kept their place
    drill.failures = 1


def test_a_killed_node_is_left_behind_and_let_in_again(drill: Drill) -> None:
    node = chance.randrange(3)
    fault = KillNode(node=node)
    at = apply(fault, drill)
    step = drill.survivors_step(at, without=node)
    print(f"from the kill to a step: {step.t - at:.3f} s")
    fault.heal(drill.cluster)
    goes_on(drill, at)


def test_the_node_with_the_store_is_a_node_like_any_other(drill: Drill) -> None:
    node = drill.cluster.store_host(drill.job)
    fault = KillNode(node=node)
    at = apply(fault, drill)
    step = drill.survivors_step(at, without=node)
    print(f"from the kill to a step: {step.t - at:.3f} s")
    assert drill.cluster.store_host(drill.job) != node
    fault.heal(drill.cluster)
    goes_on(drill, at)


def test_a_node_that_is_cut_off_is_fenced_and_rejoins(drill: Drill) -> None:
    node = chance.randrange(3)
    fault = CutNode(node=node)
    at = apply(fault, drill)
    step = drill.survivors_step(at, without=node)
    print(f"from the cut to a step: {step.t - at:.3f} s")
    drill.wait_event("store_lost", node=node, since=at)
    healing_at = time.monotonic()
    fault.heal(drill.cluster)
    drill.pauses.append(Pause(node=drill.nodes[node], start=at, end=time.monotonic()))
    drill.wait_event("fenced", node=node, since=healing_at)
    goes_on(drill, at)


def test_a_frozen_node_is_fenced_and_rejoins(drill: Drill) -> None:
    node = chance.randrange(3)
    fault = FreezeNode(node=node)
    at = apply(fault, drill)
    step = drill.survivors_step(at, without=node)
    print(f"from the freeze to a step: {step.t - at:.3f} s")
    healing_at = time.monotonic()
    fault.heal(drill.cluster)
    drill.pauses.append(Pause(node=drill.nodes[node], start=at, end=time.monotonic()))
    drill.wait_event("fenced", node=node, since=healing_at)
    goes_on(drill, at)


def test_two_nodes_that_do_not_hear_each_other_cost_one_of_them(drill: Drill) -> None:
    fault = Partition(node=0, other=chance.randrange(1, 3))
    at = apply(fault, drill)
    pair = {drill.nodes[fault.node], drill.nodes[fault.other]}
    drill.cluster.wait_for(lambda _: len(pair & set(drill.cluster.seated(drill.job))) == 1, RECOVERY_S, "one is out")
    drill.cluster.wait_step(at, world=2, timeout_s=RECOVERY_S)
    rounds = len(drill.events("round_proposed"))
    drill.cluster.wait_until(lambda: time.monotonic() > at + 2 * LEASE_TTL_S, 30, "two leases")
    assert len(drill.events("round_proposed")) <= rounds + 1  # they do not take turns
    fault.heal(drill.cluster)
    goes_on(drill, at)


@pytest.mark.parametrize("which", ["leader", "follower"])
def test_a_killed_member_of_etcd_is_not_noticed(drill: Drill, which: str) -> None:
    leader = drill.cluster.etcd.leader()
    fault = KillEtcdMember(member=leader if which == "leader" else (leader + 1) % 3)
    at = apply(fault, drill)
    drill.cluster.wait_until(lambda: drill.cluster.etcd.leader() != fault.member)
    drill.cluster.wait_until(lambda: time.monotonic() > at + LEASE_TTL_S + 1, 30, "longer than a lease")
    fault.heal(drill.cluster)
    goes_on(drill, at, within_s=2.0)
    assert validators.nobody_is_moved(drill.cluster.history(), at, time.monotonic()) == []


def test_training_goes_on_while_all_of_etcd_is_away(drill: Drill) -> None:
    fault = StopEtcd()
    at = apply(fault, drill)
    drill.cluster.wait_until(lambda: time.monotonic() > at + 3 * LEASE_TTL_S, 30, "three leases")
    for node in range(3):
        assert drill.events("store_lost", node=node)
    fault.heal(drill.cluster)
    back_at = time.monotonic()
    for node in range(3):
        drill.wait_event("store_back", node=node, since=at)
    drill.cluster.wait_until(lambda: time.monotonic() > back_at + LEASE_TTL_S + 1, 30, "longer than a lease")
    goes_on(drill, at, within_s=2.0)
    assert validators.nobody_is_moved(drill.cluster.history(), at, time.monotonic()) == []


@pytest.mark.parametrize("seed", [SEED + 100, SEED + 101])
def test_a_series_of_chosen_faults(drill: Drill, seed: int) -> None:
    drill.failures = 0
    for turn in range(3):
        fault = choose_fault(1000 * seed + turn, nodes=3, etcd_members=3)
        at = apply(fault, drill)
        node = getattr(fault, "node", None)
        if node is not None:
            drill.survivors_step(at, without=node)
        elif isinstance(fault, KillWorker):
            drill.cluster.wait_until(lambda at=at: [e for e in drill.events("workers_failed") if e.t > at], RECOVERY_S)
            drill.failures += 1
        fault.heal(drill.cluster)
        if isinstance(fault, CutNode | FreezeNode):
            drill.pauses.append(Pause(node=drill.nodes[node], start=at, end=time.monotonic()))
        goes_on(drill, at)
