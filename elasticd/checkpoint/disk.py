"""The changes that checkpoints make to a file system, one call each, and files that are sealed while they are written.

All of save.py and storage.py goes through a ``Disk``, so that a test can put one of its own in its place: full, slow,
failing, or one that writes down the order of what was done. Not here: what the files are.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from elasticd.checkpoint.blocks import BLOCK_BYTES, Block, checksum_of, cut, encode_index
from elasticd.checkpoint.manifest import FileEntry

#: After so many bytes the kernel is asked to begin to write them to the disk.
_WRITE_OUT_BYTES = 8 * 1024 * 1024
_SYNC_FILE_RANGE_WRITE = 2
_LIBC = ctypes.CDLL(None)

#: From this size on a checksum is taken beside the write instead of after it; below, the hand-over costs more.
_BESIDE_FROM_BYTES = 256 * 1024


class Disk:
    """A real file system. Every method raises OSError when it refuses."""

    def make_directory(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> int:
        """A descriptor of a file that was not there before."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """How many bytes were taken, as write(2) says it: fewer than given near a full disk, or of more than 2 GiB."""
        return os.write(descriptor, data)

    def write_out(self, descriptor: int, start: int, size_bytes: int) -> None:
        """Have these bytes go to the disk while the next ones are handed over; the kernel would wait for the flush.

        A hint, no promise, and no error: what cannot be written, the flush tells of. Linux alone has it.
        """
        if (begin := getattr(_LIBC, "sync_file_range", None)) is not None:
            begin(descriptor, ctypes.c_int64(start), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable. A read-only descriptor will do: fsync is about the inode."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, target: Path) -> None:
        path.rename(target)

    def remove_tree(self, path: Path) -> None:
        """As much of it as can be removed: what stays is swept by a later save."""
        shutil.rmtree(path, ignore_errors=True)


class SealedFile(io.RawIOBase):
    """A new file. ``close`` makes it durable, and then ``entry`` describes it.

    The checksums are of the bytes that were handed over, not of what was read back, and cost little time: they are
    taken in a second thread while the first one writes. Whoever fails half-way must ``abandon`` the file. One that is
    ``indexed`` ends in the index of its blocks (blocks.py).
    """

    def __init__(self, disk: Disk, path: Path, *, indexed: bool = False) -> None:
        super().__init__()
        self._abandoned = True  # until there is a file
        self._disk, self._name, self._indexed = disk, path.name, indexed
        self._size_bytes = self._index_bytes = self._index_crc32 = 0
        self._blocks: list[Block] = []
        self._begun_at = self._begun_crc32 = 0  # the block under way, of small writes
        self._tensor_bytes = 0
        self._taken = self._written_out = 0  # so many bytes the kernel has, and was asked to write
        #: For how long large writes had to wait for their checksum after the disk had taken them.
        self.checksum_s = 0.0
        #: What the disk said when it refused. torch.save speaks of "unexpected pos" instead.
        self.refusal: OSError | None = None
        self._descriptor = disk.create(path)
        self._beside: ThreadPoolExecutor | None = None
        self._abandoned = False

    @property
    def entry(self) -> FileEntry:
        return FileEntry(
            name=self._name,
            size_bytes=self._size_bytes,
            crc32=checksum_of(self._blocks),
            index_bytes=self._index_bytes,
            index_crc32=self._index_crc32,
        )

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size_bytes

    def begin_item(self, tensor_bytes: int) -> None:
        """What follows can be read by itself. Its one write of ``tensor_bytes`` (0: none) is a tensor's elements."""
        self._end_block()
        self._tensor_bytes = tensor_bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        of_tensor = bool(view) and len(view) == self._tensor_bytes
        if of_tensor or len(view) >= _BESIDE_FROM_BYTES:
            self._end_block()
            self._write_blocks(view, of_tensor=of_tensor)
            self._begun_at = self._size_bytes
        else:
            self._write_all(view)
            self._begun_crc32 = zlib.crc32(view, self._begun_crc32)
            self._size_bytes += len(view)
            if self._size_bytes - self._begun_at >= BLOCK_BYTES:
                self._end_block()
        return len(view)

    def _write_blocks(self, view: memoryview, *, of_tensor: bool) -> None:
        self._beside = self._beside or ThreadPoolExecutor(1, thread_name_prefix="elasticd-checksum")
        checksums = self._beside.submit(lambda: [zlib.crc32(piece) for piece in cut(view)])
        try:
            self._write_all(view)
        finally:
            started = time.perf_counter()
            found = checksums.result()  # the bytes are the caller's again once this returns
            self.checksum_s += time.perf_counter() - started
        for piece, crc32 in zip(cut(view), found, strict=True):
            self._blocks.append(Block(self._size_bytes, len(piece), crc32, of_tensor=of_tensor))
            self._size_bytes += len(piece)

    def _end_block(self) -> None:
        if size_bytes := self._size_bytes - self._begun_at:
            self._blocks.append(Block(self._begun_at, size_bytes, self._begun_crc32))
        self._begun_at, self._begun_crc32 = self._size_bytes, 0

    def _write_index(self) -> None:
        index = encode_index(self._blocks)
        self._index_bytes, self._index_crc32 = len(index), zlib.crc32(index)
        self.write(index)
        self._end_block()

    def close(self) -> None:
        if not self.closed and not self._abandoned:
            try:
                self._end_block()
                if self._indexed:
                    self._write_index()
                self._disk.sync(self._descriptor)
            finally:
                self._release()
        super().close()

    def abandon(self) -> None:
        """Close it without making it durable."""
        if not self.closed and not self._abandoned:
            self._release()
        super().close()

    def _release(self) -> None:
        self._abandoned = True
        if self._beside is not None:
            self._beside.shutdown()
        self._disk.close(self._descriptor)

    def _write_all(self, view: memoryview) -> None:
        try:
            while view:
                taken = self._disk.write(self._descriptor, view[:_WRITE_OUT_BYTES])
                view, self._taken = view[taken:], self._taken + taken
                if self._taken - self._written_out >= _WRITE_OUT_BYTES:
                    self._disk.write_out(self._descriptor, self._written_out, self._taken - self._written_out)
                    self._written_out = self._taken
        except OSError as error:
            self.refusal = error
            raise


@contextlib.contextmanager
def new_file(disk: Disk, path: Path, *, indexed: bool = False) -> Iterator[SealedFile]:
    """A file that is durable when the block ends, and abandoned when it fails."""
    file = SealedFile(disk, path, indexed=indexed)
    try:
        yield file
    except Exception as error:
        file.abandon()
        if file.refusal is not None:
            raise file.refusal from error
        raise
    except BaseException:
        file.abandon()
        raise
    file.close()


#: The file system itself.
DISK = Disk()
