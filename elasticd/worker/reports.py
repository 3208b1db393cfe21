"""What a training process tells its daemon of itself: hello, steps, speeds, shares, and what became of its state.

Telling costs training nothing and never fails: without a daemon, or once it is gone, nothing is told. Not here: how it
is sent, and what the daemon says (link.py); questions about the round (fence.py), copies in RAM (memory_host.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from elasticd.errors import ChannelClosed
from elasticd.worker.link import DaemonLink, StepReport
from elasticd.worker.planned import PlannedSteps
from elasticd.worker.shares import Work
from elasticd.worker.speeds import SpeedReports
from elasticd.worker.step import Step
from elasticd.worker.world import Place

log = logging.getLogger(__name__)


def connect(place: Place, work: Work | None, replica_size: int) -> DaemonLink | None:
    """Say hello to this node's daemon; None where there is none, with a warning if there should be one.

    ``work`` is told too: the daemons form no world that could not hold a step.
    """
    if not place.socket_path:
        return None
    hello = {
        "type": "worker_hello",
        "job": place.job_id,
        "round": place.round_number,
        "rank": place.rank,
        "local_rank": place.local_rank,
        "pid": os.getpid(),
    }
    if work is not None:
        hello |= {"micro_batches": work.micro_batches, "cap": work.cap, "replica_size": replica_size}
    try:
        return DaemonLink(place.socket_path, hello)
    except ChannelClosed as error:
        log.warning("elasticd: %s; training goes on without it", error)
        return None


class Reports:
    """Of one rank, in any thread but for steps and speeds. ``leads_node``: it speaks for its node's other ranks too."""

    def __init__(self, link: DaemonLink | None, *, rank: int, leads_node: bool) -> None:
        self._link, self._rank, self._leads_node = link, rank, leads_node
        self._speeds = SpeedReports()

    # Steps.

    def step_completed(self, step: Step, *, seconds: float, waited_s: float, sent_bytes: int) -> None:
        if self._link is not None:
            self._link.report(
                StepReport(
                    step=step.index + 1,
                    seconds=seconds,
                    wait_seconds=waited_s,
                    samples=step.samples,
                    sent_bytes=sent_bytes,
                    metrics=step.metrics,
                )
            )

    def speeds(self, told: Sequence[int], planned: PlannedSteps | None) -> None:
        """Pass on what the ranks told each other, if they did: nanoseconds of each (speeds.py)."""
        if not told or not self._leads_node:
            return
        self._speeds.add(told)
        message = self._speeds.take()
        if self._link is None or message is None:
            return
        self._link.post(message | (_shares(planned) if planned is not None else {}))

    def shares_changed(self, event: Mapping[str, Any]) -> None:
        """All ranks have decided the same: one of them says so."""
        if self._rank == 0:
            log.info("elasticd: shares %s from step %d on: %s", event["shares"], event["step"], event["reason"])
            if self._link is not None:
                self._link.post(dict(event))

    def at_boundary(self, step: int) -> None:
        """This rank has saved what there is to save, and waits to be stopped."""
        self._post({"type": "boundary", "step": step})

    # State: what became of it.

    def passed_over(self, count: int) -> None:
        self._post({"type": "passed_over", "count": count})

    def restored(self, source: str, *, step: int, seconds: float, size_bytes: int) -> None:
        """``source``: "memory", "buddy" or "disk"."""
        self._post({"type": "restored", "source": source, "step": step, "seconds": seconds, "size_bytes": size_bytes})

    def committed(self, step: int, path: object, *, seconds: float) -> None:
        """A checkpoint stands. One rank says so."""
        if self._rank == 0:
            self._post({"type": "commit", "step": step, "path": str(path), "seconds": seconds})

    def save_ended(self, *, saved: bool, size_bytes: int, seconds: float, stall_s: float, waited: bool) -> None:
        """This rank's part of a checkpoint. ``waited``: the step had to wait for an earlier save too."""
        self._post(
            {
                "type": "checkpoint",
                "result": "saved" if saved else "failed",
                "size_bytes": size_bytes,
                "seconds": seconds,
                "stall_seconds": stall_s,
                "waited": waited,
            }
        )

    def copied(
        self, step: int, *, committed: bool, at_buddies: bool, size_bytes: int, seconds: float, stall_s: float
    ) -> None:
        """How a copy in RAM ended."""
        self._post(
            {
                "type": "memory_copied",
                "step": step,
                "result": "committed" if committed else "void",
                "at_buddies": at_buddies,
                "size_bytes": size_bytes,
                "seconds": seconds,
                "stall_seconds": stall_s,
            }
        )

    def _post(self, message: Mapping[str, Any]) -> None:
        if self._link is not None:
            self._link.post(dict(message))


def _shares(planned: PlannedSteps) -> dict[str, Any]:
    """What a step without a node would be is computed from these, by the balancer's own rules (core/stragglers.py)."""
    limits = {"caps": planned.caps, "weights": planned.weights}
    said = {name: values for name, values in limits.items() if values}
    return {"shares": planned.shares, "balanced": planned.balanced, **said}
