"""Asking the daemon whether this process's round still stands, before a checkpoint is given its name.

The daemon asks etcd, whose answer is the fence: a round that is over cannot be told that it stands. While etcd is away
nobody can tell, so a save in the background is given up (training goes on, the next one asks again), and the last one
before an end waits.

Not here: what a refusal means to training (session.py), the order of a save (checkpoint/save.py).
"""

from __future__ import annotations

import time

from elasticd.errors import ChannelClosed, Fenced, StoreUnavailable
from elasticd.worker.link import DaemonLink

#: For how long one question waits: etcd's own time-outs, for a few of its members.
ANSWER_S = 10.0
PAUSE_S = 0.5


class RoundFence:
    """``patience_s``: for how long a patient caller waits for etcd to come back."""

    def __init__(self, link: DaemonLink, patience_s: float) -> None:
        self._link, self._patience_s = link, patience_s

    def __call__(self, step: int, *, patient: bool) -> None:
        deadline_s = time.monotonic() + (self._patience_s if patient else 0.0)
        while True:
            try:
                answer = self._link.request({"type": "fence", "step": step}, ANSWER_S)
            except ChannelClosed as error:
                answer = {"stands": None, "reason": str(error)}
            if answer["stands"]:
                return
            if answer["stands"] is False:
                raise Fenced(answer["reason"])
            if time.monotonic() > deadline_s or self._link.wait_closed(PAUSE_S):
                raise StoreUnavailable(f"whether the round still stands could not be learned: {answer['reason']}")
