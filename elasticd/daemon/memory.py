"""The workers' state in shared memory that the daemon owns: files on tmpfs, counted, bounded, and gone with it.

Workers write into files that are made here, and say when they are done; copies of other nodes' files are received into
the same place. A file is never mapped here: a worker that cuts off its own file can only hurt itself. Files and not
memfds, so that any process of the job's user can map one by name after a restart, and an operator can look.

Thread-safe and blocking. Not here: the files themselves (memory_files.py), that nothing is left behind
(memory_folder.py), who asks, and what is copied where (memory_service.py).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elasticd.core.memory import Generation, Holding, Index, seal_of
from elasticd.core.model import JobId, NodeId
from elasticd.daemon.memory_files import MemorySettings, Reading, SharedFiles, Shelf, StoredFile, read_index
from elasticd.daemon.memory_folder import MemoryFolder, sweep
from elasticd.errors import MemoryRefused

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Copy:
    """What one node wrote of a generation, as far as it is here. Of use once there is an index."""

    index: Index | None = None
    seal: int = 0
    index_file: StoredFile | None = None
    index_bytes: int = 0
    parts: dict[int, StoredFile] = field(default_factory=dict)
    sealed: set[int] = field(default_factory=set)  # the ranks whose parts are written

    def files(self) -> list[StoredFile]:
        return [*self.parts.values(), *([self.index_file] if self.index_file else [])]

    def take_index(self, index: Index, index_bytes: int) -> None:
        self.index, self.seal, self.index_bytes = index, seal_of(index), index_bytes

    def complete(self, writer: NodeId) -> bool:
        return self.index is not None and self.index.ranks_of(writer) <= self.sealed


_Key = tuple[Generation, NodeId]  # the node that wrote it


@dataclass(slots=True)
class _Job:
    shelf: Shelf
    copies: dict[_Key, _Copy] = field(default_factory=dict)

    def files(self) -> Iterator[StoredFile]:
        yield from self.shelf.spares
        for copy in self.copies.values():
            yield from copy.files()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """For the metrics."""

    own_bytes: int
    copied_bytes: int


class MemoryStore:
    """``me``: this node. Nothing is made on disk before the first file is."""

    def __init__(self, settings: MemorySettings, me: NodeId) -> None:
        self._settings, self._me = settings, me
        self._lock = threading.RLock()
        self._jobs: dict[JobId, _Job] = {}
        self._folder: MemoryFolder | None = None
        self._files = SharedFiles(settings, me)
        self._closed = False

    @property
    def limit_bytes(self) -> int:
        return self._settings.limit_bytes

    def sweep(self) -> None:
        """Remove what daemons that are gone have left behind."""
        for path in sweep(Path(self._settings.folder)):
            log.info("removed %s, which a daemon that is gone has left behind", path)

    # --- what this node's workers write ---

    def enter(self, job_id: JobId, owner: int) -> None:
        """Files of this job are for this user id."""
        with self._lock:
            if job_id in self._jobs or self._closed:
                return
            self._folder = self._folder or MemoryFolder(Path(self._settings.folder), self._me)
            folder = self._folder.path / hashlib.sha256(job_id.encode()).hexdigest()[:16]
            try:
                folder.mkdir(mode=0o711)
            except OSError as error:
                raise MemoryRefused(f"no copies in RAM: {folder} cannot be made: {error.strerror}") from error
            self._jobs[job_id] = _Job(Shelf(folder, owner))

    def begin(self, job_id: JobId, rank: int, generation: Generation, size_bytes: int, tag: str) -> StoredFile:
        """A file for this rank's part, which it is to fill. MemoryRefused when it does not fit."""
        with self._lock:
            job = self._job(job_id)
            copy = job.copies.setdefault((generation, self._me), _Copy())
            self._forget_part(job, copy, rank)
            known = any(file.tag == tag for file in job.files())
        if not known:  # a worker's first copy is taken only if there is room for two, once what is older is gone
            self._files.check_steady(size_bytes, self._older_bytes(job, generation))
        file = self._files.make(
            job.shelf, f"step-{generation.step}.r{generation.round_number}.rank-{rank}", size_bytes, tag
        )
        with self._lock:
            copy.parts[rank] = file
        return file

    def begin_index(self, job_id: JobId, generation: Generation, size_bytes: int, tag: str) -> StoredFile:
        """A file for what joins the parts, which the first rank of the node fills. MemoryRefused."""
        with self._lock:
            job = self._job(job_id)
            copy = job.copies.setdefault((generation, self._me), _Copy())
            self._drop_index(job, copy)
        name = f"step-{generation.step}.r{generation.round_number}.index"
        file = self._files.make(job.shelf, name, size_bytes, f"{tag}.index")
        with self._lock:
            copy.index_file = file
        return file

    def seal(self, job_id: JobId, rank: int, generation: Generation, index_bytes: int) -> bool:
        """The part is written, and with ``index_bytes`` the index is. Whether all of this node's ranks have said so.

        MemoryRefused when it is not of one piece after all.
        """
        with self._lock:
            copy = self._job(job_id).copies.get((generation, self._me))
            if copy is None or rank not in copy.parts:
                raise MemoryRefused(f"no copy of step {generation.step} was begun for rank {rank}")
            copy.sealed.add(rank)
            if index_bytes:
                if copy.index_file is None or index_bytes > copy.index_file.size_bytes:
                    raise MemoryRefused("an index is longer than was said")
                copy.take_index(read_index(copy.index_file, index_bytes), index_bytes)
            return copy.complete(self._me)

    def abandon(self, job_id: JobId, generation: Generation) -> None:
        """What this node's workers wrote of it is void."""
        with self._lock:
            job = self._jobs.get(job_id)
            copy = job.copies.pop((generation, self._me), None) if job is not None else None
            if job is not None and copy is not None:
                self._files.free(job.shelf, copy.files(), again=True)

    def forget_writer(self, tag: str) -> None:
        """The worker is gone: what it had not sealed is void, and what it might have filled next."""
        with self._lock:
            for job in self._jobs.values():
                for (_, writer), copy in job.copies.items():
                    if writer != self._me or copy.complete(writer):
                        continue
                    for rank in [rank for rank, file in copy.parts.items() if file.tag == tag]:
                        self._forget_part(job, copy, rank)
                    if copy.index_file is not None and copy.index_file.tag == f"{tag}.index":
                        self._drop_index(job, copy)
                self._files.free_spares(job.shelf, lambda spare_tag: spare_tag in (tag, f"{tag}.index"))

    def commit(self, job_id: JobId, generation: Generation) -> None:
        """This generation is safe on every rank: whatever is older is not needed any more."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is not None:
                for key in [key for key in job.copies if key[0] < generation]:
                    again = key[0].round_number == generation.round_number  # workers of another round are gone
                    self._files.free(job.shelf, job.copies.pop(key).files(), again=again)

    def keep_only(self, job_id: JobId, generation: Generation | None) -> None:
        """The job goes on from this generation (None: from elsewhere): others are void, older and newer ones."""
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None:
                return
            self._files.free_spares(job.shelf, lambda _: True)
            for key in [key for key in job.copies if key[0] != generation]:
                self._files.free(job.shelf, job.copies.pop(key).files(), again=False)
            for key, copy in list(job.copies.items()):
                for rank in [rank for rank, file in copy.parts.items() if file.fetched]:
                    copy.sealed.remove(rank)
                    self._files.free(job.shelf, [copy.parts.pop(rank)], again=False)
                if not copy.parts:
                    self._files.free(job.shelf, job.copies.pop(key).files(), again=False)

    def drop_job(self, job_id: JobId) -> None:
        with self._lock:
            job = self._jobs.pop(job_id, None)
            if job is not None:
                self._files.free(job.shelf, list(job.files()), again=False)
                shutil.rmtree(job.shelf.folder, ignore_errors=True)

    def drop_damaged(self, job_id: JobId, generation: Generation, rank: int, path: str) -> None:
        """A part does not match its checksum any more: the file of that name is no part of anything."""
        with self._lock:
            job = self._job(job_id)
            for (one, _), copy in job.copies.items():
                file = copy.parts.get(rank)
                if one == generation and file is not None and str(file.path) == path:
                    log.warning("memory: the part of rank %d of step %d is damaged", rank, generation.step)
                    copy.sealed.discard(rank)
                    self._files.free(job.shelf, [copy.parts.pop(rank)], again=False)

    # --- what is there ---

    def holdings(self, job_id: JobId) -> list[Holding]:
        with self._lock:
            job = self._jobs.get(job_id)
            found: dict[tuple[Generation, int], tuple[set[int], set[int], int]] = {}
            for (generation, writer), copy in (job.copies if job is not None else {}).items():
                if copy.index is None or (not copy.complete(writer) and writer == self._me):
                    continue
                own, copied, _ = found.setdefault((generation, copy.seal), (set(), set(), len(copy.index.parts)))
                (own if writer == self._me else copied).update(copy.sealed)
            return [
                Holding(
                    node_id=self._me,
                    generation=generation,
                    seal=seal,
                    own=tuple(sorted(own)),
                    copied=tuple(sorted(copied)),
                    world_size=size,
                )
                for (generation, seal), (own, copied, size) in found.items()
            ]

    def part(self, job_id: JobId, generation: Generation, seal: int, rank: int) -> Reading:
        """MemoryRefused when it is not here."""
        with self._lock:
            for copy in self._copies(job_id, generation, seal):
                if rank in copy.sealed:
                    return Reading.of(copy.parts[rank])
        raise MemoryRefused(f"node {self._me} does not have the part of rank {rank} of step {generation.step}")

    def index(self, job_id: JobId, generation: Generation, seal: int) -> Reading:
        """As many of its bytes as count. MemoryRefused when it is not here."""
        with self._lock:
            for copy in self._copies(job_id, generation, seal):
                if copy.index_file is not None:
                    return Reading.of(copy.index_file, copy.index_bytes)
        raise MemoryRefused(f"node {self._me} does not have the index of step {generation.step}")

    def own_copy(self, job_id: JobId, generation: Generation) -> tuple[Index, list[Reading]]:
        """The index, its file, and this node's own parts in the order of their ranks. MemoryRefused when not whole."""
        with self._lock:
            copy = self._job(job_id).copies.get((generation, self._me))
            if copy is None or copy.index is None or copy.index_file is None or not copy.complete(self._me):
                raise MemoryRefused(f"node {self._me} has no whole copy of step {generation.step}")
            index_file = Reading.of(copy.index_file, copy.index_bytes)
            parts = [copy.parts[rank] for rank in sorted(copy.index.ranks_of(self._me))]
            return copy.index, [index_file, *(Reading.of(file) for file in parts)]

    def held(self) -> Held:
        with self._lock:
            own = copied = 0
            for job in self._jobs.values():
                own += sum(file.size_bytes for file in job.shelf.spares)
                for (_, writer), copy in job.copies.items():
                    size_bytes = sum(file.size_bytes for file in copy.files())
                    own, copied = (own + size_bytes, copied) if writer == self._me else (own, copied + size_bytes)
            return Held(own_bytes=own, copied_bytes=copied)

    # --- copies of what other nodes' workers wrote ---

    def receive_index(self, job_id: JobId, writer: NodeId, size_bytes: int, name: str) -> StoredFile:
        """A file for an index that comes from another node; ``take_copy`` makes it count. MemoryRefused."""
        with self._lock:
            job = self._job(job_id)
        return self._files.make(job.shelf, f"{name}.index", size_bytes, f"copy-{writer}.index")

    def receive_part(
        self, job_id: JobId, writer: NodeId, rank: int, size_bytes: int, name: str, *, fetched: bool
    ) -> StoredFile:
        """``fetched``: for a restore, and not kept beyond it. MemoryRefused."""
        with self._lock:
            job = self._job(job_id)
        tag = f"copy-{writer}-{rank}{'-fetched' if fetched else ''}"
        file = self._files.make(job.shelf, f"{name}.rank-{rank}", size_bytes, tag)
        file.fetched = fetched
        return file

    def take_copy(
        self, job_id: JobId, writer: NodeId, index: Index, index_file: StoredFile, parts: dict[int, StoredFile]
    ) -> None:
        """What was received is whole, and its checksums match the index."""
        copy = _Copy(index_file=index_file, parts=dict(parts), sealed=set(parts))
        copy.take_index(index, index_file.size_bytes)
        with self._lock:
            job = self._job(job_id)
            old = job.copies.get((index.generation, writer))
            if old is not None and old.seal == copy.seal:  # parts that are here already stay
                kept = {rank: file for rank, file in old.parts.items() if rank not in parts}
                copy.parts |= kept
                copy.sealed |= kept.keys()
                self._files.free(job.shelf, [file for file in old.files() if file not in kept.values()], again=False)
            elif old is not None:
                self._files.free(job.shelf, old.files(), again=False)
            job.copies[index.generation, writer] = copy
            for file in copy.files():
                self._files.hand_over(job.shelf, file)

    def discard(self, job_id: JobId, files: list[StoredFile]) -> None:
        """What was received in part only."""
        with self._lock:
            job = self._jobs.get(job_id)
            self._files.free(job.shelf if job is not None else None, files, again=True)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for job_id in list(self._jobs):
                self.drop_job(job_id)
            if self._folder is not None:
                self._folder.close()
                self._folder = None

    # --- below ---

    def _job(self, job_id: JobId) -> _Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise MemoryRefused(f"node {self._me} does not take part in job {job_id}")
        return job

    def _copies(self, job_id: JobId, generation: Generation, seal: int) -> list[_Copy]:
        found = self._job(job_id).copies.items()
        return [copy for (one, _), copy in found if one == generation and copy.index is not None and copy.seal == seal]

    def _older_bytes(self, job: _Job, generation: Generation) -> int:
        with self._lock:
            older = [copy for (one, _), copy in job.copies.items() if one.round_number < generation.round_number]
            return sum(file.size_bytes for copy in older for file in copy.files())

    def _forget_part(self, job: _Job, copy: _Copy, rank: int) -> None:
        copy.sealed.discard(rank)
        file = copy.parts.pop(rank, None)
        if file is not None:
            copy.index = None
            self._files.free(job.shelf, [file], again=True)

    def _drop_index(self, job: _Job, copy: _Copy) -> None:
        copy.index = None
        if copy.index_file is not None:
            self._files.free(job.shelf, [copy.index_file], again=True)
            copy.index_file = None
