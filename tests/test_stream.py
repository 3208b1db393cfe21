"""Iterable data sets: each micro-batch of the stream exactly once, whatever becomes of the world, and wrong use.

What is checked is what the stream gave, said by the samples themselves, and not what elasticd counts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import eventually
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from worker_runs import ledger, run_world, world

from elasticd import Session
from elasticd.errors import ConfigError
from elasticd.worker.draws import Draws
from elasticd.worker.loading import Source
from elasticd.worker.stream import Stream, is_stream

SIZE, COUNT, LENGTH = 2, 8, 45
DRAWS = Draws(seed=1, given=True)
pytestmark = pytest.mark.usefixtures("in_plain_python")


class Numbers(IterableDataset[torch.Tensor]):
    """0 to LENGTH - 1, from another place in each epoch; DataLoader's workers take every so manyth."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length, self.epoch, self.read = length, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, each = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(self.resume_at() * each + first, self.length, each):
            self.read += 1
            yield torch.tensor((index + 7 * self.epoch) % self.length)

    def resume_at(self) -> int:
        self.read = 0
        return 0


class Kept(Numbers):
    """The same with a state."""

    _next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["read"]

    def resume_at(self) -> int:
        self.read, self._next = self._next, 0
        return self.read


def order(micro_batches: int, *, workers: int = 0, length: int = LENGTH) -> list[list[int]]:
    """The first micro-batches of the stream, said independently of it."""
    found: list[list[int]] = []
    epoch = 0
    while len(found) < micro_batches:
        numbers = [(index + 7 * epoch) % length for index in range(length)]
        parts = [numbers[worker :: workers or 1] for worker in range(workers or 1)]
        whole = [[part[at : at + SIZE] for at in range(0, len(part) - SIZE + 1, SIZE)] for part in parts]
        for turn in range(max(map(len, whole))):
            found += [one[turn] for one in whole if turn < len(one)]
        epoch += 1
    return found[:micro_batches]


def taken(stream: Stream, step: int, owned: tuple[int, ...]) -> list[list[int]]:
    stream.begin(step, owned)
    return [stream.take((step, micro_batch)).tolist() for micro_batch in owned]


def make(dataset: Any, *, step: int = 0, saved: Any = None, **source: Any) -> Stream:
    known = Source(dataset=dataset, length=None, size=SIZE, **source)
    return Stream(known, DRAWS, step=step, micro_batches=COUNT, saved=saved)


def own_loader(workers: int = 0) -> StatefulDataLoader[torch.Tensor]:
    return StatefulDataLoader(Kept(), batch_size=SIZE, drop_last=True, num_workers=workers)


# --- one stream, without a session ---


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Numbers, Kept])
def test_it_goes_on_over_epochs_and_restarts_under_other_shares(dataset: type[Numbers], workers: int) -> None:
    """A state is taken after each second step, through JSON; another rank of another world goes on from it."""
    expected = order(12 * COUNT, workers=workers)
    stream = make(dataset(), workers=workers)
    for step in range(12):
        owned = (tuple(range(COUNT)), (0, 5), (7,), (2, 3, 4))[step % 4]
        assert taken(stream, step, owned) == [expected[step * COUNT + each] for each in owned]
        if step % 2:
            saved = json.loads(json.dumps(stream.state(step + 1)))
            stream = make(dataset(), step=step + 1, saved=saved, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Numbers, Kept])
def test_a_state_that_is_taken_at_the_end_of_an_epoch(dataset: type[Numbers], workers: int) -> None:
    """After its last micro-batch: the end itself has not been seen yet."""
    length = 2 * COUNT * SIZE
    expected = order(6 * COUNT, workers=workers, length=length)
    stream = make(dataset(length), workers=workers)
    for step in range(6):
        assert taken(stream, step, tuple(range(COUNT))) == expected[step * COUNT : (step + 1) * COUNT]
        if step % 2:
            saved = json.loads(json.dumps(stream.state(step + 1)))
            assert (saved["epoch"], saved["taken"]) == (step // 2, 2 * COUNT)
            stream = make(dataset(length), step=step + 1, saved=saved, workers=workers)


class Drawing(IterableDataset[torch.Tensor]):
    """In an order that is drawn when an epoch begins; each sample is what else was drawn for it."""

    def __init__(self, length: int = 3 * COUNT * SIZE) -> None:
        self.length = length

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = random.sample(range(self.length), self.length)
        return (torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()]) for index in order)


def drawn(stream: Stream, step: int, owned: tuple[int, ...]) -> dict[tuple[int, int], Any]:
    return {(step, micro_batch): batch for micro_batch, batch in zip(owned, taken(stream, step, owned), strict=True)}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_stream_draws_is_the_same_on_all_ranks_and_after_a_restart(workers: int) -> None:
    """Ranks whose own states differ, of other shares; the second begins in the middle of an epoch, and reads it again."""
    everything = tuple(range(COUNT))
    torch.manual_seed(1)
    first = make(Drawing(), workers=workers)
    whole = {key: batch for step in range(5) for key, batch in drawn(first, step, everything).items()}
    assert len({json.dumps(batch) for batch in whole.values()}) == len(whole)
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    second = make(Drawing(), workers=workers)
    found = drawn(second, 0, (3,)) | drawn(second, 1, (0, 7))
    third = make(Drawing(), step=2, saved=second.state(2), workers=workers)
    found |= drawn(third, 2, (5, 6)) | drawn(third, 4, everything) | drawn(third, 2, (1,))
    assert found == {key: whole[key] for key in found}


def test_a_stream_leaves_the_scripts_own_states_alone() -> None:
    def own() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand()]

    def seed() -> None:
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)

    seed()
    expected = own()
    seed()
    stream = make(Drawing())
    taken(stream, 0, (1, 2))
    stream.state(1)
    assert own() == expected


def test_a_loader_of_the_scripts_own() -> None:
    expected = order(6 * COUNT)
    stream = make(own_loader())
    assert taken(stream, 0, (0, 7)) == [expected[0], expected[7]]
    stream = make(own_loader(), step=4, saved=stream.state(4))
    assert taken(stream, 5, tuple(range(COUNT))) == expected[5 * COUNT :]


@pytest.mark.parametrize("dataset", [Numbers, Kept])
def test_a_step_that_is_done_again_has_the_same_samples(dataset: type[Numbers]) -> None:
    expected = order(8 * COUNT)
    stream = make(dataset())
    for _ in range(2):
        assert taken(stream, 3, (1, 2)) == expected[3 * COUNT + 1 : 3 * COUNT + 3]
    stream.state(3)  # a save after a failed try
    assert taken(stream, 3, (0, 1, 2)) == expected[3 * COUNT : 3 * COUNT + 3]
    assert taken(stream, 4, (6,)) == [expected[4 * COUNT + 6]]


def test_a_state_is_read_on_from_and_none_is_read_up_to(caplog: pytest.LogCaptureFixture) -> None:
    whole, kept = Numbers(LENGTH * 10), Kept(LENGTH * 10)
    for dataset in (whole, kept):
        saved = make(dataset).state(20)
        caplog.clear()
        taken(make(dataset, step=20, saved=saved), 20, (0,))
        assert ("keeps no state: 160 micro-batches of it are read again" in caplog.text) == (dataset is whole)


def test_without_torchdata_it_reads_up_to_where_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    saved = make(Kept()).state(3)
    assert "pip install 'elasticd[stream]'" in caplog.text
    assert taken(make(Kept(), step=3, saved=saved), 3, (4,)) == [order(4 * COUNT)[3 * COUNT + 4]]


def test_only_what_this_rank_computes_is_collated() -> None:
    seen = []
    stream = make(Numbers(), collate=lambda items: seen.append(items) or items)
    stream.begin(0, (3,))
    stream.take((0, 3))
    assert [[int(item) for item in items] for items in seen] == [order(4)[3]]


@pytest.mark.parametrize(
    ("dataset", "streams"),
    [
        (Numbers(), True),
        (own_loader(), True),
        ((n for n in range(3)), True),
        ({1, 2}, True),
        ([1, 2], False),
        (TensorDataset(torch.zeros(3)), False),
    ],
)
def test_what_is_a_stream(dataset: Any, streams: bool) -> None:
    assert is_stream(dataset) == streams


# --- a session's ---


def train(path: Path, checkpoints: Path, caps: list[int], until: int, workers: int, length: int) -> None:
    """Run by a rank: what its micro-batches held, in a line for each completed step. The stream is the same on all."""
    rank = int(os.environ.get("RANK", "0"))
    # As in an interpreter of its own. Workers of a fork server would outlive a rank that is killed: torch's watchdog
    # asks for their parent, which is that server.
    multiprocessing.set_start_method("fork", force=True)
    with (
        Session(
            micro_batches=COUNT, max_micro_batches=caps[rank], seed=1, checkpoint_dir=checkpoints, save_every_steps=3
        ) as session,
        path.open("a") as file,
    ):
        model = DistributedDataParallel(nn.Linear(1, 1))
        session.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
        session.restore()
        data = Kept(length)
        for step in session.steps(until=until):
            numbers = []
            with step:
                for batch in step.micro_batches(data, size=SIZE, workers=workers):
                    step.backward(model(batch[:, None].float()).mean())
                    numbers += batch.tolist()
            line = {"step": session.step, "world": session.world_size, "ids": step.sample_ids, "numbers": numbers}
            file.write(json.dumps(line) + "\n")
            file.flush()


@pytest.mark.parametrize(("workers", "length"), [(0, LENGTH), (2, 4 * LENGTH + 1)])
def test_each_sample_exactly_once_with_a_kill_and_another_world(workers: int, length: int, tmp_path: Path) -> None:
    """1 rank, then 3 with shares 1:2:5 of which one is killed, then 2."""
    path, checkpoints = tmp_path / "ledger.jsonl", tmp_path / "checkpoints"
    run_world(1, train, path, checkpoints, [COUNT], 5, workers, length)
    with world(3, train, path, checkpoints, [1, 2, 5], 10_000, workers, length) as ranks:
        eventually(lambda: any(line["step"] > 10 for line in ledger(path)), 30, f"steps of three: {ranks[0].output}")
        ranks[1].kill()
        for rank in (ranks[0], ranks[2]):
            assert rank.wait() != 0
    stood = max(int(each.name.removeprefix("step-")) for each in checkpoints.glob("step-*[0-9]"))
    assert stood % 3 == 0
    run_world(2, train, path, checkpoints, [3, COUNT], stood + 4, workers, length)

    last_world: dict[int, int] = {}
    for line in ledger(path):
        last_world[line["step"]] = line["world"]
    assert [last_world[step] for step in (5, 6, stood, stood + 1)] == [1, 3, 3, 2]
    expected = order((stood + 4) * COUNT, workers=workers, length=length)
    for step in range(1, stood + 5):
        lines = [line for line in ledger(path) if (line["step"], line["world"]) == (step, last_world[step])]
        ids, numbers = (sorted(each for line in lines for each in line[what]) for what in ("ids", "numbers"))
        assert numbers == sorted(number for one in expected[(step - 1) * COUNT : step * COUNT] for number in one), step
        assert ids == list(range((step - 1) * COUNT * SIZE, step * COUNT * SIZE))


def steps_of(session: Session, data: Any, *, until: int, size: int = SIZE, **options: Any) -> list[list[int]]:
    seen = []
    model = nn.Linear(1, 1)
    session.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    session.restore()
    for step in session.steps(until=until):
        with step:
            for batch in step.micro_batches(data, size=size, **options):
                step.backward(model(torch.as_tensor(batch)[:, None].float()).mean())
                seen.append(torch.as_tensor(batch).tolist())
        assert step.samples == COUNT * size
    return seen


class Batches(IterableDataset[Any]):
    """Makes batches by itself."""

    def __init__(self, *sizes: int, nested: bool = False) -> None:
        self.sizes, self.nested = sizes, nested

    def __iter__(self) -> Iterator[Any]:
        for size in self.sizes:
            ones = torch.ones(size)
            yield {"of": "ones", "numbers": ([], (ones, torch.ones(7)))} if self.nested else ones


class Words(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([["one", "two"]] * 9)


def test_batches_of_the_data_sets_own() -> None:
    stream = make(DataLoader(Batches(*[SIZE] * 5, nested=True), None))
    stream.begin(1, (0,))
    assert stream.take((1, 0))["numbers"][1][0].tolist() == [1.0, 1.0]


def test_a_pack_of_any_length_is_one_sample() -> None:
    with Session(micro_batches=COUNT) as session:
        packs = steps_of(session, DataLoader(Batches(*range(3, 3 + COUNT)), None), until=1, size=1)
    assert list(map(len, packs)) == list(range(3, 3 + COUNT))


def test_any_iterable_will_do_and_its_samples_are_counted() -> None:
    with Session(micro_batches=COUNT) as session:
        assert steps_of(session, dict.fromkeys(range(20), "").keys(), until=2)[0] == [0, 1]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            iter(range(17)),
            {},
            "has not one whole micro-batch of 2 samples: it is too short, or cannot be read a second",
        ),
        (Numbers(1), {}, "has not one whole micro-batch of 2 samples"),
        (DataLoader(TensorDataset(torch.zeros(30)), 2), {}, "a loader of a map-style data set: give"),
        (
            DataLoader(Numbers(), 3),
            {},
            "gives batches of 3, and micro-batches have 2 samples: make it with batch_size=2",
        ),
        (DataLoader(Numbers(), 2), {}, "drop_last=True"),
        (
            DataLoader(Batches(3), None),
            {},
            r"a batch with one of shape \(3,\) as its first tensor; micro-batches have 2",
        ),
        (DataLoader(Numbers(), None), {}, r"one of shape \(\) as its first tensor"),
        (DataLoader(Batches(2, 2, 1), None), {}, r"one of shape \(1,\) as its first tensor"),
        (DataLoader(Words(), None), {}, "a batch with no tensor"),
        (own_loader(), {"workers": 1}, "a loader has workers and a collate function of its own"),
    ],
)
def test_streams_that_do_not_fit(data: Any, options: dict[str, Any], message: str) -> None:
    with Session(micro_batches=COUNT) as session, pytest.raises(ValueError, match=message):
        steps_of(session, data, until=2, **options)


def test_a_new_stream_in_each_step_would_begin_anew() -> None:
    with Session(micro_batches=COUNT) as session:
        steps_of(session, Numbers(), until=1)
        with pytest.raises(ValueError, match=r"give step.micro_batches the same stream in each step"):  # noqa: PT012
            for step in session.steps(until=2):
                with step:
                    next(step.micro_batches(Numbers(), size=SIZE))


@pytest.mark.parametrize(
    ("changed", "message"), [({"size": 4}, "say size=2, not 4"), ({"workers": 1}, "say workers=0")]
)
def test_another_size_or_other_workers_after_a_restart(changed: dict[str, int], message: str, tmp_path: Path) -> None:
    with Session(micro_batches=COUNT, checkpoint_dir=tmp_path) as session:
        steps_of(session, Kept(), until=1)
    with Session(micro_batches=COUNT, checkpoint_dir=tmp_path) as session, pytest.raises(ConfigError, match=message):
        steps_of(session, Kept(), until=2, **changed)
