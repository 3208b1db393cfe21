"""Replicas that nothing makes the same must begin with the same weights: seen before a job's first step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainees import Points, fingerprint
from worker_runs import run_world, world

from elasticd import Session
from elasticd.worker import first_values
from elasticd.worker.first_values import checksum


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "hsdp":
        mesh = init_device_mesh("cpu", (2, int(os.environ["WORLD_SIZE"]) // 2), mesh_dim_names=("replicate", "shard"))
        for layer in (model[0], model):
            fully_shard(layer, mesh=mesh)
    elif wrapper == "fsdp":
        fully_shard(model)
    return model


def train(wrapper: str, seed: int, until: int, directory: Path | None) -> None:
    """Run by a rank: the weights are its own where ``seed`` is 0. Prints a hash of what they are at the end."""
    exact = wrapper in ("ddp", "none")
    with Session(micro_batches=4, exact=exact, checkpoint_dir=directory) as session:
        torch.manual_seed(seed or 100 + session.rank)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        model = wrapped(model, wrapper)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        session.register(model=model, optimizer=optimizer)
        session.restore()
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
        if exact:
            print(fingerprint(model))


@pytest.mark.parametrize(("wrapper", "size"), [("none", 2), ("hsdp", 2), ("hsdp", 4)])
def test_replicas_made_without_a_seed_are_refused_by_all_ranks(wrapper: str, size: int) -> None:
    """They trained different models on the same gradients, and nobody saw it."""
    with world(size, train, wrapper, 0, 2, None) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
            assert len(rank.output.splitlines()) == 1, rank.output
            assert "replicas begin with different weights" in rank.output
            assert ("DistributedDataParallel" in rank.output) == (wrapper == "none")


@pytest.mark.parametrize(("wrapper", "seed", "size"), [("hsdp", 1, 4), ("fsdp", 0, 2), ("ddp", 0, 2)])
def test_what_is_the_same_or_need_not_be_is_taken(wrapper: str, seed: int, size: int) -> None:
    """FSDP2 makes one model of its ranks' parts, and DDP sends rank 0's weights to all."""
    run_world(size, train, wrapper, seed, 2, None)


def test_a_restart_needs_no_seed(tmp_path: Path) -> None:
    """And without a wrapper exact mode ends in the bits that it has with one."""
    (whole,) = set(run_world(2, train, "none", 1, 4, None))
    assert set(run_world(2, train, "ddp", 1, 4, None)) == {whole}
    run_world(2, train, "none", 1, 2, tmp_path)
    assert set(run_world(2, train, "none", 0, 4, tmp_path)) == {whole}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64])
def test_a_checksum_sees_every_bit_and_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_values, "PART_ELEMENTS", 5)
    whole = [torch.tensor([1, 0, 1, 0, 0, 1, 1], dtype=dtype), torch.zeros(0, dtype=dtype), torch.ones((), dtype=dtype)]
    known = checksum(whole)
    assert checksum([each.clone() for each in whole]) == known
    for index in range(len(whole[0])):
        other = whole[0].clone()
        other[index] = 1 - other[index].real.int()
        assert checksum([other, *whole[1:]]) != known
    assert checksum([whole[0].flip(0), *whole[1:]]) != known
    assert checksum([*whole[:2], torch.zeros((), dtype=dtype)]) != known
    assert checksum([]) == 0
