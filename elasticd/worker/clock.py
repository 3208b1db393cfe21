"""Seconds per micro-batch of this rank, measured without holding it up.

On CUDA by events, which are read once the device has passed them; on the CPU by the clock. The last micro-batch of a
step ends in the exchange of gradients, and so in waiting for slower ranks: it counts up to the moment when the gradient
of the model's first parameter is there, which the backward pass reaches last. Where that cannot be seen (FSDP2) it does
not count at all, unless it is the only one.

Not here: what the measure is for (shares.py).
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch

MAX_PENDING = 4096


class Mark(Protocol):
    """A moment in this rank's work."""

    def seconds_since(self, earlier: Mark) -> float | None:
        """None while the device has not come to it."""
        ...


class CpuMark:
    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def seconds_since(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, CpuMark)
        return self.at - earlier.at


class CudaMark:
    __slots__ = ("event",)

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def seconds_since(self, earlier: Mark) -> float | None:
        assert isinstance(earlier, CudaMark)
        passed: bool = self.event.query()  # type: ignore[no-untyped-call]
        return earlier.event.elapsed_time(self.event) / 1e3 if passed else None


class MicroBatchClock:
    def __init__(self, device: torch.device) -> None:
        self._mark: type[CpuMark | CudaMark] = CudaMark if device.type == "cuda" else CpuMark
        #: When they began and ended, and how many they were.
        self._pending: deque[tuple[Mark, Mark, int]] = deque(maxlen=MAX_PENDING)
        self._began: Mark | None = None
        self._gradient: Mark | None = None

    def watch(self, model: torch.nn.Module) -> None:
        """Notice the end of each backward pass through the model."""
        for parameter in reached_last(model):
            parameter.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        self._gradient = None
        self._began = self._mark()

    def end(self, *, waited: bool) -> None:
        """``waited``: other ranks may have been waited for since the gradients were there."""
        assert self._began is not None
        ended = self._gradient if waited else self._mark()
        if ended is not None:
            self._pending.append((self._began, ended, 1))

    def end_only(self, count: int = 1) -> None:
        """The end of a step's only micro-batch, or of ``count`` that a pipeline computed: with the waiting, where its
        end cannot be seen without.
        """
        assert self._began is not None
        self._pending.append((self._began, self._gradient or self._mark(), count))

    def take(self) -> float:
        """The mean since the last call; NaN when nothing was measured. What the device has not done yet is left."""
        seconds: list[float] = []
        while self._pending:
            began, ended, count = self._pending[0]
            measured = ended.seconds_since(began)
            if measured is None:
                break
            seconds.append(measured / count)
            self._pending.popleft()
        return sum(seconds) / len(seconds) if seconds else float("nan")

    def _on_gradient(self, _: torch.Tensor) -> None:
        self._gradient = self._mark()


def reached_last(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameter whose gradient a backward pass most likely computes last: the first one. None in a frozen model."""
    return [each for each in model.parameters() if each.requires_grad][:1]
