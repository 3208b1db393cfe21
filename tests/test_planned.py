"""Steps as micro-batches: the same curve and the same samples on any world and under any shares; wrong use.

Worlds of forked ranks over real gloo. Shares are forced by caps that leave no choice.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainees import Points, small
from worker_runs import ledger, run_world, world

from elasticd import Session
from elasticd.errors import ConfigError, StepsDiverged
from elasticd.worker.data import Cursor, sample_ids
from elasticd.worker.losses import StepLosses
from elasticd.worker.step import Step
from elasticd.worker.world import make_side_group

SEED, COUNT = 3, 8


pytestmark = pytest.mark.usefixtures("in_plain_python")


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


# --- the same on any world ---


def train_gpt(path: Path, caps: list[int], steps: int, workers: int) -> None:
    """Run by a rank: a tiny byte GPT; a line for each step."""
    from elasticd.examples.byte_gpt import ByteGPT, StandardLibrary, loss_of

    rank = int(os.environ["RANK"])
    with Session(micro_batches=COUNT, max_micro_batches=caps[rank], seed=SEED) as session, path.open("a") as file:
        data = StandardLibrary(16)
        model = DistributedDataParallel(ByteGPT(length=16, width=16, layers=2, heads=2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=steps):
            with step:
                for inputs, targets in step.micro_batches(data, size=2, workers=workers):
                    step.backward(loss_of(model(inputs), targets))
                optimizer.step()
                loss = step.mean_loss()
            line = {"step": session.step, "loss": loss, "ids": step.sample_ids, "of": len(data)}
            file.write(json.dumps(line) + "\n")


def curve(tmp_path: Path, caps: list[int], *, steps: int = 200, workers: int = 0) -> dict[int, float]:
    """The loss of each step; the ledger must show each sample exactly once, and the shares that were forced."""
    path = tmp_path / f"{len(caps)}-{caps}-{workers}.jsonl"
    run_world(len(caps), train_gpt, path, caps, steps, workers)
    losses: dict[int, float] = {}
    ids, shares = defaultdict(list), defaultdict(list)
    for line in ledger(path):
        assert losses.setdefault(line["step"], line["loss"]) == line["loss"]
        ids[line["step"]] += line["ids"]
        shares[line["step"]].append(len(line["ids"]) // 2)
        size = line["of"]
    order = sample_ids(Cursor(), range(steps * COUNT * 2), size=size, seed=SEED)
    assert sorted(losses) == list(range(1, steps + 1))
    for step in losses:
        assert sorted(ids[step]) == sorted(order[(step - 1) * COUNT * 2 : step * COUNT * 2])
        if sum(caps) == COUNT:
            assert sorted(shares[step]) == sorted(caps)
    return losses


def test_the_loss_curve_is_the_same_on_any_world_and_under_any_shares(tmp_path: Path) -> None:
    alone = curve(tmp_path, [COUNT])
    assert alone[200] < 0.8 * alone[1]
    for caps, steps, workers in (([4, 4], 50, 0), ([3, 3, 2], 200, 0), ([1, 2, 5], 200, 1), ([0, 8], 50, 0)):
        other = curve(tmp_path, caps, steps=steps, workers=workers)
        for step, loss in other.items():
            assert loss == pytest.approx(alone[step], rel=1e-4), (caps, step)


def train_epochs(until: int, directory: Path, path: Path, workers: int) -> None:
    """Run by a rank: 40 samples, 16 a step, so that the third and the fifth step hold an epoch's end."""
    with Session(checkpoint_dir=directory, micro_batches=COUNT, seed=SEED) as session, path.open("a") as file:
        model = DistributedDataParallel(small())
        session.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
        session.restore()
        data = Points(40)
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(data, size=2, workers=workers):
                    step.backward((model(inputs) - targets).square().mean())
            file.write(json.dumps({"step": session.step, "ids": step.sample_ids, "epoch": session.cursor.epoch}) + "\n")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_ends_in_the_middle_of_a_step_and_of_a_resize_with_each_sample_once(
    workers: int, tmp_path: Path
) -> None:
    """Nothing is dropped or padded: the step takes the rest from the next epoch."""
    path = tmp_path / "ledger"
    for size, until in ((2, 2), (3, 3), (1, 5)):
        run_world(size, train_epochs, until, tmp_path / "checkpoints", path, workers)
    by_step = defaultdict(list)
    for line in ledger(path):
        by_step[line["step"]] += line["ids"]
    assert {step: len(ids) for step, ids in by_step.items()} == dict.fromkeys(range(1, 6), 16)
    for epoch in (0, 1):
        order = sample_ids(Cursor(epoch=epoch), range(40), size=40, seed=SEED)
        assert sorted(order) == list(range(40))
        first = 40 * epoch
        for step, ids in by_step.items():
            span = range(max(first, 16 * (step - 1)), min(first + 40, 16 * step))
            assert {order[position - first] for position in span} <= set(ids), (epoch, step)
    assert sorted(sample for ids in by_step.values() for sample in ids) == sorted([*range(40), *range(40)])
    assert {line["step"]: line["epoch"] for line in ledger(path)} == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2}


def train_sharded(caps: list[int], replicas: int) -> None:
    """Run by a rank: FSDP2, or HSDP with several replicas; prints the whole weights."""
    with Session(micro_batches=COUNT, max_micro_batches=caps[int(os.environ["RANK"])], seed=SEED) as session:
        model = small()
        dims = (session.world_size,) if replicas == 1 else (replicas, session.world_size // replicas)
        mesh = init_device_mesh("cpu", dims, mesh_dim_names=("replicate", "shard")[-len(dims) :])
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=20):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
        print(json.dumps([each.full_tensor().flatten().tolist() for each in model.parameters()]))


def test_a_sharded_model_takes_unequal_shares_too() -> None:
    ends = []
    for caps, replicas in (([8], 1), ([4, 4], 1), ([6, 2], 1), ([2, 2, 2, 2], 2), ([4, 1, 1, 2], 2)):
        (first, *_) = run_world(len(caps), train_sharded, caps, replicas)
        ends.append(torch.tensor(flat(json.loads(first))))
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-4, atol=1e-5)


def exchange_losses() -> None:
    """Run by a rank: both give up their second step, and rank 0 before its losses were known."""
    with Session() as session:
        losses = StepLosses(2, make_side_group(), session.device)
        losses.begin()
        print(losses.mean({session.rank: torch.tensor(1.0 + session.rank)}))
        losses.begin()
        if session.rank == 1:
            losses.complete_here({})  # so an exchange is under way
        losses.begin()
        if session.rank == 0:
            with pytest.raises(StepsDiverged):
                losses.mean({})
        dist.barrier()


def test_losses_of_a_step_that_was_given_up_are_not_mixed_with_the_next() -> None:
    assert run_world(2, exchange_losses) == ["1.5\n", "1.5\n"]


# --- wrong use ---


def planned(**settings: object) -> tuple[Session, nn.Module, torch.optim.Optimizer]:
    session = Session(**{"micro_batches": 4, **settings})
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.register(model=model, optimizer=optimizer)
    return session, model, optimizer


def test_a_data_set_shorter_than_a_step() -> None:
    session, _, _ = planned()
    with (
        session,
        pytest.raises(ValueError, match="a global batch of 44 does not fit a data set of 40 samples"),
        next(session.steps()) as step,
    ):
        step.micro_batches(Points(), size=11)


def leave_early(step: Step, model: nn.Module) -> None:
    with step:
        for inputs, _ in step.micro_batches(Points(), size=2):
            step.backward(model(inputs).mean())
            break


def test_samples_that_would_be_missing() -> None:
    session, model, _ = planned()
    with session:
        with pytest.raises(RuntimeError, match="was left early"):
            leave_early(next(session.steps()), model)
        with pytest.raises(RuntimeError, match=r"had no step.backward\(loss\)"), next(session.steps()) as step:
            list(step.micro_batches(Points(), size=2))
        assert session.step == 0


def test_calls_in_the_wrong_place() -> None:
    session, model, _ = planned()
    with session, next(session.steps()) as step:
        for call in (lambda: step.backward(torch.ones(())), step.mean_loss):
            with pytest.raises(RuntimeError, match=r"loop over step.micro_batches\(\) first"):
                call()
        batches = step.micro_batches(Points(), size=2)
        with pytest.raises(RuntimeError, match="once in each step"):
            step.micro_batches(Points(), size=2)
        for inputs, _ in batches:
            loss = model(inputs)
            with pytest.raises(ValueError, match=r"a loss of shape \(2, 1\)"):
                step.backward(loss)
            step.backward(loss.mean())
            with pytest.raises(RuntimeError, match="once for each micro-batch"):
                step.backward(loss.mean())


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"micro_batches": 0}, "micro_batches must be at least 1"),
     ({"micro_batches": 4, "max_micro_batches": 3}, "at most 3 micro-batches together, and a step has 4"),
     ({"micro_batches": 4, "balance": "yes"}, "balance is 'yes'"),
        ({"micro_batches": 4, "balance": (1, math.nan)}, "weights are positive numbers"),
        ({"micro_batches": 4, "balance": ()}, "weights are positive numbers"),
     ({"exact": True}, "mean nothing without micro_batches"),
     ({"max_micro_batches": 3}, "mean nothing without micro_batches")],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Session(**settings)


def test_micro_batches_that_were_not_told_or_have_no_model() -> None:
    with Session() as session, pytest.raises(ConfigError, match="Session"), next(session.steps()) as step:
        step.micro_batches(Points(), size=2)
    with Session(micro_batches=2) as session, next(session.steps()) as step:
        batches = step.micro_batches(Points(), size=2)
        with pytest.raises(RuntimeError, match="needs the model"):
            next(batches)
        step._work = None


def disagree() -> None:
    """Run by a rank: each says another number of micro-batches."""
    Session(micro_batches=4 + int(os.environ["RANK"]))


def leave_unaveraged() -> None:
    """Run by a rank: a model that nothing averages."""
    Session(micro_batches=4).register(model=small())


def shard_in_exact_mode() -> None:
    """Run by a rank."""
    session = Session(micro_batches=4, exact=True)
    session.register(model=fully_shard(small()))


@pytest.mark.parametrize(
    ("target", "why"),
    [(disagree, "must be the same on all ranks"), (leave_unaveraged, "wrap it in DistributedDataParallel"),
     (shard_in_exact_mode, "exact mode needs the whole model on each rank")],
)  # fmt: skip
def test_what_ranks_cannot_do_together_ends_all_of_them_with_one_line(target, why: str) -> None:
    with world(2, target) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
            assert len(rank.output.splitlines()) == 1, rank.output
            assert why in rank.output


def fewer_than_ranks() -> None:
    """Run by a rank: two micro-batches for three ranks."""
    with Session(micro_batches=2, seed=SEED) as session:
        model = DistributedDataParallel(small())
        session.register(model=model)
        with next(session.steps()) as step:
            for inputs, targets in step.micro_batches(Points(), size=2):
                step.backward((model(inputs) - targets).square().mean())
        print(json.dumps([step.sample_ids, model.module[3].bias.grad.item()]))


def test_with_more_ranks_than_micro_batches_some_add_nothing() -> None:
    outputs = run_world(3, fewer_than_ranks)
    assert "2 micro-batches for 3 ranks: 1 of them add nothing to a step" in outputs[0]
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert found[2][0] == []
    assert flat([ids for ids, _ in found]) == sample_ids(Cursor(), range(4), size=40, seed=SEED)
    data, model = Points(), small()
    ids = sample_ids(Cursor(), range(4), size=40, seed=SEED)
    (model(data.inputs[ids]) - data.targets[ids]).square().mean().backward()
    for _, gradient in found:
        assert gradient == pytest.approx(model[3].bias.grad.item(), rel=1e-5)
