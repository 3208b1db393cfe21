"""Which rank computes which micro-batches of a step. Pure.

A step is ``micro_batches`` micro-batches, the same number for the whole job, whatever the world. Micro-batch ``m`` of
``size`` samples holds positions ``m * size`` .. ``(m + 1) * size - 1`` after the step's cursor: which samples those are
does not depend on the world either. A world only divides the micro-batches: ``shares[rank]`` of them fall to each rank.

Each rank has a *home*: the contiguous block that equal shares would give it. It keeps the first of its home, as many as
its share allows; what ranks give up goes, in order, to those whose share is larger than their home. So the division
is a function of the shares alone (a step that is done again, or a rank that joins, needs no history), and what stays at
home never moves: from equal shares to any others, exactly as many micro-batches move as must.

Not here: which shares are good (balance.py), the samples themselves (worker/data.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

Shares = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``owned[rank]``: the micro-batches of that rank, ascending. Make one with ``make_plan``."""

    owned: tuple[tuple[int, ...], ...]

    @property
    def shares(self) -> Shares:
        return tuple(len(owned) for owned in self.owned)

    @property
    def micro_batches(self) -> int:
        return sum(self.shares)

    def owner_of(self) -> tuple[int, ...]:
        """The rank of each micro-batch."""
        owners = [0] * self.micro_batches
        for rank, owned in enumerate(self.owned):
            for micro_batch in owned:
                owners[micro_batch] = rank
        return tuple(owners)


def equal_shares(micro_batches: int, world_size: int) -> Shares:
    """As equal as can be; the first ranks take the remainder. With more ranks than micro-batches the last have none."""
    if micro_batches < 1 or world_size < 1:
        raise ValueError(f"{micro_batches} micro-batches cannot be divided among {world_size} ranks")
    share, extra = divmod(micro_batches, world_size)
    return tuple(share + (rank < extra) for rank in range(world_size))


def weighted_shares(micro_batches: int, weights: Sequence[float]) -> Shares:
    """In proportion to the weights, as near as whole numbers can be; what is left over goes to the largest remainders,
    and among equal ones to the first rank. ValueError when a weight is negative or not finite, or none is positive."""
    if micro_batches < 1 or not all(isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"{micro_batches} micro-batches cannot be divided by the weights {list(weights)}")
    exact = [micro_batches * weight / sum(weights) for weight in weights]
    shares = [int(each) for each in exact]
    order = sorted(range(len(weights)), key=lambda rank: shares[rank] - exact[rank])
    for rank in order[: micro_batches - sum(shares)]:
        shares[rank] += 1
    return tuple(shares)


def make_plan(shares: Sequence[int]) -> Plan:
    """The division of ``sum(shares)`` micro-batches by these shares. ValueError when there is nothing to divide."""
    if any(share < 0 for share in shares):
        raise ValueError(f"a share is negative: {list(shares)}")
    homes = _homes(sum(shares), len(shares))
    given_up = _given_up(homes, shares)
    owned = [
        tuple(home[:share]) + tuple(next(given_up) for _ in range(share - len(home)))
        for home, share in zip(homes, shares, strict=True)
    ]
    return Plan(owned=tuple(tuple(sorted(one)) for one in owned))


def positions(micro_batch: int, size: int) -> range:
    """Where the samples of a micro-batch stand after the step's cursor."""
    return range(micro_batch * size, (micro_batch + 1) * size)


def moved(before: Plan, after: Plan) -> int:
    """How many micro-batches have another rank in ``after``."""
    pairs = zip(before.owner_of(), after.owner_of(), strict=True)
    return sum(one != other for one, other in pairs)


def _homes(micro_batches: int, world_size: int) -> list[range]:
    homes, start = [], 0
    for share in equal_shares(micro_batches, world_size):
        homes.append(range(start, start + share))
        start += share
    return homes


def _given_up(homes: Sequence[range], shares: Sequence[int]) -> Iterator[int]:
    for home, share in zip(homes, shares, strict=True):
        yield from home[share:]
