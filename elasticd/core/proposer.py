"""When a node acts on what it would decide. Pure, with one memory: since when it has wanted the same.

The oldest live member acts at once, the others each a little later (ETCD.md: one transaction and its watch take a few
milliseconds), so that in calm times one node proposes, and no node is special. A planned change first asks the
sessions to stop at a step boundary.
"""

from __future__ import annotations

from dataclasses import dataclass

from elasticd.core.memory import Need, need_of_change
from elasticd.core.model import Phase
from elasticd.core.rendezvous import Proposal, Reason, Situation, Wait, decide_round

#: Between the turns of two members; twenty times what a transaction and its watch take.
TURN_S = 0.1
LAST_TURN = 10
#: A proposal that is refused is made again at once, on what the store holds by then: another node was faster. Refused
#: again it waits, twice as long each time. It may be for long: no guard holds on a record that cannot be read.
RETRY_S = 0.05
LONGEST_RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What to do now: write, ask for a boundary, or look again at ``wake_at``."""

    proposal: Proposal | None = None
    ask_boundary: bool = False
    need: Need = Need.DISK
    wake_at: float | None = None
    waited_s: float = 0.0


class Proposer:
    """Remembers the last wish and since when it has stood; ``reason`` is why nothing is wanted."""

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self._wish: tuple[object, ...] = ()
        self._since = 0.0
        self._refused, self._not_before = 0, 0.0

    def answered(self, *, accepted: bool, now: float) -> None:
        """What the store made of the last proposal."""
        self._refused = 0 if accepted else self._refused + 1
        if self._refused > 1:
            self._not_before = now + min(LONGEST_RETRY_S, RETRY_S * 2 ** min(self._refused - 2, 10))

    def consider(self, situation: Situation, place: int | None, boundary_at: float | None, now: float) -> Due:
        """``place``: turns to wait for older members. ``boundary_at``: when a planned change may go on without
        a boundary (0: now; None: ask for one first)."""
        decision = decide_round(situation)
        if isinstance(decision, Wait):
            self.reason, self._wish = decision.reason, ()
            return Due()
        self.reason = None
        if place is None:
            return Due()
        due_at = self._due_at(decision, place, now)
        if now < due_at:
            return Due(wake_at=due_at)
        if decision.planned and boundary_at is None:
            return Due(ask_boundary=True, need=_need(situation, decision))
        if decision.planned and boundary_at is not None and now < boundary_at:
            return Due(wake_at=boundary_at)
        return Due(proposal=decision, waited_s=now - self._since)

    def _due_at(self, decision: Proposal, place: int, now: float) -> float:
        wanted = decision.round
        wish = (wanted.number, wanted.phase, wanted.cause, wanted.seats, decision.evict)
        if wish != self._wish:
            self._wish, self._since = wish, now
            self._refused, self._not_before = 0, 0.0
        return max(self._since + decision.settle_s + TURN_S * min(place, LAST_TURN), self._not_before)


def _need(situation: Situation, decision: Proposal) -> Need:
    """Where the state must be before the change is made."""
    seats = situation.round.seats if situation.round is not None else ()
    wanted = decision.round
    return need_of_change(
        [seat.node_id for seat in seats],
        [seat.node_id for seat in wanted.seats],
        goes_on=wanted.phase is Phase.RUNNING,
    )
