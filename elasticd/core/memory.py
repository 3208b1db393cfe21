"""The RAM tier's values: copies of the training state in the memory of several nodes, and which of them is whole. Pure.

A *generation* is the state after one step, as one round copied it. Each rank wrote one *part* of it; an *index* says
which parts there are, with their checksums, and is made only once every rank has written its own. So a generation
whose parts can all be found is of one piece, whoever died meanwhile, and parts of two are never mixed.

Not here: bytes (daemon/memory.py, cluster/memory_link.py), tensors (checkpoint/memory_*.py).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from elasticd.core.model import NodeId
from elasticd.core.records import from_plain, to_json, to_plain
from elasticd.errors import CheckpointInvalid, ProtocolError

FORMAT = 1
#: A part's checksum is taken over blocks of this size, so that several threads can take it.
BLOCK_BYTES = 16 * 1024 * 1024
#: The first line of an index ends within so many bytes; behind it is what the trainer needs to read the parts.
MAX_INDEX_LINE_BYTES = 16 * 1024 * 1024


class Need(IntEnum):
    """What a stop at a step boundary asks of the state: the greatest that any node asks for counts."""

    NOTHING = 0
    COPY = 1  # every node stays: its memory does
    BUDDY = 2  # one node leaves: another must keep a copy of what is in its memory
    DISK = 3  # several leave, or the job does not go on at once


def need_of_change(seated: Sequence[NodeId], wanted: Sequence[NodeId], *, goes_on: bool) -> Need:
    """What a planned change of the world asks for. ``goes_on``: the new world trains at once."""
    leaving = set(seated) - set(wanted)
    if not goes_on or len(leaving) > 1:
        return Need.DISK
    return Need.BUDDY if leaving else Need.COPY


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Generation:
    """The state after ``step`` completed steps, as copied in that round. Newer is greater."""

    step: int
    round_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank wrote, on which node. ``crc32``: see ``combine``."""

    rank: int
    node_id: NodeId
    size_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What makes the parts one generation. ``metadata_*``: of the bytes that follow it."""

    format: int = FORMAT
    generation: Generation
    job_id: str
    metadata_bytes: int
    metadata_crc32: int
    parts: tuple[Part, ...]

    def ranks_of(self, node_id: NodeId) -> frozenset[int]:
        return frozenset(part.rank for part in self.parts if part.node_id == node_id)

    def part(self, rank: int) -> Part:
        return next(part for part in self.parts if part.rank == rank)


def encode_index(index: Index) -> bytes:
    """One line of JSON that carries its own checksum."""
    return json.dumps({"crc32": seal_of(index), "index": to_plain(index)}, separators=(",", ":")).encode() + b"\n"


def decode_index(line: bytes) -> Index:
    """CheckpointInvalid, with the reason, when it is not one of a version that we know."""
    try:
        sealed: Any = json.loads(line)
        body, seal = sealed["index"], sealed["crc32"]
        if body["format"] != FORMAT:
            raise CheckpointInvalid(f"the index has format {body['format']!r}, this elasticd knows {FORMAT}")
        index = from_plain(Index, body)
    except (ValueError, KeyError, TypeError, ProtocolError) as error:
        raise CheckpointInvalid(f"the index is damaged: {error}") from error
    if seal_of(index) != seal:
        raise CheckpointInvalid("the index does not match its own checksum")
    return index


def seal_of(index: Index) -> int:
    """What tells two generations of the same name apart."""
    return zlib.crc32(to_json(index).encode())


def combine(block_crc32s: Iterable[int]) -> int:
    """One checksum of many: the CRC32 of the blocks' CRC32s, each as four bytes, little end first."""
    numbers = list(block_crc32s)
    return zlib.crc32(struct.pack(f"<{len(numbers)}I", *numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What one node has of a generation: these ranks' parts. Those that its own workers wrote are ``own``."""

    node_id: NodeId
    generation: Generation
    seal: int
    own: tuple[int, ...] = ()
    copied: tuple[int, ...] = ()
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """Where a daemon has put what was asked for: parts by rank, and the index, of which so many bytes count."""

    paths: Mapping[int, str]
    index_path: str
    index_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A generation all of whose parts are there. ``holders``: by rank, who has the part, its writer first."""

    generation: Generation
    seal: int
    holders: Mapping[int, tuple[NodeId, ...]]
    #: Whether a part is left only at a node that did not write it.
    needs_buddy: bool

    def index_holders(self) -> list[NodeId]:
        """Every node that has a part has the index too."""
        return sorted({node for nodes in self.holders.values() for node in nodes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Torn:
    """A generation that cannot be put together, and why."""

    generation: Generation
    reason: str


def find_whole(holdings: Sequence[Holding]) -> tuple[list[Whole], list[Torn]]:
    """The generations that these holdings make up, newest first, and those of which parts are missing.

    Two of the same name with different seals are two generations: they are never completed from one another.
    """
    grouped: dict[tuple[Generation, int], list[Holding]] = {}
    for holding in holdings:
        grouped.setdefault((holding.generation, holding.seal), []).append(holding)
    whole: list[Whole] = []
    torn: list[Torn] = []
    for (generation, seal), held in sorted(grouped.items(), reverse=True):
        own = _by_rank((one.node_id, one.own) for one in held)
        copied = _by_rank((one.node_id, one.copied) for one in held)
        ranks = range(held[0].world_size)
        missing = [rank for rank in ranks if rank not in own and rank not in copied]
        if missing:
            reason = f"no live node has the parts of ranks {', '.join(map(str, missing[:8]))}"
            torn.append(Torn(generation=generation, reason=reason))
            continue
        holders = {rank: (*own.get(rank, ()), *copied.get(rank, ())) for rank in ranks}
        whole.append(
            Whole(
                generation=generation,
                seal=seal,
                holders=holders,
                needs_buddy=any(rank not in own for rank in ranks),
            )
        )
    return whole, torn


def _by_rank(held: Iterable[tuple[NodeId, tuple[int, ...]]]) -> dict[int, tuple[NodeId, ...]]:
    found: dict[int, tuple[NodeId, ...]] = {}
    for node_id, ranks in sorted(held):
        for rank in ranks:
            found[rank] = (*found.get(rank, ()), node_id)
    return found


def format_bytes(size_bytes: float) -> str:
    """For people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
