"""The sample ids of this rank's micro-batches, computed many at a time.

One id costs 5 us by itself and 0.3 us among a thousand, so those of the steps to come are computed with the first that
is asked for. The memory is bounded: of ids that are no longer needed none is kept.

Not here: the order itself (data.py), which micro-batches fall to this rank (core/plan.py).
"""

from __future__ import annotations

import numpy as np

from elasticd.core.plan import positions
from elasticd.worker.data import Cursor, many_sample_ids, sample_ids

#: (step, micro-batch)
Key = tuple[int, int]
#: About so many ids are computed together: a third of a millisecond.
AT_ONCE = 1024


class SampleOrder:
    """From step ``first`` on, at whose begin the data stands at ``cursor``; a step is ``micro_batches`` of ``size``."""

    def __init__(self, first: int, cursor: Cursor, *, micro_batches: int, size: int, length: int, seed: int) -> None:
        self._first, self._cursor = first, cursor
        self._micro_batches, self._size, self._length, self._seed = micro_batches, size, length, seed
        self._step = first
        self._owned: tuple[int, ...] = ()
        self._known: dict[Key, list[int]] = {}

    def begin(self, step: int, owned: tuple[int, ...]) -> None:
        """The step to come, and what of it (and, for all that is known, of those after it) falls to this rank."""
        if owned != self._owned:
            self._known.clear()
        self._step, self._owned = step, owned

    def cursor_at(self, step: int) -> Cursor:
        return self._cursor.advanced(self._samples_before(step), self._length)

    def ids_of(self, key: Key) -> list[int]:
        """Not to be changed by the caller."""
        if key not in self._known:
            self._compute(*key)
        return self._known[key]

    def _compute(self, step: int, micro_batch: int) -> None:
        self._known = {key: ids for key, ids in self._known.items() if key[0] >= self._step}
        if micro_batch not in self._owned:  # asked for under older shares
            at = [self._samples_before(step) + each for each in positions(micro_batch, self._size)]
            self._known[step, micro_batch] = sample_ids(self._cursor, at, size=self._length, seed=self._seed)
            return
        steps = range(step, step + max(1, AT_ONCE // (len(self._owned) * self._size)))
        starts = [self._samples_before(each) + m * self._size for each in steps for m in self._owned]
        where = np.asarray(starts, dtype=np.uint64)[:, None] + np.arange(self._size, dtype=np.uint64)
        ids = many_sample_ids(self._cursor, where, size=self._length, seed=self._seed).tolist()
        self._known.update(zip(((each, m) for each in steps for m in self._owned), ids, strict=True))

    def _samples_before(self, step: int) -> int:
        """Between the first step and this one."""
        return (step - self._first) * self._micro_batches * self._size
