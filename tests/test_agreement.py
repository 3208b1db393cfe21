"""What all ranks must say alike: a difference ends all of them with an error that names it, and none hangs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, Subset
from worker_runs import run_world, world

from elasticd import Session
from elasticd.errors import ConfigError
from elasticd.worker.agreement import agree
from elasticd.worker.layout import Layout
from elasticd.worker.powersgd import PowerSGD

DATA = [torch.ones(1)] * 40
NO_RANK = "must be the same on all ranks: rank 0 says"


class Ones(IterableDataset[torch.Tensor]):
    def __iter__(self):
        return iter(DATA)


def refusals(tries: dict[str, Callable[[int], object]]) -> None:
    """Run by a rank: what each of them is refused with."""
    dist.init_process_group("gloo")
    for name, attempt in tries.items():
        try:
            attempt(dist.get_rank())
        except ConfigError as error:
            print(json.dumps([name, str(error)]))
        else:
            print(json.dumps([name, ""]))
    dist.barrier()
    dist.destroy_process_group()


def session_of(*each: dict[str, Any]) -> Callable[[int], object]:
    return lambda rank: Session(**each[rank])


def said(outputs: list[str]) -> dict[str, str]:
    """The same on all ranks."""
    by_rank = [dict(json.loads(line) for line in output.splitlines() if line.startswith("[")) for output in outputs]
    assert all(each == by_rank[0] for each in by_rank), by_rank
    return by_rank[0]


def sessions(directory: Path) -> None:
    """Run by a rank."""
    refusals(
        {
            "seed": session_of({"seed": 1}, {"seed": 2}),
            "none": session_of({"seed": 0}, {"seed": None}),
            "save": session_of({"save_every_steps": 4}, {}),
            "memory": session_of({"memory_every_steps": 2}, {}),
            "directory": session_of({"checkpoint_dir": directory}, {}),
            "planned": session_of({"micro_batches": 4}, {}),
            "work": session_of({"micro_batches": 4}, {"micro_batches": 4, "exact": True, "balance": "off"}),
            "layout": session_of({"layout": Layout()}, {}),
            "compress": session_of({"compress": "bf16"}, {"compress": PowerSGD(rank=2)}),
            "alike": session_of(
                {"compress": "powersgd", "micro_batches": 4, "max_micro_batches": 1, "keep": 1},
                {"compress": PowerSGD(), "micro_batches": 4, "max_micro_batches": 3},
            ),
        }
    )


def test_settings_of_a_session(tmp_path: Path) -> None:
    assert said(run_world(2, sessions, tmp_path)) == {
        "seed": f"Session(seed=...) {NO_RANK} 1, rank 1 says 2",
        "none": f"Session(seed=...) {NO_RANK} 0, rank 1 says None",
        "save": f"Session(save_every_steps=...) {NO_RANK} 4, rank 1 says 0",
        "memory": f"Session(memory_every_steps=...) {NO_RANK} 2, rank 1 says 0",
        "directory": f"Session(checkpoint_dir=...) {NO_RANK} a directory, rank 1 says None",
        "planned": f"Session(micro_batches=...) {NO_RANK} 4, rank 1 says None",
        "work": f"Session(balance=...) {NO_RANK} auto, rank 1 says off; Session(exact=...) {NO_RANK} False, "
        "rank 1 says True",
        "layout": f"Session(layout=...) {NO_RANK} Layout(tensor=1, pipeline=1, shard=None), rank 1 says None",
        "compress": f"Session(compress=...) {NO_RANK} bf16, rank 1 says PowerSGD(rank=2, start_step=0)",
        "alike": "",
    }


def one_step(session: Session, data: Any, size: int, **how: Any) -> None:
    model = DistributedDataParallel(nn.Linear(1, 1))
    session.register(model=model)
    with next(session.steps()) as step:
        for batch in step.micro_batches(data, size=size, **how):
            step.backward(model(batch).mean())


def stepping(
    data: Callable[[int], Any], *, size: Callable[[int], int] = lambda _: 1, **how: Any
) -> Callable[[int], object]:
    def attempt(rank: int) -> None:
        own = {name: value(rank) for name, value in how.items()}
        with Session(micro_batches=4) as session:
            one_step(session, data(rank), size(rank), **own)

    return attempt


def data_sets() -> None:
    """Run by a rank."""
    refusals(
        {
            "length": stepping(lambda rank: DATA[: 10 + rank]),
            "part": stepping(lambda rank: Subset(DATA, range(rank, 40, 2))),
            "nested": stepping(lambda rank: Subset(Subset(DATA, range(20 * rank, 20 * rank + 20)), range(20))),
            "whole": stepping(lambda _: Subset(DATA, [3, 1, 2, 5, 8])),
            "words": stepping(lambda _: Subset(dict(enumerate(DATA)), [None] * 8), size=lambda rank: 1 + rank),
            "size": stepping(lambda _: DATA, size=lambda rank: 1 + rank),
            "kind": stepping(lambda rank: Ones() if rank else DATA),
            "workers": stepping(lambda _: Ones(), workers=lambda rank: rank),
            "own": stepping(lambda rank: DataLoader(Ones(), 1, drop_last=True, num_workers=2 * rank)),
            "ahead": stepping(lambda _: DATA, workers=lambda rank: rank),  # of a map-style data set: as it likes
        }
    )


def test_data_of_a_step() -> None:
    found = said(run_world(2, data_sets))
    part = "give each rank the whole data set, without a DistributedSampler or a part of its own; the step divides it"
    assert found["length"] == f"step.micro_batches(dataset=...) {NO_RANK} 10 samples, rank 1 says 11 samples: {part}"
    assert f"(dataset=...) {NO_RANK} 20 samples of a Subset, indices " in found["part"]
    assert f"(dataset=...) {NO_RANK} 20 samples of a Subset, indices " in found["nested"]
    assert found["words"] == found["size"] == f"step.micro_batches(size=...) {NO_RANK} 1, rank 1 says 2"
    assert found["kind"].startswith(f"step.micro_batches(dataset=...) {NO_RANK} 40 samples, rank 1 says a stream")
    assert found["workers"] == f"step.micro_batches(workers=...) {NO_RANK} 0, rank 1 says 1"
    assert found["own"] == f"step.micro_batches(workers=...) {NO_RANK} 0, rank 1 says 2"
    assert found["whole"] == found["ahead"] == ""


def train(
    *, until: Callable[[int], int] = lambda _: 30, size: Callable[[int, int], int] = lambda _rank, _step: 1
) -> None:
    with Session(micro_batches=4) as session:
        model = DistributedDataParallel(nn.Linear(1, 1))
        session.register(model=model)
        for last in (3, until(session.rank)):
            for step in session.steps(until=last):
                with step:
                    for batch in step.micro_batches(DATA, size=size(session.rank, step.index)):
                        step.backward(model(batch).mean())
                print("completed", session.step, flush=True)


def other_until() -> None:
    """Run by a rank: rank 0 would end, and save, in a step that is not rank 1's last."""
    train(until=lambda rank: 5 + rank)


def other_size() -> None:
    """Run by a rank: from step 6 on micro-batches are larger on rank 1."""
    train(size=lambda rank, step: 2 if rank == 1 and step >= 6 else 1)


def other_size_on_all() -> None:
    """Run by a rank: a schedule."""
    train(size=lambda _, step: 1 + step // 10)


@pytest.mark.parametrize(
    ("target", "message", "most"),
    [
        (other_until, "until, of session.steps(), must be the same on all ranks: they say 5 to 6", 3),
        (other_size, "must be the same on all ranks: they say ", 27),
    ],
)
def test_what_differs_later_ends_all_ranks_with_one_line(target: Any, message: str, most: int) -> None:
    with world(2, target) as ranks:
        for rank in ranks:
            assert rank.wait(30) == 1
            *steps, last = rank.output.splitlines()
            assert message in last
            assert len(steps) <= most, rank.output
            assert all(line.startswith("completed") for line in steps), rank.output


def test_a_size_that_changes_on_all_ranks_alike() -> None:
    for output in run_world(2, other_size_on_all):
        assert output.splitlines()[-1] == "completed 30"


def test_alone_one_agrees_with_oneself() -> None:
    agree("Session", {"seed": 1}, None)
