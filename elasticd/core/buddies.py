"""Which node keeps a copy of another's memory: one in another failure domain, the load spread evenly. Pure.

Not here: that a node refuses, or cannot be reached (the next one in the list is asked then).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from elasticd.core.model import NodeId, Seat, Topology


class Apart(StrEnum):
    """What two nodes do not share. A label that an operator has left out is shared by all."""

    ZONE = "zone"
    RACK = "rack"
    SWITCH = "switch"
    NODE = "node"


@dataclass(frozen=True, slots=True, kw_only=True)
class Buddy:
    """A node that can keep the copy, and what a fault must reach beyond to take both."""

    node_id: NodeId
    apart: Apart


def rank_buddies(me: NodeId, seats: Sequence[Seat]) -> tuple[Buddy, ...]:
    """All other nodes of a round, the best first: in another zone, else rack, else switch, else just another node.

    Among equals, each node starts at another place of the same ring: with groups of equal size everyone keeps the copy
    of one other. Empty when ``me`` is alone, or holds no seat.
    """
    ring = sorted(seats, key=lambda seat: (*seat.topology.key(), seat.node_id))
    mine = next((index for index, seat in enumerate(ring) if seat.node_id == me), None)
    if mine is None:
        return ()
    behind_me = [*ring[mine + 1 :], *ring[:mine]]
    apart = {seat.node_id: how_apart(ring[mine].topology, seat.topology) for seat in behind_me}
    domains = list(Apart)
    ordered: list[Buddy] = []
    for level, domain in enumerate(domains):
        there = [seat.node_id for seat in behind_me if apart[seat.node_id] is domain]
        # My place among those who share this domain with me: they have the same choice, and must not all choose alike.
        place = sum(1 for seat in ring[:mine] if apart[seat.node_id] in domains[level + 1 :])
        turn = place % len(there) if there else 0
        ordered += [Buddy(node_id=node_id, apart=domain) for node_id in (*there[turn:], *there[:turn])]
    return tuple(ordered)


def how_apart(one: Topology, other: Topology) -> Apart:
    """The largest domain that is known not to be shared."""
    for domain, label, theirs in zip(Apart, one.key(), other.key(), strict=False):
        if label and theirs and label != theirs:
            return domain
    return Apart.NODE
