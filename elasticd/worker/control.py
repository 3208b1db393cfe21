"""How the ranks agree, once a step, on whether to stop at its end.

An all-reduce (MAX) of one number is started when a step begins and awaited when it ends, so that it is hidden behind
the step's work. All ranks see the same result for the same step: that is the whole agreement. A rank that died makes
it raise on the others within milliseconds; a silent one makes it wait, which is the daemon's to notice.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from elasticd.worker.world import make_side_group


class Control:
    """Collective to make. ``start`` and ``finish`` alternate, once a step, on every rank."""

    def __init__(self) -> None:
        self.group = make_side_group()
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def start(self, *, stop_wanted: bool) -> None:
        self._flag.fill_(int(stop_wanted))
        if self.group is not None:
            self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)

    def finish(self) -> tuple[bool, float]:
        """Whether any rank wanted to stop, and the seconds that this call was blocked for others."""
        blocked_s = 0.0
        if self._work is not None:
            started = time.monotonic()
            self._work.wait()
            blocked_s = time.monotonic() - started
            self._work = None
        return bool(self._flag.item()), blocked_s
