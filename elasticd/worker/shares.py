"""How many micro-batches of a step each replica computes, now: measured, exchanged and decided, the same on all ranks.

The measure goes along with the exchange that the ranks have anyway (control.py); with its end every rank has the same
numbers and takes the same decision (core/balance.py), for the steps from the next one on. Shares are not kept in
checkpoints: speeds belong to machines, and a new world learns them anew within a few exchanges. What is computed does
not depend on them.

Not here: the computing (planned.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist

from elasticd.core.balance import Kept, Rebalanced, Speeds, SpeedUnknown, choose_first, choose_shares, is_measure
from elasticd.core.plan import make_plan
from elasticd.errors import ConfigError
from elasticd.worker.agreement import numbers_of_all
from elasticd.worker.layout import Arrangement

log = logging.getLogger(__name__)

_BALANCE = ("auto", "on", "off")

#: "auto": on where each rank holds the whole model, off where it is sharded (gradients.py says what that would cost).
#: Numbers: shares in this proportion, which stay; rank r has number r, and after the last one they start again.
Balance = Literal["auto", "on", "off"] | tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a job says of its steps. ``micro_batches`` is the same on all ranks; ``at_most`` is this rank's own cap."""

    micro_batches: int
    at_most: int | None = None
    balance: Balance = "auto"
    exact: bool = False

    def __post_init__(self) -> None:
        for name, number in (("micro_batches", self.micro_batches), ("max_micro_batches", self.at_most)):
            if number is not None and type(number) is not int:
                raise ConfigError(f"{name} is {number!r}: say a whole number")
        if self.micro_batches < 1 or (self.at_most is not None and self.at_most < 0):
            raise ConfigError("micro_batches must be at least 1, and max_micro_batches must not be negative")
        if not isinstance(self.balance, tuple):
            if self.balance not in _BALANCE:
                raise ConfigError(
                    f"balance is {self.balance!r}: say 'auto', 'on', 'off', or a weight for each rank, as (1, 2)"
                )
        elif not self.balance or not all(is_measure(weight) for weight in self.balance):
            raise ConfigError(f"balance is {self.balance!r}: weights are positive numbers, one for each rank")

    @property
    def cap(self) -> int:
        """How many micro-batches of a step this rank takes at most."""
        return self.micro_batches if self.at_most is None else min(self.at_most, self.micro_batches)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the shares, when they are given and not measured; empty otherwise."""
        return self.balance if isinstance(self.balance, tuple) else ()


def make_work(micro_batches: int | None, *, at_most: int | None, balance: Balance, exact: bool) -> Work | None:
    """None when the script divides its batches itself. ConfigError when that is contradicted."""
    if micro_batches is not None:
        return Work(micro_batches=micro_batches, at_most=at_most, balance=balance, exact=exact)
    if at_most is not None or balance != "auto" or exact:
        raise ConfigError("max_micro_batches, balance and exact mean nothing without micro_batches: say how many")
    return None


class CurrentShares:
    """Collective to make: the ranks tell each other their caps, and a replica (layout.py) takes the least of its own.
    ``group`` None: a world of one.

    ``work`` is the same on all ranks, but for its cap. ``tell`` gets an event for every change, and for a speed that is
    none. ConfigError, on all ranks, when they cannot hold the work.
    """

    def __init__(
        self,
        work: Work,
        group: dist.ProcessGroup | None,
        arranged: Arrangement,
        tell: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._tell = tell
        self._arranged = arranged
        self.caps = tuple(min(caps) for caps in arranged.by_replica(_tell_caps(work, group)))
        try:
            self.plan = make_plan(choose_first(work.micro_batches, self.caps, work.weights))
        except ValueError as error:
            raise ConfigError(
                f"{error}: raise max_micro_batches, lower micro_batches, or start the job with a larger minimum of "
                "nodes (--nnodes MIN:MAX, nodes in a job file)"
            ) from error
        replicas = len(self.caps)
        if work.micro_batches < replicas and dist.get_rank() == 0:
            log.warning(
                "elasticd: %d micro-batches for %d %ss: %d of them add nothing to a step",
                work.micro_batches,
                replicas,
                self._unit,
                replicas - work.micro_batches,
            )
        self._speeds = Speeds(replicas)
        self._unknown = -1
        #: Set once the model is known.
        self.balanced = work.balance == "on"

    def decide(self, step: int, told: list[int]) -> None:
        """``told``: nanoseconds per micro-batch of each rank, 0 where there was no measure; empty: nothing is new."""
        if not told or not self.balanced:
            return
        self._speeds.add([each * 1e-9 for each in self._arranged.slowest(told)])
        decision = choose_shares(self.plan.shares, self._speeds.known(), self.caps)
        match decision:
            case Rebalanced():
                self.plan = make_plan(decision.shares)
                self._unknown = -1
                self._tell(
                    {
                        "type": "rebalanced",
                        "step": step,
                        "shares": list(decision.shares),
                        "reason": f"{self._unit} {decision.rank} ended last",
                        "before_s": decision.before_s,
                        "after_s": decision.after_s,
                    }
                )
            case SpeedUnknown():
                # Not of the first windows, nor again: it would be told with every exchange.
                if self._speeds.exchanges > 2 and decision.rank != self._unknown:
                    self._unknown = decision.rank
                    reason = f"{self._unit} {decision.rank} has no measure of its speed"
                    self._tell({"type": "rebalanced", "step": step, "shares": list(self.plan.shares), "reason": reason})
            case Kept():
                pass

    @property
    def unsettled(self) -> bool:
        """Whether the next measures may change the shares: the same on all ranks."""
        return self.balanced and self._speeds.unsettled

    @property
    def _unit(self) -> str:
        """What a share belongs to, as people call it."""
        return "rank" if self._arranged.layout.replica_size == 1 else "replica"


def as_told(seconds: float) -> int:
    """A measure as one whole number; 0 for what is none."""
    return max(1, round(seconds * 1e9)) if is_measure(seconds) else 0


def _tell_caps(work: Work, group: dist.ProcessGroup | None) -> list[int]:
    """Of each rank."""
    return [cap for (cap,) in numbers_of_all([work.cap], group)]
