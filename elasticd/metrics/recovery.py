"""How long this node's workers stood still, and why: from the first evidence to the next completed step. Pure.

Not here: how a loss is detected (cluster/peers.py), what is done about it (core/).
"""

from __future__ import annotations

from dataclasses import dataclass

from elasticd.core.model import Cause, NodeId, Phase, Round


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """``until``: ``workers`` ran again, or a ``step`` was completed."""

    cause: Cause
    until: str
    seconds: float


@dataclass(slots=True)
class _Clock:
    """Runs from the first evidence; the first round that follows names the cause."""

    until: str
    since: float | None = None
    suspect: NodeId | None = None
    cause: Cause | None = None

    def start(self, now: float, suspect: NodeId | None) -> None:
        if self.since is None:
            self.since, self.suspect = now, suspect

    def stop(self, now: float) -> Recovered | None:
        """None while there is no evidence, or no round has followed it yet."""
        if self.since is None or self.cause is None:
            return None
        recovered = Recovered(cause=self.cause, until=self.until, seconds=now - self.since)
        self.reset()
        return recovered

    def reset(self) -> None:
        self.since = self.suspect = self.cause = None


class Recovery:
    """Told in order of time. Only a node whose workers ran has something to recover: not a joiner, nor a spare."""

    def __init__(self) -> None:
        self._ran = False
        self._workers, self._step = _Clock("workers"), _Clock("step")

    def suspected(self, now: float, peer: NodeId | None = None) -> None:
        """Evidence; ``peer``: whose loss it is, if it is the loss of a peer."""
        if self._ran:
            for clock in (self._workers, self._step):
                clock.start(now, peer)

    def cleared(self, peer: NodeId) -> None:
        """The peer is back. If no round has followed, nobody stood still."""
        for clock in (self._workers, self._step):
            if clock.suspect == peer and clock.cause is None:
                clock.reset()

    def entered(self, current: Round, now: float, *, seated: bool) -> None:
        """A newer round stands."""
        if current.phase.terminal or (current.phase is Phase.RUNNING and not seated):
            self.ended()
            return
        self.suspected(now)
        for clock in (self._workers, self._step):
            if clock.since is not None and clock.cause is None:
                clock.cause = current.cause

    def started(self, now: float) -> Recovered | None:
        """This node's workers run."""
        self._ran = True
        return self._workers.stop(now)

    def stepped(self, now: float) -> Recovered | None:
        """A rank of this node completed a step of the newest round."""
        return self._step.stop(now)

    def ended(self) -> None:
        """This node has no part in the job's world any more."""
        self._ran = False
        for clock in (self._workers, self._step):
            clock.reset()
