"""Who gets a seat in a round, so that it holds whole replicas. Pure.

Seats are kept before newcomers are let in, up to the limit of nodes. When the ranks of those are no multiple of
``ranks_per_replica``, a few are left out, or exchanged for a few that wait: seats are kept as far as can be, and then
the world is as large as can be. Nodes may have different numbers of ranks, a node several replicas, and a replica
several nodes. Of like nodes those are left out that leave whole replicas in each zone, rack and switch.

A world must hold a step, too: where ranks take no more than so many micro-batches, nodes that are too few for one are
no world. Whom to let in for that is not weighed.

Not here: who may be seated (rendezvous.py), and where (ring.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from elasticd.core.model import JobSpec, Member, MemberState, NodeId, Round
from elasticd.core.ring import LEVELS, count_ranks
from elasticd.core.view import Job


def choose_members(candidates: Sequence[Member], previous: Round | None, spec: JobSpec) -> list[NodeId]:
    """The members of the next round, of candidates that are given the oldest first; empty when they make none."""
    places = {seat.node_id: seat.group_rank for seat in previous.seats} if previous else {}
    ordered = sorted(candidates, key=lambda member: places.get(member.node_id, len(places)))
    first, rest = ordered[: spec.max_nodes], ordered[spec.max_nodes :]
    if count_ranks(first) % spec.ranks_per_replica == 0:
        chosen = first
    else:
        chosen = _whole(first, rest, places, spec)
        chosen = _aligned(chosen, ordered, places, spec.ranks_per_replica)
    return [member.node_id for member in chosen] if len(chosen) >= spec.min_nodes else []


@dataclass(frozen=True, slots=True)
class _Change:
    """What is kept by leaving some out and letting others in: better ones are larger."""

    kept_ranks: int
    ranks: int
    changes: tuple[NodeId, ...] = ()

    @property
    def worth(self) -> tuple[int, int, int]:
        return self.kept_ranks, self.ranks, -len(self.changes)

    def without(self, member: Member, *, held: bool) -> _Change:
        kept = self.kept_ranks - member.nproc * held
        return _Change(kept, self.ranks - member.nproc, (*self.changes, member.node_id))

    def with_(self, member: Member) -> _Change:
        return _Change(self.kept_ranks, self.ranks + member.nproc, (*self.changes, member.node_id))


def _whole(first: Sequence[Member], rest: Sequence[Member], held: Collection[NodeId], spec: JobSpec) -> list[Member]:
    """The best change of ``first`` to a multiple: by how many fewer there are, and what their ranks leave over.

    Of nodes with as many ranks, the last of ``first`` go and the first of ``rest`` come, never a whole replica's worth.
    """
    multiple = spec.ranks_per_replica
    start = _Change(sum(m.nproc for m in first if m.node_id in held), count_ranks(first))
    best: dict[tuple[int, int], _Change] = {(0, start.ranks % multiple): start}
    for member in _few_of_each(reversed(first), multiple - 1):
        for (fewer, _), change in list(best.items()):
            if fewer + 1 < multiple:  # of so many, some are a whole replica's worth
                _note(best, fewer + 1, change.without(member, held=member.node_id in held), multiple)
    for member in _few_of_each(rest, multiple - 1):
        for (fewer, _), change in list(best.items()):
            if fewer > 0:
                _note(best, fewer - 1, change.with_(member), multiple)
    whole = [
        change for (fewer, over), change in best.items() if over == 0 and len(first) - fewer >= max(1, spec.min_nodes)
    ]
    if not whole:
        return []
    changed = set(max(whole, key=lambda change: change.worth).changes)
    return [m for m in first if m.node_id not in changed] + [m for m in rest if m.node_id in changed]


def _note(best: dict[tuple[int, int], _Change], fewer: int, change: _Change, multiple: int) -> None:
    at = (fewer, change.ranks % multiple)
    if at not in best or change.worth > best[at].worth:
        best[at] = change


def _few_of_each(members: Iterable[Member], count: int) -> list[Member]:
    """The first ``count`` of those with as many ranks."""
    seen: Counter[int] = Counter()
    found = []
    for member in members:
        seen[member.nproc] += 1
        if seen[member.nproc] <= count:
            found.append(member)
    return found


def _aligned(
    chosen: Sequence[Member], candidates: Sequence[Member], held: Collection[NodeId], multiple: int
) -> list[Member]:
    """Exchanges like for like until no exchange leaves more domains with whole replicas."""
    seated = {m.node_id for m in chosen}
    inside, outside = list(chosen), [m for m in candidates if m.node_id not in seated]
    sizes = Counter(domain for m in inside for domain in _domains(m) for _ in range(m.nproc))

    def gain(out: Member, into: Member) -> tuple[int, ...]:
        """By how many broken domains there would be fewer, from the outermost level in."""
        after = {domain: sizes[domain] for domain in (*_domains(out), *_domains(into))}
        for domain in _domains(out):
            after[domain] -= out.nproc
        for domain in _domains(into):
            after[domain] += into.nproc
        gains = [0] * LEVELS
        for domain, size in after.items():
            gains[len(domain) - 1] += (sizes[domain] % multiple != 0) - (size % multiple != 0)
        return tuple(gains)

    def like(member: Member) -> tuple[int, bool]:
        return member.nproc, member.node_id in held

    for _ in range(len(inside)):
        # One of each kind is enough: the last that is in, the first that is out.
        outs = {(like(m), m.topology.key()): m for m in inside}
        intos = {(like(m), m.topology.key()): m for m in reversed(outside)}
        pairs = [(out, into) for out in outs.values() for into in intos.values() if like(out) == like(into)]
        out, into = max(pairs, key=lambda pair: gain(*pair), default=(None, None))
        if out is None or into is None or gain(out, into) <= (0,) * LEVELS:
            break
        for domain in _domains(out):
            sizes[domain] -= out.nproc
        for domain in _domains(into):
            sizes[domain] += into.nproc
        inside[inside.index(out)], outside[outside.index(into)] = into, out
    return inside


def _domains(member: Member) -> list[tuple[str, ...]]:
    """Its zone, its rack in that zone, its switch in that rack."""
    key = member.topology.key()
    return [key[: level + 1] for level in range(LEVELS)]


@dataclass(frozen=True, slots=True)
class Room:
    """What members take of a step together, at most: ``held`` of its ``micro_batches``."""

    held: int
    micro_batches: int

    @property
    def short(self) -> bool:
        return self.held < self.micro_batches

    def explain(self) -> str:
        """Why a job waits, for people."""
        return (
            f"its nodes take at most {self.held} of a step's {self.micro_batches} micro-batches together "
            "(max_micro_batches): it waits for more"
        )


def count_room(ring: Sequence[Member]) -> Room | None:
    """Of the members in the order of their ranks; None where they have said nothing, or do not say the same.

    Who has not said anything yet (its workers have not run) may take a whole step: only what is known is held against
    a world, or one that has lost the node with the most room could never try another.
    """
    said = [member.limits for member in ring if member.limits is not None]
    steps = {(limits.micro_batches, limits.replica_size) for limits in said}
    if len(steps) != 1:
        return None
    ((micro_batches, together),) = steps
    caps = [cap for member in ring for cap in _caps(member) or (micro_batches,) * member.nproc]
    held = sum(min(caps[start : start + together]) for start in range(0, len(caps), together))
    return Room(held, micro_batches)


def most_room_first(members: Sequence[Member], micro_batches: int) -> list[Member]:
    """By what their ranks take of a step together, as far as it is known; as they come where that is the same."""
    return sorted(members, key=lambda member: -sum(_caps(member) or (micro_batches,) * member.nproc))


def _caps(member: Member) -> tuple[int, ...]:
    """Of each of its ranks, as it has them now; empty where that is not known."""
    caps = member.limits.caps if member.limits is not None else ()
    return caps if len(caps) == member.nproc else ()


def why_waiting(job: Job) -> str:
    """Why a job without a world has none although its nodes may be enough, for people; empty when that is not it."""
    if job.over or (job.round is not None and job.round.value.seats):
        return ""
    if job.round is not None and job.round.value.reason:
        return job.round.value.reason
    room = count_room([held.value for held in job.members.values() if held.value.state is not MemberState.LEAVING])
    return room.explain() if room is not None and room.short else ""


def why_spare(spec: JobSpec, current: Round | None) -> str:
    """Why a member that is ready has no seat, for people; empty when it will have one soon."""
    if current is None or not current.seats:
        return ""
    if len(current.seats) >= spec.max_nodes:
        return f"the job has its {spec.max_nodes} nodes"
    if spec.ranks_per_replica > 1:
        return f"no whole replica of {spec.ranks_per_replica} ranks"
    return ""
