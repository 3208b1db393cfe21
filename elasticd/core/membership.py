"""Who is alive, by the evidence that one node has. Pure: (view, links, time) -> verdicts.

A node is never judged by its clock. Evidence, strongest first: its link was refused or fell silent; its key is gone
although the store has been up for a whole TTL; it came back with another boot id. A missing key alone proves nothing
while its link is up: its lease lapsed in an outage and it will register again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from elasticd.core.messages import Down
from elasticd.core.model import BootId, Member, NodeId, Seat
from elasticd.core.view import Keyed


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The last thing heard of a peer on its link. ``down`` is None while the link is up."""

    boot_id: BootId
    down: Down | None
    since: float


class Verdict(StrEnum):
    """What one node thinks of a seat of the current round."""

    ALIVE = "alive"
    REGISTERING = "registering"  # alive, but its key is missing: no transaction can name it yet
    LOST = "lost"
    REBOOTED = "rebooted"  # the node is there, in another life: its workers are gone
    UNCLEAR = "unclear"  # the key is missing, and the store has not been up for a whole TTL


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one node knows about the others. ``store_up_s``: for how long its store has answered without a break."""

    me: NodeId
    links: Mapping[NodeId, Link]
    store_up_s: float
    lease_ttl_s: float

    def judge_seat(self, seat: Seat, member: Keyed[Member] | None) -> Verdict:
        """Whether the holder of a seat is still there."""
        if member is not None and member.value.boot_id != seat.boot_id:
            return Verdict.REBOOTED
        if seat.node_id == self.me:
            return Verdict.ALIVE if member is not None else Verdict.REGISTERING
        link = self._link(seat.node_id, seat.boot_id)
        if link is not None and link.down is not None:
            return Verdict.LOST
        if member is not None:
            return Verdict.ALIVE
        if link is not None:
            return Verdict.REGISTERING
        return Verdict.LOST if self.store_up_s >= self.lease_ttl_s else Verdict.UNCLEAR

    def reaches(self, member: Member, *, linked: bool) -> bool:
        """Whether a candidate may be let in: a neighbour must have a link that is up."""
        if member.node_id == self.me:
            return True
        link = self._link(member.node_id, member.boot_id)
        if link is None:
            return not linked
        return link.down is None

    def _link(self, node_id: NodeId, boot_id: BootId) -> Link | None:
        link = self.links.get(node_id)
        return link if link is not None and link.boot_id == boot_id else None


def neighbours(me: NodeId, nodes: frozenset[NodeId], degree: int = 16) -> frozenset[NodeId]:
    """Whom to hold a link to: everybody while they are few, otherwise the nearest on a ring of ids.

    Symmetric: a is b's neighbour exactly when b is a's.
    """
    others = sorted(nodes | {me})
    if len(others) - 1 <= degree:
        return frozenset(others) - {me}
    at, reach = others.index(me), degree // 2
    ring = [others[(at + offset) % len(others)] for offset in range(-reach, reach + 1) if offset]
    return frozenset(ring)
