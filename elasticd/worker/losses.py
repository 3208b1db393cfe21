"""The mean over the losses of a step's micro-batches, on all ranks.

To ask for it after the optimizer's step would hold up the ranks a second time, for one small number. All losses of a
rank are known before its last backward pass: where the last step's mean was asked for, this step's is under way during
that pass, and has arrived when it is asked for. On a GPU the losses are not known to the host by then: their copies to
the host are put before that pass, and exchanged when they are asked for, while the device is still at work behind them.

Who asks on some ranks only (``if rank == 0:``) would wait for ever: the others go on to the next step, and wait there.
So the group is one of its own, where nothing else can come in between, and in the first step of a process a rank that
has not asked takes part when the step ends, to say so: the error comes on all ranks, at once. To do so in each step
would cost each step; there a rank that waits for long says for what, and goes on: the others may only be slow.

Not here: weights of micro-batches; they have the same size, and so the same weight.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from elasticd.errors import StepsDiverged

log = logging.getLogger(__name__)

#: So long the others are waited for in silence.
PATIENCE = timedelta(seconds=10)


class StepLosses:
    """``group`` None: a world of one. It must be used for nothing else."""

    def __init__(self, micro_batches: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._micro_batches, self._group = micro_batches, group
        self._on_host = device.type == "cpu"
        self._asked_before = False
        self._agreed = False
        self._begun = 0
        self._every = torch.empty(0)
        self._work: dist.Work | None = None
        self._coming: _Coming | None = None

    def begin(self) -> None:
        """A new step, or one again. What was under way, and nobody asked for, is left to end by itself.

        Who gives its first step up says so, without waiting: others may have ended theirs, and wait for this rank.
        """
        self._begun += 1
        if self._begun > 1 and not self._agreed and not self._asked_before and self._group is not None:
            self._start({}, asks=False)
        self._work = self._coming = None

    def complete_here(self, losses: Mapping[int, torch.Tensor]) -> None:
        """This rank's losses of the step are all known; its last backward pass is to come."""
        if self._asked_before and not self._on_host:
            self._asked_before = False
            self._coming = _Coming(losses) if losses else None
        elif self._asked_before and self._group is not None:
            self._asked_before = False
            self._start(losses, asks=True)

    def mean(self, losses: Mapping[int, torch.Tensor]) -> float:
        """Collective: the same number on all ranks, added up in the order of micro-batches on every world.

        StepsDiverged when the ranks have not asked in the same steps.
        """
        self._asked_before = True
        if self._group is None:
            return sum(self._numbers(losses)) / self._micro_batches
        _wait(self._work or self._start(losses, asks=True))
        *every, asking, begun = self._every.tolist()
        if (asking, begun) != (self._group.size(), self._begun * self._group.size()):
            raise _asked_on_some_ranks()
        total: float = sum(every)
        return total / self._micro_batches

    def end_step(self) -> None:
        """Collective in the first step that ends.

        StepsDiverged when only other ranks have asked for its mean, or have given it up.
        """
        if self._agreed or self._group is None:
            return
        self._agreed = True
        if self._asked_before or self._work is not None:
            return
        self._start({}, asks=False).wait()
        self._work = None
        *_, asking, begun = self._every.tolist()
        if asking:
            raise _asked_on_some_ranks()
        if begun != self._begun * self._group.size():
            raise StepsDiverged("the first step's block raised, and was tried again, on some ranks only")

    def _start(self, losses: Mapping[int, torch.Tensor], *, asks: bool) -> dist.Work:
        # A new tensor each time: the exchange of a step that was given up may still be under way.
        said = [*self._numbers(losses), float(asks), float(self._begun)]
        self._every = torch.tensor(said, dtype=torch.float64)
        work: dist.Work = dist.all_reduce(self._every, group=self._group, async_op=True)
        self._work = work
        return work

    def _numbers(self, losses: Mapping[int, torch.Tensor]) -> list[float]:
        """Each loss at its micro-batch's place, 0 where another rank has it. One wait for the device."""
        numbers = [0.0] * self._micro_batches
        if losses:
            found = self._coming.numbers() if self._coming is not None else _stacked(losses).tolist()
            for micro_batch, loss in zip(losses, found, strict=True):
                numbers[micro_batch] = loss
        return numbers


class _Coming:
    """Losses on their way to the host: behind what computes them, before what the device is given next."""

    def __init__(self, losses: Mapping[int, torch.Tensor]) -> None:
        self._host = torch.empty(len(losses), dtype=torch.float64, pin_memory=True)
        self._host.copy_(_stacked(losses), non_blocking=True)
        self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._there.record()

    def numbers(self) -> list[float]:
        self._there.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


def _wait(work: dist.Work) -> None:
    """Until it is done; said once, if that takes long."""
    try:
        work.wait(PATIENCE)
    except RuntimeError:
        if not work.is_completed():
            log.warning(
                "elasticd: rank %d waits in step.mean_loss() for other ranks: all must call it, in the same steps",
                dist.get_rank(),
            )
        work.wait()  # raises what the exchange itself has ended in


def _asked_on_some_ranks() -> StepsDiverged:
    return StepsDiverged("step.mean_loss() was called in a step on some ranks only: all must call it")


def _stacked(losses: Mapping[int, torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss.reshape(()).double() for loss in losses.values()])
