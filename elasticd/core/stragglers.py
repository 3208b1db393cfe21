"""Which node holds its job up for good, and what to do about it. Pure.

Every rank's speed is known to every node of a world that uses a Session (worker/speeds.py): seconds per micro-batch, or
per step without the waiting. A node's *slowdown* is that of its slowest rank over the median of the world's ranks, the
lower one of two, so that of two nodes the faster one is the measure. Unchanged scripts give no figures: none of their
nodes is ever a straggler. Ranks that compute a micro-batch together (tensor or pipeline parallel) are as slow as the
slowest of them: nodes that share such a replica cannot be told apart, and are not judged.

A node whose slowdown stays above the job's factor for the job's time, in spite of the balance of shares, is a suspect;
so is one whose GPU is in trouble, at once. A suspect is exchanged for a spare. Without a spare the world does without
it if a step then gets shorter by more than a restart is worth, and keeps it otherwise. Each such eviction needs a
place in the cluster's budget, and each new round measures anew, so two of a job are at least that time apart.

An evicted node is *aside*: while its record stands it is let into that job only where the minimum is not met without
it. With several evictions behind it, or trouble with a GPU, it is in quarantine too (Policy).

Not here: the world that follows (rendezvous.py), the records (machine.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from statistics import median, median_low
from typing import TypeVar

from elasticd.core.balance import Rebalanced, choose_first, choose_shares, is_measure, step_seconds
from elasticd.core.model import JobId, NodeId, OpenEnum, Seat

T = TypeVar("T")

#: The median of so many measures of a rank counts, and as many are needed before it is judged.
WINDOWS = 5
#: Below this part of the way from 1 to the factor a node is no straggler any more; in between it stays what it was.
RECOVERED = 0.7
#: Time without measures (a checkpoint, an evaluation) counts neither for nor against a node.
GAP_S = 10.0
#: Without a spare, a step must get shorter by this part: a change of the world costs seconds too.
WORTH_A_RESTART = 0.1


class Grounds(OpenEnum):
    """Why a node is a suspect."""

    SLOW = "slow"
    GPU = "gpu"


class Why(StrEnum):
    """Why a suspect keeps its seat."""

    BETTER_WITH_IT = "better_with_it"
    TOO_FEW_NODES = "too_few_nodes"
    BUDGET_SPENT = "budget_spent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the ranks of a round told each other, by rank: seconds, 0 where there is no measure.

    ``shares``: of a step's micro-batches, one for each replica, which is one rank or several in a row; empty where a
    script divides its batch equally itself. ``balanced``: whether they follow speed. ``caps``: the most that each
    replica takes; empty where none has a limit. ``weights``: of shares that somebody gave, as choose_first takes them.
    """

    seconds: tuple[float, ...]
    shares: tuple[int, ...] = ()
    balanced: bool = False
    caps: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The operator's: how many nodes may be evicted, and when one is put in quarantine.

    ``budget``: evictions in the whole cluster within ``window_s``; below 1 a part of its nodes, but at least one node;
    0 for none. From ``quarantine_after`` evictions on, remembered for ``forget_s``, a node is in quarantine for
    ``quarantine_s``, twice as long each further time.
    """

    enabled: bool = True
    budget: float = 0.1
    window_s: int = 3600
    quarantine_after: int = 2
    quarantine_s: int = 3600
    longest_quarantine_s: int = 7 * 24 * 3600
    forget_s: int = 30 * 24 * 3600

    def allowed(self, nodes: int) -> int:
        """How many evictions may stand at once in a cluster of so many nodes."""
        if not self.enabled or self.budget <= 0:
            return 0
        return int(self.budget) if self.budget >= 1 else max(1, int(self.budget * nodes))

    def sentence_s(self, grounds: Grounds, offences: int) -> int:
        """How long a node with so many offences, this one included, is in quarantine; 0: not at all."""
        first = 1 if grounds is Grounds.GPU else self.quarantine_after
        if offences < first:
            return 0
        return min(self.longest_quarantine_s, self.quarantine_s << min(offences - first, 30))


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """``evictions/<job>/<node>``, for as long as the budget's window: who lost its seat, and why.

    ``spare``: who took it; "": nobody. ``until`` is Unix time by the writer's clock, for people alone: the record's
    lease ends it.
    """

    job_id: JobId
    node_id: NodeId
    grounds: Grounds
    reason: str
    spare: str = ""
    until: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offences:
    """``offences/<node>``: how often it was evicted."""

    node_id: NodeId
    count: int
    until: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """``quarantines/<node>``: it takes no jobs while this stands. ``undrain`` deletes it, or its lease ends it."""

    node_id: NodeId
    grounds: Grounds
    reason: str
    offences: int
    seconds: int
    until: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """``tally``: every eviction counts up here, so that no two of them pass the budget side by side."""

    evictions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A seat's holder that should go. ``gain``: the part by which a step is shorter in a world without it."""

    node_id: NodeId
    grounds: Grounds
    reason: str
    gain: float
    budget_left: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """The suspect's seat goes to the ``spare``; None: the world does without."""

    suspect: Suspect
    spare: NodeId | None


@dataclass(frozen=True, slots=True)
class SuspectKept:
    """A suspect keeps its seat."""

    node_id: NodeId
    why: Why


class SpeedWatch:
    """The measures of one round, and since when each node has been slow. What is no measure is left out."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._windows: list[deque[float]] = []
        self._since: dict[NodeId, float] = {}
        self._last_at: float | None = None
        self._latest: Measured | None = None
        self._seats: tuple[Seat, ...] = ()
        #: By node, once it is known.
        self.slowdowns: dict[NodeId, float] = {}

    def add(self, measured: Measured, seats: Sequence[Seat], factor: float, now: float) -> None:
        """ValueError when there is not one measure for each rank of these seats, or the shares do not fit them."""
        size = sum(seat.nproc for seat in seats)
        _check(measured, size)
        if not self._windows:
            self._windows = [deque(maxlen=WINDOWS) for _ in range(size)]
        for windows, seconds in zip(self._windows, measured.seconds, strict=True):
            if is_measure(seconds):
                windows.append(seconds)
        self._latest, self._seats = measured, tuple(seats)
        self._skip_gap(now)
        self._compare(factor, now)

    def unknown(self) -> tuple[int, ...]:
        """Ranks without a single measure: they are never judged."""
        return tuple(rank for rank, windows in enumerate(self._windows) if not windows)

    def slowest(self, after_s: float, now: float) -> tuple[NodeId, float, float] | None:
        """Of the nodes that have been slow for so long: the slowest, its slowdown, and for how long."""
        long_slow = [node for node, since in self._since.items() if now - since >= after_s]
        if not long_slow:
            return None
        node = max(long_slow, key=lambda node: (self.slowdowns[node], node))
        return node, self.slowdowns[node], now - self._since[node]

    def gain_without(self, node_id: NodeId) -> float:
        """The part by which a step gets shorter when the others do the node's work; negative: longer.

        0 where that is not known; -inf where the others cannot hold a step.
        """
        latest = self._latest
        if latest is None:
            return 0.0
        of_ranks = [median(windows) if windows else 0.0 for windows in self._windows]
        left, together = _ranks_without(node_id, self._seats), self._replica_size
        usual = [max(each) for each in _in_replicas(of_ranks, together)]
        others = [max(each) for each in _in_replicas([of_ranks[rank] for rank in left], together)]
        if not others or not all(map(is_measure, others)):
            return 0.0
        if not latest.shares:  # each rank computes an equal part of the batch, which grows as ranks go
            return _gain(max(usual), max(others) * len(usual) / len(others))
        most = latest.caps or [sum(latest.shares)] * len(usual)
        caps = [min(each) for each in _in_replicas([most[rank // together] for rank in left], together)]
        return _gain(step_seconds(latest.shares, usual), _alone_s(latest, others, caps))

    @property
    def _replica_size(self) -> int:
        shares = self._latest.shares if self._latest is not None else ()
        return len(self._windows) // len(shares) if shares else 1

    def _skip_gap(self, now: float) -> None:
        gap_s = now - self._last_at if self._last_at is not None else 0.0
        self._last_at = now
        if gap_s > GAP_S:
            self._since = {node: since + gap_s for node, since in self._since.items()}

    def _compare(self, factor: float, now: float) -> None:
        usual = {rank: median(windows) for rank, windows in enumerate(self._windows) if len(windows) == WINDOWS}
        if not usual:
            return
        middle = median_low(usual.values())
        for seat in self._seats:
            own = [usual[rank] for rank in _ranks(seat) if rank in usual]
            if not own or seat.first_rank % self._replica_size or seat.nproc % self._replica_size:
                continue
            self.slowdowns[seat.node_id] = slowdown = max(own) / middle
            if slowdown > factor:
                self._since.setdefault(seat.node_id, now)
            elif slowdown < 1 + (factor - 1) * RECOVERED:
                self._since.pop(seat.node_id, None)


def _check(measured: Measured, size: int) -> None:
    shares, caps, weights = measured.shares, measured.caps, measured.weights
    if len(measured.seconds) != size:
        raise ValueError(f"speeds of {len(measured.seconds)} ranks in a world of {size}")
    if shares and size % len(shares):
        raise ValueError(f"shares of {len(shares)} replicas in a world of {size}")
    if shares and (min(shares) < 0 or sum(shares) < 1):
        raise ValueError(f"shares {list(shares)} make no step")
    if caps and (len(caps) != len(shares) or min(caps) < 0):
        raise ValueError(f"caps {list(caps)} of {len(shares)} replicas")
    if not all(map(is_measure, weights)):
        raise ValueError(f"weights {list(weights)} are not positive numbers")


def _ranks(seat: Seat) -> range:
    return range(seat.first_rank, seat.first_rank + seat.nproc)


def _ranks_without(node_id: NodeId, seats: Sequence[Seat]) -> list[int]:
    """Of the others, in the order of a world without it: the last one takes the place that gets free (ring.py)."""
    *first, last = seats
    if last.node_id != node_id:
        first = [last if seat.node_id == node_id else seat for seat in first]
    return [rank for seat in first for rank in _ranks(seat)]


def _in_replicas(of_ranks: Sequence[T], together: int) -> list[Sequence[T]]:
    return [of_ranks[start : start + together] for start in range(0, len(of_ranks), together)]


def _alone_s(latest: Measured, seconds: Sequence[float], caps: Sequence[int]) -> float:
    """How long a step takes these replicas, with the shares that the workers would choose; inf: they cannot hold it."""
    micro_batches = sum(latest.shares)
    if sum(caps) < micro_batches:
        return inf
    shares = choose_first(micro_batches, caps, latest.weights)
    best = choose_shares(shares, seconds, caps) if latest.balanced else None
    return step_seconds(best.shares if isinstance(best, Rebalanced) else shares, seconds)


def _gain(before_s: float, after_s: float) -> float:
    return 1 - after_s / before_s if before_s > 0 else 0.0


def find_suspect(
    watch: SpeedWatch, troubles: Mapping[NodeId, str], *, after_s: float, budget_left: bool, now: float
) -> Suspect | None:
    """Who should go first. ``troubles``: of the GPUs of those who hold seats; "" where there is none."""
    for node_id, trouble in sorted(troubles.items()):
        if trouble:
            return Suspect(node_id=node_id, grounds=Grounds.GPU, reason=trouble, gain=1.0, budget_left=budget_left)
    found = watch.slowest(after_s, now)
    if found is None or found[0] not in troubles:
        return None
    node_id, slowdown, for_s = found
    reason = f"{slowdown:.1f} times as slow as the median for {for_s:.0f} s"
    gain = watch.gain_without(node_id)
    return Suspect(node_id=node_id, grounds=Grounds.SLOW, reason=reason, gain=gain, budget_left=budget_left)


def judge_suspect(suspect: Suspect, seats: Collection[NodeId], without: Sequence[NodeId]) -> Exchange | SuspectKept:
    """``without``: the best world in which the suspect has no seat; empty when there is none.

    The suspect's gain is that of a world which is smaller by the suspect alone: for one that is smaller by more (whole
    replicas) no slow node is given up.
    """
    fewer = len(seats) - len(without)
    if not without:
        return SuspectKept(suspect.node_id, Why.TOO_FEW_NODES)
    if suspect.grounds is Grounds.SLOW and fewer > 0 and (fewer > 1 or suspect.gain < WORTH_A_RESTART):
        return SuspectKept(suspect.node_id, Why.BETTER_WITH_IT)
    if not suspect.budget_left:
        return SuspectKept(suspect.node_id, Why.BUDGET_SPENT)
    return Exchange(suspect=suspect, spare=next((node for node in without if node not in seats), None))
