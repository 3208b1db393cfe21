"""Which samples belong to a step, and which of them to this rank. Pure, in constant memory.

The order of samples is a function of (seed, epoch, index): a keyed permutation of ``range(size)`` that is computed one
index at a time. Epochs follow one another without a gap: a batch at an epoch's end takes its remaining samples from
the start of the next one, so nothing is dropped or padded. The cursor says how many samples are behind us; since it
does not mention the world, a restart or a resize neither skips nor repeats a sample.

Not here: reading the samples themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Of numpy.uint64.
Integers = NDArray[Any]

_MASK_64 = (1 << 64) - 1
_ADDED, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = 6
#: From here on an array is faster than one index at a time (5 us each).
_MANY = 64


class Permutation:
    """A pseudo-random bijection of ``range(size)``, keyed by (seed, epoch).

    A Feistel network over the smallest power of two that holds ``size`` is a bijection whatever its round function is;
    results that fall outside are put through it again until they fall inside (cycle walking: fewer than two passes on
    average). Not for cryptography.
    """

    __slots__ = ("_keys", "_left_bits", "_right_bits", "size")

    def __init__(self, size: int, *, seed: int, epoch: int) -> None:
        if size < 1:
            raise ValueError(f"a data set of {size} samples has no order")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._left_bits, self._right_bits = bits // 2, bits - bits // 2
        base = _mix(_mix(seed & _MASK_64) ^ (epoch & _MASK_64))
        self._keys = tuple(_mix(base + number) for number in range(_ROUNDS))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        value = self._encrypt(index)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def take(self, indices: Integers) -> Integers:
        """``self[index]`` of many valid indices at once."""
        values = self._encrypt_many(indices)
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._encrypt_many(values[outside])
        return values

    def _encrypt(self, value: int) -> int:
        """One pass. The halves differ by at most a bit, and swap their widths each round."""
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = value >> right_bits, value & ((1 << right_bits) - 1)
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & ((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return left << right_bits | right

    def _encrypt_many(self, values: Integers) -> Integers:
        """The same for each of an array."""
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = values >> right_bits, values & ((1 << right_bits) - 1)
        for key in self._keys:
            mixed = _mix_many(right, key)
            mixed &= (1 << left_bits) - 1
            mixed ^= left
            left, right = right, mixed
            left_bits, right_bits = right_bits, left_bits
        return left << right_bits | right


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """How far the data has been consumed: ``index`` samples of epoch ``epoch``."""

    epoch: int = 0
    index: int = 0

    def advanced(self, count: int, size: int) -> Cursor:
        """The cursor after ``count`` more samples of a data set of ``size``."""
        position = self.index + count
        return Cursor(epoch=self.epoch + position // size, index=position % size)


def shard(count: int, rank: int, world_size: int) -> range:
    """The positions of a batch of ``count`` that fall to ``rank``: contiguous, and the first ranks take the remainder.

    Empty when there are more ranks than positions.
    """
    share, extra = divmod(count, world_size)
    start = rank * share + min(rank, extra)
    return range(start, start + share + (rank < extra))


def sample_ids(cursor: Cursor, positions: Sequence[int], *, size: int, seed: int) -> list[int]:
    """The samples at these positions after the cursor, in order."""
    if len(positions) >= _MANY:
        found: list[int] = many_sample_ids(cursor, np.asarray(positions), size=size, seed=seed).tolist()
        return found
    orders: dict[int, Permutation] = {}
    ids = []
    for position in positions:
        at = cursor.advanced(position, size)
        if at.epoch not in orders:
            orders[at.epoch] = Permutation(size, seed=seed, epoch=at.epoch)
        ids.append(orders[at.epoch][at.index])
    return ids


def many_sample_ids(cursor: Cursor, positions: Integers, *, size: int, seed: int) -> Integers:
    """The same for an array of any shape: one of that shape."""
    at = positions.ravel().astype(np.uint64) + np.uint64(cursor.index)
    epochs, indices = np.divmod(at, np.uint64(size))
    ids = np.empty_like(indices)
    if not len(ids):
        return ids.reshape(positions.shape)
    for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
        here = epochs == epoch
        ids[here] = Permutation(size, seed=seed, epoch=cursor.epoch + epoch).take(indices[here])
    return ids.reshape(positions.shape)


def _mix(value: int) -> int:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    value = (value + _ADDED) & _MASK_64
    value = ((value ^ value >> 30) * _FIRST) & _MASK_64
    value = ((value ^ value >> 27) * _SECOND) & _MASK_64
    return value ^ value >> 31


def _mix_many(values: Integers, key: int) -> Integers:
    """``_mix(value + key)`` of each; the type's arithmetic is modulo 2**64 by itself."""
    mixed = values + np.uint64((key + _ADDED) & _MASK_64)
    mixed ^= mixed >> 30
    mixed *= np.uint64(_FIRST)
    mixed ^= mixed >> 27
    mixed *= np.uint64(_SECOND)
    mixed ^= mixed >> 31
    return mixed
