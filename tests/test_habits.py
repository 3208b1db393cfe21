"""What people do every day in a training loop: it must have the curve of one process, on any world and over a restart.

Forked ranks over real gloo.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainees import Points, fingerprint, small
from worker_runs import run_world

from elasticd import Session

SEED, COUNT = 3, 12


def full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def open_session(kind: str, **settings: Any) -> tuple[Session, nn.Module]:
    # Bits are compared: shares that followed the speed of a busy machine would add up in another order.
    session = Session(micro_batches=COUNT, seed=SEED, exact=kind == "exact", balance="off", **settings)
    model = small(dropout=0.2)
    if kind == "fsdp2":
        for part in (model[0], model[3], model):
            fully_shard(part)
    elif kind == "ddp":
        model = DistributedDataParallel(model)
    return session, model


def clip(until: int, kind: str, directory: Path | None = None) -> None:
    """Run by a rank: clips every step, and a schedule lowers the rate; prints each step's loss, norm and rate."""
    session, model = open_session(kind, checkpoint_dir=directory)
    with session:
        adam = torch.optim.AdamW(model.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=20)
        session.register(model=model, optimizer=adam, extra={"schedule": schedule})
        session.restore()
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    step.backward((model(inputs) - targets).square().mean())
                norm = full(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
                adam.step()
                schedule.step()
                loss = step.mean_loss()
            line = {"step": step.index, "loss": loss, "norm": norm.item(), "rate": schedule.get_last_lr()[0]}
            print(json.dumps(line))
        if kind == "exact":
            print(json.dumps({"bits": fingerprint(model)}))


def lines(size: int, run: Callable[..., object], *arguments: object) -> list[dict[str, Any]]:
    """The same on all ranks."""
    first, *others = run_world(size, run, *arguments)
    assert all(other == first for other in others)
    return [json.loads(line) for line in first.splitlines() if line.startswith("{")]


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]], rel: float) -> bool:
    assert len(found) == len(wanted) > 0
    return all(one == pytest.approx(other, rel=rel) for one, other in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def clipped() -> list[dict[str, Any]]:
    """By one process."""
    found = lines(1, clip, 8, "ddp")
    assert any(line["norm"] > 0.5 for line in found)
    return found


@pytest.mark.parametrize(("kind", "size"), [("ddp", 3), ("fsdp2", 2)])
def test_clipping_has_the_curve_of_one_process(clipped: list[dict[str, Any]], kind: str, size: int) -> None:
    assert same(lines(size, clip, 8, kind), clipped, rel=1e-4)


def test_clipping_a_sharded_model_is_clipping_a_replicated_one() -> None:
    assert same(lines(2, clip, 8, "fsdp2"), lines(2, clip, 8, "ddp"), rel=1e-5)


def test_clipping_in_exact_mode_has_the_same_bits_on_any_world() -> None:
    whole = lines(1, clip, 8, "exact")
    assert lines(3, clip, 8, "exact")[-1] == whole[-1]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_schedule_and_clipping_go_on_after_a_restart(tmp_path: Path, kind: str) -> None:
    whole = lines(2, clip, 8, kind)
    first = lines(2, clip, 5, kind, tmp_path)
    assert first + lines(2, clip, 8, kind, tmp_path) == whole


def evaluate(until: int, kind: str, where: str) -> None:
    """Run by a rank: an evaluation on other data draws random numbers of its own, and leaves the training alone."""
    session, model = open_session(kind)
    with session:
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        session.register(model=model, optimizer=sgd)
        for step in session.steps(until=until):
            if where == "between":
                measure(model)
            with step:
                if where == "before":
                    measure(model)
                for inputs, targets in step.micro_batches(Points(), size=2):
                    step.backward((model(inputs) - targets).square().mean())
                    if where == "in the loop":
                        measure(model)
                sgd.step()
                if where == "after":
                    measure(model)
                loss = step.mean_loss()
            print(json.dumps({"loss": loss}))


def measure(model: nn.Module) -> float:
    """As many batches on all ranks; and dropout is drawn once more, as a script of carelessness would."""
    model.eval()
    with torch.no_grad():
        loss = sum((model(torch.randn(4, 6)).square().mean() for _ in range(2)), torch.zeros(())).item()
    model.train()
    nn.functional.dropout(torch.ones(5))
    return loss


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_evaluation_does_not_change_the_curve(kind: str) -> None:
    plain = lines(2, evaluate, 5, kind, "nowhere")
    assert plain[-1]["loss"] != plain[0]["loss"]
    for where in ("between", "before", "in the loop", "after"):
        assert lines(2, evaluate, 5, kind, where) == plain, where


class Pair(nn.Module):
    """Two models that learn from one another, in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"teacher": small(), "pupil": nn.Linear(6, 1)})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.parts["teacher"](x), self.parts["pupil"](x)


def train_pair(until: int, each_alone: bool) -> None:
    """Run by a rank: under one DDP, or a DDP for each."""
    with Session(micro_batches=COUNT, seed=SEED) as session:
        pair = Pair()
        model = pair if each_alone else DistributedDataParallel(pair)
        if each_alone:
            pair.parts = nn.ModuleDict({name: DistributedDataParallel(each) for name, each in pair.parts.items()})
        names = [pair.parts[name] for name in ("teacher", "pupil")]
        optimizers = [torch.optim.Adam(names[0].parameters(), lr=0.01), torch.optim.SGD(names[1].parameters(), lr=0.01)]
        session.register(model=model, optimizer=optimizers)
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    taught, learnt = model(inputs)
                    step.backward((taught - targets).square().mean() + (learnt - taught.detach()).square().mean())
                for optimizer in optimizers:
                    optimizer.step()
                loss = step.mean_loss()
            print(json.dumps({"loss": loss}))


def test_two_models_in_one_session_have_the_curve_of_one_process() -> None:
    whole = lines(1, train_pair, 6, False)
    assert whole[-1]["loss"] < whole[0]["loss"]
    for each_alone in (False, True):
        assert same(lines(3, train_pair, 6, each_alone), whole, rel=1e-4), each_alone


def give_up(until: int, kind: str, faulty: bool) -> None:
    """Run by a rank: step 2 raises on all ranks after its second micro-batch, and is done again."""
    session, model = open_session(kind)
    with session:
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        session.register(model=model, optimizer=sgd)
        for step in session.steps(until=until):
            try:
                with step:
                    for number, (inputs, targets) in enumerate(step.micro_batches(Points(), size=2)):
                        step.backward((model(inputs) - targets).square().mean())
                        if faulty and step.index == 2 and number == 1:
                            faulty = False
                            raise ArithmeticError
                    sgd.step()
            except ArithmeticError:
                continue
            print(json.dumps({"step": step.index, "loss": step.mean_loss()}))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_step_that_is_given_up_and_done_again_leaves_no_gradients(kind: str) -> None:
    assert lines(2, give_up, 5, kind, True) == lines(2, give_up, 5, kind, False)
