"""Micro-batches of an iterable data set: one stream, which every rank reads, and of which each keeps its own.

Micro-batch m of step s is the (s * M + m)-th that the stream gives, on any world. So a rank that dies, joins or gets
another share changes nothing of the order; nothing has to move between ranks, and one small state, the same on all of
them, is enough for a checkpoint. The price is that each rank reads the whole stream: reading and decoding cost as much
as in a world of one, in ``workers`` processes ahead of time where that is too slow; only what a rank keeps is put on
its device (and collated, without workers). To divide the stream into shards instead would read each sample once, but
the state of a shard would have to follow each change of shares, and its samples would depend on the number of shards.
Where decoding is dear, a map-style data set, of which each rank reads only its own, is the better one.

All ranks must see the same stream: it must not ask for the rank. What it draws at random from the global generators is
the same on all of them where the session has a seed (draws.py): without workers they are seeded for each micro-batch
that is read, with workers at the begin of each epoch and then not again. So a stream that draws, is read by workers and
keeps a state must keep its generator's too, or what it draws after a restart is not what it would have drawn. Without a
seed it must draw from a generator of its own, seeded.

torchdata's StatefulDataLoader keeps the state. A stream without one (no ``state_dict`` in the data set, or torchdata
not installed) is read again from the beginning of its epoch at a restart, up to where it was.

Epochs follow one another. Of each, samples that are too few for one more micro-batch are dropped (with workers: of
each worker). ``set_epoch`` of the data set is called before an epoch, where there is one.

Not here: map-style data sets (loading.py), and which micro-batches are this rank's (core/plan.py).
"""

from __future__ import annotations

import base64
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from elasticd.errors import ConfigError
from elasticd.worker.draws import STREAM_BATCH, STREAM_EPOCH, Draws
from elasticd.worker.loading import Source
from elasticd.worker.order import Key

log = logging.getLogger(__name__)

_END = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a stream stands: ``taken`` micro-batches of epoch ``epoch``, ``total`` of all epochs.

    ``state``: of the loader there, as text; None where it keeps none.
    """

    epoch: int = 0
    taken: int = 0
    total: int = 0
    state: str | None = None


class Stream:
    """One for each session that reads a stream. ``saved``: what ``state`` gave at the step that is now the first.

    ConfigError when that was of micro-batches of another size, or of other workers.
    """

    def __init__(
        self, source: Source, draws: Draws, *, step: int, micro_batches: int, saved: Mapping[str, Any] | None
    ) -> None:
        self._source, self._draws, self._first, self._micro_batches = source, draws, step, micro_batches
        self._generator = torch.Generator()  # or workers' seeds would be drawn from the script's random state
        self._loader, collated = _make_loader(source, self._generator)
        self._collate = None if collated else source.collate or default_collate
        self._dataset = source.dataset.dataset if isinstance(source.dataset, DataLoader) else source.dataset
        self._batches: Iterator[Any] = iter(())
        self._kept: dict[Key, Any] = {}
        self._total = 0
        with draws.aside():
            if saved is None:
                self._begin_epoch(0)
                self._origin = self._position()
            else:
                self._origin = _checked(saved, size=source.size, workers=self._loader.num_workers)
                self._go_to_origin()
        self._base = self._origin.total

    def begin(self, step: int, owned: tuple[int, ...]) -> None:  # noqa: ARG002 - as the loaders of map-style data have it
        """The step to come; what was kept of it is there again, if it is done a second time."""
        self._kept = {key: batch for key, batch in self._kept.items() if key[0] >= step}

    def take(self, key: Key) -> Any:
        """ValueError when the stream has not even one whole micro-batch, or gives one of another size."""
        if key not in self._kept:
            with self._draws.aside():
                self._skip_to(self._number(key))
                batch = self._next()
                self._kept[key] = batch if self._collate is None else self._collate(batch)
        return self._kept[key]

    def ids_of(self, key: Key) -> list[int]:
        """Its samples, counted from the first that the stream gave."""
        size = self._source.size
        first = self._number(key) * size
        return list(range(first, first + size))

    def is_like(self, source: Source) -> bool:
        return not source.changed_from(self._source)

    def state(self, step: int) -> dict[str, Any]:
        """For a checkpoint: where the stream stands before this step. Reads up to there what is others'."""
        with self._draws.aside():
            self._skip_to(self._number((step, 0)))
            self._origin = self._position()
        return asdict(self._origin) | {"size": self._source.size, "workers": self._loader.num_workers}

    def _number(self, key: Key) -> int:
        step, micro_batch = key
        return self._base + (step - self._first) * self._micro_batches + micro_batch

    def _skip_to(self, number: int) -> None:
        if number < self._total:  # a step that is done again
            self._go_to_origin()
        while self._total < number:
            self._next()

    def _next(self) -> Any:
        """The next micro-batch of the stream, whoever's it is, of this epoch or the next."""
        batch = self._read()
        if batch is _END:
            self._begin_epoch(self._epoch + 1)
            batch = self._read()
            if batch is _END:
                raise ValueError(
                    f"the stream has not one whole micro-batch of {self._source.size} samples: it is too short, or "
                    "cannot be read a second time (an iterator that is used up; give what iter() can begin anew)"
                )
        if self._loader.batch_size is None:  # a loader of the script's own, whose data set makes batches
            _check_size(batch, self._source.size)
        return batch

    def _read(self) -> Any:
        """The next of this epoch; _END after the last."""
        if not self._loader.num_workers:
            self._draws.seed_here(self._total, 0, STREAM_BATCH)
        batch = next(self._batches, _END)
        if batch is not _END:
            self._taken += 1
            self._total += 1
        return batch

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._taken = epoch, 0
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)
        self._generator.manual_seed(self._draws.of(epoch, 0, STREAM_EPOCH))
        self._draws.seed_here(epoch, 0, STREAM_EPOCH)
        self._batches = iter(self._loader)

    def _go_to_origin(self) -> None:
        origin = self._origin
        if origin.state is not None:
            self._loader.load_state_dict(_decode(origin.state))
        self._begin_epoch(origin.epoch)
        self._total = origin.total - origin.taken
        if origin.state is None and origin.taken:
            log.warning("elasticd: the stream keeps no state: %d micro-batches of it are read again", origin.taken)
            for _ in range(origin.taken):
                self._read()
        self._taken, self._total = origin.taken, origin.total

    def _position(self) -> Position:
        return Position(epoch=self._epoch, taken=self._taken, total=self._total, state=_state_of(self._loader))


def is_stream(dataset: Any) -> bool:
    """Whether it is read from the front (an IterableDataset, a loader, any iterable), and not by index."""
    if isinstance(dataset, IterableDataset | DataLoader):
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")


def length_of(dataset: Any) -> int | None:
    """None for a stream. ValueError when it is neither that nor a data set of known length."""
    if is_stream(dataset):
        return None
    by_index = hasattr(dataset, "__getitem__") and not isinstance(dataset, Mapping)
    if by_index and hasattr(dataset, "__len__"):
        return len(dataset)
    kind = type(dataset).__name__
    raise ValueError(f"{kind} is no data set: it needs __len__ and __getitem__(index), or __iter__ if it is a stream")


class _Items(IterableDataset[Any]):
    """Any iterable, in the form that torch's loaders ask for."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class _StatefulItems(_Items):
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.items.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.items.load_state_dict(state)


def _make_loader(source: Source, generator: torch.Generator) -> tuple[Any, bool]:
    """A loader of whole micro-batches, and whether they come collated. ValueError when a loader does not fit."""
    if isinstance(source.dataset, DataLoader):
        return _fitting(source.dataset, source), True
    dataset = source.dataset
    if not isinstance(dataset, IterableDataset):
        stateful = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        dataset = _StatefulItems(dataset) if stateful else _Items(dataset)
    ahead: dict[str, Any] = (
        {"num_workers": source.workers, "prefetch_factor": source.prefetch} if source.workers else {}
    )
    # Without workers, what other ranks compute is not collated.
    collate = source.collate if source.workers else list
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 under torch 2.13
        made = _loader_class()(dataset, source.size, drop_last=True, collate_fn=collate, generator=generator, **ahead)
    return made, bool(source.workers)


def _loader_class() -> type[DataLoader[Any]]:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ModuleNotFoundError:
        log.warning("elasticd: without torchdata a stream keeps no state: pip install 'elasticd[stream]'")
        return DataLoader
    stateful: type[DataLoader[Any]] = StatefulDataLoader
    return stateful


def _fitting(loader: DataLoader[Any], source: Source) -> DataLoader[Any]:
    """A loader of the script's own: what it gives is a micro-batch each time."""
    if not isinstance(loader.dataset, IterableDataset):
        raise ValueError("a loader of a map-style data set: give step.micro_batches the data set itself")
    if loader.batch_size is not None and (loader.batch_size != source.size or not loader.drop_last):
        raise ValueError(
            f"the loader gives batches of {loader.batch_size}, and micro-batches have {source.size} samples: make it "
            f"with batch_size={source.size} and drop_last=True"
        )
    if source.workers or source.collate is not None:
        raise ValueError("a loader has workers and a collate function of its own: say them there")
    return loader


def _check_size(batch: Any, size: int) -> None:
    """ValueError unless the first tensor in it has as many samples: what else there is, is not known to be a sample.

    A micro-batch of one sample is whatever the loader gives: a pack of sequences, of any length.
    """
    if size == 1:
        return
    found = _first_tensor(batch)
    if found is None or not found.ndim or len(found) != size:
        shape = "no tensor" if found is None else f"one of shape {tuple(found.shape)} as its first tensor"
        raise ValueError(
            f"the loader has batch_size=None, and gives a batch with {shape}; micro-batches have {size} samples: let "
            f"its data set give tensors of shape ({size}, ...), and leave out what is too little for one; or say "
            "size=1, where each batch is one sample"
        )


def _first_tensor(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    inside = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for each in inside if (found := _first_tensor(each)) is not None), None)


def _checked(saved: Mapping[str, Any], *, size: int, workers: int) -> Position:
    if saved["size"] != size:
        raise ConfigError(
            f"the checkpoint's stream stands after micro-batches of {saved['size']} samples: say size={saved['size']}, "
            f"not {size}"
        )
    if saved["workers"] != workers:
        raise ConfigError(
            f"the checkpoint's stream was read by {saved['workers']} workers, in an order that {workers} would not "
            f"keep: say workers={saved['workers']}"
        )
    return Position(epoch=saved["epoch"], taken=saved["taken"], total=saved["total"], state=saved["state"])


def _state_of(loader: Any) -> str | None:
    """None where neither the data set nor its iterator keeps any: torchdata would count what it reads again twice."""
    if not hasattr(loader, "state_dict"):
        return None
    state = loader.state_dict()
    return _encode(state) if _holds_state(state) else None


def _holds_state(state: Any) -> bool:
    """Whether torchdata's nested state has some of the data set, of any worker."""
    if not isinstance(state, Mapping):
        return False
    own = any(state.get(name) is not None for name in ("dataset_state", "dataset_iter_state"))
    return own or any(_holds_state(value) for value in state.values())


def _encode(state: Any) -> str:
    content = io.BytesIO()
    torch.save(state, content)
    return base64.b64encode(content.getvalue()).decode()


def _decode(text: str) -> Any:
    """Of a checkpoint whose checksum has matched: it may hold whatever the data set put into it."""
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=False)
