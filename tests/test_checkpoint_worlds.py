"""Checkpoints of several ranks: they fit another world, and all ranks take the same one."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from memory_nodes import MemoryNodes
from small_checkpoints import data_file, flip, newest_step, save, saver, state_of
from test_memory import join_node
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from worker_runs import run_world, world

from elasticd import Session
from elasticd.checkpoint import storage
from elasticd.checkpoint.manifest import MANIFEST_NAME, METADATA_NAME
from elasticd.checkpoint.restore import restore_newest

# --- several ranks ---


def build(kind: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(dist.get_rank())  # a restore must not depend on equal first values
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All parameters and moments, unsharded, by their names in the plain model. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    found = dict(model_state)
    for name, moments in optimizer_state["state"].items():
        found |= {f"{name}/{key}": value for key, value in moments.items()}
    return found


def train_and_dump(directory: Path, kind: str, until: int, dump: Path) -> None:
    """Run by a rank: resume, say with what; train to ``until``, save, say with what it ended."""
    with Session(checkpoint_dir=directory, seed=3) as session:
        model, optimizer = build(kind)
        session.register(model=model, optimizer=optimizer)
        session.restore()
        if session.step:
            _dump(whole(model, optimizer), dump, "resumed")
        for step in session.steps(until=until):
            with step:
                ids = step.batch_indices(dataset_size=60, global_batch=6)
                x = torch.tensor(ids).unsqueeze(1) / 60 * torch.ones(6)
                optimizer.zero_grad()
                (model(x).square().mean() * step.loss_scale).backward()
                optimizer.step()
        _dump(whole(model, optimizer), dump, "ended")


def _dump(state: dict[str, torch.Tensor], dump: Path, name: str) -> None:
    if dist.get_rank() == 0:
        torch.save(state, dump / name)


@pytest.mark.parametrize(("kind", "first", "then"), [("ddp", 2, 1), ("fsdp2", 2, 1), ("fsdp2", 1, 2), ("ddp", 1, 3)])
def test_a_checkpoint_fits_another_world(tmp_path: Path, kind: str, first: int, then: int) -> None:
    """Model and moments come back to the bit, however they were split, and training goes on from there."""
    run_world(first, train_and_dump, tmp_path / "c", kind, 3, tmp_path)
    ended = torch.load(tmp_path / "ended")
    assert len(ended) == 4 + 3 * 4
    run_world(then, train_and_dump, tmp_path / "c", kind, 5, tmp_path)
    resumed = torch.load(tmp_path / "resumed")
    assert resumed.keys() == ended.keys()
    for name, value in ended.items():
        assert torch.equal(resumed[name], value), name
    assert storage.complete_steps(tmp_path / "c") == [5, 3]
    assert storage.verify(tmp_path / "c" / "step-5").world_size == then


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_of_two_ranks_open_without_us(tmp_path: Path) -> None:
    """FSDP2 on two ranks, read by plain DCP in a process without any group."""
    run_world(2, train_and_dump, tmp_path / "c", "fsdp2", 2, tmp_path)
    state = {"model": {"0.weight": torch.zeros(10, 6)}}
    dcp_load(state, checkpoint_id=tmp_path / "c" / "step-2", no_dist=True)
    assert torch.equal(state["model"]["0.weight"], torch.load(tmp_path / "ended")["0.weight"])


def print_the_choice(directories: list[Path]) -> None:
    """Run by a rank, each with the directory of its own."""
    dist.init_process_group("gloo")
    found = restore_newest(directories[dist.get_rank()], dist.group.WORLD, lambda _: state_of(0.0))
    print("found", found.manifest.step if found else None)


def test_all_ranks_take_the_one_that_verifies_for_the_first(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    flip(data_file(tmp_path / "step-20"))
    for output in run_world(2, print_the_choice, [tmp_path, tmp_path]):
        assert output.splitlines()[-1] == "found 10"


def test_all_ranks_start_afresh_when_nothing_verifies(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "step-10" / MANIFEST_NAME).unlink()
    for output in run_world(2, print_the_choice, [tmp_path, tmp_path]):
        assert output.splitlines()[-1] == "found None"


@pytest.mark.parametrize("there", ["nothing", "another of the same step", "rotten metadata", "less data"])
def test_ranks_that_see_different_directories_are_the_operators_error(tmp_path: Path, there: str) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    save(mine, 10)
    if there == "another of the same step":
        save(other, 10)
    elif there != "nothing":
        shutil.copytree(mine, other, dirs_exist_ok=True)
    if there == "rotten metadata":
        flip(other / "step-10" / METADATA_NAME)
    if there == "less data":
        os.truncate(data_file(other / "step-10"), 1000)
    with world(2, print_the_choice, [mine, other]) as ranks:
        assert [rank.wait() for rank in ranks] == [1, 1]
        assert "all ranks must see the same directory" in ranks[1].output
        assert "rank 1 could not take up the checkpoint" in ranks[0].output


def save_with_a_silent_rank(directory: Path) -> None:
    """Run by a rank: rank 1 never takes part in the save."""
    from datetime import timedelta

    dist.init_process_group("gloo")
    group = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        time.sleep(600)
    try:
        saver(directory, group=group).save(state_of(1.0), 1)
    except RuntimeError as error:
        print("gave up:", type(error).__name__)


def test_a_silent_rank_ends_a_save_by_the_time_out_and_nothing_is_published(tmp_path: Path) -> None:
    with world(2, save_with_a_silent_rank, tmp_path) as ranks:
        assert ranks[0].wait() == 0, ranks[0].output
        assert "gave up" in ranks[0].output
    assert newest_step(tmp_path) is None


def save_where_it_is_restored(directory: Path) -> None:
    """Run by a rank of two nodes: take up a copy in RAM, and save at once. Rank 1 does not see what is on disk yet."""
    join_node(2)
    if os.environ["RANK"] == "1":
        storage.of_step = lambda *_: []
    with Session(memory_every_steps=1, seed=1, checkpoint_dir=directory, save_timeout_s=20) as session:
        session.register(model=torch.nn.Linear(3, 2))
        restored_step = session.restore()
        saved = session.save() if restored_step else None
        print(restored_step, saved.fresh if saved else None)
        for step in session.steps(until=2):
            with step:
                pass


def test_ranks_whose_views_of_the_directory_differ_save_together_after_a_restore_from_ram(tmp_path: Path) -> None:
    with MemoryNodes("", "") as nodes:
        for number, expected in ((1, "0 None"), (2, "2 False")):
            nodes.enter_round()
            outputs = run_world(2, save_where_it_is_restored, tmp_path, **nodes.environment(number))
            assert [output.splitlines()[-1] for output in outputs] == [expected] * 2
