"""Loading what a rank needs of a checkpoint, each byte read once: checked as it arrives, used only when it matched.

The elements of large tensors go from the file straight into the tensors that are loaded, block after block (blocks.py),
by a few threads in the order of the files. What must be unpickled (small tensors, whatever is no tensor) waits until
everything that this rank reads has matched.

All ranks together read everything: each checks, beside what it loads, its share of what may be nobody's (the random
state of a rank that this world does not have). A rank of the world that saved finds most of its share among what it
loads.

A load that fails half-way leaves tensors half filled: restore.py sees to it that nobody trains on those.

Not here: which checkpoint (restore.py), resharding (DCP's planner says what part of what goes where).
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from elasticd.checkpoint.blocks import Block, between, checked
from elasticd.checkpoint.fetch import File, Part, fetch, open_file
from elasticd.checkpoint.manifest import METADATA_NAME, FileEntry, Manifest
from elasticd.checkpoint.objects import Location, ObjectPath
from elasticd.errors import CheckpointInvalid


def plain_reader(path: Location) -> FileSystemReader:
    """DCP's own: it unpickles what it finds."""
    if not isinstance(path, ObjectPath):
        return FileSystemReader(path)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return cast("FileSystemReader", FsspecReader(path.url))


class CheckedReader(FileSystemReader):
    """DCP's reader of one checkpoint whose data files are indexed. For one load, by rank ``rank`` of ``size``.

    CheckpointInvalid from the constructor and from ``read_data`` when something is not as it was written.
    """

    def __init__(self, path: Location, manifest: Manifest, *, rank: int = 0, size: int = 1) -> None:
        super().__init__(str(path))
        self.path: Any = path  # what is read, is read here: DCP's own does not
        self._share = rank, size
        self._manifest = manifest
        self._entries = {entry.name: entry for entry in manifest.files}
        self._metadata = self._read_checked_metadata()
        #: Whether tensors may hold a part of this checkpoint already.
        self.filling = False

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index, []).append(item)
        with ExitStack() as stack:
            files = self._open_files(wanted, stack)
            parts = [self._part(files, index, items, planner) for index, items in wanted.items()]
            others = self._rest_of_share(files, parts, stack)
            self.filling = not all(isinstance(part, _Pickled) for part in parts)
            fetch(sorted(parts + others, key=lambda part: (part.file.entry.name, part.blocks[0].start)))
        self.filling = True
        for part in parts:
            part.unpickle()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _open_files(self, wanted: Mapping[MetadataIndex, object], stack: ExitStack) -> dict[str, File]:
        names = sorted({self.storage_data[index].relative_path for index in wanted})
        return {name: open_file(self.path, self._entry(name), stack) for name in names}

    def _rest_of_share(self, files: dict[str, File], parts: Sequence[Part], stack: ExitStack) -> list[Part]:
        """The blocks of this rank's share that are in none of the parts.

        All blocks, in the order of the ranks that wrote them, are divided into as many pieces as there are ranks now.
        """
        loaded = {(part.file.entry.name, block.start) for part in parts for block in part.blocks}
        rank, size = self._share
        data = self._manifest.data_files
        total, before, others = sum(entry.size_bytes for entry in data), 0, []
        for entry in data:
            first, end = total * rank // size - before, total * (rank + 1) // size - before
            before += entry.size_bytes
            if first >= entry.size_bytes or end <= 0:
                continue
            file = files.get(entry.name) or open_file(self.path, entry, stack)
            ours = [block for block in file.blocks if first <= block.start < end]
            if left := [block for block in ours if (entry.name, block.start) not in loaded]:
                others.append(Part(file, left))
        return others

    def _entry(self, name: str) -> FileEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointInvalid(f"the manifest says nothing of {name}") from None

    def _read_checked_metadata(self) -> Metadata:
        try:
            content = (self.path / METADATA_NAME).read_bytes()
        except OSError as error:
            raise CheckpointInvalid(f"{METADATA_NAME}: {error.strerror}") from error
        checked(content, self._manifest.metadata.crc32, METADATA_NAME)
        metadata: Metadata = pickle.loads(content)  # noqa: S301 - its checksum has matched
        metadata.storage_meta = replace(metadata.storage_meta or StorageMeta(), load_id=self.load_id)
        return metadata

    def _part(
        self, files: Mapping[str, File], index: MetadataIndex, items: list[ReadItem], planner: LoadPlanner
    ) -> Part:
        """One item of the checkpoint, and where this rank wants it."""
        info = self.storage_data[index]
        file = files[info.relative_path]
        blocks = between(file.blocks, info.offset, info.offset + info.length)
        if not blocks or blocks[0].start != info.offset or blocks[-1].end != info.offset + info.length:
            raise CheckpointInvalid(f"the index of {info.relative_path} does not fit its items")
        if items[0].type == LoadItemType.BYTE_IO:
            return _Pickled(file, blocks, items, planner)
        found = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(found, TensorStorageMetadata)
        sizes, dtype = _chunk(found, index).sizes, found.properties.dtype
        elements = [block for block in blocks if block.of_tensor]
        if sum(block.size_bytes for block in elements) != math.prod(sizes) * dtype.itemsize or not elements:
            return _Pickled(file, blocks, items, planner)
        targets = [planner.resolve_tensor(item).detach() for item in items]
        if len(items) == 1 and targets[0].shape == sizes and _takes_bytes(targets[0], dtype):
            return _Direct(file, blocks, targets[0])
        return _Staged(file, blocks, list(zip(items, targets, strict=True)), _Elements(sizes, dtype, elements[0].start))


class _Pickled(Part):
    """Needed whole, and unpickled."""

    def __init__(self, file: File, blocks: Sequence[Block], items: list[ReadItem], planner: LoadPlanner) -> None:
        super().__init__(file, blocks)
        self._items, self._planner = items, planner
        self._start = blocks[0].start
        self._content = bytearray(blocks[-1].end - self._start)

    def room_for(self, block: Block) -> memoryview:
        return memoryview(self._content)[block.start - self._start :][: block.size_bytes]

    def unpickle(self) -> None:
        for item in self._items:
            content = io.BytesIO(self._content)
            if item.type == LoadItemType.BYTE_IO:
                self._planner.load_bytes(item, content)
                continue
            tensor = torch.load(content, map_location="cpu", weights_only=True)
            target = self._planner.resolve_tensor(item).detach()
            target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))


class _Direct(Part):
    """A tensor whose elements lie in the file as they lie in memory."""

    def __init__(self, file: File, blocks: Sequence[Block], target: torch.Tensor) -> None:
        super().__init__(file, blocks)
        self._memory = _bytes_of(target)
        self._start = next(block.start for block in blocks if block.of_tensor)

    def room_for(self, block: Block) -> memoryview:
        if not block.of_tensor:  # torch.save's frame: checked, and not needed
            return super().room_for(block)
        return self._memory[block.start - self._start :][: block.size_bytes]


class _Elements:
    """Where in a file the elements of a tensor of these sizes are."""

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, start: int) -> None:
        self.dtype, self.start = dtype, start
        self.strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]

    def span(self, item: ReadItem) -> tuple[int, int]:
        """The first element that an item needs, and the one behind the last, in row-major order."""
        first = sum(offset * stride for offset, stride in zip(item.storage_offsets, self.strides, strict=True))
        return first, first + 1 + sum((n - 1) * stride for n, stride in zip(item.lengths, self.strides, strict=True))


class _Staged(Part):
    """A tensor of which a part is needed, or that lies in memory otherwise: read into buffers, then copied."""

    def __init__(
        self, file: File, blocks: Sequence[Block], wanted: list[tuple[ReadItem, torch.Tensor]], elements: _Elements
    ) -> None:
        spans = [elements.span(item) for item, _ in wanted]
        size = elements.dtype.itemsize
        needed = between(
            blocks,
            elements.start + size * min(first for first, _ in spans),
            elements.start + size * max(end for _, end in spans),
        )
        super().__init__(file, needed)
        self._wanted, self._elements = wanted, elements
        self._buffer: torch.Tensor | None = None
        self._memory = memoryview(b"")

    def begin(self) -> None:
        self._buffer = torch.empty(self.blocks[-1].end - self.blocks[0].start, dtype=torch.uint8)
        self._memory = _bytes_of(self._buffer)

    def room_for(self, block: Block) -> memoryview:
        return self._memory[block.start - self.blocks[0].start :][: block.size_bytes]

    def finish(self) -> None:
        assert self._buffer is not None
        elements, found = self._elements, self._buffer.view(self._elements.dtype)
        skipped = (self.blocks[0].start - elements.start) // elements.dtype.itemsize
        for item, target in self._wanted:
            first, _ = elements.span(item)
            target.copy_(found.as_strided(item.lengths, elements.strides, first - skipped))
        self._buffer, self._memory = None, memoryview(b"")


def _chunk(found: TensorStorageMetadata, index: MetadataIndex) -> ChunkStorageMetadata:
    """The piece of a tensor that an item holds."""
    chunks = found.chunks
    if index.index is not None and index.index < len(chunks) and chunks[index.index].offsets == index.offset:
        return chunks[index.index]
    return next(chunk for chunk in chunks if chunk.offsets == index.offset)


def _takes_bytes(target: torch.Tensor, dtype: torch.dtype) -> bool:
    return (
        type(target) is torch.Tensor
        and target.dtype == dtype
        and target.device.type == "cpu"
        and target.layout == torch.strided
        and target.is_contiguous()
        and not target.is_conj()
        and not target.is_neg()
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
