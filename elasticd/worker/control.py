"""How the ranks agree on whether to stop at the end of a step.

An all-reduce (MAX) of a few numbers is started when a step begins and awaited when it ends, so that it is hidden behind
the step's work. All ranks see the same result for the same step: that is the whole agreement. Which step it is and how
many were begun goes along, both ways round, so that a rank that repeated or left out a step is found out. A rank that
died makes it raise on the others within milliseconds; a silent one makes it wait, which is the daemon's to notice. What
else must be the same on all ranks goes along in the same way, such as where the data stands.

It costs a millisecond of CPU time on each rank (gloo wakes two threads of it several times), so short steps do
without: how long a step takes is agreed upon too, and with it the step of the next exchange. One more number of each
rank's own goes along, for all to see (shares.py says how fast the rank is).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from elasticd.errors import ConfigError, StepsDiverged
from elasticd.worker.world import make_side_group

#: How often the ranks talk, about; a step that is longer than this has an exchange of its own.
EXCHANGE_EVERY_S = 0.5
#: The same, while speeds have changed and shares are to follow.
HURRIED_EVERY_S = 0.2
MAX_STEPS_APART = 20


class Control:
    """Collective to make. ``start`` and ``finish`` alternate, once a step, on every rank.

    A step whose block raised is started again without having been finished: all ranks must have done the same.
    """

    def __init__(self) -> None:
        self.group = make_side_group()
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._said = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None
        self._begun = 0
        self._alike: list[str] = []
        self.told: list[int] = []
        #: What the stop that was agreed on asks of the state (core.memory.Need): the most that any rank wanted.
        self.stop_need = 0
        #: The earliest steps of the next exchange: usually, and in a hurry.
        self._next = self._next_hurried = 0
        self._last_exchange: tuple[int, float] | None = None  # (step, when it began)

    def start(
        self,
        step: int,
        *,
        stop_wanted: int,
        due: bool,
        hurried: bool = False,
        own: Callable[[], int] = lambda: 0,
        alike: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """``stop_wanted``: 0 for no stop, or what one asks for. ``due``: an exchange must be had, whatever the time.

        ``step``, ``due`` and ``hurried`` are the same on all ranks. ``own`` is called when there is an exchange: what
        this rank tells the others, not negative. So is ``alike``: what must be the same on all ranks, by name.
        """
        self._begun += 1
        self._work = None
        if self.group is None:
            self._said[0] = stop_wanted
        elif due or step >= (self._next_hurried if hurried else self._next):
            owns = [0] * self._world_size
            owns[self._rank] = own()
            values = alike()
            self._alike = list(values)
            both_ways = [each for value in values.values() for each in (value, -value)]
            said = [int(stop_wanted), self._step_us(step), step, -step, self._begun, -self._begun, *both_ways, *owns]
            self._last_exchange = (step, time.monotonic())
            # A new tensor each time: the exchange of a step that was given up may still be under way.
            self._said = torch.tensor(said, dtype=torch.int64)
            self._work = dist.all_reduce(self._said, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def talk_next(self) -> None:
        """There is an exchange in the next step, on all ranks."""
        self._next = self._next_hurried = 0

    def finish(self, step: int) -> tuple[bool, float]:
        """Whether any rank wanted to stop, and the seconds that this call was blocked for others.

        StepsDiverged when the ranks have not begun the same steps; ConfigError when what must be the same on all of
        them is not. ``told`` then holds each rank's ``own``; it is empty after a step without an exchange.
        """
        self.told = []
        if self.group is None:
            self.stop_need = int(self._said[0])
            return bool(self.stop_need), 0.0
        if self._work is None:
            return False, 0.0
        started = time.monotonic()
        self._work.wait()
        blocked_s = time.monotonic() - started
        self._work = None
        self.stop_need, step_us, last, first, most, least, *rest = self._said.tolist()
        if (last, most) != (-first, -least):
            raise StepsDiverged(
                f"ranks are in steps {-first} to {last}, and have begun {-least} to {most}: a block that raised was "
                "tried again on some of them only"
            )
        for name in self._alike:
            highest, lowest, *rest = rest
            if highest != -lowest:
                raise ConfigError(f"{name} must be the same on all ranks: they say {-lowest} to {highest}")
        self.told = rest
        self._next = step + _steps_in(EXCHANGE_EVERY_S, step_us)
        self._next_hurried = step + _steps_in(HURRIED_EVERY_S, step_us)
        return bool(self.stop_need), blocked_s

    def _step_us(self, step: int) -> int:
        """How long this rank's steps took since the last exchange; before the first one nothing is known."""
        if self._last_exchange is None:
            return int(1e6 * EXCHANGE_EVERY_S)
        then, at = self._last_exchange
        return int(1e6 * (time.monotonic() - at) / max(1, step - then))


def _steps_in(seconds: float, step_us: int) -> int:
    return max(1, min(MAX_STEPS_APART, int(1e6 * seconds) // max(1, step_us)))
