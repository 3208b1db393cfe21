"""Checkpoints in a directory: durable before visible, never mixed, and only as many as are asked for."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_checkpoints import (
    WEIGHTS,
    data_file,
    flip,
    loaded,
    names,
    newest_step,
    rewrite_manifest,
    save,
    saver,
    state_of,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from worker_runs import alone

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
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saver
from elasticd.errors import CheckpointInvalid, ConfigError, SaveFailed

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
    assert torch.equal(state["model"]["weight"], torch.full((WEIGHTS,), 1.5))
    assert state["note"] == "of 1.5"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_dcp_opens_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    state = {"model": {"weight": torch.zeros(WEIGHTS)}}
    dcp_load(state, checkpoint_id=tmp_path / "step-3", no_dist=True)
    assert torch.equal(state["model"]["weight"], torch.full((WEIGHTS,), 3.0))


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
        assert torch.equal(loaded(directory / "step-1")["model"]["weight"], torch.full((WEIGHTS,), 1.0))
        save(directory, 2, round_number=2)  # the next round is not in the way of what was left
        assert names(directory) == ["step-1", "step-2"]
        crashes += 1
    assert crashes >= 5  # the directory, the data, the metadata and its rename, the manifest, the name


# --- steps that are there already ---


def test_a_step_that_stands_is_never_written_into(tmp_path: Path) -> None:
    """torch overwrites in place, and mixes old and new shards silently (TORCH.md, defect 7)."""
    save(tmp_path, 5)
    before = written(tmp_path / "step-5")
    again = saver(tmp_path, round_number=2).save(state_of(99.0), 5)
    assert not again.fresh
    assert written(tmp_path / "step-5") == before
    assert names(tmp_path) == ["step-5"]


def written(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Which files there are, and when each was written to. Not when it was read."""
    return {path.name: (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_torn_one_of_the_same_step_is_set_aside_and_kept(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for number in (1, 2):
        flip(data_file(tmp_path / "step-5"))
        assert saver(tmp_path, round_number=2).save(state_of(99.0), 5).fresh
        assert torch.equal(loaded(tmp_path / "step-5")["model"]["weight"], torch.full((WEIGHTS,), 99.0))
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
