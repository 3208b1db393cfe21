"""What daemons say to each other about copies in RAM: one keeps another's, and gives them back. Threads, blocking.

``put`` hands a generation to a buddy, ``get`` has parts of one back; both name the job, the generation and the node
that wrote it, and every byte is checked against the index on arrival. Not here: whom to ask (memory_service.py).
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from elasticd.cluster.memory_link import DataConnection, Header
from elasticd.core.memory import Generation, Index, format_bytes, seal_of
from elasticd.core.model import JobId, NodeId
from elasticd.daemon.memory import MemoryStore
from elasticd.daemon.memory_files import Reading, StoredFile, read_index
from elasticd.errors import MemoryRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a daemon serves copies."""

    node_id: NodeId
    address: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a rank needs of a generation. ``parts``: by rank, who wrote it, and who has it, best first."""

    job_id: JobId
    generation: Generation
    seal: int
    parts: Mapping[int, tuple[NodeId, tuple[NodeId, ...]]]
    index_from: tuple[NodeId, ...]
    #: (rank, path) of what is here and was found damaged: it is wanted from elsewhere.
    damaged: tuple[tuple[int, str], ...] = ()


class Copies:
    """This node's part in it. ``enter``: MemoryRefused when this node is not in that job now: then it keeps nothing."""

    def __init__(
        self, me: NodeId, store: MemoryStore, tls: ssl.SSLContext | None, enter: Callable[[JobId], None]
    ) -> None:
        self._me, self._store, self._tls, self._enter = me, store, tls, enter
        self._fetching = threading.Lock()

    # --- the side that asks ---

    def put(self, job_id: JobId, generation: Generation, to: Place, committed: Generation | None) -> Sent:
        """Have this node's own parts kept there. Returns once they are, and are whole.

        ``committed``: older generations need not be kept any more. MemoryRefused, with the reason, when it cannot be.
        """
        started = time.monotonic()
        index, files = self._store.own_copy(job_id, generation)
        with contextlib.ExitStack() as stack:
            for file in files:
                stack.enter_context(file)
            stack.enter_context(_refusals(to.node_id))
            connection = stack.enter_context(DataConnection.dial(to.address, to.port, self._tls))
            connection.ask(
                {
                    "op": "put",
                    "job": job_id,
                    "writer": self._me,
                    "index_bytes": files[0].size_bytes,
                    "ranks": sorted(index.ranks_of(self._me)),
                    "committed": _plain(committed),
                }
            )
            with contextlib.suppress(ConnectionError):  # it refused half-way, and hung up: its answer says why
                for file in files:
                    connection.send_file(file.descriptor, file.size_bytes)
            connection.answer()
        return Sent(size_bytes=sum(file.size_bytes for file in files), seconds=time.monotonic() - started)

    def fetch(self, wanted: Wanted, places: Mapping[NodeId, Place]) -> dict[str, Any]:
        """Bring here what is not here yet: paths by rank, and the index. MemoryRefused when it cannot be had."""
        with self._fetching:  # ranks of one node mostly want the same
            for rank, path in wanted.damaged:
                self._store.drop_damaged(wanted.job_id, wanted.generation, rank, path)
            missing: dict[tuple[NodeId, tuple[NodeId, ...]], list[int]] = {}
            for rank, (writer, nodes) in wanted.parts.items():
                if not self._is_here(partial(self._part, wanted, rank)):
                    missing.setdefault((writer, nodes), []).append(rank)
            if not missing and not self._is_here(partial(self._index, wanted)):
                missing = {(wanted.index_from[0], wanted.index_from): []}
            for (writer, nodes), ranks in missing.items():
                self._from_any(wanted, writer, ranks, nodes, places)
        paths = []
        for rank in wanted.parts:
            with self._part(wanted, rank) as part:
                paths.append([rank, str(part.path)])
        with self._index(wanted) as index:
            return {"paths": paths, "index_path": str(index.path), "index_bytes": index.size_bytes}

    def _from_any(
        self,
        wanted: Wanted,
        writer: NodeId,
        ranks: list[int],
        nodes: tuple[NodeId, ...],
        places: Mapping[NodeId, Place],
    ) -> None:
        """From the first of these nodes that gives it. MemoryRefused, with all reasons, when none does."""
        reasons = []
        for node_id in nodes:
            place = places.get(node_id)
            if place is None or node_id == self._me:
                reasons.append(f"node {node_id} cannot be asked")
                continue
            try:
                self._get(wanted, writer, ranks, place)
            except MemoryRefused as error:
                reasons.append(str(error))
            else:
                return
        raise MemoryRefused("; ".join(reasons) or f"nobody has the parts of ranks {ranks}")

    def _get(self, wanted: Wanted, writer: NodeId, ranks: list[int], of: Place) -> None:
        generation = wanted.generation
        request = {"op": "get", "job": wanted.job_id, "ranks": ranks, "seal": wanted.seal}
        request |= {"step": generation.step, "round": generation.round_number}
        with _refusals(of.node_id), DataConnection.dial(of.address, of.port, self._tls) as connection:
            index_bytes = int(connection.ask(request)["index_bytes"])
            index = self._receive(connection, wanted.job_id, writer, index_bytes, ranks, fetched=True)
            if (index.generation, seal_of(index)) != (generation, wanted.seal):
                raise MemoryRefused("it sent another generation")

    def _part(self, wanted: Wanted, rank: int) -> Reading:
        return self._store.part(wanted.job_id, wanted.generation, wanted.seal, rank)

    def _index(self, wanted: Wanted) -> Reading:
        return self._store.index(wanted.job_id, wanted.generation, wanted.seal)

    def _is_here(self, open_it: Callable[[], Reading]) -> bool:
        try:
            with open_it():
                return True
        except MemoryRefused:
            return False

    # --- the side that answers ---

    def serve(self, connection: DataConnection, header: Header) -> None:
        """One request. What is wrong with it is raised, and ends the connection."""
        job_id = JobId(str(header["job"]))
        self._enter(job_id)
        match header.get("op"):
            case "put":
                self._serve_put(connection, header, job_id)
            case "get":
                self._serve_get(connection, header, job_id)
            case other:
                raise ValueError(f"no such request: {other!r}")

    def _serve_put(self, connection: DataConnection, header: Header, job_id: JobId) -> None:
        committed = header.get("committed")
        if committed is not None:
            self._store.commit(job_id, Generation(step=int(committed[0]), round_number=int(committed[1])))
        writer, ranks = NodeId(str(header["writer"])), [int(rank) for rank in header["ranks"]]
        if writer == self._me:
            raise MemoryRefused("a node is not its own buddy")
        connection.send({"ok": True})
        self._receive(connection, job_id, writer, int(header["index_bytes"]), ranks, fetched=False)
        connection.send({"ok": True})

    def _serve_get(self, connection: DataConnection, header: Header, job_id: JobId) -> None:
        generation = Generation(step=int(header["step"]), round_number=int(header["round"]))
        seal = int(header["seal"])
        with contextlib.ExitStack() as stack:
            found = [self._store.index(job_id, generation, seal)]
            found += [self._store.part(job_id, generation, seal, int(rank)) for rank in header["ranks"]]
            files = [stack.enter_context(file) for file in found]
            connection.send({"ok": True, "index_bytes": files[0].size_bytes})
            for file in files:
                connection.send_file(file.descriptor, file.size_bytes)

    # --- both ---

    def _receive(
        self,
        connection: DataConnection,
        job_id: JobId,
        writer: NodeId,
        index_bytes: int,
        ranks: list[int],
        *,
        fetched: bool,
    ) -> Index:
        """An index and these parts of it, kept once all of it has come and matches. MemoryRefused otherwise."""
        taken: list[StoredFile] = []
        try:
            index_file = self._store.receive_index(job_id, writer, index_bytes, f"from-{writer}")
            taken.append(index_file)
            connection.receive_file(index_file.descriptor, index_bytes)
            index = read_index(index_file, index_bytes)
            if not set(ranks) <= index.ranks_of(writer):
                raise MemoryRefused(f"node {writer} did not write the parts of ranks {ranks}")
            name = f"step-{index.generation.step}.r{index.generation.round_number}.from-{writer}"
            parts = {}
            for part in (index.part(rank) for rank in ranks):
                file = self._store.receive_part(job_id, writer, part.rank, part.size_bytes, name, fetched=fetched)
                taken.append(file)
                parts[part.rank] = file
                if connection.receive_file(file.descriptor, part.size_bytes) != part.crc32:
                    raise MemoryRefused(
                        f"the part of rank {part.rank} of step {index.generation.step} "
                        f"({format_bytes(part.size_bytes)}) does not match its checksum"
                    )
            self._store.take_copy(job_id, writer, index, index_file, parts)
        except BaseException:
            self._store.discard(job_id, taken)
            raise
        return index


def _plain(generation: Generation | None) -> list[int] | None:
    return None if generation is None else [generation.step, generation.round_number]


@contextlib.contextmanager
def _refusals(node_id: NodeId) -> Iterator[None]:
    """Whatever goes wrong with another node is one kind of failure here, and says which node it was."""
    try:
        yield
    except (MemoryRefused, OSError, ValueError, KeyError, TypeError) as error:
        raise MemoryRefused(f"node {node_id}: {error}") from error
