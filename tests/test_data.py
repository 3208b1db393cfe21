"""The order of samples and who takes which: bijections, and each sample exactly once over changing worlds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticd.worker import data as module
from elasticd.worker.data import Cursor, Permutation, many_sample_ids, sample_ids, shard
from elasticd.worker.order import SampleOrder

seeds = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 700), seed=seeds, epoch=st.integers(0, 1000))
def test_a_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed=seed, epoch=epoch)
    assert sorted(order[index] for index in range(size)) == list(range(size))


@given(size=st.integers(2**20, 2**62), seed=seeds, indices=st.sets(st.integers(0, 2**20 - 1), max_size=50))
def test_a_huge_permutation_costs_no_memory_and_repeats_nothing(size: int, seed: int, indices: set[int]) -> None:
    order = Permutation(size, seed=seed, epoch=0)
    found = [order[index] for index in indices]
    assert len(set(found)) == len(indices)
    assert all(0 <= sample < size for sample in found)


def test_the_order_differs_by_seed_and_epoch_and_is_not_the_natural_one() -> None:
    def of(seed: int, epoch: int) -> list[int]:
        order = Permutation(1000, seed=seed, epoch=epoch)
        return [order[index] for index in range(1000)]

    orders = [of(1, 0), of(1, 1), of(2, 0), list(range(1000))]
    for number, one in enumerate(orders):
        for other in orders[number + 1 :]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20  # 1 is expected of independent orders
    assert of(1, 0) == of(1, 0)


def test_the_order_never_changes_between_versions() -> None:
    """A job that resumes after an upgrade must go on in the same order."""
    order = Permutation(1000, seed=7, epoch=3)
    assert [order[index] for index in range(8)] == [594, 494, 839, 951, 512, 636, 161, 38]


@given(size=st.integers(1, 2**63), seed=seeds, start=st.integers(0, 2**62), count=st.integers(96, 300))
def test_a_large_batch_is_computed_at_once_and_gives_the_same_samples(
    size: int, seed: int, start: int, count: int
) -> None:
    cursor = Cursor(epoch=3).advanced(start, size)
    one_by_one = [sample_ids(cursor, [position], size=size, seed=seed)[0] for position in range(count)]
    assert sample_ids(cursor, range(count), size=size, seed=seed) == one_by_one


def test_the_order_of_a_late_step_costs_as_much_as_that_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many epochs lie between it and the process's start."""
    made = []

    class Counted(Permutation):
        def __init__(self, size: int, *, seed: int, epoch: int) -> None:
            made.append(epoch)
            super().__init__(size, seed=seed, epoch=epoch)

    monkeypatch.setattr(module, "Permutation", Counted)
    order = SampleOrder(0, Cursor(epoch=2), micro_batches=4, size=16, length=640, seed=9)
    for step in (0, 5000):  # an epoch has ten steps; ids of sixteen are computed together
        made.clear()
        order.begin(step, (0, 1, 2, 3))
        order.ids_of((step, 0))
        assert made == [2 + step // 10, 3 + step // 10]


def test_no_samples_are_an_empty_array() -> None:
    none = np.empty((0, 3), dtype=np.uint64)
    assert many_sample_ids(Cursor(), none, size=5, seed=1).shape == (0, 3)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    with pytest.raises(IndexError):
        Permutation(10, seed=0, epoch=0)[index]


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        Permutation(0, seed=0, epoch=0)


@given(count=st.integers(0, 200), world_size=st.integers(1, 40))
def test_shards_are_contiguous_even_and_whole(count: int, world_size: int) -> None:
    shards = [shard(count, rank, world_size) for rank in range(world_size)]
    assert [position for part in shards for position in part] == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(
    size=st.integers(1, 60),
    seed=seeds,
    worlds=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    data=st.data(),
)
def test_every_sample_exactly_once_an_epoch_whatever_the_world(
    size: int, seed: int, worlds: list[int], data: st.DataObject
) -> None:
    batch = data.draw(st.integers(1, size))
    cursor, seen = Cursor(), []
    for world_size in worlds:
        for rank in range(world_size):
            seen += sample_ids(cursor, shard(batch, rank, world_size), size=size, seed=seed)
        cursor = cursor.advanced(batch, size)
    expected = sample_ids(Cursor(), range(batch * len(worlds)), size=size, seed=seed)
    assert seen == expected
    for start in range(0, len(seen) - size + 1, size):
        assert sorted(seen[start : start + size]) == list(range(size))
    assert cursor == Cursor(epoch=len(seen) // size, index=len(seen) % size)


@settings(deadline=None)
@given(
    size=st.integers(1, 40),
    length=st.integers(1, 500),
    shares=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=6),
    first=st.integers(0, 3),
)
def test_ids_computed_ahead_are_those_of_each_step_whatever_falls_to_the_rank(
    size: int, length: int, shares: list[set[int]], first: int
) -> None:
    """Micro-batches of this step and of the next one, owned or not, in steps whose shares change."""
    length = max(length, 4 * size)
    cursor = Cursor(epoch=1, index=length // 2)
    order = SampleOrder(first, cursor, micro_batches=4, size=size, length=length, seed=9)
    for number, owned in enumerate(shares):
        order.begin(first + number, tuple(sorted(owned)))
        for step, micro_batch in ((number, 0), (number + 1, 3), *((number, m) for m in owned)):
            where = [(4 * step + micro_batch) * size + k for k in range(size)]
            assert order.ids_of((first + step, micro_batch)) == sample_ids(cursor, where, size=length, seed=9)
        assert order.cursor_at(first + number) == cursor.advanced(4 * size * number, length)
