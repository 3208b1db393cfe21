"""Files on tmpfs for copies in RAM: allocated whole, counted against a limit, and used again. Thread-safe.

Not here: what is in them (memory.py).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from elasticd.core.memory import MAX_INDEX_LINE_BYTES, Index, decode_index, format_bytes
from elasticd.core.model import NodeId
from elasticd.errors import CheckpointInvalid, MemoryRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """``folder`` is on tmpfs; ``limit_bytes`` is for all copies together, of this node's workers and of others'."""

    folder: str = "/dev/shm"  # noqa: S108 - it is there to be shared
    limit_bytes: int = 0
    port: int = 0


@dataclass(slots=True, eq=False)
class StoredFile:
    """One file. ``tag``: who may have it again when it is free; ``fetched``: only there for a restore."""

    path: Path
    descriptor: int
    size_bytes: int
    tag: str = ""
    fetched: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """A file that stays open for its reader, whatever becomes of the copy meanwhile. To be closed."""

    path: Path
    descriptor: int
    size_bytes: int

    @classmethod
    def of(cls, file: StoredFile, size_bytes: int | None = None) -> Reading:
        return cls(file.path, os.dup(file.descriptor), file.size_bytes if size_bytes is None else size_bytes)

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


@dataclass(slots=True)
class Shelf:
    """A job's files: where they are, whose they are, and those that are free to be used again."""

    folder: Path
    owner: int
    spares: list[StoredFile] = field(default_factory=list)


class SharedFiles:
    """All of a node's. MemoryRefused, with the sizes, where there is no room."""

    def __init__(self, settings: MemorySettings, me: NodeId) -> None:
        self._settings, self._me = settings, me
        self._lock = threading.RLock()
        self.used_bytes = 0
        self._made = 0

    def check_steady(self, size_bytes: int, freed_bytes: int) -> None:
        """Whether two files of this size can be had once ``freed_bytes`` are free. MemoryRefused when not."""
        with self._lock:
            if self.used_bytes - freed_bytes + 2 * size_bytes > self._settings.limit_bytes:
                raise MemoryRefused(self._too_much(size_bytes, "and two generations of it are kept"))

    def _too_much(self, size_bytes: int, why: str) -> str:
        return (
            f"a copy in RAM does not fit on node {self._me}: a part has {format_bytes(size_bytes)}, {why}; of the "
            f"{format_bytes(self._settings.limit_bytes)} that memory.limit_bytes allows, "
            f"{format_bytes(self.used_bytes)} are in use"
        )

    def make(self, shelf: Shelf, name: str, size_bytes: int, tag: str) -> StoredFile:
        """A file with all its pages, so that nobody who writes into it is killed for want of one. MemoryRefused."""
        with self._lock:
            spare = next((one for one in shelf.spares if (one.tag, one.size_bytes) == (tag, size_bytes)), None)
            self._made += 1
            path = shelf.folder / f"{name}.{self._made}"
            if spare is not None:
                shelf.spares.remove(spare)
                spare.path = spare.path.rename(path)
                return spare
            self.free_spares(shelf, lambda spare_tag: spare_tag == tag)
            if self.used_bytes + size_bytes > self._settings.limit_bytes:
                raise MemoryRefused(self._too_much(size_bytes, "beside those that must stay"))
            self.used_bytes += size_bytes
        try:
            file = self._allocate(path, size_bytes, tag)
        except OSError as error:
            with self._lock:
                self.used_bytes -= size_bytes
            raise MemoryRefused(
                f"a copy in RAM of {format_bytes(size_bytes)} cannot be had in {self._settings.folder} on node "
                f"{self._me}, which has {format_bytes(_free_bytes(self._settings.folder))} free: {error.strerror}"
            ) from error
        with self._lock:
            if not tag.startswith("copy-"):  # those change hands when they are whole
                self.hand_over(shelf, file)
        return file

    def _allocate(self, path: Path, size_bytes: int, tag: str) -> StoredFile:
        if size_bytes > _free_bytes(self._settings.folder):  # or memory would fill up before tmpfs says so
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if size_bytes:
                os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return StoredFile(path=path, descriptor=descriptor, size_bytes=size_bytes, tag=tag)

    def hand_over(self, shelf: Shelf, file: StoredFile) -> None:
        """To the job's user, who may read and write it from now on."""
        if shelf.owner != os.geteuid():
            os.fchown(file.descriptor, shelf.owner, -1)

    def free(self, shelf: Shelf | None, files: list[StoredFile], *, again: bool) -> None:
        """``again``: one file of each tag is kept for its next user: fresh pages cost more than the copy itself."""
        with self._lock:
            for file in files:
                if shelf and again and not file.fetched and all(one.tag != file.tag for one in shelf.spares):
                    shelf.spares.append(file)
                    continue
                file.path.unlink(missing_ok=True)
                os.close(file.descriptor)
                self.used_bytes -= file.size_bytes

    def free_spares(self, shelf: Shelf, unwanted: Callable[[str], bool]) -> None:
        """Those whose tag will not be asked for again, or not with their size."""
        with self._lock:
            self.free(shelf, [file for file in shelf.spares if unwanted(file.tag)], again=False)
            shelf.spares = [file for file in shelf.spares if not unwanted(file.tag)]


def read_index(file: StoredFile, index_bytes: int) -> Index:
    """The index at the file's start. MemoryRefused when it is not one."""
    head = os.pread(file.descriptor, min(index_bytes, MAX_INDEX_LINE_BYTES), 0)
    try:
        return decode_index(head.partition(b"\n")[0])
    except CheckpointInvalid as error:
        raise MemoryRefused(str(error)) from error


def _free_bytes(folder: str) -> int:
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
