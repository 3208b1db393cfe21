"""Which shares make a step shortest, from how long a micro-batch takes on each rank. Pure.

A step lasts as long as its slowest rank: ``max(share * seconds)``. Shares change only where that is worth it, one
micro-batch at a time from the rank that ends last to the one that would then end first, until no such move shortens the
step. The result cannot be bettered: a shorter step would need a smaller share for the slowest rank, and no larger one
for any other. Ranks do not fall below one micro-batch where there are enough: one without any would still compute a
stand-in (worker/gradients.py), and gain nothing.

What a window measures is noisy (a processor that is held back by its control group runs in bursts), so the mean of a
rank's last windows counts. A single one that is far off (a checkpoint, another process) is left out of it; two in a row
that are far off to the same side are a change of speed, and all before them is forgotten. So shares have settled with
the third exchange after a change.

Every rank feeds the same numbers into the same function at the end of the same step, so all decide alike. Not here: the
measuring and the exchange (worker/shares.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import fmean, median

from elasticd.core.plan import Shares, equal_shares, weighted_shares

WINDOWS = 8
#: So many windows since a change of speed say what there is to say, about.
SETTLED = 3
#: Far off: slower or faster than is usual for this rank by this factor.
FAR_OFF = 1.4
#: A step must get shorter by this part for shares to change: less is within what is measured by chance.
WORTHWHILE = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalanced:
    """Other ``shares`` than before, because ``rank`` ended last; seconds of a step, before and after, as predicted."""

    shares: Shares
    rank: int
    before_s: float
    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The shares stay: no better ones, or not better by enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedUnknown:
    """The shares stay: the measure of ``rank`` is not a positive, finite number."""

    rank: int
    seconds: float


Decision = Rebalanced | Kept | SpeedUnknown


class Speeds:
    """The last measures of each rank: the only thing that balancing remembers."""

    def __init__(self, world_size: int) -> None:
        self._windows: list[list[float]] = [[] for _ in range(world_size)]
        self._seen = [0] * world_size
        #: How many windows there were.
        self.exchanges = 0
        #: Whether the next window may say something new: one is young, or its last window was far off. It is asked for
        #: in each step, and changes with a window only.
        self.unsettled = True

    def add(self, seconds: Sequence[float]) -> None:
        """One window's seconds per micro-batch of each rank. What is no measure is left out."""
        self.exchanges += 1
        for rank, (windows, measured) in enumerate(zip(self._windows, seconds, strict=True)):
            if is_measure(measured):
                windows.append(measured)
                del windows[: -1 if _has_changed(windows) else -WINDOWS]
                self._seen[rank] += 1
        self.unsettled = any(len(each) < SETTLED or not _is_near(each[-1], median(each)) for each in self._windows)

    def known(self) -> list[float]:
        """Seconds per micro-batch of each rank; NaN until there are two windows.

        The first one is warming up: the second alone counts beside it, and a third one shows whether it was far off.
        """
        return [
            _usual(windows[1:] if seen == 2 else windows) if seen > 1 else float("nan")
            for windows, seen in zip(self._windows, self._seen, strict=True)
        ]


def _has_changed(windows: Sequence[float]) -> bool:
    """Whether the last two are both far off what was usual before, to the same side."""
    if len(windows) < 3:
        return False
    usual = median(windows[:-2])
    return min(windows[-2:]) > usual * FAR_OFF or max(windows[-2:]) < usual / FAR_OFF


def _usual(windows: Sequence[float]) -> float:
    middle = median(windows)
    near = [each for each in windows if _is_near(each, middle) or len(windows) < 3]
    return fmean(near) if near else middle  # half of them fast and half slow, and none between


def _is_near(seconds: float, usual: float) -> bool:
    return usual / FAR_OFF <= seconds <= usual * FAR_OFF


def is_measure(seconds: float) -> bool:
    return isfinite(seconds) and seconds > 0


def step_seconds(shares: Sequence[int], seconds: Sequence[float]) -> float:
    return max(share * each for share, each in zip(shares, seconds, strict=True))


def lost_to_whole_shares(micro_batches: int, seconds: Sequence[float]) -> float:
    """The part of all ranks' speed that the best shares of so many micro-batches leave unused, as shares are whole.

    0.037 for 24 of them and a rank of 0.47 times the other's speed, 0.012 for 48: with more micro-batches a step it is
    less. ``seconds`` per micro-batch are positive and finite, and there are at least as many micro-batches as ranks.
    """
    caps = [micro_batches] * len(seconds)
    best = _shortest(choose_first(micro_batches, caps), seconds, caps)
    undivided_s = micro_batches / sum(1 / each for each in seconds)
    return 1 - undivided_s / step_seconds(best, seconds)


def fit_caps(shares: Shares, caps: Sequence[int]) -> Shares:
    """The shares, as near as can be, with none above its cap. ValueError when the caps hold fewer than all together."""
    if sum(caps) < sum(shares):
        raise ValueError(f"ranks take at most {sum(caps)} micro-batches together, and a step has {sum(shares)}")
    fitted = [min(share, cap) for share, cap in zip(shares, caps, strict=True)]
    for _ in range(sum(shares) - sum(fitted)):
        room = [rank for rank, share in enumerate(fitted) if share < caps[rank]]
        fitted[min(room, key=lambda rank: fitted[rank])] += 1
    return tuple(fitted)


def choose_first(micro_batches: int, caps: Sequence[int], weights: Sequence[float] = ()) -> Shares:
    """The shares of a world whose speeds are not known yet: equal, or by weights that somebody gave, within the caps.

    Rank r has weight ``weights[r % len(weights)]``, so that a world of any size has its weights.
    """
    world_size = len(caps)
    if not weights:
        return fit_caps(equal_shares(micro_batches, world_size), caps)
    of_ranks = [weights[rank % len(weights)] for rank in range(world_size)]
    return fit_caps(weighted_shares(micro_batches, of_ranks), caps)


def choose_shares(shares: Shares, seconds: Sequence[float], caps: Sequence[int]) -> Decision:
    """The shares of the steps to come, for ranks that take so many seconds per micro-batch.

    ``shares`` are those that stand, and are within ``caps``.
    """
    for rank, measured in enumerate(seconds):
        if not is_measure(measured):
            return SpeedUnknown(rank=rank, seconds=measured)
    before_s = step_seconds(shares, seconds)
    best = _shortest(shares, seconds, caps)
    after_s = step_seconds(best, seconds)
    if after_s > before_s * (1 - WORTHWHILE):
        return Kept()
    return Rebalanced(shares=best, rank=_ends_last(shares, seconds), before_s=before_s, after_s=after_s)


def _shortest(shares: Shares, seconds: Sequence[float], caps: Sequence[int]) -> Shares:
    least = 1 if sum(shares) >= len(shares) else 0
    found = list(shares)
    while True:
        last = _ends_last(found, seconds)
        takes = [
            (found[rank] + 1) * each if rank != last and found[rank] < caps[rank] else inf
            for rank, each in enumerate(seconds)
        ]
        taker = takes.index(min(takes))
        if found[last] <= least or takes[taker] >= found[last] * seconds[last]:
            return tuple(found)
        found[last] -= 1
        found[taker] += 1


def _ends_last(shares: Sequence[int], seconds: Sequence[float]) -> int:
    """The first of those that end last: the same on every rank."""
    ends = [share * each for share, each in zip(shares, seconds, strict=True)]
    return ends.index(max(ends))
