"""Gradients in two bytes an element: the same curve within noise, half of the bytes, the same weights on all ranks."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainees import Points
from worker_runs import run_world

from elasticd import PowerSGD, Session
from elasticd.errors import ConfigError
from elasticd.worker.compress import Compression

COUNT, SEED, STEPS = 8, 3, 60

pytestmark = pytest.mark.usefixtures("in_plain_python")


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))


def train(compress: Compression | None, caps: list[int]) -> None:
    """Run by a rank: prints the losses and the weights at the end."""
    rank = int(os.environ["RANK"])
    settings = {"micro_batches": COUNT, "max_micro_batches": caps[rank], "compress": compress}
    with Session(seed=SEED, **settings) as session:
        model = DistributedDataParallel(small())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        losses = []
        for step in session.steps(until=STEPS):
            with step:
                for inputs, targets in step.micro_batches(Points(64), size=4):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
                losses.append(step.mean_loss())
        weights = [each.flatten().tolist() for each in model.parameters()]
        print(json.dumps([losses, weights]))


def losses_of(compress: Compression | None, caps: list[int]) -> list[float]:
    outputs = run_world(len(caps), train, compress, caps)
    assert len(set(outputs)) == 1, "ranks must end with the same weights"
    losses: list[float] = json.loads(outputs[0])[0]
    return losses


def test_the_loss_curve_stays_within_noise_under_any_shares() -> None:
    plain = losses_of(None, [4, 4])
    assert plain[-1] < 0.3 * plain[0]
    for compress, caps in (("bf16", [4, 4]), ("bf16", [1, 7]), ("fp16", [8, 0])):
        losses = losses_of(compress, caps)
        assert losses != plain, "nothing was rounded"
        assert losses == pytest.approx(plain, rel=0.05), (compress, caps)


def refused(sharded: bool, compress: list[Compression | PowerSGD | None], exact: bool) -> None:
    """Run by a rank: prints whether the operator was told."""
    try:
        session = Session(micro_batches=COUNT, compress=compress[int(os.environ["RANK"])], exact=exact)
        model = small()
        if sharded:
            fully_shard(model)
        session.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    except ConfigError as error:
        print(error)


@pytest.mark.parametrize(
    ("sharded", "compress", "exact", "word"),
    [
        (True, ["bf16", "bf16"], False, "MixedPrecisionPolicy"),
        (False, ["bf16", "bf16"], False, "DistributedDataParallel"),
        (False, ["fp16", "fp16"], True, "exact"),
        (False, ["bf16", None], False, "same on all ranks"),
        (True, ["powersgd", "powersgd"], False, "MixedPrecisionPolicy"),
        (False, ["powersgd", "powersgd"], True, "exact"),
        (False, ["powersgd", PowerSGD(rank=1)], False, "same on all ranks"),
    ],
)
def test_what_cannot_be_compressed_is_refused_on_all_ranks(
    sharded: bool, compress: list[Compression | PowerSGD | None], exact: bool, word: str
) -> None:
    for output in run_world(2, refused, sharded, compress, exact):
        assert word in output


def test_a_name_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="bf16"):
        Session(micro_batches=COUNT, compress="bf8")  # type: ignore[arg-type]
