"""Shares follow speed: what is measured of micro-batches, and what becomes of it; loading ahead under shares that change."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from statistics import median_low

import pytest
import torch
from conftest import eventually
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainees import Points, small
from worker_runs import FakeDaemon, run_world

from elasticd import Session
from elasticd.bench.balance import FAST, SLOW, train
from elasticd.testing import cgroups
from elasticd.worker.clock import MicroBatchClock
from elasticd.worker.draws import Draws
from elasticd.worker.loading import PrefetchingLoader, Source
from elasticd.worker.order import Key
from elasticd.worker.shares import as_told

COUNT = 8
DRAWS = Draws(seed=0, given=True)


def timed(clock: MicroBatchClock, model: nn.Module, count: int, *, waited: bool) -> None:
    """One step of so many micro-batches, each of which takes 20 ms and a backward pass."""
    clock.begin(count)
    for number in range(count):
        if number == count - 1:
            clock.begin_last()
        time.sleep(0.02)
        model(torch.ones(1, 6)).sum().backward()
    time.sleep(0.3 * count)  # for other ranks
    clock.end(waited=waited)


def test_waiting_for_others_is_not_in_the_measure_of_a_step() -> None:
    """Nor where the end of the last micro-batch cannot be seen: it is left out then."""
    for seen, count in ((True, 1), (True, 3), (False, 3)):
        clock, model, told = MicroBatchClock(torch.device("cpu")), small(), list[int]()
        if seen:
            clock.watch(model, lambda: told.append(1))
        timed(clock, model, count, waited=True)
        assert 0.02 <= clock.take() < 0.3, (seen, count)
        assert len(told) == seen
        assert math.isnan(clock.take())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_not_waited_for_to_be_measured() -> None:
    """By events, which are read when the device has passed them."""
    device = torch.device("cuda", 0)
    clock, model = MicroBatchClock(device), small().to(device)
    clock.watch(model, lambda: None)
    busy = torch.randn(8192, 8192, device=device)
    clock.begin(1)
    clock.begin_last()
    for _ in range(50):
        busy = (busy @ busy).tanh()
    model(busy[:1, :6]).sum().backward()
    clock.end(waited=True)
    assert math.isnan(clock.take()), "the device cannot have come to it yet"
    torch.cuda.synchronize()
    assert clock.take() > 0


def train_unequal(until: int, balance: str) -> None:
    """Run by a rank: rank 1 takes three times as long for each micro-batch, from step 20 on as long as rank 0.

    It ends once shares have followed that, or at ``until``.
    """
    with Session(micro_batches=COUNT, balance=balance) as session:
        model = DistributedDataParallel(small())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    time.sleep(0.09 if session.rank == 1 and step.index < 20 else 0.03)
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
            print(json.dumps([session.step, len(step.sample_ids) // 2]))
            assert session.planned is not None
            if session.step > 22 and session.planned.shares[0] <= COUNT // 2 + 1:  # the same on both
                break


def test_shares_follow_speed_and_say_why(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path / "socket") as daemon:
        env = {"ELASTICD_SOCKET": daemon.path, "ELASTICD_JOB_ID": "job", "ELASTICD_ROUND": "1"}
        outputs = run_world(2, train_unequal, 120, "auto", **env)
        eventually(daemon.heard_out)
        events, speeds = daemon.of_type("rebalanced"), daemon.of_type("speeds")
    shares = list(zip(*([json.loads(line)[1] for line in output.splitlines()] for output in outputs), strict=True))
    assert shares[0] == (4, 4)
    # 6 and 2, then 4 and 4 again, where nothing else runs here: whatever does may hold a rank up, for real.
    assert median_low(first for first, _ in shares[10:20]) > COUNT // 2
    assert len(shares) < 120
    assert events[0]["shares"][0] > 4
    assert events[0]["reason"] == "rank 1 ended last"
    assert events[0]["after_s"] < events[0]["before_s"]
    first, other = speeds[0]["seconds"]
    assert 0 < first < other
    assert (sum(speeds[0]["shares"]), speeds[0]["balanced"]) == (COUNT, True)
    assert not {"caps", "weights"} & speeds[0].keys()


def train_limited(until: int) -> None:
    """Run by a rank: shares by weights, of which rank 1 may not have its own."""
    cap = 1 if os.environ["RANK"] == "1" else None
    with Session(micro_batches=COUNT, max_micro_batches=cap, balance=(1, 2)) as session:
        model = DistributedDataParallel(small())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    time.sleep(0.02)
                    step.backward((model(inputs) - targets).square().mean())


def test_the_daemon_hears_what_limits_the_shares(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path / "socket") as daemon:
        env = {"ELASTICD_SOCKET": daemon.path, "ELASTICD_JOB_ID": "job", "ELASTICD_ROUND": "1"}
        run_world(2, train_limited, 25, **env)
        eventually(daemon.heard_out)
        hellos, speeds = daemon.of_type("worker_hello"), daemon.of_type("speeds")
    told = {hello["rank"]: (hello["micro_batches"], hello["cap"], hello["replica_size"]) for hello in hellos}
    assert told == {0: (COUNT, COUNT, 1), 1: (COUNT, 1, 1)}
    limits = {"shares": [7, 1], "balanced": False, "caps": [COUNT, 1], "weights": [1, 2]}
    assert speeds[0].items() >= limits.items()


def test_balance_off_gives_equal_shares() -> None:
    for output in run_world(2, train_unequal, 8, "off"):
        assert {json.loads(line)[1] for line in output.splitlines()} == {4}


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("namespaces")
def test_a_node_that_is_held_to_a_quarter_of_its_cpu_gives_work_away() -> None:
    """By its control group, in mid-run: what that is worth is the bench's to say."""
    if cgroups.v1_root("cpu") is None:
        pytest.skip("no cpu controller of cgroup version 1")
    lines, (slowed_at,) = train("session", (FAST, SLOW / 2), 16, micro_batches=24)
    # The most, not the last: while something else runs on this machine, the fast node is slow too.
    assert max(line["share"] for line in lines if line["rank"] == 0 and line["t"] > slowed_at) >= 14


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
def test_a_speed_that_is_none_is_told_as_none(bad: float) -> None:
    assert as_told(bad) == 0
    assert as_told(1e-12) == 1
    assert as_told(0.25) == 250_000_000


# --- loading ahead ---


class Ids:
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return index


def test_batches_are_right_whatever_the_shares_become_and_however_often_a_step_is_done() -> None:
    asked: list[Key] = []

    def ids_of(key: Key) -> list[int]:
        asked.append(key)
        return [key[0] * 10 + key[1]]

    loader = PrefetchingLoader(Source(dataset=Ids(), length=1000, size=1, workers=1, prefetch=3), ids_of, DRAWS)
    owned = [(0, 1, 2)] * 4 + [(0, 1, 2, 5)] * 3 + [(1,)] * 3 + [(0, 1, 2, 3, 4, 5)] * 4
    for step, mine in enumerate(owned):
        for attempt in range(2 if step in (2, 5) else 1):
            loader.begin(step, mine)
            for micro_batch in mine[: 2 if attempt == 0 and step in (2, 5) else None]:
                assert loader.take((step, micro_batch)).tolist() == [step * 10 + micro_batch]
    needed = sum(len(mine) for mine in owned)
    assert len(asked) < 1.5 * needed
    assert len(loader._ready) + len(loader._asked) < 12
