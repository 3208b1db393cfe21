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
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

#: Of numpy.uint64.
Integers = NDArray[Any]
#: The arithmetic below is modulo 2**64, and the same for an int and for an array.
Number = TypeVar("Number", int, Integers)

_MASK_64 = (1 << 64) - 1
_ROUNDS = 6
#: From here on an array is faster than one index at a time (4 us each).
_MANY = 96


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
        values = self._encrypt(indices)
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._encrypt(values[outside])
        return values

    def _encrypt(self, value: Number) -> Number:
        """One pass. The halves differ by at most a bit, and swap their widths each round."""
        left_bits, right_bits = self._left_bits, self._right_bits
        left, right = value >> right_bits, value & ((1 << right_bits) - 1)
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & ((1 << left_bits) - 1))
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
        return _many_sample_ids(cursor, positions, size=size, seed=seed)
    orders: dict[int, Permutation] = {}
    ids = []
    for position in positions:
        at = cursor.advanced(position, size)
        if at.epoch not in orders:
            orders[at.epoch] = Permutation(size, seed=seed, epoch=at.epoch)
        ids.append(orders[at.epoch][at.index])
    return ids


def _many_sample_ids(cursor: Cursor, positions: Sequence[int], *, size: int, seed: int) -> list[int]:
    at = np.asarray(positions, dtype=np.uint64) + np.uint64(cursor.index)
    epochs, indices = np.divmod(at, np.uint64(size))
    ids = np.empty_like(indices)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = Permutation(size, seed=seed, epoch=cursor.epoch + int(epoch)).take(indices[here])
    found: list[int] = ids.tolist()
    return found


def _mix(value: Number) -> Number:
    """splitmix64's finaliser: every bit of the result depends on every bit of the value."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK_64
    return value ^ value >> 31
