"""The mean of gradients beside the curves: what a sharded model holds of them, steps given up, half precision, loss scaling."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainees import Points, fingerprint, small
from worker_runs import run_world, world

from elasticd import Session
from elasticd.core.plan import make_plan
from elasticd.worker.gradients import MeanGradients
from elasticd.worker.layout import Arrangement, Layout
from elasticd.worker.state import Registered

SEED, COUNT = 3, 8


def squared(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


# --- sharded models ---


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """How many elements of gradients this rank has: of whole ones, and of its own part."""
    whole = 0
    for module in (model[0], model[3], model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for each in group.fsdp_params:
                grads = (each.unsharded_accumulated_grad, getattr(getattr(each, "_unsharded_param", None), "grad", None))
                whole += sum(grad.numel() for grad in grads if grad is not None)
    parts = [each.grad for each in optimizer.param_groups[0]["params"] if each.grad is not None]
    assert all(isinstance(part, DTensor) for part in parts)
    return whole, sum(part.to_local().numel() for part in parts)


def train_sharded(caps: list[int], replicas: int, fault_at: int = -1, change: tuple[int, ...] = ()) -> None:
    """Run by a rank: ten steps; the whole weights, what was held after each micro-batch of the last step, bytes sent.

    ``fault_at``: this step is given up after its first micro-batch, and done again. ``change``: shares from step 5 on.
    """
    cap = caps[int(os.environ["RANK"])]
    with Session(micro_batches=COUNT, max_micro_batches=cap, seed=SEED) as session:
        model, size = small(), session.world_size // replicas
        mesh = init_device_mesh("cpu", (replicas, size), mesh_dim_names=("replicate", "shard"))
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh if replicas > 1 else mesh["shard"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        session.register(model=model, optimizer=optimizer)
        sent = [0]
        for step in session.steps(until=10):
            if change and step.index == 5:
                session.planned._shares.plan = make_plan(change)
            try:
                with step:
                    seen = []
                    for batch in step.micro_batches(Points(), size=2):
                        step.backward(squared(model, batch))
                        seen.append(held(model, optimizer))
                        if step.index == fault_at:
                            fault_at = -1
                            raise ArithmeticError
                    optimizer.step()
            except ArithmeticError:
                continue
            sent.append(session.sent_bytes)
        weights = [each.full_tensor().flatten().tolist() for each in optimizer.param_groups[0]["params"]]
        steps = [after - before for before, after in itertools.pairwise(sent)]
        flat = list(itertools.chain.from_iterable(weights))
        print(json.dumps({"weights": flat, "held": seen, "sent": steps}))


def run_sharded(caps: list[int], replicas: int = 1, *how: Any) -> list[dict[str, Any]]:
    outputs = run_world(len(caps), train_sharded, caps, replicas, *how)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    """What ten undisturbed steps of one process end in."""
    (alone,) = run_sharded([COUNT])
    return torch.tensor(alone["weights"])


def check(ranks: list[dict[str, Any]], weights: torch.Tensor) -> None:
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["weights"]), weights, rtol=1e-4, atol=1e-5)


#: Of ``small()``.
ELEMENTS = 6 * 16 + 16 + 16 + 1


@pytest.mark.parametrize(("size", "replicas"), [(2, 1), (4, 2)])
def test_with_equal_shares_nobody_holds_a_whole_gradient_between_micro_batches(
    weights: torch.Tensor, size: int, replicas: int
) -> None:
    ranks = run_sharded([COUNT] * size, replicas)
    check(ranks, weights)
    for rank in ranks:
        assert [whole for whole, _ in rank["held"]] == [0] * (COUNT // size)
        # HSDP keeps what is not all-reduced yet, which is as large, out of sight.
        assert {own for _, own in rank["held"]} <= {0, rank["held"][-1][1]}
    owned = sum(rank["held"][-1][1] for rank in ranks)
    assert owned == ELEMENTS * replicas
    # A reduce-scatter over two for each micro-batch, and one all-reduce over the two copies.
    scattered = COUNT // size * 4 * owned
    assert sum(rank["sent"][-1] for rank in ranks) == scattered + (4 * owned if replicas == 2 else 0)


@pytest.mark.parametrize(
    ("size", "replicas", "unequal"), [(2, 1, (6, 2)), (4, 2, (4, 1, 1, 2))]
)
def test_shares_that_become_unequal_in_mid_run_have_the_same_curve(
    weights: torch.Tensor, size: int, replicas: int, unequal: tuple[int, ...]
) -> None:
    ranks = run_sharded([COUNT] * size, replicas, -1, unequal)
    check(ranks, weights)
    # That is what it costs then.
    assert [whole for whole, _ in ranks[0]["held"]] == [ELEMENTS] * (unequal[0] - 1) + [0]
    # One exchange a step from there on.
    for rank in ranks:
        each_scatter = (rank["sent"][0] - rank["sent"][-1]) / (COUNT // size - 1)
        assert each_scatter == 4 * rank["held"][-1][1]


@pytest.mark.parametrize(("caps", "replicas"), [([4, 4], 1), ([6, 2], 1), ([2, 2, 2, 2], 2)])
def test_what_a_step_that_was_given_up_left_in_a_sharded_model_counts_nowhere(
    weights: torch.Tensor, caps: list[int], replicas: int
) -> None:
    """torch keeps it out of sight of zero_grad: with unequal shares, and between the copies of HSDP."""
    check(run_sharded(caps, replicas, 3), weights)


class TwoHeads(nn.Module):
    """The second half of a step's micro-batches reaches another head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        found: torch.Tensor = self.heads[(self.calls - 1) // 2 % 2](inputs)
        return found


def reach_some() -> None:
    """Run by a rank of two, each a copy of the model."""
    with Session(micro_batches=COUNT, seed=SEED) as session:
        model = TwoHeads()
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        for each in (*model.heads, model):
            fully_shard(each, mesh=mesh)
        session.register(model=model)
        with next(session.steps()) as step:
            for batch in step.micro_batches(Points(), size=2):
                step.backward(squared(model, batch))


def test_gradients_that_hsdp_would_leave_for_the_next_step_are_an_error() -> None:
    with world(2, reach_some) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
            assert "RuntimeError: the last micro-batch has not reached all parameters" in rank.output


# --- losses in half precision ---


def sum_in_half(kind: str, sharded: bool) -> None:
    """Run by a rank: ten micro-batches, each with a gradient of 1, and a loss in half precision. Prints their mean."""
    dtype = getattr(torch, kind)
    with Session(micro_batches=10, seed=SEED) as session:
        model: nn.Module = nn.Linear(1, 1, bias=False)
        if sharded:
            fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        elif session.world_size > 1:
            model = DistributedDataParallel(model)
        session.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
        with next(session.steps()) as step:
            for batch in step.micro_batches([torch.ones(1)] * 10, size=1):
                step.backward(model(batch).sum().to(dtype))
            gradient = next(model.parameters()).grad
            print((gradient.full_tensor() if sharded else gradient).item())


@pytest.mark.parametrize(
    ("size", "kind", "sharded"), [(1, "bfloat16", False), (3, "bfloat16", False), (3, "float16", False), (2, "bfloat16", True)]
)
def test_the_weight_of_a_loss_in_half_precision_is_not_rounded(size: int, kind: str, sharded: bool) -> None:
    """1/10 is 0.1001 in bf16, and 3/10 is 0.3008: means would differ between worlds by 0.3 %."""
    for output in run_world(size, sum_in_half, kind, sharded):
        assert float(output) == pytest.approx(1, rel=1e-6)


def test_losses_of_different_types_in_one_step_are_refused_where_it_matters() -> None:
    def compute(micro_batches: int) -> None:
        model, arranged = nn.Linear(1, 1), Arrangement(layout=Layout(), rank=0, world_size=1)
        gradients = MeanGradients(Registered(model=model), micro_batches=micro_batches, arranged=arranged)
        gradients.clear(unequal=False)
        gradients.backward(model(torch.ones(1)).sum(), counts=True)
        gradients.backward(model(torch.ones(1)).sum().bfloat16(), counts=True)

    compute(8)
    with pytest.raises(ValueError, match="all of a step must have one type"):
        compute(10)


# --- loss scaling ---


def train_scaled(until: int, scaled: bool, overflow_at: int, directory: Path | None) -> None:
    """Run by a rank, in fp16: mean loss, scale and weights of each step. ``overflow_at``: in one micro-batch of rank 0."""
    with Session(micro_batches=COUNT, checkpoint_dir=directory, seed=SEED) as session:
        model: nn.Module = small()
        if session.world_size > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3, enabled=scaled)
        session.register(model=model, optimizer=optimizer, extra={"scaler": scaler})
        session.restore()
        for step in session.steps(until=until):
            with step:
                for number, batch in enumerate(step.micro_batches(Points(), size=2)):
                    with torch.autocast("cpu", dtype=torch.float16):
                        loss = squared(model, batch)
                    overflows = step.index == overflow_at and session.rank == 0 and number == 1
                    step.backward(loss * 1e36 if overflows else loss, scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
                line = [step.index, step.mean_loss(), scaler.get_scale(), fingerprint(model)]
            print(json.dumps(line))


def run_scaled(
    size: int, until: int, *, scaled: bool = True, overflow_at: int = -1, into: Path | None = None
) -> dict[int, tuple[float, float, str]]:
    """Step -> mean loss, scale, weights: the same on all ranks."""
    ranks = [
        {line[0]: tuple(line[1:]) for line in map(json.loads, output.splitlines())}
        for output in run_world(size, train_scaled, until, scaled, overflow_at, into)
    ]
    assert all(rank == ranks[0] for rank in ranks)
    return ranks[0]


def test_a_loss_that_is_scaled_is_reported_as_it_is_and_has_the_same_curve() -> None:
    plain = run_scaled(1, 6, scaled=False)
    for size in (1, 2):
        found = run_scaled(size, 6)
        assert [scale for _, scale, _ in found.values()] == [2.0**14] * 2 + [2.0**15] * 3 + [2.0**16]
        for step, (loss, _, _) in found.items():
            assert loss == pytest.approx(plain[step][0], rel=1e-2), (size, step)


def test_a_step_whose_gradients_overflow_is_skipped_by_all_ranks_and_a_restart_goes_on_with_the_scale(
    tmp_path: Path,
) -> None:
    undisturbed = run_scaled(2, 8, overflow_at=4)
    scales, weights = ([each[column] for each in undisturbed.values()] for column in (1, 2))
    assert scales[2:6] == [2.0**15, 2.0**15, 2.0**14, 2.0**14]
    assert [weights[step] == weights[step - 1] for step in range(1, 8)] == [step == 4 for step in range(1, 8)]
    run_scaled(2, 6, overflow_at=4, into=tmp_path)
    assert run_scaled(2, 8, overflow_at=4, into=tmp_path) == {step: undisturbed[step] for step in (6, 7)}
