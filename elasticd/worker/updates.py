"""Sees each step() of a registered optimizer in a step's block: where it may not be, and that it has been.

In the loop over micro-batches a rank has the gradients of its own samples at most: an update there would be another on
each rank, and nothing would ever bring them together again. And a step whose update has begun cannot be done again: it
would be applied twice. A GradScaler that skips the update does not call the optimizer, and so nothing has been.

Between blocks nothing is looked at: torch steps optimizers to make their state. Not here: what the session does with a
step that was given up after its update (session.py). An optimizer's step that is compiled, or replayed as a CUDA graph,
calls no hooks: it is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch


class Updated(Protocol):
    """The step whose block is open."""

    updated: bool

    @property
    def in_loop(self) -> bool: ...


class Updates:
    """``attach`` costs a call, well below a microsecond, for each optimizer.step()."""

    def __init__(self) -> None:
        self._step: Updated | None = None

    def attach(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self._on_optimizer)

    def begin(self, step: Updated) -> None:
        self._step = step

    def end(self) -> None:
        self._step = None

    def _on_optimizer(self, *_: Any) -> None:
        if self._step is None:
            return
        if self._step.in_loop:
            raise RuntimeError(
                "call optimizer.step() after the loop over step.micro_batches(), once a step: before its end gradients "
                "are not whole"
            )
        self._step.updated = True
