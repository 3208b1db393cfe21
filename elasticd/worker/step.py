"""One step of training, as the script sees it. What is done in its block belongs to this step alone.

Not here: what happens between two steps (session.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from elasticd.errors import ConfigError
from elasticd.worker.data import Cursor, sample_ids, shard
from elasticd.worker.gradients import Scaler
from elasticd.worker.layout import Arrangement
from elasticd.worker.loading import Collate, Source
from elasticd.worker.planned import PlannedSteps, StepWork
from elasticd.worker.stream import length_of

if TYPE_CHECKING:
    from elasticd.worker.pipeline import Pipeline


class Host(Protocol):
    """What a step needs of its session."""

    @property
    def cursor(self) -> Cursor: ...

    @property
    def dataset_size(self) -> int: ...

    @property
    def seed(self) -> int: ...

    @property
    def arranged(self) -> Arrangement: ...

    @property
    def planned(self) -> PlannedSteps | None: ...

    def begin(self, step: Step) -> None: ...

    def complete(self, step: Step) -> None: ...

    def abandon(self, step: Step) -> None: ...


class Step:
    """``with step:`` does it. Completed when the block ends without an exception."""

    def __init__(self, host: Host, index: int) -> None:
        #: How many steps were completed before this one: the first has index 0.
        self.index = index
        self.entered = self.completed = self.stop_agreed = False
        #: Whether an optimizer's step has begun in the block.
        self.updated = False
        #: What the block raised.
        self.error: BaseException | None = None
        self.started_at = 0.0
        self.metrics: dict[str, float] = {}
        self.samples = 0
        #: Samples of all ranks together; 0 where the script divides its batches without batch_indices.
        self.batch_size = 0
        #: The size of the data set that batch_indices was told; 0 when it was not called.
        self.dataset_size = host.dataset_size
        self._host = host
        self._next_cursor = host.cursor
        self._loss_scale = 1.0
        self._work: StepWork | None = None

    def __enter__(self) -> Step:
        if self.entered:
            raise RuntimeError("a step is used once: take the next one from session.steps()")
        self.entered = True
        self._host.begin(self)
        self.started_at = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.error = error
        if error is not None:
            self._host.abandon(self)
            return
        if self._work is not None:
            self._end_work(self._work)
        self._host.complete(self)
        self.completed = True

    @property
    def in_loop(self) -> bool:
        """Whether micro-batches have begun, and not all of them have been."""
        return self._work is not None and not self._work.done

    @property
    def next_cursor(self) -> Cursor:
        """Where the data stands once this step is completed."""
        return self._next_cursor

    def micro_batches(
        self, dataset: Any, *, size: int, workers: int = 0, prefetch: int = 2, collate: Collate | None = None
    ) -> Iterator[Any]:
        """This rank's micro-batches of ``size`` samples, collated and on the session's device. Once a step.

            for inputs, targets in step.micro_batches(dataset, size=4):
                step.backward(loss_of(model(inputs), targets))
            optimizer.step()

        A step has as many of them as the session was told, whatever the world; their samples follow the cursor in the
        order given by (seed, epoch), and go on with the next epoch where one ends. Gradients of earlier steps are
        cleared at the loop's beginning, and are the exact mean over all micro-batches of all ranks at its end.
        With more ranks than micro-batches, some compute a stand-in that counts nothing.

        ``dataset`` has ``__len__`` and ``__getitem__`` (or ``__getitems__``); ``workers`` processes load ``prefetch``
        micro-batches each ahead of time, 0 loads here; ``collate`` as in torch's DataLoader. With workers give the same
        objects in each step: new ones start new workers. What data set and collate draw at random from the generators
        of torch, Python and NumPy follows from (seed, step, micro-batch) too, if the session has a seed
        (worker/draws.py). ``size`` may change from step to step, on all ranks alike.

        Or it is a stream: an IterableDataset, any other iterable that can be begun anew, or a (Stateful)DataLoader over
        one, with batches of ``size`` and ``drop_last``. Micro-batches are then its own in its own order, the same on
        any world; every rank reads the whole of it and keeps its part (worker/stream.py: why, and at what cost). The
        same object in each step; where it stands is in the checkpoint.

        ConfigError without ``Session(micro_batches=...)``, when a checkpoint's stream was read in another way, or when
        the ranks do not have the same data and ``size``; ValueError when a step does not fit the data set, it has
        changed its size in the middle of an epoch, or a stream has not one micro-batch; NotFinite in exact mode.
        """
        if self._host.arranged.layout.pipeline > 1:
            raise ConfigError("the layout has pipeline stages: call step.run_pipeline(...) instead of this loop")
        length = length_of(dataset)
        source = Source(dataset=dataset, length=length, size=size, workers=workers, prefetch=prefetch, collate=collate)
        planned, work = self._begin_work(source)
        return planned.run(self.index, self._host.cursor, source, work)

    def run_pipeline(
        self,
        pipeline: Pipeline,
        dataset: Any,
        *,
        size: int,
        workers: int = 0,
        prefetch: int = 2,
        collate: Collate | None = None,
    ) -> None:
        """Collective: forward and backward passes of the replica's micro-batches, by its pipeline. Once a step.

        What is said of ``micro_batches`` holds; what this rank computes of them is its stage.
        """
        if self._host.arranged.layout.pipeline == 1:
            raise ConfigError("the layout has no pipeline stages: say Session(layout=Layout(pipeline=...))")
        length = length_of(dataset)
        source = Source(dataset=dataset, length=length, size=size, workers=workers, prefetch=prefetch, collate=collate)
        planned, work = self._begin_work(source)
        planned.run_pipeline(self.index, self._host.cursor, source, work, pipeline)

    def _begin_work(self, source: Source) -> tuple[PlannedSteps, StepWork]:
        planned = self._host.planned
        if planned is None:
            raise ConfigError("say how many micro-batches a step has, for the whole job: Session(micro_batches=...)")
        if self._work is not None or not self.entered:
            raise RuntimeError("loop over step.micro_batches() once in each step, inside 'with step:'")
        if self.batch_size:
            raise RuntimeError("take a step's samples from step.micro_batches() or step.batch_indices(), not from both")
        numbers = (source.size, source.workers, source.prefetch)
        if (
            any(type(number) is not int for number in numbers)
            or source.size < 1
            or source.workers < 0
            or numbers[2] < 1
        ):
            raise ValueError("a micro-batch has at least 1 sample, workers are not negative, and prefetch at least 1")
        batch_size = planned.micro_batches * source.size
        if source.length is not None:
            self._advance(source.length, batch_size, f"{planned.micro_batches} micro-batches of {source.size}: ")
        self.batch_size = batch_size
        self._work = StepWork(planned)
        return planned, self._work

    def _end_work(self, work: StepWork) -> None:
        try:
            work.end()
        except BaseException as error:
            self.error = error
            self._host.abandon(self)
            raise
        self.samples = self._counted(work.sample_ids)

    def backward(self, loss: torch.Tensor, *, scaler: Scaler | None = None) -> None:
        """The backward pass of one micro-batch, from the mean loss over its samples, weighted for the step's mean.

        ``loss``: one number, with its graph; best in float32, also under autocast. ``scaler``: for training in fp16, a
        torch.amp.GradScaler; give it here instead of ``scaler.scale(loss)``, so that ``mean_loss`` is not scaled. Then
        ``scaler.step(optimizer)`` and ``scaler.update()`` after the loop, and ``extra={"scaler": scaler}`` at
        ``session.register``.

        RuntimeError outside of the loop or a second time, ValueError for another loss, or one of another type in the
        same step; ConfigError for a scaler in exact mode.
        """
        self._begun_work().backward(loss, scaler)

    def mean_loss(self) -> float:
        """Collective, after the loop: the mean over all micro-batches of all ranks, the same number on each of them.

        All ranks must ask, in the same steps: not ``if rank == 0``. RuntimeError before the loop has ended;
        StepsDiverged where it is seen that only some ranks ask (losses.py).
        """
        return self._begun_work().mean_loss()

    @property
    def sample_ids(self) -> list[int]:
        """The samples that this rank's replica has had in this step so far, in order: the same on all its ranks."""
        return list(self._work.sample_ids) if self._work is not None else []

    def _begun_work(self) -> StepWork:
        if self._work is None:
            raise RuntimeError("loop over step.micro_batches() first")
        return self._work

    def batch_indices(self, *, dataset_size: int, global_batch: int) -> list[int]:
        """The sample ids of this replica's share of the step's global batch. Empty when there are more than samples.

        The batch as a whole does not depend on the world: ``global_batch`` samples after the cursor, in the order given
        by (seed, epoch). Calling it again in the same step gives the same ids. ValueError when a batch does not fit, or
        when the data set has changed its size in the middle of an epoch: samples would be skipped or repeated.
        """
        if self._work is not None:
            raise RuntimeError("take a step's samples from step.micro_batches() or step.batch_indices(), not from both")
        self._advance(dataset_size, global_batch)
        self.batch_size = global_batch
        arranged = self._host.arranged
        positions = shard(global_batch, arranged.replica, arranged.replicas)
        self._loss_scale = len(positions) * arranged.replicas / global_batch
        self.samples = self._counted(positions)
        return sample_ids(self._host.cursor, positions, size=dataset_size, seed=self._host.seed)

    def _counted(self, samples: Sequence[int]) -> int:
        """All ranks of a replica have the same samples: one of them counts them."""
        return len(samples) if self._host.arranged.leads else 0

    def _advance(self, dataset_size: int, global_batch: int, what: str = "") -> None:
        """The step's samples are the next ``global_batch`` of so many."""
        if not 0 < global_batch <= dataset_size:
            raise ValueError(
                f"{what}a global batch of {global_batch} does not fit a data set of {dataset_size} samples"
            )
        cursor, known = self._host.cursor, self._host.dataset_size
        if cursor.index and dataset_size != known:
            raise ValueError(f"the data set has {dataset_size} samples, but had {known} when this epoch began")
        self.dataset_size = dataset_size
        self._next_cursor = cursor.advanced(global_batch, dataset_size)

    @property
    def loss_scale(self) -> float:
        """What to multiply this rank's mean loss by, before ``backward``, so that DDP's mean over replicas is exact.

        DDP averages over replicas, not over samples: with shares of unequal size a sample of a small share would weigh
        more. local_count * replicas / global_batch undoes that. 0 for an empty share: such a rank computes on any one
        sample, since DDP needs a backward pass on every rank.
        """
        return self._loss_scale

    def report(self, *, loss: float | torch.Tensor | None = None, samples: int | None = None, **metrics: float) -> None:
        """Figures of this step, for the daemon's metrics and ``session.progress``: each one number, or a tensor of one.

        ``samples``: those of this rank, where neither micro_batches nor batch_indices has said it. ValueError for what
        is no number.
        """
        if loss is not None:
            self.metrics["loss"] = float(loss)
        if samples is not None:
            self.samples = samples
        self.metrics.update({name: float(value) for name, value in metrics.items()})
