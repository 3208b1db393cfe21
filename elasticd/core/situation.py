"""From what one node knows to the situation that a decision needs. Pure.

Not here: the evidence itself (membership.py), the decision (rendezvous.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elasticd.core.membership import Evidence, Link, Verdict, neighbours
from elasticd.core.messages import Down, PeerAddress
from elasticd.core.model import BootId, NodeId
from elasticd.core.rendezvous import Situation
from elasticd.core.task import Task
from elasticd.core.view import Job, View

#: Turns that a node lets pass which has lost more than half of the others at once.
CUT_OFF_TURNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """``evidence`` may count less than all of ``links``; ``linked``: whom this node holds a link to."""

    evidence: Evidence
    links: Mapping[NodeId, Link]
    linked: frozenset[NodeId]
    drained: frozenset[NodeId]
    aside: frozenset[NodeId] = frozenset()


def assess(known: Knowledge, job: Job, task: Task, *, parked: bool) -> Situation:
    """The situation of a job as this node sees it. When the store has lost the round, the one that stands counts."""
    current = job.round.value if job.round else task.last_round
    verdicts = {
        seat.node_id: known.evidence.judge_seat(seat, job.members.get(seat.node_id))
        for seat in (current.seats if current else ())
    }
    dead = {node for node, link in known.links.items() if link.down is not None}
    members = {
        node: member
        for node, member in job.members.items()
        if node in verdicts or node not in dead or known.links[node].boot_id != member.value.boot_id
    }
    return Situation(
        spec=task.spec,
        round=current,
        members=members,
        reachable=frozenset(
            node for node, m in members.items() if known.evidence.reaches(m.value, linked=node in known.linked)
        ),
        lost=_judged(verdicts, Verdict.LOST),
        rebooted=_judged(verdicts, Verdict.REBOOTED),
        unsettled=_judged(verdicts, Verdict.REGISTERING) | _judged(verdicts, Verdict.UNCLEAR),
        drained=known.drained,
        aside=known.aside,
        finished=frozenset(task.finished),
        cancelled=job.cancelled,
        parked=parked,
    )


def seniority(situation: Situation, me: NodeId, links: Mapping[NodeId, Link]) -> int | None:
    """My place among the live members, the oldest first: how many turns I let pass before I propose.

    None for who holds no seat while one who does is alive: the world is theirs, and a node that was put out because it
    does not hear one of them must not put that one out in turn. Who has lost more than half of the others at once is
    more likely the one that is cut off, and steps back.
    """
    gone = (situation.lost | situation.rebooted) - {me}
    ages = sorted((m.create_revision, node) for node, m in situation.members.items() if node not in gone)
    place = next(i for i, (_, node) in enumerate(ages) if node == me)
    seats = {seat.node_id for seat in situation.round.seats} if situation.round else set()
    if seats and me not in seats and seats - gone:
        return None
    silent = {node for node in gone if node in links and links[node].down is Down.SILENT}
    cut_off = len(seats) > 2 and 2 * len(silent) > len(seats - {me})
    return place + CUT_OFF_TURNS if cut_off else place


def outsider_lost_all(me: NodeId, job: Job, links: Mapping[NodeId, Link]) -> bool:
    """Whether I hold no seat and several that do fell silent for me: then it is I who am cut off, until leases tell."""
    seats = {seat.node_id for seat in job.round.value.seats} if job.round else set()
    silent = {node for node in seats if node in links and links[node].down is Down.SILENT}
    return me not in seats and len(silent) > 1


def unreachable(links: Mapping[NodeId, Link], job: Job, watched: frozenset[PeerAddress]) -> tuple[BootId, ...]:
    """The lives that my links have lost and that hold no seat: what I say of them keeps them out until they are back.

    Without it, two members with different evidence would take turns at letting such a node in and putting it out. Who
    holds a seat is judged at once and not through the store. A member that I hold no link to is not mine to judge.
    """
    seats = {seat.boot_id for seat in job.round.value.seats} if job.round else set()
    mine = {peer.node_id for peer in watched}
    lost = {
        link.boot_id
        for node, link in links.items()
        if link.down is not None and link.boot_id not in seats and (node in mine or node not in job.members)
    }
    return tuple(sorted(lost))


def peers_wanted(me: NodeId, view: View, task: Task | None, watched: frozenset[PeerAddress]) -> frozenset[PeerAddress]:
    """Links to the neighbours among the members of my job; a link that a seat still needs outlives its key."""
    if task is None:
        return frozenset()
    job = view.job(task.spec.job_id)
    known = {node: view.nodes[node].value for node in job.members if node in view.nodes}
    near = neighbours(me, frozenset(known))
    wanted = {
        PeerAddress(node_id=node.node_id, boot_id=node.boot_id, address=node.address, port=node.peer_port)
        for node in known.values()
        if node.node_id in near
    }
    seats = {seat.node_id: seat.boot_id for seat in job.round.value.seats} if job.round else {}
    kept = {peer for peer in watched if seats.get(peer.node_id) == peer.boot_id and peer.node_id not in known}
    return frozenset(wanted | kept)


def _judged(verdicts: Mapping[NodeId, Verdict], wanted: Verdict) -> frozenset[NodeId]:
    return frozenset(node for node, verdict in verdicts.items() if verdict is wanted)
