"""New objects under the interface of new files, so that SealedFile checks and indexes both alike.

Not here: what else is done in an object store (object_storage.py).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Iterator
from typing import Any

from elasticd.checkpoint.disk import Disk
from elasticd.checkpoint.objects import Location, ObjectPath, writing


class ObjectDisk(Disk):
    """What a new file needs of a Disk: it is put in parts, and stands when it is flushed."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = itertools.count()
        self._open: dict[int, tuple[ObjectPath, Any]] = {}
        self._written: dict[int, int] = {}

    def create(self, path: Location) -> int:
        assert isinstance(path, ObjectPath)
        with writing(path):
            file = path.fs.open(path.key, "wb")
        descriptor = next(self._numbers)
        self._open[descriptor], self._written[descriptor] = (path, file), 0
        return descriptor

    def write(self, descriptor: int, data: memoryview) -> int:
        path, file = self._open[descriptor]
        with writing(path):
            file.write(data)
        self._written[descriptor] += len(data)
        return len(data)

    def write_out(self, descriptor: int, start: int, size_bytes: int) -> None:
        """The client's affair."""

    def sync(self, descriptor: int) -> None:
        """Complete the upload. OSError unless the store then has an object of this size."""
        path, file = self._open[descriptor]
        with writing(path):
            file.close()
            size_bytes = path.size_bytes()
        del self._open[descriptor]
        if size_bytes != self._written[descriptor]:
            raise OSError(errno.EIO, f"{path.url} has {size_bytes} of {self._written[descriptor]} bytes")

    def close(self, descriptor: int) -> None:
        """One that was not completed is given up: a file of fsspec's would complete it when it is collected."""
        _, file = self._open.pop(descriptor, (None, None))
        del self._written[descriptor]
        if file is not None:
            for give_up in (file.discard, lambda: setattr(file, "closed", True)):
                with contextlib.suppress(Exception):
                    give_up()

    def rename(self, path: Location, target: Location) -> None:
        """By a copy in the store: for the one small file that DCP writes under another name."""
        assert isinstance(path, ObjectPath)
        assert isinstance(target, ObjectPath)
        with writing(path):
            path.fs.mv(path.key, target.key)
