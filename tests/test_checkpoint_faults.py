"""Faults of the disk and deaths in the middle of a save: what is restored is always the newest committed, never a mix.

The disk is the real one behind a ``Disk`` that writes down what is done to it. From such a record every state is built
that a crash may leave: the process killed between two operations, or the power lost, when only what was flushed is sure
to be there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_background import Full
from worker_runs import run_world, world

from elasticd.checkpoint import storage
from elasticd.checkpoint.disk import Disk
from elasticd.checkpoint.manifest import MANIFEST_NAME, METADATA_NAME, complete_name
from elasticd.checkpoint.restore import restore_newest
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saver
from elasticd.errors import CheckpointInvalid, SaveFailed


def state_of(step: int) -> dict:
    return {
        "model": {"weight": torch.full((500,), float(step)), "bias": torch.full((7,), -float(step))},
        "note": f"of {step}",
    }


def saver(directory: Path, disk: Disk | None = None, *, keep: int = 3, **more: object) -> Saver:
    wanted = {"group": None, "job_id": "j", "round_number": 1, "keep": Keep(last=keep), "disk": disk or Disk(), **more}
    return Saver(directory, **wanted)


def failure_of(ours: Saver, step: int) -> SaveFailed | None:
    try:
        ours.save(state_of(step), step)
    except SaveFailed as error:
        return error
    return None


def restored_step(directory: Path) -> int:
    """The step of what is restored, 0 for nothing; all parts of the state must be of that step."""
    found = restore_newest(directory, None, lambda _: state_of(0))
    if found is None:
        return 0
    step, state = found.manifest.step, found.state
    assert torch.equal(state["model"]["weight"], torch.full((500,), float(step)))
    assert torch.equal(state["model"]["bias"], torch.full((7,), -float(step)))
    assert state["note"] == f"of {step}"
    return step


# --- every state that a crash may leave ---


@dataclass
class Recorder(Disk):
    """Does it, and writes it down. Data is (inode number of ours, bytes)."""

    done: list[tuple] = field(default_factory=list)
    _inodes: dict[int, int] = field(default_factory=dict)

    def make_directory(self, path: Path) -> None:
        super().make_directory(path)
        self.done.append(("mkdir", path))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._inodes[descriptor] = len(self.done)
        self.done.append(("create", path, len(self.done)))
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        taken = super().write(descriptor, data)
        self.done.append(("write", self._inodes[descriptor], bytes(data[:taken])))
        return taken

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self.done.append(("sync", self._inodes[descriptor]))

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.done.append(("sync directory", path))

    def rename(self, path: Path, target: Path) -> None:
        super().rename(path, target)
        self.done.append(("rename", path, target))

    def remove_tree(self, path: Path) -> None:
        for inside in sorted(path.iterdir()) if path.exists() else []:
            self.done.append(("remove", inside))
        super().remove_tree(path)
        self.done.append(("remove", path))


class Replayed:
    """A file system in memory: what is there, and what of it is durable."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[Path, int | None] = {}  # None: a directory
        self.data: dict[int, bytes] = {}
        self.synced: dict[int, int] = {}  # inode -> so many of its bytes are durable
        self.history: list[tuple] = []  # changes of names
        self.pending: list[tuple] = []  # those of them that no flush of their directory has covered

    def apply(self, operation: tuple) -> None:
        match operation:
            case ("write", inode, data):
                self.data[inode] += data
            case ("sync", inode):
                self.synced[inode] = len(self.data[inode])
            case ("sync directory", path):
                self.pending = [change for change in self.pending if path not in _parents(change)]
            case _:
                if operation[0] == "create":
                    self.data[operation[2]] = b""
                self.history.append(operation)
                self.pending.append(operation)
                self._change(self.names, operation)

    @staticmethod
    def _change(names: dict[Path, int | None], operation: tuple) -> None:
        match operation:
            case ("mkdir", path):
                names[path] = None
            case ("create", path, inode):
                names[path] = inode
            case ("remove", path):
                names.pop(path, None)
            case ("rename", path, target):
                for name in [name for name in names if name == path or path in name.parents]:
                    names[target / name.relative_to(path)] = names.pop(name)

    def after_kill(self) -> dict[Path, bytes | None]:
        return {path: None if inode is None else self.data[inode] for path, inode in self.names.items()}

    def after_power_loss(self, draw: random.Random) -> dict[Path, bytes | None]:
        """Data that was not flushed may be there, cut short, or zeros. Names that were not flushed are as they are (a
        journal keeps their order, so the last few of them may be undone)."""
        found = {}
        names = self._names_without(draw.randrange(len(self.pending) + 1))
        for path, inode in names.items():
            if inode is None:
                found[path] = None
                continue
            data, sure = self.data[inode], self.synced.get(inode, 0)
            lost = draw.choice(["kept", "cut", "zeros"])
            kept = data if lost == "kept" else data[: draw.randint(sure, len(data))]
            found[path] = kept if lost != "zeros" else kept + bytes(len(data) - len(kept))
        return found

    def _names_without(self, undone: int) -> dict[Path, int | None]:
        names: dict[Path, int | None] = {}
        kept = [change for change in self.history if change not in self.pending[len(self.pending) - undone :]]
        for change in kept:
            self._change(names, change)
        return names


def _parents(change: tuple) -> list[Path]:
    return [path.parent for path in change[1:] if isinstance(path, Path)]


def build(directory: Path, root: Path, found: dict[Path, bytes | None]) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for path in sorted(found, key=lambda path: len(path.parts)):
        target = directory / path.relative_to(root)
        if not target.parent.is_dir():
            continue  # its directory was undone
        if found[path] is None:
            target.mkdir()
        else:
            target.write_bytes(found[path])


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple], dict[int, dict[str, bytes]]]:
    """Saves of steps 1 to 5 with two kept, one of them of a later round: what was done, and each one's bytes."""
    root = tmp_path_factory.mktemp("recorded")
    recorder = Recorder()
    whole = {}
    for step in range(1, 6):
        saver(root, recorder, keep=2, round_number=1 + step // 4).save(state_of(step), step)
        recorder.done.append(("returned", step))
        whole[step] = {path.name: path.read_bytes() for path in (root / complete_name(step)).iterdir()}
    return root, recorder.done, whole


def states(root: Path, done: list[tuple], draw: random.Random) -> Iterator[tuple[str, dict, int, int]]:
    """(what happened, what is there, the step that had been returned, the newest that may be visible)"""
    disk = Replayed(root)
    returned = 0
    for number, operation in enumerate(done):
        if operation[0] == "returned":
            returned = operation[1]
            continue
        disk.apply(operation)
        yield f"killed after {number} {operation[:2]}", disk.after_kill(), returned, returned + 1
        yield f"power lost after {number} {operation[:2]}", disk.after_power_loss(draw), returned, returned + 1


@pytest.mark.parametrize("seed", range(4))
def test_after_any_prefix_of_the_writes_the_last_committed_is_found_byte_for_byte(
    record: tuple, seed: int, tmp_path: Path
) -> None:
    root, done, whole = record
    assert len(done) > 100
    directory = tmp_path / "rebuilt"
    seen = set()
    for what, found, returned, newest in states(root, done, random.Random(seed)):
        build(directory, root, found)
        step = restored_step(directory)
        assert returned <= step <= newest, f"seed {seed}: {what}: found {step} after {returned} had returned"
        if step:
            there = {path.name: path.read_bytes() for path in (directory / complete_name(step)).iterdir()}
            assert there == whole[step], f"seed {seed}: {what}"
        seen.add((step - returned) if step else "none")
    assert seen == {0, 1, "none"}


def test_the_property_finds_a_save_that_flushes_nothing(record: tuple, tmp_path: Path) -> None:
    """The test of the test: without any flush, a power loss takes away what save() had returned for."""
    root, done, _ = record
    careless = [operation for operation in done if not operation[0].startswith("sync")]
    lost = 0
    for _, found, returned, _ in states(root, careless, random.Random(1)):
        build(tmp_path / "rebuilt", root, found)
        lost += restored_step(tmp_path / "rebuilt") < returned
    assert lost > 10


# --- a disk that refuses, at every operation ---


class Refusing(Disk):
    """Refuses the ``number``-th operation alone."""

    def __init__(self, number: int, error: int) -> None:
        self.number, self.error, self.seen, self.refused = number, error, 0, ""

    def _try(self, what: str) -> None:
        self.seen += 1
        if self.seen == self.number:
            self.refused = what
            raise OSError(self.error, os.strerror(self.error))

    def make_directory(self, path: Path) -> None:
        self._try("make directory")
        super().make_directory(path)

    def create(self, path: Path) -> int:
        self._try(f"create {path.name}")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._try("write")
        return super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._try("sync")
        super().sync(descriptor)

    def sync_directory(self, path: Path) -> None:
        self._try(f"sync {path.suffix or 'parent'}")
        super().sync_directory(path)

    def rename(self, path: Path, target: Path) -> None:
        self._try(f"rename to {target.name}")
        super().rename(path, target)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_error_of_any_operation_fails_the_save_and_the_next_one_works(tmp_path: Path, error: int) -> None:
    refused = []
    for number in range(1, 200):
        directory = tmp_path / str(number)
        directory.mkdir()
        saver(directory).save(state_of(1), 1)
        disk = Refusing(number, error)
        failed = failure_of(saver(directory, disk), 2)
        if failed is None:
            assert not disk.refused
            break
        assert os.strerror(error) in str(failed), disk.refused
        # Only the flush of the final name may fail after it is visible: whole, and perhaps not yet durable.
        assert restored_step(directory) == (2 if disk.refused == "sync parent" else 1), disk.refused
        assert not [path.name for path in directory.iterdir() if path.name.endswith(".tmp")], disk.refused
        saver(directory).save(state_of(3), 3)
        assert restored_step(directory) == 3
        refused.append(disk.refused)
        shutil.rmtree(directory)
    assert {"make directory", "create __0_0.distcp", "write", "sync", "create .metadata.tmp", "rename to .metadata",
            f"create {MANIFEST_NAME}", "sync .tmp", "rename to step-2", "sync parent"} <= set(refused)  # fmt: skip


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(room_bytes=st.integers(0, 9000))
def test_a_disk_that_is_full_after_any_number_of_bytes(tmp_path: Path, room_bytes: int) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    saver(tmp_path).save(state_of(1), 1)
    with contextlib.suppress(SaveFailed):
        saver(tmp_path, Full(room_bytes)).save(state_of(2), 2)
        assert room_bytes > 2000
    step = restored_step(tmp_path)
    assert step in (1, 2)
    assert len(list(tmp_path.iterdir())) == step


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    directory = tmp_path / "tiny"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_a_real_disk_that_is_full_at_every_phase(tiny_disk: Path) -> None:
    """Filled by somebody else to the last page, more and more: each save takes 4 pages and 2 of names or so."""
    saver(tiny_disk).save(state_of(1), 1)
    failed = 0
    for room_pages in range(12):
        filler = tiny_disk / "filler"
        pages = os.statvfs(tiny_disk).f_bavail - room_pages
        filler.write_bytes(bytes(4096 * pages))
        error = failure_of(saver(tiny_disk, round_number=2), 2)
        assert restored_step(tiny_disk) == (2 if error is None else 1)
        if error is None:
            break
        assert "No space left on device" in str(error)
        failed += 1
        filler.unlink()
    assert 2 <= failed < 11


@pytest.mark.skipif(os.geteuid() != 0, reason="remounting needs root")
def test_a_disk_that_turns_read_only(tiny_disk: Path) -> None:
    saver(tiny_disk).save(state_of(1), 1)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(SaveFailed, match="Read-only file system"):
        saver(tiny_disk).save(state_of(2), 2)
    assert restored_step(tiny_disk) == 1
    subprocess.run(["mount", "-o", "remount,rw", str(tiny_disk)], check=True)
    saver(tiny_disk).save(state_of(2), 2)
    assert restored_step(tiny_disk) == 2


def test_one_that_is_there_is_made_durable_before_it_counts(tmp_path: Path) -> None:
    """Its own save may have failed at the last flush: to say "it stands" is to have flushed its name."""
    assert saver(tmp_path).save(state_of(1), 1).fresh
    recorder = Recorder()
    assert not saver(tmp_path, recorder).save(state_of(1), 1).fresh
    assert recorder.done == [("sync directory", tmp_path)]


# --- deaths of ranks ---


class Slow(Disk):
    """Each operation takes a while, so that a kill falls into the midst of a save."""

    def write(self, descriptor: int, data: memoryview) -> int:
        time.sleep(0.002)
        return super().write(descriptor, data[:500])

    def sync(self, descriptor: int) -> None:
        time.sleep(0.004)
        super().sync(descriptor)

    def sync_directory(self, path: Path) -> None:
        time.sleep(0.004)
        super().sync_directory(path)


def save_for_ever(directory: Path, round_number: int, first: int) -> None:
    """Run by a rank: save step after step on a slow disk, and say which one stands."""
    dist.init_process_group("gloo")
    group = dist.new_group()
    rank = dist.get_rank()
    ours = saver(directory, Slow(), group=group, round_number=round_number)
    for step in range(first, 10_000):
        weight = torch.full((500,), float(step))
        state = {"model": {"weight": weight, "bias": torch.full((7,), -float(step))}, "note": f"of {step}"}
        state["own"] = {str(rank): torch.full((300,), float(step))}
        ours.save(state, step)
        if rank == 0:
            with (directory.parent / "stands").open("a") as file:
                file.write(f"{step}\n")


def stands(directory: Path) -> int:
    path = directory.parent / "stands"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((int(line) for line in lines if line.endswith("\n")), default=0)


@pytest.mark.slow
def test_kills_at_twenty_random_points_leave_the_newest_committed(tmp_path: Path) -> None:
    """SIGKILL to one rank or to all, then the next round goes on in the same directory with another world."""
    seed = 11
    draw, directory = random.Random(seed), tmp_path / "c"
    directory.mkdir()
    for number in range(1, 21):
        before, size = stands(directory), draw.choice([1, 2, 3])
        first = restored_step(directory) + 1
        with world(size, save_for_ever, directory, number, first) as ranks:
            enough = before + draw.randint(1, 2)
            deadline = time.monotonic() + 60
            while stands(directory) < enough:
                assert time.monotonic() < deadline, ranks[0].output
                assert all(rank.running for rank in ranks), [rank.output for rank in ranks]
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1))
            for victim in draw.sample(ranks, draw.choice([1, size])):
                victim.kill()
            statuses = [rank.wait() for rank in ranks]  # those that were not killed end by themselves, in seconds
            assert 0 not in statuses
        step, committed = restored_step(directory), stands(directory)
        assert step in (committed, committed + 1), f"seed {seed}: kill {number}: {step} after {committed}"
        assert not [one for one in directory.iterdir() if ".invalid" in one.name]


def save_one(directory: Path, round_number: int, step: int) -> None:
    dist.init_process_group("gloo")
    try:
        made = saver(directory, Slow(), group=dist.group.WORLD, round_number=round_number).save(state_of(step), step)
        print("fresh" if made.fresh else "there")
    except SaveFailed as error:
        print("refused:", error)


def test_of_two_rounds_that_race_for_a_step_one_commits_and_nothing_is_mixed(tmp_path: Path) -> None:
    """An old round that does not know yet that it is over, against the new one, at the same step."""
    with world(2, save_one, tmp_path, 1, 5) as old, world(2, save_one, tmp_path, 2, 5) as new:
        for rank in (*old, *new):
            assert rank.wait() == 0, rank.output
        words = [ranks[0].output.split()[-1 if "refused" not in ranks[0].output else 0] for ranks in (old, new)]
    assert words.count("fresh") == 1, words
    assert restored_step(tmp_path) == 5
    assert {manifest.round_number for manifest in [storage.verify(tmp_path / "step-5")]} <= {1, 2}


# --- rot of every kind, in a checkpoint of two ranks ---


def save_two(directory: Path) -> None:
    dist.init_process_group("gloo")
    for step in (1, 2):
        state = state_of(step) | {"own": {str(dist.get_rank()): torch.full((300,), float(step))}}
        saver(directory, group=dist.group.WORLD).save(state, step)


def test_every_file_is_missed_cut_and_flipped_in_turn(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    directory.mkdir()
    run_world(2, save_two, directory)
    draw = random.Random(3)
    checkpoint = directory / "step-2"
    kinds = sorted(path.name for path in checkpoint.iterdir())
    assert kinds == [METADATA_NAME, "__0_0.distcp", "__1_0.distcp", MANIFEST_NAME]
    for name in kinds:
        content = (checkpoint / name).read_bytes()
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 0xFF
        for damaged in (None, b"", content[: draw.randrange(1, len(content))], bytes(flipped), content + b"x"):
            (checkpoint / name).unlink()
            if damaged is not None:
                (checkpoint / name).write_bytes(damaged)
            with pytest.raises(CheckpointInvalid):
                storage.verify(checkpoint)
            assert restored_step(directory) == 1, (name, damaged)
            (checkpoint / name).write_bytes(content)
    assert restored_step(directory) == 2
