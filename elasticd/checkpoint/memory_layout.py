"""Which rank copies which part of the state into which bytes: DCP's own planning, once for as long as the form stays.

DCP's planner spreads state that several ranks hold over those ranks, so that nothing is copied twice; its metadata says
where each tensor (or each shard of one) lies, and its load planner reshards from that onto any other world. Only the
bytes are not DCP's: tensors lie as they are, each at a place of its own, so that a copy of the state is one pass over
memory and can be read where it stands.

Not here: whose memory it is (the daemon's), and when a copy is whole (memory_save.py).
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.distributed.tensor import DTensor

from elasticd.core.memory import BLOCK_BYTES, combine

_ALIGN_BYTES = 64
#: An object is written behind its length; its place leaves room for it to grow by as much as it had.
_LENGTH_BYTES = 8
_SPARE_BYTES = 512


@dataclass(frozen=True, slots=True)
class Span:
    """Where an item lies in a rank's part. What lies there may be shorter, if it is no tensor."""

    rank: int
    offset: int
    size_bytes: int


class Outgrown(Exception):
    """The state has another form than the one that was planned for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What one rank copies, and where to. ``metadata`` is a pickle of DCP's Metadata for the whole state."""

    items: tuple[tuple[WriteItem, Span], ...]
    size_bytes: int
    metadata: bytes
    form: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Local:
    """What a rank tells rank 0: its plan, and how much room its objects want."""

    plan: SavePlan
    object_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Planned:
    plan: SavePlan
    spans: tuple[Span, ...]
    metadata: bytes


def plan_together(state: dict[str, Any], group: dist.ProcessGroup | None) -> Layout:
    """Collective. CheckpointException on every rank when one of them cannot plan."""
    planner = DefaultSavePlanner()

    def local() -> _Local:
        planner.set_up_planner(state, is_coordinator=group is None or dist.get_rank(group) == 0)
        plan = planner.create_local_plan()
        objects = (item for item in plan.items if item.type is WriteItemType.BYTE_IO)
        return _Local(plan, {item.index.fqn: _room_for(_resolve_object(planner, item)) for item in objects})

    def together(locals_: list[_Local]) -> list[_Planned]:
        return _plan_all(planner, locals_)

    wrapper = _DistWrapper(group, group is not None, 0)
    planned: _Planned = wrapper.reduce_scatter("memory_plan", local, together)
    plan = planner.finish_plan(planned.plan)
    return Layout(
        items=tuple(zip(plan.items, planned.spans, strict=True)),
        size_bytes=max((span.offset + span.size_bytes for span in planned.spans), default=0),
        metadata=planned.metadata,
        form=form_of(planner.state_dict),
    )


def _plan_all(planner: DefaultSavePlanner, locals_: list[_Local]) -> list[_Planned]:
    """On rank 0. Each item gets a place of its own in the part of the rank that DCP gives it to."""
    plans, metadata = planner.create_global_plan([one.plan for one in locals_])
    places: dict[MetadataIndex, Span] = {}
    spans: list[tuple[Span, ...]] = []
    for rank, (plan, one) in enumerate(zip(plans, locals_, strict=True)):
        at, mine = 0, []
        for item in plan.items:
            span = Span(rank, at, _size_of(item, one.object_bytes))
            places[item.index] = span
            mine.append(span)
            at += -(-span.size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        spans.append(tuple(mine))
    packed = pickle.dumps(replace(metadata, storage_data=places))
    return [_Planned(plan, mine, packed) for plan, mine in zip(plans, spans, strict=True)]


def _size_of(item: WriteItem, object_bytes: dict[str, int]) -> int:
    if item.type is WriteItemType.BYTE_IO:
        return object_bytes[item.index.fqn]
    assert item.tensor_data is not None
    element_bytes = torch.empty((), dtype=item.tensor_data.properties.dtype).element_size()
    return item.tensor_data.chunk.sizes.numel() * element_bytes


def _room_for(content: bytes) -> int:
    return _LENGTH_BYTES + 2 * len(content) + _SPARE_BYTES


def copy_state(layout: Layout, state: dict[str, Any], target: memoryview) -> None:
    """One pass over a rank's share of the state, into mapped memory. Returns once nothing of the original is needed.

    Outgrown when the state's form has changed: then nothing, or only a part, has been written.
    """
    planner = DefaultSavePlanner()
    planner.set_up_planner(state)
    if form_of(planner.state_dict) != layout.form:
        raise Outgrown("the form of the state has changed")
    devices: set[torch.device] = set()
    with torch.no_grad():
        for item, span in layout.items:
            if item.type is WriteItemType.BYTE_IO:
                _write_object(_resolve_object(planner, item), span, target)
            elif span.size_bytes:
                source = planner.resolve_data(item)
                assert isinstance(source, torch.Tensor)
                tensor_at(target, span, source.dtype, source.shape).copy_(source)
                devices.add(source.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def checksum_of(part: memoryview, pool: ThreadPoolExecutor) -> int:
    """Of a rank's part, as core.memory.combine has it, in several threads."""
    blocks = range(0, len(part), BLOCK_BYTES)
    return combine(pool.map(lambda at: zlib.crc32(part[at : at + BLOCK_BYTES]), blocks))


def tensor_at(memory: memoryview, span: Span, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """The tensor that lies there, not a copy."""
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=span.offset).view(shape)


def object_at(memory: memoryview, span: Span) -> bytes:
    """The pickle that lies there."""
    length = int.from_bytes(memory[span.offset : span.offset + _LENGTH_BYTES], "little")
    start = span.offset + _LENGTH_BYTES
    return bytes(memory[start : start + length])


def _write_object(content: bytes, span: Span, target: memoryview) -> None:
    if _LENGTH_BYTES + len(content) > span.size_bytes:
        raise Outgrown("an object of the state has grown")
    end = span.offset + _LENGTH_BYTES
    target[span.offset : end] = len(content).to_bytes(_LENGTH_BYTES, "little")
    target[end : end + len(content)] = content


def _resolve_object(planner: DefaultSavePlanner, item: WriteItem) -> bytes:
    resolved = planner.resolve_data(item)
    assert isinstance(resolved, io.BytesIO)
    return resolved.getvalue()


def form_of(flat: dict[str, Any]) -> tuple[object, ...]:
    """What must stay as it is for a plan to hold: names, shapes, types; of objects only that they are there."""
    return tuple(_forms(flat))


def _forms(flat: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    for name, value in flat.items():
        if isinstance(value, DTensor):
            yield name, value.shape, value.dtype, value.placements, value.device_mesh
        elif isinstance(value, torch.Tensor):
            yield name, value.shape, value.dtype
        else:
            yield (name,)


def unpack_metadata(content: bytes) -> Metadata:
    """Only of bytes whose checksum has matched: it unpickles."""
    found = pickle.loads(content)  # noqa: S301 - checked against the index before
    assert isinstance(found, Metadata)
    return found
