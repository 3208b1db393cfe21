"""How the ranks agree, once a step, on whether to stop at its end.

An all-reduce (MAX) of three numbers is started when a step begins and awaited when it ends, so that it is hidden
behind the step's work. All ranks see the same result for the same step: that is the whole agreement. The step's own
number goes along, both ways round, so that a rank that repeated or left out a step is found out at once. A rank that
died makes it raise on the others within milliseconds; a silent one makes it wait, which is the daemon's to notice.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from elasticd.errors import StepsDiverged
from elasticd.worker.world import make_side_group


class Control:
    """Collective to make. ``start`` and ``finish`` alternate, once a step, on every rank.

    A step whose block raised is started again without having been finished: all ranks must have done the same.
    """

    def __init__(self) -> None:
        self.group = make_side_group()
        self._said = torch.zeros(3, dtype=torch.int64)
        self._work: dist.Work | None = None

    def start(self, step: int, *, stop_wanted: bool) -> None:
        # A new tensor each time: the exchange of a step that was given up may still be under way.
        self._said = torch.tensor([stop_wanted, step, -step], dtype=torch.int64)
        if self.group is not None:
            self._work = dist.all_reduce(self._said, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def finish(self) -> tuple[bool, float]:
        """Whether any rank wanted to stop, and the seconds that this call was blocked for others.

        StepsDiverged when the ranks are not in the same step.
        """
        blocked_s = 0.0
        if self._work is not None:
            started = time.monotonic()
            self._work.wait()
            blocked_s = time.monotonic() - started
            self._work = None
        stop_wanted, last, first = self._said.tolist()
        if last != -first:
            raise StepsDiverged(
                f"one rank is in step {-first} while another is in step {last}: a block that raised was tried again on "
                "some ranks only"
            )
        return bool(stop_wanted), blocked_s
