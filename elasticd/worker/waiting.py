"""How long this rank waited for others in a step: from its own last gradient to the optimizers' step.

Between the two, DDP waits for the slowest rank and for the last bucket of gradients to cross the network: a rank that
never waits still shows the latter. On CUDA it is the device's time, known a step or two later, and counted then.

Not here: the wait at the end of the step (control.py), which is added to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from elasticd.worker.marks import Mark, marks_of

#: Steps that the device is behind; more are forgotten.
MAX_PENDING = 64


class GradientWait:
    """``attach`` costs one small call for each parameter and backward pass; on CUDA, where it is an event, for one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._make = device, marks_of(device)
        self._gradient: Mark | None = None
        self._pending: deque[tuple[Mark, Mark]] = deque(maxlen=MAX_PENDING)
        self._new = 0

    def attach(self, parameters: Iterable[torch.nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """No parameters: who knows it better calls ``gradients_came`` when the last gradient of a step is there."""
        watched = [each for each in parameters if each.requires_grad and each.device == self._device]
        for parameter in watched if self._device.type == "cpu" else watched[:1]:  # the last one to have its gradient
            parameter.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        for optimizer in optimizers:  # the first that steps ends the wait
            optimizer.register_step_pre_hook(self._on_optimizer)

    def take(self) -> float:
        """Seconds waited since the last call, as far as the device has come."""
        waited_s = 0.0
        while self._pending:
            gradient, optimizer = self._pending[0]
            seconds = optimizer.seconds_since(gradient)
            if seconds is None:
                break
            waited_s += seconds
            self._pending.popleft()
        self._new = 0
        return waited_s

    def drop(self) -> None:
        """Of a step that was given up."""
        self._gradient = None
        for _ in range(min(self._new, len(self._pending))):
            self._pending.pop()
        self._new = 0

    def gradients_came(self) -> None:
        if self._gradient is None:
            self._gradient = self._make()
        else:
            self._gradient.record()

    def _on_gradient(self, _: torch.Tensor) -> None:
        self.gradients_came()

    def _on_optimizer(self, *_: Any) -> None:
        if self._gradient is not None:
            self._pending.append((self._gradient, self._make()))
            self._new += 1
            self._gradient = None
