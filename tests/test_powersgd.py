"""PowerSGD: torch's own sums, the same curve under any shares and on any world, whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from memory_nodes import MemoryNodes
from test_memory import join_node
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from trainees import Points
from worker_runs import run_world

from elasticd import PowerSGD, Session
from elasticd.checkpoint.manifest import complete_name
from elasticd.errors import ConfigError
from elasticd.worker.powersgd import LowRankAverage, orthonormal, rank_for

COUNT, SEED, HALF, STEPS = 8, 3, 15, 30
#: Sums of other parts, in another order.
SAME_CURVE = 2e-3
RANK_2 = PowerSGD(rank=2)

pytestmark = pytest.mark.usefixtures("in_plain_python")


@dataclass(frozen=True, kw_only=True)
class Run:
    """``caps``: of each rank. ``forget``: what was restored of errors and Q is dropped. ``nodes``: of copies in RAM."""

    caps: tuple[int, ...] = (4, 4)
    compress: PowerSGD | None = RANK_2
    until: int = STEPS
    directory: str | None = None
    forget: bool = False
    bucket_mb: float = 25.0
    nodes: int = 0
    torchs: bool = False


def model_of(width: int = 24) -> nn.Module:
    """All of its matrices but the last are compressed, of rank 2."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 20), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(20, 1))


def train(run: Run) -> None:
    """Run by a rank: prints the losses by step, and the weights at the end."""
    rank = int(os.environ["RANK"])
    if run.nodes:
        join_node(run.nodes)
    with Session(
        seed=SEED,
        micro_batches=COUNT,
        max_micro_batches=run.caps[rank],
        compress=run.compress,
        checkpoint_dir=run.directory,
        save_every_steps=HALF,
        memory_every_steps=1 if run.nodes else 0,
    ) as session:
        model = DistributedDataParallel(model_of(), bucket_cap_mb=run.bucket_mb)
        if run.torchs:
            use_torchs_hook(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        session.restore()
        if run.forget:
            for each in session._checkpoints._registered.compression:
                each.take({})
        losses = {}
        for step in session.steps(until=run.until):
            with step:
                for inputs, targets in step.micro_batches(Points(64), size=4):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
                losses[step.index] = step.mean_loss()
        print(json.dumps([losses, [each.flatten().tolist() for each in model.parameters()]]))


def curve(run: Run, **env: str) -> dict[int, float]:
    outputs = [output.splitlines()[-1] for output in run_world(len(run.caps), train, run, **env)]
    assert len(set(outputs)) == 1, "ranks must end with the same weights"
    return {int(step): loss for step, loss in json.loads(outputs[0])[0].items()}


def same(one: dict[int, float], other: dict[int, float], rel: float = SAME_CURVE) -> bool:
    return one == {step: pytest.approx(other[step], rel=rel) for step in one}


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, float]:
    return curve(Run())


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], Path]:
    """A run of unequal shares, and its checkpoint half-way: of two ranks, with unequal errors."""
    folder = tmp_path_factory.mktemp("half")
    losses = curve(Run(directory=str(folder), caps=(1, 7)))
    shutil.rmtree(folder / complete_name(STEPS))
    return losses, folder


def use_torchs_hook(model: DistributedDataParallel) -> None:
    """With the Q that ours begins with, after two steps in full, in one bucket."""
    state = PowerSGDState(model.process_group, matrix_approximation_rank=2, start_powerSGD_iter=2)
    ours = LowRankAverage(
        PowerSGD(rank=2),
        model.process_group,
        dict(model.module.named_parameters(prefix="module")),
        lambda: 0,
        lambda *_: None,
    )
    qs = [matrix.q for matrix in reversed(ours._matrices.values())]  # a bucket holds the last parameter first
    state.q_memory_dict[0] = torch.cat([q.flatten() for q in qs])
    state.p_memory_dict[0] = torch.empty(sum(matrix.error.shape[0] * 2 for matrix in ours._matrices.values()))
    model.register_comm_hook(state, powerSGD_hook)


def test_it_computes_what_torchs_hook_computes() -> None:
    ours = curve(Run(compress=PowerSGD(rank=2, start_step=2)))
    torchs = curve(Run(compress=None, torchs=True))
    assert same(ours, torchs)


def test_the_curve_is_the_same_under_any_shares_and_follows_the_one_in_full(
    undisturbed: dict[int, float], unequal: tuple[dict[int, float], Path]
) -> None:
    assert undisturbed[STEPS - 1] < 0.6 * undisturbed[0]
    assert same(unequal[0], undisturbed)
    for run in (Run(caps=(8, 0)), Run(caps=(3, 3, 2), bucket_mb=0.001)):
        assert same(curve(run), undisturbed), run
    assert not same(curve(Run(compress=PowerSGD(rank=1))), undisturbed)


def resumed(half_way: Path, folder: Path, **changes: object) -> dict[int, float]:
    shutil.copytree(half_way, folder)
    losses = curve(replace(Run(directory=str(folder)), **changes))
    assert set(losses) == set(range(HALF, STEPS))
    return losses


def test_a_run_goes_on_from_disk_as_if_it_had_not_been_interrupted(
    unequal: tuple[dict[int, float], Path], tmp_path: Path
) -> None:
    straight, half_way = unequal
    assert same(resumed(half_way, tmp_path / "a", caps=(1, 7)), straight, rel=1e-6)
    assert not same(resumed(half_way, tmp_path / "b", caps=(1, 7), forget=True), straight)


@pytest.mark.parametrize("caps", [(3, 3, 2), (8,)])
def test_on_another_world_what_the_errors_add_to_the_mean_is_kept(
    unequal: tuple[dict[int, float], Path], tmp_path: Path, caps: tuple[int, ...]
) -> None:
    straight, half_way = unequal
    assert same(resumed(half_way, tmp_path / "c", caps=caps), straight)


def test_what_a_checkpoint_does_not_have_begins_afresh(unequal: tuple[dict[int, float], Path], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    assert curve(Run(directory=str(plain), until=HALF, compress=None))
    switched_on = resumed(plain, tmp_path / "on")
    other_rank = resumed(unequal[1], tmp_path / "rank", compress=PowerSGD(rank=1))
    for losses in (switched_on, other_rank):
        assert losses[STEPS - 1] < losses[HALF]


def test_copies_in_ram_hold_it_too_and_a_lost_node_s_errors_come_from_its_buddy(undisturbed: dict[int, float]) -> None:
    with MemoryNodes("z1", "z2", "z1") as nodes:
        first = Run(nodes=3, until=10, caps=(3, 3, 2))
        losses = curve(first, **nodes.environment(1))
        nodes.enter_round()
        losses |= curve(replace(first, until=20), **nodes.environment(2))
        nodes.kill("n2")
        nodes.enter_round()
        losses |= curve(replace(first, until=STEPS, nodes=2, caps=(4, 4)), **nodes.environment(3))
        assert {m["step"] for m in nodes.nodes["n0"].observed if m["type"] == "restored"} == {10, 20}
    assert set(losses) == set(range(STEPS))
    assert same(losses, undisturbed)


def test_infinity_reaches_the_optimizer_and_is_forgotten() -> None:
    with Session(seed=SEED, micro_batches=1, compress="powersgd") as session:
        model = DistributedDataParallel(model_of(64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        finite = []
        for step in session.steps(until=6):
            with step:
                for inputs, targets in step.micro_batches(Points(64), size=4):
                    loss = (model(inputs) - targets).square().mean()
                    step.backward(loss * float("inf") if step.index == 2 else loss)
                finite.append(all(bool(each.grad.isfinite().all()) for each in model.parameters()))
                if finite[-1]:  # as a GradScaler does
                    optimizer.step()
        assert finite == [True, True, False, True, True, True]


def test_a_checkpoint_holds_only_what_is_worth_compressing() -> None:
    sizes = {(1000,): 0, (): 0, (4, 4): 0, (64, 32, 3, 3): 4, (100, 2): 0, (40, 40): 4, (1000, 3): 0, (0, 5): 0}
    assert {shape: rank_for(torch.zeros(shape), 4) for shape in sizes} == sizes


def test_columns_that_span_less_still_give_a_basis() -> None:
    for columns in (torch.zeros(20, 3), torch.ones(20, 3), torch.eye(20)[:, :3]):
        assert torch.allclose(orthonormal(columns).t() @ orthonormal(columns), torch.eye(3), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": 1.5}, {"rank": True}, {"start_step": -1}])
def test_what_means_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PowerSGD(**wrong)
