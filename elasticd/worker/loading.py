"""Micro-batches of a map-style data set, loaded here or ahead of time by torch's DataLoader workers.

Workers are given the ids of micro-batches to come: of this step, then of the next ones, as far as shares stand. When
they change, what had been asked for and now falls to another rank is dropped as it arrives, and what is new here is
asked for first. So a change of shares costs a few loads, and never a sample.

Not here: which micro-batches this rank computes (core/plan.py), iterable data sets (stream.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from elasticd.worker.draws import LOADER, MICRO_BATCH, Draws, seed_global
from elasticd.worker.order import Key

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a step's micro-batches come from. ``dataset`` has ``__len__`` and ``__getitem__`` (or ``__getitems__``).

    ``length``: of the data set, when this was made; None: it is a stream (stream.py). ``workers`` 0: loaded
    when needed, in this process. ``prefetch``: micro-batches ahead for each worker.
    """

    dataset: Any
    length: int | None
    size: int
    workers: int = 0
    prefetch: int = 2
    collate: Collate | None = None

    def changed_from(self, other: Source) -> list[str]:
        """The arguments in which they differ. Data sets are not compared: that may take long or mean something else."""
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        return [name for name, (new, old) in pairs.items() if new is not old and (name == "dataset" or new != old)]

    @property
    def readers(self) -> int | None:
        """The processes that read a stream, on whose number its order depends; None of a map-style data set."""
        if self.length is not None:
            return None
        return self.dataset.num_workers if isinstance(self.dataset, DataLoader) else self.workers

    def described(self) -> str:
        """In the same words on all ranks, if they have the same data set: by what is cheap to know of it.

        Parts of equal length are told apart where they are torch's Subsets.
        """
        if self.length is None:
            return "a stream"
        which = _checksum_of_indices(self.dataset)
        return f"{self.length} samples" + (f" of a Subset, indices {which:08x}" if which else "")


def _checksum_of_indices(dataset: Any) -> int:
    """Of a Subset, of a Subset's Subset too. 0 for everything else, and for indices that are no numbers."""
    checksum = 0
    while isinstance(dataset, Subset):
        try:
            checksum = crc32(np.asarray(dataset.indices, dtype=np.int64).tobytes(), checksum)
        except (TypeError, ValueError, OverflowError):
            return 0
        dataset = dataset.dataset
    return checksum


class DirectLoader:
    """Loads in this process, when asked."""

    def __init__(self, source: Source, ids_of: Callable[[Key], list[int]], draws: Draws) -> None:
        self._source, self._ids_of, self._draws = source, ids_of, draws

    def begin(self, step: int, owned: tuple[int, ...]) -> None:
        pass

    def take(self, key: Key) -> Any:
        source = self._source
        collate = source.collate or default_collate
        with self._draws.aside():
            self._draws.seed_here(*key, MICRO_BATCH)
            return collate(_fetch(source.dataset, self._ids_of(key)))


class _Seeded(Dataset[Any]):
    """A data set as workers see it: what they draw is seeded before a micro-batch's samples are fetched."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, asked: list[int]) -> list[Any]:
        seed, *ids = asked
        seed_global(seed)
        return _fetch(self._dataset, ids)


class PrefetchingLoader:
    """Loads in worker processes, ahead of time. ``ids_of`` says which samples a micro-batch has.

    ``pinned``: for a GPU, to which only pinned memory is copied beside what the device computes.
    """

    def __init__(
        self, source: Source, ids_of: Callable[[Key], list[int]], draws: Draws, *, pinned: bool = False
    ) -> None:
        self._ids_of, self._draws = ids_of, draws
        self._step = 0
        self._owned: tuple[int, ...] = ()
        #: Asked for, in the order in which they come; and what came before it was needed.
        self._asked: deque[Key] = deque()
        self._ready: dict[Key, Any] = {}
        self._urgent: deque[Key] = deque()
        #: The step up to which everything has been asked for, and what is left of it.
        self._ahead = -1
        self._rest: deque[Key] = deque()
        self._generator = torch.Generator()  # or it would draw from the script's random state
        self._loader: DataLoader[Any] = DataLoader(
            _Seeded(source.dataset),
            batch_sampler=self,
            num_workers=source.workers,
            prefetch_factor=source.prefetch,
            collate_fn=source.collate,
            generator=self._generator,
            pin_memory=pinned,
        )
        self._batches: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        """What is to be loaded next, without an end: each time a micro-batch's seed and its ids.

        torch asks in this process, once for each batch taken.
        """
        while True:
            key = self._next_key()
            self._asked.append(key)
            yield [self._draws.of(*key, MICRO_BATCH), *self._ids_of(key)]

    def begin(self, step: int, owned: tuple[int, ...]) -> None:
        """The step to come, and what of it (and, for all that is known, of those after it) falls to this rank."""
        if owned != self._owned:
            self._owned = owned
            asked = set(self._asked)
            self._ready = {key: batch for key, batch in self._ready.items() if key[1] in owned}
            known = asked | self._ready.keys()
            # The step that is half asked for begins anew, as do all before it.
            wanted = [(each, m) for each in range(step, self._ahead + 1) for m in owned]
            self._urgent = deque(key for key in wanted if key not in known)
            self._rest.clear()
        self._step = step
        self._ready = {key: batch for key, batch in self._ready.items() if key[0] >= step}
        if self._ahead < step - 1:
            self._ahead = step - 1

    def take(self, key: Key) -> Any:
        if self._batches is None:
            self._generator.manual_seed(self._draws.of(self._step, self._draws.replica, LOADER))
            self._batches = iter(self._loader)
        if key not in self._ready and key not in self._asked and key not in self._urgent and key not in self._rest:
            self._urgent.appendleft(key)  # a step that is done again, or one that was not expected
        while key not in self._ready:
            batch = next(self._batches)
            arrived = self._asked.popleft()
            if arrived[0] >= self._step and arrived[1] in (*self._owned, key[1]):
                self._ready[arrived] = batch
        return self._ready.pop(key)

    def _next_key(self) -> Key:
        if self._urgent:
            return self._urgent.popleft()
        if not self._rest:
            self._ahead += 1
            self._rest.extend((self._ahead, m) for m in self._owned)
        return self._rest.popleft()


Loader = DirectLoader | PrefetchingLoader


def make_loader(source: Source, ids_of: Callable[[Key], list[int]], draws: Draws, *, pinned: bool) -> Loader:
    if source.workers:
        return PrefetchingLoader(source, ids_of, draws, pinned=pinned)
    return DirectLoader(source, ids_of, draws)


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors, in tuples, lists and mappings too, on that device; everything else as it is."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _fetch(dataset: Any, ids: list[int]) -> list[Any]:
    """As torch's own DataLoader does it."""
    if getattr(dataset, "__getitems__", None):
        samples: list[Any] = dataset.__getitems__(ids)
        return samples
    return [dataset[each] for each in ids]
