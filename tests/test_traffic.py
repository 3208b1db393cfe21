"""What a rank sends for its gradients: counted, and held against what the kernel counts."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainees import Points
from worker_runs import run_world

from elasticd import Layout, Session, average_in_two_levels
from elasticd.bench.balance import FAST
from elasticd.bench.balance import train as train_on_nodes
from elasticd.worker.traffic import ring_bytes

STEPS = 3
#: What TCP and IP add to a segment, acknowledgements, and what ranks agree on in a step.
MARGIN_OF_HEADERS, MARGIN_OF_A_STEP_BYTES = 1.01, 8_000


def model_of() -> nn.Module:
    """5300 elements, of which 12 do not count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 400, bias=False), nn.Linear(400, 1))
    model[0].bias.requires_grad_(requires_grad=False)
    return model


COUNTED = 6 * 12 + 12 * 400 + 401


def train(kind: str) -> None:
    """Run by a rank: prints what it has counted."""
    how: dict[str, Any] = {"exact": {"exact": True}, "two levels": {"layout": Layout(shard=2)}}.get(kind, {})
    compress = kind if kind in ("bf16", "powersgd") else None
    with Session(seed=1, micro_batches=4, compress=compress, **how) as session:
        model = model_of()
        if kind == "fsdp":
            fully_shard(model)
        elif kind == "hsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        else:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        session.register(model=model, optimizer=optimizer)
        if kind == "two levels":
            average_in_two_levels(model, session.mesh)
        for step in session.steps(until=STEPS):
            with step:
                for inputs, targets in step.micro_batches(Points(64), size=4):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
        print(session.sent_bytes)


def counted(kind: str, ranks: int) -> list[int]:
    return [int(output.splitlines()[-1]) for output in run_world(ranks, train, kind)]


@pytest.mark.parametrize(
    ("kind", "ranks", "a_step_bytes"),
    [
        ("ddp", 2, 4 * COUNTED),
        ("bf16", 2, 2 * COUNTED),
        # Rank 4 of 12 x 400; the others as they are.
        ("powersgd", 2, 4 * (4 * 412 + 6 * 12 + 401)),
        ("exact", 2, 8 * COUNTED),
        # Within the node 1 x, across nodes a half of it.
        ("two levels", 4, 4 * COUNTED * 1.5),
    ],
)
def test_it_follows_from_the_sizes_of_what_is_averaged(kind: str, ranks: int, a_step_bytes: float) -> None:
    assert set(counted(kind, ranks)) == {STEPS * a_step_bytes}


@pytest.mark.parametrize(("kind", "ranks", "models"), [("fsdp", 2, 2), ("hsdp", 4, 4)])
def test_sharded_models_send_each_part_to_its_rank(kind: str, ranks: int, models: int) -> None:
    """All ranks together: each of two sends half of the model, once for each of its micro-batches; HSDP does so with
    two copies, and all-reduces halves."""
    sent = [each / STEPS / 4 for each in counted(kind, ranks)]
    assert sum(sent) == models * COUNTED
    assert min(sent) > 0.8 * max(sent)  # parts are whole rows


def test_a_ring_sends_nearly_twice_and_one_rank_nothing() -> None:
    assert [ring_bytes(100, ranks) for ranks in (1, 2, 4)] == [0, 100, 150]


@pytest.mark.net
@pytest.mark.parametrize("way", ["session", "powersgd"])
def test_the_kernel_counts_the_same(namespaces: None, way: str) -> None:
    """Of each node's interface, which nothing but the ranks' traffic crosses."""
    lines, _ = train_on_nodes(way, (FAST, FAST), steps=8, micro_batches=2)
    for rank in (0, 1):
        own = sorted((line for line in lines if line["rank"] == rank), key=lambda line: line["step"])[2:]
        sent = [
            tuple(later[what] - line[what] for what in ("counted", "sent"))
            for line, later in itertools.pairwise(own)
        ]
        assert all(100_000 < ours <= kernels for ours, kernels in sent), sent
        # TCP sends some of it again on a busy machine: not in every step.
        assert any(kernels <= MARGIN_OF_HEADERS * ours + MARGIN_OF_A_STEP_BYTES for ours, kernels in sent), sent
