"""How long this rank waited for others in a step, on CPU: from its own last gradient to the optimizers' step.

Between the two, DDP waits for the slowest rank and for the last bucket of gradients to cross the network: a rank that
never waits still shows the latter. On CUDA the host runs ahead of the device and these times mean nothing: not used.

Not here: the wait at the end of the step (control.py), which is added to it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch


class GradientWait:
    """``attach`` costs one small call for each parameter and backward pass."""

    def __init__(self) -> None:
        self._last_gradient_at = 0.0
        self._waited_s = 0.0

    def attach(self, parameters: Iterable[torch.nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """No parameters: who knows it better calls ``gradients_came`` when the last gradient of a step is there."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        for optimizer in optimizers:  # the first that steps ends the wait
            optimizer.register_step_pre_hook(self._on_optimizer)

    def take(self) -> float:
        """Seconds waited since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def gradients_came(self) -> None:
        self._last_gradient_at = time.monotonic()

    def _on_gradient(self, _: torch.Tensor) -> None:
        self._last_gradient_at = time.monotonic()

    def _on_optimizer(self, *_: Any) -> None:
        if self._last_gradient_at:
            self._waited_s += time.monotonic() - self._last_gradient_at
            self._last_gradient_at = 0.0
