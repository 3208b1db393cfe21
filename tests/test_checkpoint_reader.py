"""Loading in one pass: each byte read once, checked before it is used; never a mix; parts of tensors, any layout."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoints import data_file, flip, saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from worker_runs import run_world

from elasticd.checkpoint import blocks as blocks_module
from elasticd.checkpoint import storage
from elasticd.checkpoint.blocks import Block, between, decode_index, encode_index, join_checksums
from elasticd.checkpoint.manifest import MANIFEST_NAME, decode_manifest
from elasticd.checkpoint.reader import CheckedReader
from elasticd.checkpoint.restore import PassedOver, restore_newest
from elasticd.errors import CheckpointInvalid, ConfigError, StateLost

LARGE, SMALL = 5000, 7  # elements: over and under the size from which a tensor's bytes are read as they are


def state_of(value: float) -> dict:
    model = {f"w{n}": torch.full((LARGE,), value + n) for n in range(4)}
    return {"model": model | {"bias": torch.full((SMALL,), value)}, "note": f"of {value}"}


def is_of(state: dict, value: float) -> bool:
    want = state_of(value)
    same = (torch.equal(state["model"][name], want["model"][name]) for name in want["model"])
    return state["note"] == want["note"] and all(same)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """So small that a tensor of a few kilobytes has many of them."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 1024)
    return 1024


# --- blocks ---


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_join(first: bytes, second: bytes) -> None:
    assert join_checksums(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2**32 - 1), st.booleans()), max_size=20), st.data())
def test_an_index_survives_and_finds_its_blocks(sizes: list, data: st.DataObject) -> None:
    made, start = [], 0
    for size, crc32, of_tensor in sizes:
        made.append(Block(start, size, crc32, of_tensor=of_tensor))
        start += size
    assert decode_index(encode_index(made)) == made
    first = data.draw(st.integers(0, start))
    end = data.draw(st.integers(first, start))
    touched = [block for block in made if block.start < end and block.end > first]
    assert list(between(made, first, end)) == touched


def test_an_index_that_is_cut_is_none() -> None:
    with pytest.raises(CheckpointInvalid, match="cut short"):
        decode_index(encode_index([Block(0, 4, 5)])[:-1])


def test_the_index_covers_the_file_and_is_at_its_end(tmp_path: Path, small_blocks: int) -> None:
    path = saver(tmp_path).save(state_of(1.0), 1).path
    (entry,) = [one for one in storage.verify(path).files if one.index_bytes]
    content = (path / entry.name).read_bytes()
    assert zlib.crc32(content) == entry.crc32
    found = decode_index(content[len(content) - entry.index_bytes :])
    assert found[-1].end == len(content) - entry.index_bytes
    for block in found:
        assert zlib.crc32(content[block.start : block.end]) == block.crc32
    assert sum(block.size_bytes for block in found if block.of_tensor) == 4 * LARGE * 4


# --- each byte once ---


def test_each_byte_is_read_once_and_large_tensors_are_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saver(tmp_path).save(state_of(2.0), 1).path
    read, unpickled = [], []
    preadv, load = os.preadv, torch.load
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: (read.append((at, len(views[0]))), preadv(fd, views, at))[1])
    monkeypatch.setattr(torch, "load", lambda file, **more: (unpickled.append(len(file.getvalue())), load(file, **more))[1])
    found = restore_newest(tmp_path, None, lambda _: state_of(0.0))
    assert is_of(found.state, 2.0)
    read.sort()
    assert sum(size for _, size in read) == data_file(path).stat().st_size
    assert all(at + size == following for (at, size), (following, _) in pairwise(read))
    assert len(unpickled) == 2  # the bias and the note
    assert sum(unpickled) < LARGE


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64,
          torch.float8_e4m3fn]  # fmt: skip
SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "row-major": lambda tensor: tensor.clone(),
    "transposed": lambda tensor: tensor.clone().t(),
    "a slice": lambda tensor: torch.cat([tensor, tensor])[3 : 3 + len(tensor)],
    "columns": lambda tensor: torch.cat([tensor, tensor], dim=1)[:, 5 : 5 + tensor.shape[1]],
}


def bits_of(tensor: torch.Tensor) -> list[int]:
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_any_type_and_layout_come_back(tmp_path: Path, dtype: torch.dtype, small_blocks: int) -> None:
    raw = torch.randint(0, 2, (100, 100), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    saved = {name: view(raw.to(dtype)) for name, view in SHAPES.items()}
    if dtype.is_complex:
        saved["conjugated"] = (raw.to(dtype) * 1j).conj()
    saved |= {"no element": torch.empty(0, 9, dtype=dtype), "one number": torch.ones((), dtype=dtype)}
    saver(tmp_path).save({"model": saved}, 1)
    for layout in SHAPES.values():
        state = {name: layout(torch.zeros_like(value)) if value.dim() and value.numel() else torch.zeros_like(value)
                 for name, value in saved.items()}  # fmt: skip
        assert restore_newest(tmp_path, None, lambda _, state=state: {"model": state}) is not None
        for name, value in saved.items():
            assert bits_of(state[name]) == bits_of(value), name


def test_another_type_in_memory_is_converted(tmp_path: Path) -> None:
    weight = torch.arange(float(LARGE))
    saver(tmp_path).save({"model": {"weight": weight}}, 1)
    state = {"model": {"weight": torch.zeros(LARGE, dtype=torch.float64)}}
    restore_newest(tmp_path, None, lambda _: state)
    assert torch.equal(state["model"]["weight"], weight.double())


class Window(DefaultLoadPlanner):
    """Wants one box of one tensor."""

    def __init__(self, target: torch.Tensor, offsets: torch.Size) -> None:
        super().__init__()
        self.target, self.offsets = target, offsets

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.target


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_part_of_a_tensor_can_be_read(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    shape[0] = -(-2000 // torch.Size(shape[1:]).numel())
    offsets = torch.Size(data.draw(st.integers(0, size - 1)) for size in shape)
    sizes = torch.Size(data.draw(st.integers(1, size - first)) for size, first in zip(shape, offsets, strict=True))
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    directory = tmp_path_factory.mktemp("window")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "BLOCK_BYTES", 256)
        path = saver(directory).save({"w": whole}, 1).path
    reader = CheckedReader(path, storage.read_manifest(path))
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    target = torch.full(sizes, -1.0)
    items = create_read_items_for_chunk_list(
        "w", metadata.state_dict_metadata["w"], [ChunkStorageMetadata(offsets=offsets, sizes=sizes)]
    )
    reader.read_data(LoadPlan(items), Window(target, offsets))
    expected = whole[tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))]
    assert torch.equal(target, expected)


def test_of_a_large_tensor_only_the_blocks_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: int
) -> None:
    path = saver(tmp_path).save({"w": torch.arange(100_000.0)}, 1).path
    ranks = 50
    reader = CheckedReader(path, storage.read_manifest(path), rank=0, size=ranks)
    reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    wanted = ChunkStorageMetadata(offsets=torch.Size([50_000]), sizes=torch.Size([100]))
    items = create_read_items_for_chunk_list("w", reader.read_metadata().state_dict_metadata["w"], [wanted])
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: (read.append(len(views[0])), preadv(fd, views, at))[1])
    target = torch.zeros(100)
    reader.read_data(LoadPlan(items), Window(target, wanted.offsets))
    assert torch.equal(target, torch.arange(50_000.0, 50_100.0))
    (index_bytes,) = [entry.index_bytes for entry in storage.read_manifest(path).files if entry.index_bytes]
    share_bytes = data_file(path).stat().st_size / ranks  # which it checks for all
    assert share_bytes <= sum(read) <= share_bytes + index_bytes + 3 * small_blocks


# --- never a mix ---


def places(path: Path) -> dict[str, int]:
    """A byte of every kind in a data file: where it is."""
    (entry,) = [one for one in storage.read_manifest(path).files if one.index_bytes]
    content = (path / entry.name).read_bytes()
    found = decode_index(content[len(content) - entry.index_bytes :])
    tensors = [block for block in found if block.of_tensor]
    return {
        "first tensor": tensors[0].start,
        "last tensor": tensors[-1].end - 1,
        "frame": tensors[1].start - 1,
        "pickled": found[0].start + 20,
        "index": len(content) - 1,
    }


@pytest.mark.parametrize("kind", ["first tensor", "last tensor", "frame", "pickled", "index"])
def test_damage_of_any_kind_takes_the_older_one_whole(tmp_path: Path, kind: str) -> None:
    for step in (1, 2):
        path = saver(tmp_path).save(state_of(float(step)), step).path
    flip(data_file(path), position=places(path)[kind])
    live, passed_over = state_of(9.0), []
    found = restore_newest(tmp_path, None, lambda _: live, passed_over)
    assert found.manifest.step == 1
    assert is_of(found.state, 1.0)
    assert found.state["model"] is live["model"]
    assert [(one.step, "does not match its checksum" in one.reason) for one in passed_over] == [(2, True)]


@pytest.mark.parametrize(("kind", "lost"), [("last tensor", True), ("pickled", True), ("index", False)])
def test_a_state_that_is_half_filled_is_never_trained_on(tmp_path: Path, kind: str, lost: bool) -> None:
    path = saver(tmp_path).save(state_of(1.0), 1).path
    flip(data_file(path), position=places(path)[kind])
    live = state_of(9.0)
    if lost:
        with pytest.raises(StateLost, match="to start afresh, move the damaged ones away"):
            restore_newest(tmp_path, None, lambda _: live)
        assert live["note"] == "of 9.0"
    else:
        assert restore_newest(tmp_path, None, lambda _: live) is None
        assert is_of(live, 9.0)


def test_what_was_cut_after_its_size_was_seen_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        path = saver(tmp_path).save(state_of(float(step)), step).path
    monkeypatch.setattr(storage, "check_sizes", lambda *_: None)
    os.truncate(data_file(path), 1000)
    found = restore_newest(tmp_path, None, lambda _: state_of(9.0))
    assert found.manifest.step == 1
    assert is_of(found.state, 1.0)


def restore_on_two(directory: Path) -> None:
    """Run by a rank: what it restored, or why nothing."""
    dist.init_process_group("gloo")
    own, passed_over = {str(dist.get_rank()): torch.zeros(LARGE)}, list[PassedOver]()
    try:
        found = restore_newest(directory, dist.group.WORLD, lambda _: state_of(9.0) | {"own": own}, passed_over)
    except (StateLost, ConfigError) as error:
        print(json.dumps(type(error).__name__))
        return
    assert found is not None
    assert is_of(found.state, float(found.manifest.step))
    assert own[str(dist.get_rank())].eq(found.manifest.step).all()
    print(json.dumps([found.manifest.step, [one.reason for one in passed_over]]))


def save_on_two(directory: Path) -> None:
    dist.init_process_group("gloo")
    for step in (1, 2):
        own = {str(dist.get_rank()): torch.full((LARGE,), float(step))}
        saver(directory, group=dist.group.WORLD).save(state_of(float(step)) | {"own": own}, step)


def test_ranks_agree_when_one_of_them_finds_damage_half_way(tmp_path: Path) -> None:
    """What only rank 1 reads is damaged: rank 0 has loaded everything by then."""
    run_world(2, save_on_two, tmp_path)
    for step, expected in ((2, [1, ["rank 1 found its part damaged"]]), (1, "StateLost")):
        flip_own_part_of_rank_1(tmp_path / f"step-{step}")
        zero, one = (json.loads(output.splitlines()[-1]) for output in run_world(2, restore_on_two, tmp_path))
        assert zero == expected
        assert one == (expected if isinstance(expected, str) else [1, []])


def flip_own_part_of_rank_1(path: Path) -> None:
    reader = CheckedReader(path, storage.read_manifest(path))
    (info,) = [info for index, info in reader.read_metadata().storage_data.items() if index.fqn == "own.1"]
    flip(path / info.relative_path, position=info.offset + info.length // 2)


# --- the format before ---


def as_format_1(path: Path) -> None:
    """What elasticd wrote before there were indexes."""
    body = json.loads((path / MANIFEST_NAME).read_text())["manifest"] | {"format": 1}
    for entry in body["files"]:
        del entry["index_bytes"], entry["index_crc32"]
    seal = zlib.crc32(json.dumps(body, separators=(",", ":"), sort_keys=True).encode())
    (path / MANIFEST_NAME).write_text(json.dumps({"crc32": seal, "manifest": body}))


def test_one_of_the_format_before_is_restored_and_checked_before_anything_is_filled(tmp_path: Path) -> None:
    path = saver(tmp_path).save(state_of(1.0), 1).path
    as_format_1(path)
    assert decode_manifest((path / MANIFEST_NAME).read_bytes()).format == 1
    assert is_of(restore_newest(tmp_path, None, lambda _: state_of(9.0)).state, 1.0)
    flip(data_file(path), position=random.Random(2).randrange(data_file(path).stat().st_size))
    live = state_of(9.0)
    assert restore_newest(tmp_path, None, lambda _: live) is None
    assert is_of(live, 9.0)
