"""Layouts: tensor parallel, pipelines and shards have the curve, the samples and the checkpoints of one process.

The byte GPT in worlds of forked ranks over real gloo.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from worker_runs import byte_gpt, ledger, run_world, world

from elasticd import Layout, Session
from elasticd.errors import ConfigError
from elasticd.worker.data import Cursor, sample_ids
from elasticd.worker.layout import Arrangement

SEED, COUNT, SIZE = 3, 4, 2


def small(session: Session) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(session.device)


# --- the same on any layout ---


def train_gpt(parallel: str, path: Path, caps: list[int], steps: int, directory: Path | None) -> None:
    """Run by a rank: the shipped example, with this replica's cap."""
    from elasticd.examples import byte_gpt as script

    if parallel == "pp-fsdp2":
        parallel = "pp"
        script.DistributedDataParallel = lambda stage, process_group: fully_shard(
            stage, mesh=DeviceMesh.from_group(process_group, "cpu")
        )
    replica_size = script.LAYOUTS[parallel].replica_size if parallel in script.LAYOUTS else 1
    cap = caps[int(os.environ["RANK"]) // replica_size] if caps else None
    script.Session = lambda **settings: Session(**settings, max_micro_batches=cap)
    arguments = ["--parallel", parallel, "--steps", str(steps), "--micro-batches", str(COUNT), "--ledger", str(path)]
    if directory is not None:
        arguments += ["--checkpoint-dir", str(directory), "--save-every", "1000"]
    byte_gpt(*arguments, "--batch", str(COUNT * SIZE), "--seed", str(SEED))


def curve(
    path: Path, parallel: str, size: int, *, caps: list[int] | None = None, steps: int = 8, into: Path | None = None
) -> dict[int, float]:
    """The loss of each step in the ledger; it must show each sample of each step once."""
    run_world(size, train_gpt, parallel, path, caps or [], steps, into, LOCAL_WORLD_SIZE="2")
    losses: dict[int, float] = {}
    ids: dict[int, list[int]] = defaultdict(list)
    for line in ledger(path):
        assert losses.setdefault(line["step"], line["loss"]) == line["loss"]
        ids[line["step"]] += line["ids"]
    assert sorted(losses) == list(range(1, steps + 1))
    order = expected(steps)
    for step in losses:
        assert sorted(ids[step]) == sorted(order[(step - 1) * COUNT * SIZE : step * COUNT * SIZE])
    return losses


def expected(steps: int) -> list[int]:
    from elasticd.examples.byte_gpt import StandardLibrary

    return sample_ids(Cursor(), range(steps * COUNT * SIZE), size=len(StandardLibrary(16)), seed=SEED)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    losses = curve(tmp_path_factory.mktemp("alone") / "ledger", "ddp", 1)
    assert losses[8] < losses[1]
    return losses


@pytest.mark.parametrize(
    ("parallel", "size", "caps"),
    [("tp", 2, None), ("tp", 4, None), ("tp-ddp", 4, [1, 3]), ("pp", 2, None), ("pp", 4, [3, 1]), ("pp", 4, [0, 4]),
     ("pp-fsdp2", 4, [1, 3]), ("hsdp", 4, None)],
)  # fmt: skip
def test_the_curve_and_the_samples_are_those_of_one_process(
    tmp_path: Path, alone: dict[int, float], parallel: str, size: int, caps: list[int] | None
) -> None:
    """Shares of 3 and 1, and of none: a replica's ranks follow the same plan, and a pipeline runs any number."""
    for step, loss in curve(tmp_path / "ledger", parallel, size, caps=caps).items():
        assert loss == pytest.approx(alone[step], rel=1e-4), step


def test_a_checkpoint_goes_on_under_any_other_layout(tmp_path: Path, alone: dict[int, float]) -> None:
    """With the optimizer's state: a pipeline's stages have a part of it each."""
    chain = (("tp-ddp", 4), ("pp", 4), ("ddp", 1), ("pp", 2))
    for number, (parallel, size) in enumerate(chain, start=1):
        losses = curve(tmp_path / "ledger", parallel, size, steps=2 * number - 1, into=tmp_path / "checkpoints")
    for step, loss in losses.items():
        assert loss == pytest.approx(alone[step], rel=1e-4), step


def train_exactly(until: int, caps: list[int], directory: Path) -> None:
    """Run by a rank: split over two, with dropout on what all of a replica's ranks have; prints all the weights."""
    cap = caps[int(os.environ["RANK"]) // 2]
    settings = {"micro_batches": COUNT, "max_micro_batches": cap, "exact": True, "layout": Layout(tensor=2)}
    with Session(checkpoint_dir=directory, seed=SEED, **settings) as session:
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        parallelize_module(model, session.mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        session.restore()
        data = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
        for step in session.steps(until=until):
            with step:
                for inputs in step.micro_batches(data, size=SIZE):
                    step.backward((model(inputs) - inputs.sum(1, keepdim=True)).square().mean())
                optimizer.step()
        parts = [each.full_tensor() if isinstance(each, DTensor) else each for each in model.parameters()]
        print(hashlib.sha256(b"".join(part.detach().numpy().tobytes() for part in parts)).hexdigest())


def test_exact_mode_has_the_same_bits_on_any_number_of_tensor_parallel_replicas(tmp_path: Path) -> None:
    def bits(until: int, caps: list[int], name: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        (found,) = {each.strip() for each in run_world(2 * len(caps), train_exactly, until, caps, tmp_path / name)}
        return found

    whole = bits(8, [4], "whole")
    assert bits(3, [2, 2], "restarted") != whole
    assert bits(8, [1, 3], "restarted") == whole


def train_unequal(until: int) -> None:
    """Run by a rank of four, in replicas of two: the last one takes three times as long."""
    with Session(micro_batches=COUNT, layout=Layout(tensor=2)) as session:
        model = DistributedDataParallel(small(session), process_group=session.mesh.get_group("dp"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=until):
            with step:
                for inputs in step.micro_batches(torch.ones(64, 6), size=SIZE):
                    time.sleep(0.06 if session.rank == 3 else 0.02)
                    step.backward(model(inputs).square().mean())
                optimizer.step()
            print(json.dumps(step.sample_ids))


def test_a_replica_gives_work_away_when_one_of_its_ranks_is_slow() -> None:
    outputs = run_world(4, train_unequal, 16)
    ids = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]
    assert (len(ids[0][0]), len(ids[2][0])) == (2 * SIZE, 2 * SIZE)
    assert (len(ids[0][-1]), len(ids[2][-1])) == (3 * SIZE, SIZE)


# --- how ranks are arranged ---


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6))
def test_replicas_are_the_same_ranks_as_those_of_the_mesh(tensor: int, pipeline: int, replicas: int) -> None:
    layout = Layout(tensor=tensor, pipeline=pipeline)
    size = tensor * pipeline * replicas
    ranks = [Arrangement(layout=layout, rank=rank, world_size=size) for rank in range(size)]
    grid = torch.arange(size).view(replicas, pipeline, tensor)  # as init_device_mesh lays them out
    for arranged in ranks:
        assert arranged.rank in grid[arranged.replica]
        assert arranged.rank in grid[arranged.replica, arranged.stage]
        assert arranged.first_rank == int(grid[arranged.replica].min())
    assert ranks[0].by_replica(range(size)) == grid.flatten(1).tolist()
    leaders = [arranged for arranged in ranks if arranged.leads]
    assert [arranged.replica for arranged in leaders] == list(range(replicas))
    assert {arranged.stage for arranged in leaders} == {pipeline - 1}


def test_a_replica_is_as_fast_as_its_slowest_rank_and_unmeasured_while_one_is() -> None:
    arranged = Arrangement(layout=Layout(tensor=2), rank=0, world_size=6)
    assert arranged.slowest([3, 4, 5, 0, 7, 6]) == [4, 0, 7]


@pytest.mark.parametrize(
    "wrong", [{"tensor": 0}, {"pipeline": 1.5}, {"shard": "rack"}, {"shard": -1}, {"tensor": None}]
)
def test_layouts_that_are_none(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        Layout(**wrong)


# --- wrong use ---


def no_whole_number() -> None:
    """Run by a rank of three."""
    Session(layout=Layout(tensor=2))


def no_whole_copies() -> None:
    """Run by a rank of three."""
    Session(layout=Layout(shard=2))


def disagree() -> None:
    """Run by a rank."""
    Session(layout=Layout(tensor=1 + int(os.environ["RANK"])))


def nodes_differ() -> None:
    """Run by a rank: of a node with as many ranks as its number says."""
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + int(os.environ["RANK"]))
    Session(layout=Layout(shard="node"))


def tensor_parallel_without_layout() -> None:
    """Run by a rank."""
    session = Session(micro_batches=4)
    model = small(session)
    parallelize_module(model, session.mesh, {"0": ColwiseParallel()})
    session.register(model=model)


def ddp_over_tensor_parallel() -> None:
    """Run by a rank of four."""
    session = Session(micro_batches=4, layout=Layout(tensor=2))
    model = small(session)
    parallelize_module(model, session.mesh["tp"], {"0": ColwiseParallel()})
    session.register(model=DistributedDataParallel(model, device_mesh=session.mesh["dp"]))


def ddp_over_all_ranks() -> None:
    """Run by a rank of four: stages would be averaged with one another."""
    session = Session(micro_batches=4, layout=Layout(pipeline=2))
    session.register(model=DistributedDataParallel(small(session)))


def ddp_over_the_pipeline() -> None:
    """Run by a rank of four: as many ranks as there are replicas, and not those of them."""
    session = Session(micro_batches=4, layout=Layout(pipeline=2))
    session.register(model=DistributedDataParallel(small(session), process_group=session.mesh.get_group("pp")))


def shards_over_the_pipeline() -> None:
    """Run by a rank of four."""
    session = Session(micro_batches=4, layout=Layout(pipeline=2))
    session.register(model=fully_shard(small(session), mesh=session.mesh["pp"]))


def static_graph() -> None:
    """Run by a rank."""
    session = Session(micro_batches=4)
    session.register(model=DistributedDataParallel(small(session), static_graph=True))


def half_in_ddp() -> None:
    """Run by a rank."""
    session = Session(micro_batches=4)
    session.register(model=nn.ModuleDict({"gen": DistributedDataParallel(small(session)), "disc": small(session)}))


def half_in_exact_mode() -> None:
    """Run by a rank: exact mode sums all of it by itself, so it is none of the wrong ones."""
    session = Session(micro_batches=4, exact=True)
    session.register(model=nn.ModuleDict({"gen": DistributedDataParallel(small(session)), "disc": small(session)}))
    with session:
        raise ConfigError("taken as it is")


def left_out_on_purpose() -> None:
    """Run by a rank: so is what DDP was told to leave out, what is frozen, and both halves wrapped."""
    session = Session(micro_batches=4)
    partly, frozen = small(session), small(session)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(partly, ["0.weight"])
    frozen.requires_grad_(False)
    parts = {"gen": DistributedDataParallel(partly), "disc": fully_shard(small(session)), "teacher": frozen}
    session.register(model=nn.ModuleDict(parts))
    with session:
        raise ConfigError("taken as it is")


def shards_without_the_root() -> None:
    """Run by a rank: the first and the last layer stay plain tensors."""
    session = Session(micro_batches=4)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))
    fully_shard(model[1])
    session.register(model=model)


def loop_in_a_pipeline() -> None:
    """Run by a rank."""
    session = Session(micro_batches=4, layout=Layout(pipeline=2))
    session.register(model=small(session))
    with next(session.steps()) as step:
        step.micro_batches([], size=1)


def exact_pipeline() -> None:
    """Run by a rank."""
    session = Session(micro_batches=4, exact=True, layout=Layout(pipeline=2))
    session.register(model=small(session))


@pytest.mark.parametrize(
    ("size", "target", "why"),
    [(3, no_whole_number, "a world of 3 ranks cannot hold this layout (tensor 2)"),
     (3, no_whole_copies, "cannot hold this layout (shard 2)"),
     (2, disagree, "Session(layout=...) must be the same on all ranks: rank 0 says "),
     (2, nodes_differ, "there are 1 to 2: say a number"),
     (2, tensor_parallel_without_layout, "nothing averages the gradients of this model over its 2 replicas"),
     (4, ddp_over_tensor_parallel, "makes plain tensors of a tensor-parallel model's parameters"),
     (4, ddp_over_all_ranks, 'say process_group=session.mesh.get_group("dp")'),
     (4, ddp_over_the_pipeline, 'say process_group=session.mesh.get_group("dp")'),
     (4, shards_over_the_pipeline, "use meshes of session.mesh"),
     (2, static_graph, "DistributedDataParallel(static_graph=True) must average in its first pass"),
     (2, half_in_ddp, "nothing averages the gradient of parameter disc.0.weight (4 in all) over the 2 replicas"),
     (2, half_in_exact_mode, "taken as it is"),
     (2, left_out_on_purpose, "taken as it is"),
     (2, shards_without_the_root, "nothing averages the gradient of parameter 0.weight (4 in all)"),
     (2, loop_in_a_pipeline, "call step.run_pipeline(...)"),
     (2, exact_pipeline, "exact mode needs the whole model on each rank")],
)  # fmt: skip
def test_what_a_layout_cannot_be_ends_all_ranks_with_one_line(size: int, target, why: str) -> None:
    with world(size, target) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
            assert why in rank.output
            assert len(rank.output.splitlines()) == 1, rank.output


def test_a_pipeline_where_there_is_none(in_plain_python: None) -> None:
    session = Session(micro_batches=2)
    with session, pytest.raises(ConfigError, match="no pipeline stages"), next(session.steps()) as step:
        step.run_pipeline(None, [], size=1)
