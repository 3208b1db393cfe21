"""One step of training, as the script sees it. What is done in its block belongs to this step alone.

Not here: what happens between two steps (session.py).
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

import torch

from elasticd.worker.data import Cursor, sample_ids, shard


class Host(Protocol):
    """What a step needs of its session."""

    cursor: Cursor
    dataset_size: int

    @property
    def seed(self) -> int: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def begin(self) -> None: ...

    def complete(self, step: Step) -> None: ...

    def abandon(self) -> None: ...


class Step:
    """``with step:`` does it. Completed when the block ends without an exception."""

    def __init__(self, host: Host, index: int) -> None:
        #: How many steps were completed before this one: the first has index 0.
        self.index = index
        self.entered = self.completed = self.stop_agreed = False
        self.started_at = 0.0
        self.metrics: dict[str, float] = {}
        self.samples = 0
        #: The size of the data set that batch_indices was told; 0 when it was not called.
        self.dataset_size = host.dataset_size
        self._host = host
        self._next_cursor = host.cursor
        self._loss_scale = 1.0

    def __enter__(self) -> Step:
        if self.entered:
            raise RuntimeError("a step is used once: take the next one from session.steps()")
        self.entered = True
        self._host.begin()
        self.started_at = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self._host.complete(self)
            self.completed = True
        else:
            self._host.abandon()

    @property
    def next_cursor(self) -> Cursor:
        """Where the data stands once this step is completed."""
        return self._next_cursor

    def batch_indices(self, *, dataset_size: int, global_batch: int) -> list[int]:
        """The sample ids of this rank's share of the step's global batch. Empty when there are more ranks than samples.

        The batch as a whole does not depend on the world: ``global_batch`` samples after the cursor, in the order given
        by (seed, epoch). Calling it again in the same step gives the same ids. ValueError when a batch does not fit, or
        when the data set has changed its size in the middle of an epoch: samples would be skipped or repeated.
        """
        if not 0 < global_batch <= dataset_size:
            raise ValueError(f"a global batch of {global_batch} does not fit a data set of {dataset_size} samples")
        cursor, known = self._host.cursor, self._host.dataset_size
        if cursor.index and dataset_size != known:
            raise ValueError(f"the data set has {dataset_size} samples, but had {known} when this epoch began")
        self.dataset_size = dataset_size
        positions = shard(global_batch, self._host.rank, self._host.world_size)
        self._next_cursor = cursor.advanced(global_batch, dataset_size)
        self._loss_scale = len(positions) * self._host.world_size / global_batch
        self.samples = len(positions)
        return sample_ids(cursor, positions, size=dataset_size, seed=self._host.seed)

    @property
    def loss_scale(self) -> float:
        """What to multiply this rank's mean loss by, before ``backward``, so that DDP's mean over ranks is exact.

        DDP averages over ranks, not over samples: with shares of unequal size a sample of a small share would weigh
        more. local_count * world_size / global_batch undoes that. 0 for an empty share: such a rank computes on any one
        sample, since DDP needs a backward pass on every rank.
        """
        return self._loss_scale

    def report(self, *, loss: float | torch.Tensor | None = None, samples: int | None = None, **metrics: float) -> None:
        """Figures of this step for the daemon's metrics. ``samples``: those of this rank, known from batch_indices."""
        if loss is not None:
            self.metrics["loss"] = float(loss)
        if samples is not None:
            self.samples = samples
        self.metrics.update({name: float(value) for name, value in metrics.items()})
