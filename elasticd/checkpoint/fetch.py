"""Reading parts of files into memory, each block checked as it arrives, by a few threads. Without torch.

Reading and checksums release the interpreter's lock, so that one thread's checksum runs beside another's read. Blocks
are taken in the order in which they are given: from the disk that is nearly one sequential read.

Not here: what the parts are (reader.py).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from elasticd.checkpoint.blocks import Block, checked, decode_index
from elasticd.checkpoint.manifest import FileEntry
from elasticd.checkpoint.objects import Location, ObjectPath
from elasticd.errors import CheckpointInvalid

#: One that reads, one that checks, and two that make up for a disk that answers late.
THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An open data file, and its blocks."""

    entry: FileEntry
    #: Fills a view from an offset on as far as it comes; how many bytes it took, 0 at the end of the file.
    read_at: Callable[[memoryview, int], int]
    blocks: Sequence[Block]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view. CheckpointInvalid when the file ends before, or cannot be read."""
        try:
            while view:
                taken = self.read_at(view, offset)
                if not taken:
                    raise CheckpointInvalid(f"{self.entry.name} is cut short")
                view, offset = view[taken:], offset + taken
        except OSError as error:
            raise CheckpointInvalid(f"{self.entry.name}: {error.strerror}") from error


def open_file(directory: Location, entry: FileEntry, stack: ExitStack) -> File:
    """Open a file until the stack ends, and read its index. CheckpointInvalid when it is not there, or not whole."""
    path = directory / entry.name
    read_at = path.read_at if isinstance(path, ObjectPath) else _open(path, stack)
    index = bytearray(entry.index_bytes)
    File(entry=entry, read_at=read_at, blocks=()).read_into(memoryview(index), entry.size_bytes - entry.index_bytes)
    checked(index, entry.index_crc32, f"the index of {entry.name}")
    blocks = decode_index(index)
    if sum(block.size_bytes for block in blocks) + entry.index_bytes != entry.size_bytes:
        raise CheckpointInvalid(f"the index of {entry.name} does not cover it")
    return File(entry=entry, read_at=read_at, blocks=blocks)


def _open(path: Path, stack: ExitStack) -> Callable[[memoryview, int], int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointInvalid(f"{path.name}: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return lambda view, offset: os.preadv(descriptor, [view], offset)


class Part:
    """Blocks of one file that belong together. All but ``unpickle`` is called from several threads."""

    def __init__(self, file: File, blocks: Sequence[Block]) -> None:
        self.file, self.blocks = file, blocks

    def begin(self) -> None:
        """Before its first block is read."""

    def room_for(self, block: Block) -> memoryview:
        """Where a block's bytes go."""
        return memoryview(bytearray(block.size_bytes))

    def finish(self) -> None:
        """All its blocks have matched."""

    def unpickle(self) -> None:
        """All blocks of all parts have matched."""


def fetch(parts: Sequence[Part]) -> None:
    """Read all blocks of all parts. CheckpointInvalid when one does not match; others may have been read by then."""
    work = _Work(parts)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="elasticd-read") as threads:
        for reading in [threads.submit(work.read) for _ in range(THREADS)]:
            reading.result()


class _Work:
    def __init__(self, parts: Sequence[Part]) -> None:
        self._lock = threading.Lock()
        self._left = self._in_order(parts)
        self._missing = {id(part): len(part.blocks) for part in parts}
        self._failed = False

    def read(self) -> None:
        try:
            while (taken := self._take()) is not None:
                part, block = taken
                view = part.room_for(block)
                part.file.read_into(view, block.start)
                checked(view, block.crc32, f"{part.file.entry.name} at {block.start}")
                if self._was_last_of(part):
                    part.finish()
        except BaseException:
            self._failed = True
            raise

    @staticmethod
    def _in_order(parts: Sequence[Part]) -> Iterator[tuple[Part, Block]]:
        for part in parts:
            part.begin()
            for block in part.blocks:
                yield part, block

    def _take(self) -> tuple[Part, Block] | None:
        with self._lock:
            return None if self._failed else next(self._left, None)

    def _was_last_of(self, part: Part) -> bool:
        with self._lock:
            self._missing[id(part)] -= 1
            return not self._missing[id(part)]
