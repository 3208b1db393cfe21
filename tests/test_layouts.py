"""What was saved under one parallel layout is restored under any other, to the bit, and trains on from there.

Tiny models, forked ranks, gloo. Each layout saves once; then, under each layout, what each of them saved is restored.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_checkpoint_worlds import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worker_runs import run_world

from elasticd import Session
from elasticd.checkpoint import storage

#: Name -> how many ranks.
LAYOUTS = {"fsdp2 on 4": 4, "hsdp 2x1": 2, "hsdp 2x2": 4, "ddp on 1": 1, "ddp on 3": 3, "tensor-parallel": 2}
STEPS = 3
WIDTH = 66


def build(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    # Wide enough for the elements of most shards to be read without unpickling, and uneven.
    model: nn.Module = nn.Sequential(nn.Linear(WIDTH, 90), nn.Tanh(), nn.Linear(90, 51))
    kind, size = layout.split(maxsplit=1)[0], dist.get_world_size()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "tensor-parallel":
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    else:
        shards = int(layout[-1]) if kind == "hsdp" else size
        shape, names = ((size // shards, shards), ("replicate", "shard")) if kind == "hsdp" else ((size,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The whole batch on every rank: the mean over the ranks is the same under every layout."""
    optimizer.zero_grad()
    x = torch.arange(4.0 * WIDTH).reshape(4, WIDTH) / 4 / WIDTH
    model(x).square().mean().backward()
    optimizer.step()


def seen(session: Session, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: object) -> dict:
    """All of the training state, unsharded, and what this rank would draw next. Collective."""
    state = {name: value.clone() for name, value in whole(model, optimizer).items()}
    cursor = (session.cursor.epoch, session.cursor.index, session.dataset_size)
    return {"state": state, "cursor": cursor, "step": session.step, "lr": scheduler.get_last_lr()}


def open_session(directory: Path, layout: str, seed: int) -> tuple[Session, nn.Module, torch.optim.Optimizer, object]:
    session = Session(checkpoint_dir=directory, seed=5)
    model, optimizer = build(layout, seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    session.register(model=model, optimizer=optimizer, extra={"scheduler": scheduler})
    return session, model, optimizer, scheduler


def save_under(layout: str, directory: Path, dump: Path) -> None:
    """Run by a rank: train, save, say with what it ended, and what one more step would make of it."""
    dist.init_process_group("gloo")
    # FSDP2 and DTensor do not make replicas equal, as DDP does: the script must.
    session, model, optimizer, scheduler = open_session(directory, layout, 17)
    with session:
        session.restore()
        for step in session.steps(until=STEPS):
            with step:
                step.batch_indices(dataset_size=60, global_batch=12)
                train_once(model, optimizer)
                scheduler.step()
        ended = seen(session, model, optimizer, scheduler)
        drawn = torch.rand(4)
        train_once(model, optimizer)
        after = whole(model, optimizer)
        if session.rank == 0:
            torch.save({**ended, "drawn": drawn, "after": after}, dump)


def restore_under(layout: str, directories: list[tuple[Path, Path]]) -> None:
    """Run by a rank: take up each of the checkpoints in turn."""
    dist.init_process_group("gloo")
    for directory, dump in directories:
        # A restore must not depend on equal first values.
        session, model, optimizer, scheduler = open_session(directory, layout, 100 + dist.get_rank())
        with session:
            assert session.restore() == STEPS
            expected = torch.load(dump)
            found = seen(session, model, optimizer, scheduler)
            drawn = torch.rand(4)
            for key in ("cursor", "step", "lr"):
                assert found[key] == expected[key], (dump.name, key)
            assert found["state"].keys() == expected["state"].keys()
            for name, value in expected["state"].items():
                assert torch.equal(found["state"][name], value), (dump.name, name)
            if session.rank == 0:
                assert torch.equal(drawn, expected["drawn"])
            train_once(model, optimizer)
            for name, value in whole(model, optimizer).items():
                torch.testing.assert_close(value, expected["after"][name], rtol=1e-4, atol=1e-6)
        print(json.dumps(dump.name))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """(checkpoint directory, dump) of each layout."""
    root, made = tmp_path_factory.mktemp("layouts"), []
    for layout, size in LAYOUTS.items():
        directory, dump = root / layout / "checkpoints", root / layout / "dump"
        directory.mkdir(parents=True)
        run_world(size, save_under, layout, directory, dump)
        manifest = storage.verify(directory / f"step-{STEPS}")
        assert manifest.world_size == size
        made.append((directory, dump))
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_restores_what_every_layout_saved(saved: list[tuple[Path, Path]], layout: str) -> None:
    for output in run_world(LAYOUTS[layout], restore_under, layout, saved):
        assert output.count('"dump"') == len(LAYOUTS)


def test_shards_are_written_once_and_by_all_ranks(saved: list[tuple[Path, Path]]) -> None:
    """Replicas are not written twice, and no rank writes it all."""
    sizes = {}
    for directory, _ in saved:
        manifest = storage.read_manifest(directory / f"step-{STEPS}")
        data = [entry for entry in manifest.files if entry.name.endswith(".distcp")]
        assert len(data) == manifest.world_size
        sizes[directory.parent.name] = manifest.size_bytes
    assert sizes["ddp on 3"] < 2 * sizes["ddp on 1"]
