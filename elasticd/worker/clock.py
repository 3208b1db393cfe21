"""Seconds per micro-batch of this rank, measured without holding it up.

A step's micro-batches are measured together. The last one ends in the exchange of gradients, and so in waiting for
slower ranks: they count up to the moment when the gradient of the model's first parameter is there, which the backward
pass reaches last. Where that cannot be seen (FSDP2) the last one does not count at all, unless it is the only one.

Not here: what the measure is for (shares.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from elasticd.worker.marks import Mark, marks_of

MAX_PENDING = 4096


class MicroBatchClock:
    """Called in this order, once a step: begin, begin_last, end or end_together. One that raised is begun anew."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._mark = device, marks_of(device)
        #: (begin, end, micro-batches in between)
        self._pending: deque[tuple[Mark, Mark, int]] = deque(maxlen=MAX_PENDING)
        self._count = 0
        self._began: Mark | None = None
        self._began_last: Mark | None = None
        self._gradient: Mark | None = None
        self._on_gradients: Callable[[], None] = lambda: None

    def watch(self, model: torch.nn.Module, on_gradients: Callable[[], None]) -> None:
        """Notice the end of each step's last backward pass through the model, and pass it on."""
        self._on_gradients = on_gradients
        for parameter in reached_last(model):
            if parameter.device == self._device:  # a script may spread its model over devices of its own choice
                parameter.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    def begin(self, count: int) -> None:
        """A step of so many micro-batches."""
        self._count = count
        self._began, self._began_last, self._gradient = self._mark(), None, None

    def begin_last(self) -> None:
        self._began_last = self._mark()

    def end(self, *, waited: bool) -> None:
        """``waited``: other ranks may have been waited for since the gradients were there."""
        began, began_last = self._began, self._began_last
        assert began is not None
        assert began_last is not None
        self._began_last = None
        if not waited:
            self._pending.append((began, self._mark(), self._count))
        elif self._gradient is not None:
            self._pending.append((began, self._gradient, self._count))
        elif self._count > 1:
            self._pending.append((began, began_last, self._count - 1))
        else:
            self._pending.append((began, self._mark(), 1))

    def end_together(self) -> None:
        """Of micro-batches that a pipeline computed: with the waiting, where their end cannot be seen without."""
        assert self._began is not None
        self._began_last = None
        self._pending.append((self._began, self._gradient or self._mark(), self._count))

    def take(self) -> float:
        """The mean since the last call; NaN when nothing was measured. What the device has not done yet is left."""
        seconds, count = 0.0, 0
        while self._pending:
            began, ended, micro_batches = self._pending[0]
            measured = ended.seconds_since(began)
            if measured is None:
                break
            seconds += measured
            count += micro_batches
            self._pending.popleft()
        return seconds / count if count else float("nan")

    def _on_gradient(self, _: torch.Tensor) -> None:
        if self._began_last is not None:
            self._gradient = self._mark()
            self._on_gradients()


def reached_last(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameter whose gradient a backward pass most likely computes last: the first one. None in a frozen model."""
    return [each for each in model.parameters() if each.requires_grad][:1]
