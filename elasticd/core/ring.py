"""Where the members of a round sit: the order of its ranks. Pure.

Who had a place among the first n keeps it. Newcomers fill the gaps so that replicas, and then the ring of ranks, cross
a boundary between zones, then racks, then switches as few times as they must: by dynamic programming as long as there
are few enough ways to fill the gaps, beside like neighbours otherwise. In a world of newcomers alone each domain is one
piece of the ring, and those that hold whole replicas come first.

Not here: who is seated (seating.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import prod

from elasticd.core.model import Member, NodeId, Round, Seat

LEVELS = 3  # of a topology
#: Beyond so many ways to look at, gaps are filled one by one.
MAX_STATES = 4096
MAX_WORK = 200_000

Key = tuple[str, str, str]
#: Where a member stands, and how many ranks it has.
Kind = tuple[Key, int]
#: Boundaries crossed inside replicas, by level from the outermost, then those crossed in the ring.
Crossings = tuple[int, ...]


def seat_members(
    members: Mapping[NodeId, Member], previous: Round | None, ranks_per_replica: int = 1
) -> tuple[Seat, ...]:
    """Ranks that stick: who had a place among the first n keeps it; the rest fill the gaps."""
    places: list[Member | None] = [None] * len(members)
    rest = dict(members)
    for seat in previous.seats if previous else ():
        member = members.get(seat.node_id)
        if member and member.boot_id == seat.boot_id and seat.group_rank < len(places):
            places[seat.group_rank] = rest.pop(seat.node_id)
    return _number(_fill(places, list(rest.values()), ranks_per_replica))


def crossings(ring: Sequence[Member], ranks_per_replica: int = 1) -> Crossings:
    """How often replicas cross a boundary between zones, racks, switches, and then how often the ring of ranks does."""
    inside, around, first_rank = [0] * LEVELS, [0] * LEVELS, 0
    for at, member in enumerate(ring):
        first_rank += member.nproc
        following = ring[(at + 1) % len(ring)]
        for level in range(_shared(member.topology.key(), following.topology.key()), LEVELS):
            around[level] += 1
            inside[level] += at + 1 < len(ring) and first_rank % ranks_per_replica != 0
    return (*inside, *around)


def _fill(places: Sequence[Member | None], newcomers: Sequence[Member], multiple: int) -> list[Member]:
    if not newcomers:
        return [place for place in places if place is not None]
    if len(newcomers) == len(places):
        ring = _by_domain(newcomers, multiple)
        if not any(crossings(ring, multiple)[:LEVELS]):
            return ring  # each domain is one piece of it: it cannot be better
        return _fewest_crossings(places, newcomers, multiple) or ring
    return _fewest_crossings(places, newcomers, multiple) or _one_by_one(places, newcomers)


def _by_domain(members: Sequence[Member], multiple: int, level: int = 0) -> list[Member]:
    """Each domain in one piece, on every level; first those that hold whole replicas."""
    if level == LEVELS:
        return sorted(members, key=lambda m: m.node_id)
    groups = [
        list(group)
        for _, group in groupby(
            sorted(members, key=lambda m: m.topology.key()[level]), key=lambda m: m.topology.key()[level]
        )
    ]
    groups.sort(key=lambda group: count_ranks(group) % multiple != 0)
    return [member for group in groups for member in _by_domain(group, multiple, level + 1)]


def _fewest_crossings(
    places: Sequence[Member | None], newcomers: Sequence[Member], multiple: int
) -> list[Member] | None:
    """The best way to fill the gaps, by dynamic programming over what has been used; None when there are too many.

    Newcomers with the same place in the topology and as many ranks are alike.
    """
    kinds: dict[Kind, list[Member]] = defaultdict(list)
    for member in sorted(newcomers, key=lambda m: (m.topology.key(), m.nproc, m.node_id)):
        kinds[member.topology.key(), member.nproc].append(member)
    states = prod(len(kind) + 1 for kind in kinds.values()) * len(kinds)
    if states > MAX_STATES or states * len(places) > MAX_WORK:
        return None
    first = places[0]
    starts = [first.topology.key()] if first is not None else sorted({key for key, _ in kinds})
    found = [_search(places, list(kinds), [len(kind) for kind in kinds.values()], start, multiple) for start in starts]
    _, filled = min((each for each in found if each is not None), key=lambda each: each[0])
    left = {kind: iter(members) for kind, members in kinds.items()}
    return [place or next(left[kind]) for place, kind in zip(places, filled, strict=True)]


def _search(
    places: Sequence[Member | None], kinds: Sequence[Kind], counts: Sequence[int], start: Key, multiple: int
) -> tuple[Crossings, list[Kind]] | None:
    """Of the rings that begin at ``start``: the crossings of the best, and the kind at each of its places."""
    # (how many of each kind are used, where the last one stands) -> (crossings, ranks, kinds so far, the last first)
    best: dict[tuple[tuple[int, ...], Key], tuple[Crossings, int, tuple[object, ...]]] = {}
    empty: Crossings = (0,) * (2 * LEVELS)
    for at, place in enumerate(places):
        before = best if at else {((0,) * len(kinds), start): (empty, 0, ())}
        best = {}
        for (used, last), (crossed, ranks, path) in before.items():
            for kind, then in _next_kinds(place, kinds, counts, used):
                if at == 0 and kind[0] != start:
                    continue
                now = _cross(crossed, last, kind[0], inside=at > 0 and ranks % multiple != 0) if at else crossed
                held = best.get((then, kind[0]))
                if held is None or now < held[0]:
                    best[then, kind[0]] = (now, ranks + kind[1], (kind, path))
    ends = [(_cross(crossed, last, start, inside=False), path) for (_, last), (crossed, _, path) in best.items()]
    if not ends:
        return None
    crossed, path = min(ends, key=lambda end: end[0])
    return crossed, _unwound(path)


def _next_kinds(
    place: Member | None, kinds: Sequence[Kind], counts: Sequence[int], used: tuple[int, ...]
) -> list[tuple[Kind, tuple[int, ...]]]:
    """What may stand at this place, and what is used then."""
    if place is not None:
        return [((place.topology.key(), place.nproc), used)]
    return [
        (kind, (*used[:index], used[index] + 1, *used[index + 1 :]))
        for index, kind in enumerate(kinds)
        if used[index] < counts[index]
    ]


def _cross(crossed: Crossings, before: Key, after: Key, *, inside: bool) -> Crossings:
    shared = _shared(before, after)
    added = [int(level >= shared) for level in range(LEVELS)]
    return tuple(a + b for a, b in zip(crossed, [each * inside for each in added] + added, strict=True))


def _unwound(path: tuple[object, ...]) -> list[Kind]:
    kinds: list[Kind] = []
    while path:
        kind, path = path  # type: ignore[assignment]
        kinds.append(kind)  # type: ignore[arg-type]
    return kinds[::-1]


def _one_by_one(places: Sequence[Member | None], newcomers: Sequence[Member]) -> list[Member]:
    """Each gap gets the newcomer that shares most with the member before it; the first in topology order otherwise."""
    rest = sorted(newcomers, key=lambda member: (member.topology.key(), member.node_id))
    filled: list[Member] = []
    for place in places:
        filled.append(place or rest.pop(_nearest(filled[-1] if filled else None, rest)))
    return filled


def _nearest(before: Member | None, newcomers: Sequence[Member]) -> int:
    if before is None:
        return 0
    here = before.topology.key()
    return max(range(len(newcomers)), key=lambda i: (_shared(here, newcomers[i].topology.key()), -i))


def _shared(one: Key, other: Key) -> int:
    """How many levels of the topology two places share, from the outermost in."""
    shared = 0
    for mine, theirs in zip(one, other, strict=True):
        if mine != theirs:
            break
        shared += 1
    return shared


def _number(members: Sequence[Member]) -> tuple[Seat, ...]:
    seats, first_rank = [], 0
    for group_rank, member in enumerate(members):
        seats.append(
            Seat(
                node_id=member.node_id,
                boot_id=member.boot_id,
                address=member.address,
                group_rank=group_rank,
                first_rank=first_rank,
                nproc=member.nproc,
                topology=member.topology,
            )
        )
        first_rank += member.nproc
    return tuple(seats)


def count_ranks(members: Iterable[Member]) -> int:
    return sum(member.nproc for member in members)
