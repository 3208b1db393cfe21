"""What the next round should be. Pure: a situation in, a proposal or the reason to wait out.

Not here: who proposes and when (machine.py); who is alive (membership.py); which of the candidates make whole replicas
(seating.py), and their order (ring.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from elasticd.core.model import (
    Cause,
    Failure,
    JobSpec,
    Member,
    MemberState,
    NodeId,
    Phase,
    Round,
    Seat,
)
from elasticd.core.ring import seat_members
from elasticd.core.seating import Room, choose_members, count_room, most_room_first
from elasticd.core.stragglers import Exchange, Grounds, Suspect, SuspectKept, judge_suspect
from elasticd.core.view import Keyed


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a decision depends on.

    ``members`` leaves out those that are known to be dead and hold no seat; ``reachable``: members that may enter a
    world (linked); ``lost``: seats of the current round whose holder is gone; ``unsettled``: seats that cannot be
    judged or named yet; ``finished``: seats known to have ended well, even if their holder has left since; ``aside``:
    those who were evicted from this job, and come back only where the minimum is not met without them.
    """

    spec: JobSpec
    round: Round | None
    members: Mapping[NodeId, Keyed[Member]]
    reachable: frozenset[NodeId]
    lost: frozenset[NodeId] = frozenset()
    rebooted: frozenset[NodeId] = frozenset()
    unsettled: frozenset[NodeId] = frozenset()
    drained: frozenset[NodeId] = frozenset()
    finished: frozenset[NodeId] = frozenset()
    aside: frozenset[NodeId] = frozenset()
    suspect: Suspect | None = None
    cancelled: bool = False
    #: The workers of the current round stand still at a step boundary: they need a new round in any case.
    parked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The round to write, and the nodes to put out. ``planned``: nobody is hurt, so it can wait for a step boundary."""

    round: Round
    evict: frozenset[NodeId] = frozenset()
    planned: bool = False
    settle_s: float = 0.0
    exchange: Exchange | None = None


@dataclass(frozen=True, slots=True)
class TooFewNodes:
    have: int
    need: int


@dataclass(frozen=True, slots=True)
class NoWholeReplicas:
    """The ranks that there are make no replica, or none on as many nodes as are needed."""

    ranks: int
    per_replica: int


@dataclass(frozen=True, slots=True)
class NoRoomForStep:
    """Those who are there take no more than ``held`` of a step's ``micro_batches`` together."""

    held: int
    micro_batches: int


@dataclass(frozen=True, slots=True)
class StillPreparing:
    nodes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class Unsettled:
    nodes: tuple[NodeId, ...]


@dataclass(frozen=True, slots=True)
class NoFreshStore:
    """Nobody has a rendezvous store ready that no round has used."""


@dataclass(frozen=True, slots=True)
class NothingToChange:
    pass


@dataclass(frozen=True, slots=True)
class Over:
    phase: Phase


Reason = (
    TooFewNodes
    | NoWholeReplicas
    | NoRoomForStep
    | StillPreparing
    | Unsettled
    | NoFreshStore
    | NothingToChange
    | SuspectKept
    | Over
)


@dataclass(frozen=True, slots=True)
class Wait:
    reason: Reason


#: When many join at once, one round for all is better than one for each.
SETTLE_JOIN_S = 0.05
#: A worker that failed because its peer's node died fails 20 to 100 ms after it; the link knows in 1 ms. Waiting this
#: long keeps a lost node from being counted as a crash of the script.
SETTLE_FAILURE_S = 0.15


def decide_round(situation: Situation) -> Proposal | Wait:
    """The next round, or why there is none to write now."""
    current = situation.round
    if current is not None and current.phase.terminal:
        return Wait(Over(current.phase))
    if situation.cancelled:
        return _end(situation, Phase.CANCELLED, Cause.CANCELLED)
    if current is None or current.phase is Phase.WAITING:
        return _start(situation)
    return _change(situation, current)


def _start(situation: Situation) -> Proposal | Wait:
    """No world stands: form one when everybody who said that he comes is ready, and the minimum is met."""
    ready = _together(situation, [node for node in _candidates(situation) if node in situation.reachable], frozenset())
    preparing = tuple(
        sorted(
            node
            for node, member in situation.members.items()
            if node not in situation.drained
            and (member.value.state is MemberState.PREPARING or node not in situation.reachable)
        )
    )
    if len(ready) < situation.spec.max_nodes and preparing:
        return Wait(StillPreparing(preparing))
    if len(ready) < situation.spec.min_nodes:
        return Wait(TooFewNodes(len(ready), situation.spec.min_nodes))
    if not _chosen(situation, ready):
        return Wait(_why_no_world(situation, ready))
    cause = Cause.START if situation.round is None else Cause.JOIN
    return _world(situation, ready, cause, settle_s=_settle_join_s(situation, ready))


def _change(situation: Situation, current: Round) -> Proposal | Wait:
    """A world stands: end it, mend it, grow it or shrink it, in this order of urgency."""
    seats = frozenset(seat.node_id for seat in current.seats)
    gone = (situation.lost | situation.rebooted) - situation.finished
    done = _done(situation, current)
    if seats <= done:
        return _end(situation, Phase.SUCCEEDED, Cause.FINISHED)
    stay = [node for node in _candidates(situation) if node in situation.reachable or node in seats]
    stay = _together(situation, [node for node in stay if node not in gone], seats)
    unsettled = situation.unsettled & seats - gone
    if unsettled:
        return Wait(Unsettled(tuple(sorted(unsettled))))
    if gone or _without_agent(situation, current):
        return _world(situation, stay, Cause.NODE_LOST, evict=situation.lost - situation.finished)
    failures = _failures(situation, current)
    if failures:
        return _after_failure(situation, current, stay, next((f for f in failures if f.final), failures[0]))
    return _planned(situation, current, seats, stay)


def _planned(situation: Situation, current: Round, seats: frozenset[NodeId], stay: Sequence[NodeId]) -> Proposal | Wait:
    leaving = frozenset(n for n in seats if n not in stay)
    if leaving:
        cause = Cause.DRAIN if leaving & situation.drained else Cause.LEAVE
        return _world(situation, stay, cause, planned=True)
    if len(current.seats) < situation.spec.max_nodes and set(_chosen(situation, stay)) - seats:
        return _world(situation, stay, Cause.JOIN, planned=True, settle_s=_settle_join_s(situation, stay))
    verdict = _judge(situation, seats, stay)
    if isinstance(verdict, Exchange):
        return _exchanged(situation, stay, verdict)
    if situation.parked:
        return _world(situation, stay, Cause.JOIN, planned=True)
    return Wait(verdict or NothingToChange())


def _judge(situation: Situation, seats: frozenset[NodeId], stay: Sequence[NodeId]) -> Exchange | SuspectKept | None:
    suspect = situation.suspect
    if suspect is None or suspect.node_id not in seats:
        return None
    return judge_suspect(suspect, seats, _chosen(situation, [node for node in stay if node != suspect.node_id]))


def _exchanged(situation: Situation, stay: Sequence[NodeId], exchange: Exchange) -> Proposal | Wait:
    suspect = exchange.suspect
    cause = Cause.STRAGGLER if suspect.grounds is Grounds.SLOW else Cause.GPU_TROUBLE
    found = _world(situation, [node for node in stay if node != suspect.node_id], cause, planned=True)
    if isinstance(found, Wait):
        return found
    taken = f"{exchange.spare} takes its seat" if exchange.spare else "the world does without it"
    reason = f"{suspect.node_id} is {suspect.grounds.value}: {suspect.reason}; {taken}"
    return replace(found, round=replace(found.round, reason=reason), exchange=exchange)


def _settle_join_s(situation: Situation, coming: Sequence[NodeId]) -> float:
    """Nobody is waited for once there are as many as the job may have."""
    return SETTLE_JOIN_S if len(coming) < situation.spec.max_nodes else 0.0


def _after_failure(situation: Situation, current: Round, stay: Sequence[NodeId], failure: Failure) -> Proposal | Wait:
    """A worker failed: within the budget everybody starts again, beyond it the job has failed.

    Workers that have said what they take of a step, and end since it is less than the step, have not failed: they wait
    for more. But a job that has lost no node, and has as many as it may have, is one that can never hold a step.
    """
    seated = [seat.node_id for seat in current.seats if seat.node_id in situation.members]
    room = _room(situation, seated) if len(seated) == len(current.seats) else None
    short = room is not None and room.short
    may_come = len(seated) < situation.spec.max_nodes or current.restarts_by(Cause.NODE_LOST)
    if short and not failure.final and (may_come or _chosen(situation, stay)):
        return _world(situation, stay, Cause.NODE_LOST, settle_s=SETTLE_FAILURE_S)
    if short or failure.final or current.restarts_by(Cause.WORKER_FAILED) >= situation.spec.max_restarts:
        return _end(situation, Phase.FAILED, Cause.WORKER_FAILED, failure, SETTLE_FAILURE_S)
    return _world(situation, stay, Cause.WORKER_FAILED, failure=failure, settle_s=SETTLE_FAILURE_S)


def _together(situation: Situation, candidates: Sequence[NodeId], seats: frozenset[NodeId]) -> list[NodeId]:
    """Those who hold seats; of the rest, the oldest first, whoever has not been lost by one who is in before him.

    Those who were put aside are among them only where there is no world without them: as many as the minimum needs, or
    all where that is none either.
    """
    together: list[NodeId] = []
    for node in sorted(candidates, key=lambda node: node not in seats):
        if node in seats or not any(_apart(situation, node, other) for other in together):
            together.append(node)
    last_resort = [node for node in together if node in situation.aside]
    wanted = [node for node in together if node not in situation.aside]
    if not last_resort or _chosen(situation, wanted):
        return wanted
    few = wanted + last_resort[: max(0, situation.spec.min_nodes - len(wanted))]
    return few if _chosen(situation, few) else wanted + last_resort


def _apart(situation: Situation, one: NodeId, other: NodeId) -> bool:
    """Whether one of the two says that its link has lost the other, in the life that it has now."""
    a, b = situation.members[one].value, situation.members[other].value
    return a.boot_id in b.unreachable or b.boot_id in a.unreachable


def _candidates(situation: Situation) -> list[NodeId]:
    """Members that can enter a new round, the oldest first."""
    able = [
        (member.create_revision, node)
        for node, member in situation.members.items()
        if member.value.state not in (MemberState.PREPARING, MemberState.LEAVING) and node not in situation.drained
    ]
    return [node for _, node in sorted(able)]


def _done(situation: Situation, current: Round) -> frozenset[NodeId]:
    return situation.finished | _in_state(situation, current, MemberState.SUCCEEDED)


def _in_state(situation: Situation, current: Round, state: MemberState) -> frozenset[NodeId]:
    """Seats of the current round whose members say this of this very round."""
    found = set()
    for seat in current.seats:
        member = situation.members.get(seat.node_id)
        if member and member.value.state is state and member.value.round_number == current.number:
            found.add(seat.node_id)
    return frozenset(found)


def _without_agent(situation: Situation, current: Round) -> bool:
    """Whether a seat's agent is being started again: its workers are gone with the old one."""
    return any(
        member.value.state is MemberState.PREPARING
        for seat in current.seats
        if (member := situation.members.get(seat.node_id))
    )


def _failures(situation: Situation, current: Round) -> list[Failure]:
    """The failures of this round in the order in which they reached the store: the first is the cause of the rest."""
    found = []
    for node in _in_state(situation, current, MemberState.FAILED):
        member = situation.members[node]
        failure = member.value.failure
        if failure is not None:
            found.append((member.mod_revision, failure))
    return [failure for _, failure in sorted(found, key=lambda item: item[0])]


def _world(
    situation: Situation,
    candidates: Sequence[NodeId],
    cause: Cause,
    *,
    evict: frozenset[NodeId] = frozenset(),
    failure: Failure | None = None,
    planned: bool = False,
    settle_s: float = 0.0,
) -> Proposal | Wait:
    """A new round of these candidates; one that waits when they are too few."""
    previous = situation.round
    chosen = _chosen(situation, candidates)
    enough = bool(chosen)
    room = None if enough else _room(situation, _whole(situation, candidates))
    members = {node: situation.members[node].value for node in chosen}
    seats = seat_members(members, previous, situation.spec.ranks_per_replica)
    store = _store(seats, members, previous)
    if enough and store is None:
        return Wait(NoFreshStore())
    address, port = store or ("", 0)
    written = Round(
        number=(previous.number if previous else 0) + 1,
        phase=Phase.RUNNING if enough else Phase.WAITING,
        cause=cause,
        seats=seats,
        store_address=address,
        store_port=port,
        restarts=count_restart(previous, cause),
        failure=failure,
        reason="" if enough or room is None else room.explain(),
    )
    return Proposal(round=written, evict=evict, planned=planned, settle_s=settle_s)


def _end(
    situation: Situation, phase: Phase, cause: Cause, failure: Failure | None = None, settle_s: float = 0.0
) -> Proposal:
    """The last round of a job: no seats."""
    previous = situation.round
    number = (previous.number if previous else 0) + 1
    restarts = previous.restarts if previous else ()
    written = Round(number=number, phase=phase, cause=cause, restarts=restarts, failure=failure)
    return Proposal(round=written, settle_s=settle_s)


def count_restart(previous: Round | None, cause: Cause) -> tuple[tuple[Cause, int], ...]:
    """The job's restarts by cause, with this one; the first round of a job is no restart."""
    if previous is None:
        return ()
    counts = dict(previous.restarts)
    counts[cause] = counts.get(cause, 0) + 1
    return tuple(sorted(counts.items()))


def _chosen(situation: Situation, candidates: Sequence[NodeId]) -> list[NodeId]:
    """Those of them that make a world; empty when they are too few, no whole replicas, or cannot hold a step."""
    chosen = _whole(situation, candidates)
    room = _room(situation, chosen)
    return [] if room is not None and room.short else chosen


def _whole(situation: Situation, candidates: Sequence[NodeId]) -> list[NodeId]:
    """Those who make a world by number. Where the first in turn cannot hold a step, those who take the most of it."""
    members = [situation.members[node].value for node in candidates]
    chosen = choose_members(members, situation.round, situation.spec)
    room = _room(situation, chosen)
    if room is None or not room.short or len(members) <= situation.spec.max_nodes:
        return chosen
    roomiest = most_room_first(members, room.micro_batches)[: situation.spec.max_nodes]
    return choose_members(roomiest, situation.round, situation.spec) or chosen


def _room(situation: Situation, chosen: Sequence[NodeId]) -> Room | None:
    """What a world of these takes of a step; None where nobody knows."""
    members = {node: situation.members[node].value for node in chosen}
    if not any(member.limits for member in members.values()):
        return None
    seats = seat_members(members, situation.round, situation.spec.ranks_per_replica)
    return count_room([members[seat.node_id] for seat in seats])


def _why_no_world(situation: Situation, candidates: Sequence[NodeId]) -> NoWholeReplicas | NoRoomForStep:
    room = _room(situation, _whole(situation, candidates))
    if room is not None:
        return NoRoomForStep(room.held, room.micro_batches)
    ranks = sum(situation.members[node].value.nproc for node in candidates)
    return NoWholeReplicas(ranks, situation.spec.ranks_per_replica)


def _store(seats: Sequence[Seat], members: Mapping[NodeId, Member], previous: Round | None) -> tuple[str, int] | None:
    """Where the round's rendezvous store listens: on the first seat that has one which no round has used."""
    used = (previous.store_address, previous.store_port) if previous else ("", 0)
    for seat in seats:
        port = members[seat.node_id].store_port
        if port and (seat.address, port) != used:
            return seat.address, port
    return None
