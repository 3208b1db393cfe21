"""A step's micro-batches on this rank: which they are, their data, their gradients, their time.

What a micro-batch computes depends on the job's seed, the step and its number in it, and on nothing of the world: its
samples (data.py) and, where the job has a seed, torch's random states, from which dropout draws.

Not here: the step that they belong to (step.py), how each of these is done (loading.py, gradients.py, exact.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from elasticd.worker.clock import MicroBatchClock
from elasticd.worker.data import Cursor
from elasticd.worker.exact import ExactGradients
from elasticd.worker.gradients import Gradients, MeanGradients, shards, trained
from elasticd.worker.loading import Loader, Source, make_loader, to_device
from elasticd.worker.losses import StepLosses
from elasticd.worker.order import SampleOrder
from elasticd.worker.shares import CurrentShares, Work, as_told
from elasticd.worker.state import Registered, derive_seed


class PlannedSteps:
    """One for each session that says how many micro-batches a step has. Collective to make."""

    def __init__(
        self,
        work: Work,
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        seed: int | None,
        tell: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._work, self._device, self._seed = work, device, seed
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._shares = CurrentShares(work, group, tell)
        self._clock = MicroBatchClock(device)
        self._losses = StepLosses(work.micro_batches, group, device)
        self._gradients: Gradients | None = None
        self._source: Source | None = None
        self._loader: Loader | None = None
        self._order: SampleOrder | None = None

    @property
    def micro_batches(self) -> int:
        return self._work.micro_batches

    @property
    def shares(self) -> tuple[int, ...]:
        return self._shares.plan.shares

    # What the session does between steps.

    def use(self, registered: Registered, on_gradients: Callable[[], None]) -> None:
        """The model whose gradients are meant. ConfigError when they could not be averaged as asked for.

        ``on_gradients`` is called, where that can be seen, when this rank has computed all gradients of a step.
        """
        make = ExactGradients if self._work.exact else MeanGradients
        self._gradients = make(registered, micro_batches=self.micro_batches, world_size=self._world_size)
        self._clock.watch(trained(registered), on_gradients)
        if self._work.balance == "auto":
            self._shares.balanced = not shards(registered)

    def measure(self) -> int:
        """Of the time since the last call, as it is told to the others."""
        return as_told(self._clock.take())

    def decide(self, step: int, told: list[int]) -> None:
        self._shares.decide(step, told)

    def close(self) -> None:
        """Workers that load ahead end."""
        self._loader = None

    # What a step does.

    def run(self, step: int, cursor: Cursor, source: Source, begun: StepWork) -> Iterator[Any]:
        """This rank's micro-batches, one at a time, each to be followed by ``begun.backward``."""
        gradients, clock = self._known_gradients(), self._clock
        owned = self._shares.plan.owned[self._rank]
        todo = owned or (0,)  # a stand-in: as finite as the step is
        order, loader = self._order_of(source, step, cursor)
        order.begin(step, todo)
        loader.begin(step, todo)
        self._losses.begin()
        gradients.clear(unequal=len(set(self.shares)) > 1)
        clock.begin(len(todo))
        for micro_batch in todo:
            last = micro_batch == todo[-1]
            if last:
                clock.begin_last()
            batch = loader.take((step, micro_batch))
            if self._device.type != "cpu":
                batch = to_device(batch, self._device)
            self._seed_for(step, micro_batch)
            gradients.before(last=last)
            begun.open(micro_batch, order.ids_of((step, micro_batch)), counts=bool(owned), last=last)
            yield batch
            begun.check_closed()
        clock.end(waited=not self._work.exact)
        gradients.finish()
        begun.done = True

    def backward(self, loss: torch.Tensor, *, counts: bool) -> None:
        self._known_gradients().backward(loss, counts=counts)

    @property
    def losses(self) -> StepLosses:
        return self._losses

    def _known_gradients(self) -> Gradients:
        if self._gradients is None:
            raise RuntimeError(
                "step.micro_batches needs the model: call session.register(model=..., optimizer=...) first"
            )
        return self._gradients

    def _order_of(self, source: Source, step: int, cursor: Cursor) -> tuple[SampleOrder, Loader]:
        """Those that are in use, as long as the data set is the same and the cursor where it was expected."""
        known = self._source is not None and self._source.is_like(source)
        if self._loader is None or self._order is None or not known or self._order.cursor_at(step) != cursor:
            self._source = source
            self._order = SampleOrder(
                step,
                cursor,
                micro_batches=self.micro_batches,
                size=source.size,
                length=source.length,
                seed=self._seed or 0,
            )
            self._loader = make_loader(source, self._order.ids_of)
        return self._order, self._loader

    def _seed_for(self, step: int, micro_batch: int) -> None:
        """torch.manual_seed would take 0.1 ms, for devices that are not in use."""
        if self._seed is None and not self._work.exact:
            return
        seed = derive_seed(self._seed or 0, step, micro_batch, 1)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index].manual_seed(seed)


class StepWork:
    """What a step has done of its micro-batches: each is opened, gets one backward pass, and is closed."""

    def __init__(self, planned: PlannedSteps) -> None:
        self._planned = planned
        self._open: int | None = None
        self._counts, self._last = True, False
        self.done = False
        self.sample_ids: list[int] = []
        self._losses: dict[int, torch.Tensor] = {}

    def open(self, micro_batch: int, ids: list[int], *, counts: bool, last: bool) -> None:
        """``last``: of this rank's in the step."""
        self._open, self._counts, self._last = micro_batch, counts, last
        if counts:
            self.sample_ids += ids

    def backward(self, loss: torch.Tensor) -> None:
        """RuntimeError outside of the loop, or a second time; ValueError when the loss is not one number."""
        if self._open is None:
            raise RuntimeError("call step.backward(loss) once for each micro-batch, in the loop over them")
        if loss.numel() != 1:
            raise ValueError(f"a loss of shape {tuple(loss.shape)}: give step.backward the mean over the micro-batch")
        if self._counts:
            self._losses[self._open] = loss.detach()
        self._open = None
        if self._last:
            self._planned.losses.complete_here(self._losses)
        self._planned.backward(loss, counts=self._counts)

    def check_closed(self) -> None:
        if self._open is not None:
            raise RuntimeError("a micro-batch had no step.backward(loss): its samples would be missing from the step")

    def check_done(self) -> None:
        if not self.done:
            raise RuntimeError(
                "the loop over step.micro_batches() was left early: samples would be missing from the step"
            )

    def mean_loss(self) -> float:
        self.check_done()
        return self._planned.losses.mean(self._losses)
