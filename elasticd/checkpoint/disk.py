"""The changes that checkpoints make to a file system, one call each, and files that are sealed while they are written.

All of save.py and storage.py goes through a ``Disk``, so that a test can put one of its own in its place: full, slow,
failing, or one that writes down the order of what was done. Not here: what the files are.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from elasticd.checkpoint.manifest import FileEntry

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

    The checksum is of the bytes that were handed over, not of what was read back, and costs little time: it is taken
    in a second thread while the first one writes. Whoever fails half-way must ``abandon`` the file.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        super().__init__()
        self._abandoned = True  # until there is a file
        self._disk, self._name = disk, path.name
        self._size_bytes = self._crc32 = 0
        #: For how long large writes had to wait for their checksum after the disk had taken them.
        self.checksum_s = 0.0
        #: What the disk said when it refused. torch.save speaks of "unexpected pos" instead.
        self.refusal: OSError | None = None
        self._descriptor = disk.create(path)
        self._beside: ThreadPoolExecutor | None = None
        self._abandoned = False

    @property
    def entry(self) -> FileEntry:
        return FileEntry(name=self._name, size_bytes=self._size_bytes, crc32=self._crc32)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size_bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < _BESIDE_FROM_BYTES:
            self._write_all(view)
            self._crc32 = zlib.crc32(view, self._crc32)
        else:
            self._beside = self._beside or ThreadPoolExecutor(1, thread_name_prefix="elasticd-checksum")
            checksum = self._beside.submit(zlib.crc32, view, self._crc32)
            try:
                self._write_all(view)
            finally:
                started = time.perf_counter()
                self._crc32 = checksum.result()  # the bytes are the caller's again once this returns
                self.checksum_s += time.perf_counter() - started
        self._size_bytes += len(view)
        return len(view)

    def close(self) -> None:
        if not self.closed and not self._abandoned:
            try:
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
                view = view[self._disk.write(self._descriptor, view) :]
        except OSError as error:
            self.refusal = error
            raise


@contextlib.contextmanager
def new_file(disk: Disk, path: Path) -> Iterator[SealedFile]:
    """A file that is durable when the block ends, and abandoned when it fails."""
    file = SealedFile(disk, path)
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
