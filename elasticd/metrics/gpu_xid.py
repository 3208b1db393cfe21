"""XID events: what the driver says of a GPU that misbehaves, collected without waiting. In the thread that asks NVML.

Not here: which of them mean a sick GPU (gpu_health.py).
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

#: At one time: a GPU in trouble says the same thing over and over.
MAX_EVENTS = 64


class XidEvents:
    """Those since this was made. A driver or a GPU that has none gives none."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._set: Any = None
        self._indices: dict[int | None, int] = {}  # by the address of the handle
        self._seen: dict[int, set[int]] = {}
        with contextlib.suppress(nvml.NVMLError):
            self._set = nvml.nvmlEventSetCreate()

    def watch(self, index: int, handle: Any) -> None:
        """From now on. Does nothing for a GPU that is watched already."""
        if self._set is None or index in self._seen:
            return
        self._seen[index] = set()
        self._indices[_address(handle)] = index
        with contextlib.suppress(self._nvml.NVMLError):  # not supported
            self._nvml.nvmlDeviceRegisterEvents(handle, self._nvml.nvmlEventTypeXidCriticalError, self._set)

    def collect(self) -> None:
        """What has come in."""
        for _ in range(MAX_EVENTS if self._set is not None and self._seen else 0):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._set, 0)
            except self._nvml.NVMLError:  # none is left, or the GPU is lost
                return
            index = self._indices.get(_address(event.device))
            if index is not None:
                self._seen[index].add(int(event.eventData))

    def seen(self, index: int) -> tuple[int, ...]:
        """The XIDs of this GPU, each once."""
        return tuple(sorted(self._seen.get(index, ())))


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
