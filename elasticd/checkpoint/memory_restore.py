"""Taking the state up from copies in RAM: the newest generation whose every part some live node has.

All ranks hear what every daemon holds, so all see the same candidates. For each, newest first, a rank has its daemon
bring the parts that it needs, checks them whole, and only when every rank could do so is anything unpickled or filled:
a rung that fails leaves the model as it was. Resharding is DCP's: its load planner says which pieces of which parts a
rank needs, whatever the world was that wrote them.

Not here: checkpoints on disk (restore.py), the form of the state (worker/state.py).
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from elasticd.checkpoint.exchange import share
from elasticd.checkpoint.held import Held, held_by
from elasticd.checkpoint.memory_layout import Span, checksum_of, object_at, tensor_at, unpack_metadata
from elasticd.core.memory import (
    Fetched,
    Generation,
    Holding,
    Index,
    Whole,
    decode_index,
    find_whole,
    seal_of,
)
from elasticd.core.model import NodeId
from elasticd.core.records import from_plain, to_plain
from elasticd.errors import CheckpointInvalid, MemoryRefused

log = logging.getLogger(__name__)

_THREADS = min(4, os.cpu_count() or 1)

#: The state to fill.
MakeState = Callable[[Held], dict[str, Any]]


class RestoringHost(Protocol):
    """The daemon, as far as restoring goes. MemoryRefused from what answers."""

    def inventory(self) -> list[Holding]: ...

    def fetch(
        self,
        generation: Generation,
        seal: int,
        wanted: Mapping[int, tuple[NodeId, Sequence[NodeId]]],
        index_from: Sequence[NodeId],
        damaged: Sequence[tuple[int, str]] = (),
    ) -> Fetched: ...

    def restored(self, generation: Generation | None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """``state`` is filled. ``source``: "memory" when every part came from the node that wrote it, else "buddy"."""

    step: int
    state: dict[str, Any]
    source: str
    seconds: float
    size_bytes: int


class MemoryRestore:
    """All ranks make one and call it alike; ``host`` is None on a rank whose daemon keeps nothing."""

    def __init__(self, host: RestoringHost | None, group: dist.ProcessGroup | None) -> None:
        self._host, self._group = host, group
        self._tried: set[tuple[Generation, int]] = set()
        self._passed_over: set[Generation] = set()

    def restore(self, make_state: MakeState, *, at_least: int) -> Restored | None:
        """Collective. The newest generation of ``at_least`` so many steps that can be had; None when there is none.

        What was tried is not tried again. What is passed over is logged by rank 0, with its reason.
        """
        for whole in self._candidates(at_least):
            started = time.monotonic()
            taken, problem = self._take(whole, make_state)
            problems = [one for one in share(problem, self._group) if one]
            if not problems:
                assert taken is not None
                return self._load(whole, taken, started)
            if taken is not None:
                taken.close()
            self._pass_over(whole.generation, "; ".join(sorted(set(problems))[:3]))
        return None

    def _candidates(self, at_least: int) -> Iterator[Whole]:
        held: list[Holding] = []
        if self._host is not None:
            try:
                held = self._host.inventory()
            except MemoryRefused as error:
                log.info("elasticd: no copies in RAM: %s", error)
        said = share([to_plain(one) for one in held], self._group)
        unique = {from_plain(Holding, plain) for one in said for plain in one}
        whole, torn = find_whole(sorted(unique, key=lambda one: (one.generation, one.node_id)))
        for one in torn:
            if one.generation.step >= at_least:
                self._pass_over(one.generation, one.reason)
        for candidate in whole:
            key = (candidate.generation, candidate.seal)
            if candidate.generation.step >= at_least and key not in self._tried:
                self._tried.add(key)
                yield candidate

    def _pass_over(self, generation: Generation, reason: str) -> None:
        """Said once: what was found damaged may be torn when it is looked at again."""
        if generation not in self._passed_over and (self._group is None or dist.get_rank(self._group) == 0):
            log.warning("elasticd: the copy of step %d in RAM is passed over: %s", generation.step, reason)
        self._passed_over.add(generation)

    def _take(self, whole: Whole, make_state: MakeState) -> tuple[_Taken | None, str]:
        """What this rank needs of it, checked; or why it cannot be had."""
        if self._host is None:
            return None, "a node keeps no copies in RAM"
        try:
            holders = whole.index_holders()
            fetched = self._host.fetch(whole.generation, whole.seal, {}, holders)
            index, metadata = _read_index(fetched, whole)
            state = make_state(held_by(metadata, len(index.parts)))
            plan = _plan(state, metadata)
            ranks = sorted({_span(metadata, item.storage_index).rank for item in plan.items})
            wanted = {rank: (index.part(rank).node_id, whole.holders[rank]) for rank in ranks}
            fetched = self._host.fetch(whole.generation, whole.seal, wanted, holders)
            taken = _Taken(state, metadata, fetched)
            if damaged := taken.damaged(index):  # another node may have it whole
                log.warning("elasticd: step %d in RAM: %s", whole.generation.step, _told(damaged))
                taken = _Taken(state, metadata, self._fetch_again(whole, wanted, damaged))
                if damaged := taken.damaged(index):
                    return None, _told(damaged)
        except (MemoryRefused, CheckpointInvalid, OSError) as error:
            return None, str(error)
        except (ValueError, RuntimeError, KeyError) as error:  # how DCP says that a state does not fit
            return None, f"it does not fit what was registered: {error}"
        return taken, ""

    def _fetch_again(
        self,
        whole: Whole,
        wanted: Mapping[int, tuple[NodeId, Sequence[NodeId]]],
        damaged: Sequence[tuple[int, str]],
    ) -> Fetched:
        assert self._host is not None
        try:
            return self._host.fetch(whole.generation, whole.seal, wanted, whole.index_holders(), damaged)
        except MemoryRefused as error:
            raise MemoryRefused(f"{_told(damaged)}; {error}") from error

    def _load(self, whole: Whole, taken: _Taken, started: float) -> Restored:
        assert self._host is not None
        try:
            taken.load()
        finally:
            taken.close()
        share(None, self._group)  # every rank has read what it needs: the rest may go
        self._host.restored(whole.generation)
        return Restored(
            step=whole.generation.step,
            state=taken.state,
            source="buddy" if whole.needs_buddy else "memory",
            seconds=time.monotonic() - started,
            size_bytes=taken.size_bytes,
        )


def _read_index(fetched: Fetched, whole: Whole) -> tuple[Index, Metadata]:
    """Nothing is unpickled before its checksum has matched. CheckpointInvalid when it does not."""
    with Path(fetched.index_path).open("rb") as file:
        content = file.read(fetched.index_bytes)
    line, _, packed = content.partition(b"\n")
    index = decode_index(line)
    if seal_of(index) != whole.seal or index.generation != whole.generation:
        raise CheckpointInvalid("the index is of another copy")
    if len(packed) != index.metadata_bytes or zlib.crc32(packed) != index.metadata_crc32:
        raise CheckpointInvalid("the metadata does not match its checksum")
    return index, unpack_metadata(packed)


def _told(damaged: Sequence[tuple[int, str]]) -> str:
    return f"the part of rank {damaged[0][0]} does not match its checksum"


def _plan(state: dict[str, Any], metadata: Metadata) -> LoadPlan:
    planner = DefaultLoadPlanner()
    planner.set_up_planner(state, metadata, is_coordinator=False)
    return planner.create_local_plan()


def _span(metadata: Metadata, index: MetadataIndex) -> Span:
    found = metadata.storage_data[index]
    assert isinstance(found, Span)
    return found


class _Taken:
    """The parts that a rank needs, mapped, and the state that they are for."""

    def __init__(self, state: dict[str, Any], metadata: Metadata, fetched: Fetched) -> None:
        # Mapped for reading only; nobody writes through the tensors that are made of it.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        self.state, self._metadata, self._paths = state, metadata, fetched.paths
        self._maps = {rank: _map(Path(path)) for rank, path in fetched.paths.items()}

    @property
    def size_bytes(self) -> int:
        return sum(len(one) for one in self._maps.values())

    def damaged(self, index: Index) -> list[tuple[int, str]]:
        """Rank and path of each part that is not what its rank wrote."""
        found = []
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="elasticd-checksum") as pool:
            for rank, view in self._maps.items():
                part = index.part(rank)
                if (len(view), checksum_of(view, pool)) != (part.size_bytes, part.crc32):
                    found.append((rank, self._paths[rank]))
        return found

    def load(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is disabled": it is not, the load just needs none
            dcp_load(self.state, storage_reader=_Reader(self._metadata, self._maps), no_dist=True)

    def close(self) -> None:
        self._maps.clear()


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if not size_bytes:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), size_bytes, prot=mmap.PROT_READ))


class _Reader(StorageReader):
    """How DCP's loader reaches the parts: tensors are copied from where they lie, straight to where they belong."""

    def __init__(self, metadata: Metadata, maps: Mapping[int, memoryview]) -> None:
        self._metadata, self._maps = metadata, maps

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:  # noqa: FBT001 (DCP's)
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        tensors = [item for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                span = _span(self._metadata, item.storage_index)
                planner.load_bytes(item, io.BytesIO(object_at(self._maps[span.rank], span)))
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="elasticd-load") as pool:
            for _ in pool.map(lambda item: self._read_tensor(item, planner), tensors):
                pass
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_tensor(self, item: ReadItem, planner: LoadPlanner) -> None:
        span = _span(self._metadata, item.storage_index)
        described = self._metadata.state_dict_metadata[item.storage_index.fqn]
        assert isinstance(described, TensorStorageMetadata)
        with torch.no_grad():
            target = planner.resolve_tensor(item).detach()
            if span.size_bytes:
                shape = _chunk_shape(described, item.storage_index)
                source = tensor_at(self._maps[span.rank], span, described.properties.dtype, shape)
                for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    source = source.narrow(dimension, offset, length)
                target.copy_(source)
            planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003 (DCP's)
        return False


def _chunk_shape(described: TensorStorageMetadata, index: MetadataIndex) -> torch.Size:
    """The shape of the piece that was written, of which a reader may want a part."""
    offset = index.offset
    return next(chunk.sizes for chunk in described.chunks if offset is None or chunk.offsets == offset)
