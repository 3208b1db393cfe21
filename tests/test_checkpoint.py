"""Checkpoints: durable before visible, checked before used, never mixed, and resharded onto any world."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from worker_runs import alone, run_world, world

from elasticd import Session
from elasticd.checkpoint import storage
from elasticd.checkpoint.manifest import (
    FORMAT,
    MANIFEST_NAME,
    METADATA_NAME,
    FileEntry,
    Manifest,
    decode_manifest,
    encode_manifest,
)
from elasticd.checkpoint.restore import PassedOver, Restored, load_into, restore_newest
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saver
from elasticd.errors import CheckpointInvalid, ConfigError, SaveFailed


def state_of(value: float) -> dict:
    return {"model": {"weight": torch.full((300,), value), "bias": torch.full((7,), -value)}, "note": f"of {value}"}


def saver(directory: Path, *, keep: int = 3, **more: object) -> Saver:
    return Saver(directory, **{"group": None, "job_id": "j", "round_number": 1, "keep": Keep(last=keep), **more})


def save(directory: Path, *steps: int, **more: object) -> None:
    for step in steps:
        saver(directory, **more).save(state_of(float(step)), step)


def loaded(path: Path) -> dict:
    state = state_of(0.0)
    load_into(state, path)
    return state


def restored(directory: Path) -> tuple[Restored | None, list[PassedOver]]:
    """The newest that verifies is loaded into a new state; what was passed over."""
    passed_over: list[PassedOver] = []
    return restore_newest(directory, None, lambda _: state_of(0.0), passed_over), passed_over


def newest_step(directory: Path) -> int | None:
    found, _ = restored(directory)
    if found is not None:
        assert storage.verify(found.path) == found.manifest
    return found.manifest.step if found else None


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- what is written ---


def test_what_is_saved_is_loaded_and_described(tmp_path: Path) -> None:
    saved = saver(tmp_path, round_number=4).save(state_of(1.5), 10)
    assert (saved.step, saved.path, saved.fresh) == (10, tmp_path / "step-10", True)
    manifest = storage.verify(saved.path)
    assert (manifest.step, manifest.world_size, manifest.job_id, manifest.round_number) == (10, 1, "j", 4)
    assert manifest.torch_version == torch.__version__
    assert {entry.name for entry in manifest.files} | {MANIFEST_NAME} == set(names(saved.path))
    assert manifest.size_bytes == sum((saved.path / entry.name).stat().st_size for entry in manifest.files)
    state = loaded(saved.path)
    assert torch.equal(state["model"]["weight"], torch.full((300,), 1.5))
    assert state["note"] == "of 1.5"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_dcp_opens_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    state = {"model": {"weight": torch.zeros(300)}}
    dcp_load(state, checkpoint_id=tmp_path / "step-3", no_dist=True)
    assert torch.equal(state["model"]["weight"], torch.full((300,), 3.0))


def test_durable_before_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is flushed at its full length, then its directory, then the name, then the directory of the name.

    torch's own writer flushes .metadata while it is still empty, and no directory at all (TORCH.md, defect 5).
    """
    flushed: dict[int, tuple[int, bool]] = {}  # inode -> its size when it was flushed last, and whether it was visible
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        found = os.fstat(descriptor)
        flushed[found.st_ino] = (found.st_size, (tmp_path / "step-8").exists())

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 8)
    final = tmp_path / "step-8"
    for name in names(final):
        found = (final / name).stat()
        assert flushed[found.st_ino] == (found.st_size, False), name
    assert flushed[final.stat().st_ino][1] is False
    assert flushed[tmp_path.stat().st_ino][1] is True
    assert list(flushed)[-2:] == [final.stat().st_ino, tmp_path.stat().st_ino]


def test_the_names_on_the_way_to_a_new_directory_are_flushed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    storage.open_directory(tmp_path / "a" / "b")
    assert sorted(flushed) == [str(tmp_path), str(tmp_path / "a")]
    storage.open_directory(tmp_path / "a" / "b")
    assert len(flushed) == 2


def die_at(directory: Path, number: int) -> None:
    """Run by a rank: save step 2, and die by SIGKILL just before the ``number``-th change of the file system."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if (writes or event in ("os.mkdir", "os.rename", "os.remove")) and str(directory) in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(directory, 2)


def test_a_crash_at_any_point_of_a_save_leaves_a_checkpoint_that_verifies(tmp_path: Path) -> None:
    crashes = 0
    for number in range(1, 30):
        directory = tmp_path / str(number)
        directory.mkdir()
        save(directory, 1)
        with alone(die_at, directory, number) as rank:
            status = rank.wait()
        step = newest_step(directory)
        if status == 0:
            assert step == 2
            break
        assert status == -signal.SIGKILL
        assert step == 1, f"after a crash at change {number}"
        assert torch.equal(loaded(directory / "step-1")["model"]["weight"], torch.full((300,), 1.0))
        save(directory, 2, round_number=2)  # the next round is not in the way of what was left
        assert names(directory) == ["step-1", "step-2"]
        crashes += 1
    assert crashes >= 5  # the directory, the data, the metadata and its rename, the manifest, the name


# --- what is passed over ---


def flip(path: Path, *, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


def data_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


def rewrite_manifest(checkpoint: Path, **changes: object) -> None:
    manifest = decode_manifest((checkpoint / MANIFEST_NAME).read_bytes())
    (checkpoint / MANIFEST_NAME).write_bytes(encode_manifest(dataclasses.replace(manifest, **changes)))


def forge_manifest_without_metadata(checkpoint: Path) -> None:
    manifest = decode_manifest((checkpoint / MANIFEST_NAME).read_bytes())
    rewrite_manifest(checkpoint, files=tuple(e for e in manifest.files if e.name != METADATA_NAME))


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a bit of the data", lambda at: flip(data_file(at), position=2000), "does not match its checksum"),
    ("a bit of the metadata", lambda at: flip(at / METADATA_NAME, position=100), "does not match its checksum"),
    ("data cut short", lambda at: os.truncate(data_file(at), 1000), "has 1000 bytes instead of"),
    ("data missing", lambda at: data_file(at).unlink(), "No such file"),
    ("metadata missing", lambda at: (at / METADATA_NAME).unlink(), "No such file"),
    ("manifest missing", lambda at: (at / MANIFEST_NAME).unlink(), "no manifest.json"),
    ("manifest empty", lambda at: (at / MANIFEST_NAME).write_bytes(b""), "is damaged"),
    ("manifest cut short", lambda at: os.truncate(at / MANIFEST_NAME, 200), "is damaged"),
    ("manifest of another shape", lambda at: (at / MANIFEST_NAME).write_text("[1]"), "is damaged"),
    ("manifest not JSON", lambda at: (at / MANIFEST_NAME).write_bytes(b"\xff\xfe{"), "is damaged"),
    ("manifest of another step", lambda at: rewrite_manifest(at, step=19), "is of step 19"),
    ("manifest from the future", lambda at: rewrite_manifest(at, format=FORMAT + 1), "has format 3"),
    ("manifest without metadata", forge_manifest_without_metadata, "says nothing of .metadata"),
    ("a directory in place of a file", lambda at: (data_file(at).unlink(), (at / "__0_0.distcp").mkdir()), ""),
]


@pytest.mark.parametrize(("damage", "why"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_what_does_not_verify_is_passed_over_with_a_reason(tmp_path: Path, damage: Callable, why: str) -> None:
    save(tmp_path, 10, 20)
    damage(tmp_path / "step-20")
    found, passed_over = restored(tmp_path)
    assert found is not None
    assert found.manifest.step == 10
    assert [one.step for one in passed_over] == [20]
    assert why in passed_over[0].reason


def test_no_flip_of_a_bit_passes_unseen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    draw = random.Random(5)
    whole = {path: path.read_bytes() for path in (tmp_path / "step-1").iterdir()}
    manifest = decode_manifest(whole[tmp_path / "step-1" / MANIFEST_NAME])
    for _ in range(400):
        path = draw.choice(list(whole))
        content = bytearray(whole[path])
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            assert storage.verify(tmp_path / "step-1") == manifest  # a blank became another blank
            assert path.name == MANIFEST_NAME
        except CheckpointInvalid:
            pass
        path.write_bytes(whole[path])
    assert newest_step(tmp_path) == 1


def test_several_bad_ones_and_none_that_is_good(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    for step in (1, 2, 3):
        flip(data_file(tmp_path / f"step-{step}"))
    found, passed_over = restored(tmp_path)
    assert found is None
    assert [one.step for one in passed_over] == [3, 2, 1]


def test_the_newest_is_by_number_and_other_names_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 9, 100, 20)
    for name in ("step-x", "step-7.r3.tmp", "step-500.invalid-1", "lost+found"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("step-900")
    assert storage.complete_steps(tmp_path) == [100, 20, 9]
    assert newest_step(tmp_path) == 100


class Poison:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", [METADATA_NAME, "__0_0.distcp"])
def test_nothing_is_unpickled_before_its_checksum_matched(tmp_path: Path, name: str) -> None:
    directory, mark = tmp_path / "checkpoints", tmp_path / "mark"
    directory.mkdir()
    save(directory, 1, 2)
    poison = pickle.dumps(Poison(mark))
    padded = poison + bytes(max(0, (directory / "step-2" / name).stat().st_size - len(poison)))
    (directory / "step-2" / name).write_bytes(padded)
    assert newest_step(directory) == 1
    assert not mark.exists()
    pickle.loads(padded)
    assert mark.exists()  # the poison works


def test_a_checkpoint_of_another_model_is_the_operators_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for other in ({"model": {"other": torch.zeros(3)}}, {"model": {"weight": torch.zeros(299)}}):
        with pytest.raises(ConfigError, match="does not fit what was registered"):
            load_into(other, tmp_path / "step-1")


def test_what_cannot_be_read_after_all_is_not_blamed_on_the_model(tmp_path: Path) -> None:
    save(tmp_path, 1)
    data_file(tmp_path / "step-1").unlink()
    with pytest.raises(CheckpointInvalid, match="could not be read"):
        loaded(tmp_path / "step-1")


# --- steps that are there already ---


def test_a_step_that_stands_is_never_written_into(tmp_path: Path) -> None:
    """torch overwrites in place, and mixes old and new shards silently (TORCH.md, defect 7)."""
    save(tmp_path, 5)
    before = {path.name: path.stat() for path in (tmp_path / "step-5").iterdir()}
    again = saver(tmp_path, round_number=2).save(state_of(99.0), 5)
    assert not again.fresh
    assert {path.name: path.stat() for path in (tmp_path / "step-5").iterdir()} == before
    assert names(tmp_path) == ["step-5"]


def test_a_torn_one_of_the_same_step_is_set_aside_and_kept(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for number in (1, 2):
        flip(data_file(tmp_path / "step-5"))
        assert saver(tmp_path, round_number=2).save(state_of(99.0), 5).fresh
        assert torch.equal(loaded(tmp_path / "step-5")["model"]["weight"], torch.full((300,), 99.0))
        assert (tmp_path / f"step-5.invalid-{number}" / MANIFEST_NAME).exists()


def test_what_older_rounds_left_half_written_is_swept_and_a_newer_rounds_is_not(tmp_path: Path) -> None:
    for name in ("step-3.r1.tmp", "step-4.r2.tmp", "step-4.r9.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    save(tmp_path, 4, round_number=2)
    assert names(tmp_path) == ["step-4", "step-4.r9.tmp"]


# --- retention ---


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    save(tmp_path, *range(1, 7), keep=3)
    assert names(tmp_path) == ["step-4", "step-5", "step-6"]


def test_what_is_torn_or_from_the_future_does_not_count_and_stays(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=9)
    data_file(tmp_path / "step-4").unlink()
    rewrite_manifest(tmp_path / "step-2", format=FORMAT + 1)
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-2", "step-3", "step-4", "step-5"]


def test_steps_that_are_newer_are_not_removed_by_one_that_took_an_older_one(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, keep=1)
    (tmp_path / "step-10").mkdir()
    shutil.copytree(tmp_path / "step-20", tmp_path / "step-30")
    save(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["step-10", "step-25", "step-30"]


def test_that_an_old_one_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    in_the_way = tmp_path / "step-1.r7.tmp"  # of a newer round than ours, so not swept: the rename to it is refused

    class Late(Saver):
        def _prune(self, newest: int) -> None:
            in_the_way.mkdir()
            (in_the_way / "file").touch()
            super()._prune(newest)

    late = Late(tmp_path, group=None, job_id="j", round_number=7, keep=Keep(last=1))
    assert late.save(state_of(2.0), 2).fresh
    assert "old checkpoints were not removed" in caplog.text
    assert newest_step(tmp_path) == 2


# --- what can go wrong while saving ---


@contextmanager
def small_files() -> Iterator[None]:
    """The kernel refuses to let any file of this process grow over 2000 bytes: a real error of write().

    No fixture, since pytest's own output may go to a file, and is written before fixtures end.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_fails_the_save_and_leaves_nothing(tmp_path: Path) -> None:
    """torch's writer reports success when a writer thread failed (TORCH.md, defect 6)."""
    with small_files(), pytest.raises(SaveFailed, match="step 1 was not saved: rank 0: "):
        saver(tmp_path).save({"model": {"weight": torch.zeros(5000)}}, 1)
    assert names(tmp_path) == []


def test_items_that_were_not_written_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same defect, had the writer said nothing: every item of the plan must be accounted for."""
    from torch.distributed.checkpoint import filesystem

    real = filesystem._FileSystemWriter.write_data

    def lose_one(self: object, plan: object, planner: object) -> torch.futures.Future:
        results = real(self, plan, planner).wait()
        lost: torch.futures.Future = torch.futures.Future()
        lost.set_result(results[:-1])
        return lost

    monkeypatch.setattr(filesystem._FileSystemWriter, "write_data", lose_one)
    with pytest.raises(SaveFailed, match="only 2 of 3 items were written"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_an_interrupt_during_a_save_stays_an_interrupt(tmp_path: Path) -> None:
    """DCP wraps whatever is raised; Ctrl-C must not pass for a full disk and be trained over."""

    class Interrupting:
        def __reduce__(self) -> tuple:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saver(tmp_path).save({"note": Interrupting()}, 1)
    assert names(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_the_operators_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write checkpoints to .*file/sub: Not a directory"):
        storage.open_directory(tmp_path / "file" / "sub")


def test_a_directory_that_is_gone_fails_the_save_and_not_more(tmp_path: Path) -> None:
    with pytest.raises(SaveFailed, match="No such file"):
        save(tmp_path / "gone", 1)


# --- the manifest ---

MANIFEST = Manifest(
    step=3,
    world_size=2,
    job_id="j",
    round_number=4,
    torch_version="2.13.0",
    saved_at_unix_s=0.5,
    files=(FileEntry(name=METADATA_NAME, size_bytes=9, crc32=7), FileEntry(name="__0_0.distcp", size_bytes=1, crc32=1)),
)


def test_a_manifest_survives_and_can_be_read_by_a_person() -> None:
    assert decode_manifest(encode_manifest(MANIFEST)) == MANIFEST
    assert json.loads(encode_manifest(MANIFEST))["manifest"]["step"] == 3


@pytest.mark.parametrize("key", ["format", "step", "world_size", "round_number", "saved_at_unix_s", "torch_version"])
def test_a_manifest_carries_its_own_checksum(key: str) -> None:
    sealed = json.loads(encode_manifest(MANIFEST))
    sealed["manifest"][key] = {"format": 0, "torch_version": "2.14.0"}.get(key, 8)
    with pytest.raises(CheckpointInvalid, match="its own checksum"):
        decode_manifest(json.dumps(sealed).encode())


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
