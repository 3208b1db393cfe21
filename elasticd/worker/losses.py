"""The mean over the losses of a step's micro-batches, on all ranks.

To ask for it after the optimizer's step would hold up the ranks a second time, for one small number. All losses of a
rank are known before its last backward pass: where the last step's mean was asked for, this step's is under way during
that pass, and has arrived when it is asked for. On a GPU the losses are not known to the host by then, and reading them
would hold it up: there they are exchanged when they are asked for.

Not here: weights of micro-batches; they have the same size, and so the same weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from elasticd.errors import StepsDiverged


class StepLosses:
    """``group`` None: a world of one."""

    def __init__(self, micro_batches: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._micro_batches, self._group = micro_batches, group
        self._on_host = device.type == "cpu"
        self._asked_before = False
        self._exchanges = 0
        self._every = torch.empty(0)
        self._work: dist.Work | None = None

    def begin(self) -> None:
        """A new step. What was under way, and nobody asked for, is left to end by itself."""
        self._work = None

    def complete_here(self, losses: Mapping[int, torch.Tensor]) -> None:
        """This rank's losses of the step are all known; its last backward pass is to come."""
        if self._asked_before and self._on_host and self._group is not None:
            self._asked_before = False
            self._start(losses)

    def mean(self, losses: Mapping[int, torch.Tensor]) -> float:
        """Collective: the same number on all ranks, added up in the order of micro-batches on every world.

        StepsDiverged when the ranks have not asked in the same steps.
        """
        self._asked_before = True
        if self._group is None:
            return sum(_numbers(losses, self._micro_batches)) / self._micro_batches
        if self._work is None:
            self._start(losses)
        assert self._work is not None
        self._work.wait()
        *every, exchanges = self._every.tolist()
        if exchanges != self._exchanges * dist.get_world_size(self._group):
            raise StepsDiverged("step.mean_loss() was called in a step on some ranks only: all must call it")
        total: float = sum(every)
        return total / self._micro_batches

    def _start(self, losses: Mapping[int, torch.Tensor]) -> None:
        self._exchanges += 1
        # A new tensor each time: the exchange of a step that was given up may still be under way.
        said = [*_numbers(losses, self._micro_batches), float(self._exchanges)]
        self._every = torch.tensor(said, dtype=torch.float64)
        self._work = dist.all_reduce(self._every, group=self._group, async_op=True)


def _numbers(losses: Mapping[int, torch.Tensor], count: int) -> list[float]:
    """Each loss at its micro-batch's place, 0 where another rank has it. One wait for the device."""
    numbers = [0.0] * count
    if losses:
        found = torch.stack([loss.reshape(()).double() for loss in losses.values()]).tolist()
        for micro_batch, loss in zip(losses, found, strict=True):
            numbers[micro_batch] = loss
    return numbers
