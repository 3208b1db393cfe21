"""Moments in this rank's work, and the time between two of them, without holding it up.

On CUDA by events, which the device passes when it comes to them, since the host runs ahead of it; on the CPU by the
clock. Not here: what is measured so (clock.py, waiting.py).
"""

from __future__ import annotations

import time
from typing import Protocol

import torch


class Mark(Protocol):
    """Made at one moment; ``record`` moves it to another."""

    def record(self) -> None: ...

    def seconds_since(self, earlier: Mark) -> float | None:
        """None while the device has not come to it."""
        ...


class CpuMark:
    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def record(self) -> None:
        self.at = time.perf_counter()

    def seconds_since(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, CpuMark)
        return self.at - earlier.at


class CudaMark:
    """In the stream that the calling thread uses: in a hook of the backward pass, that of the forward pass."""

    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def record(self) -> None:
        self.event.record()

    def seconds_since(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, CudaMark)
        passed: bool = self.event.query()  # type: ignore[no-untyped-call]
        return earlier.event.elapsed_time(self.event) / 1e3 if passed else None


def marks_of(device: torch.device) -> type[CpuMark | CudaMark]:
    return CudaMark if device.type == "cuda" else CpuMark
