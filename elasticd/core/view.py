"""The cluster as one node knows it: the parsed copy of all keys, as of one revision. Pure.

The watch keeps it fresh, a snapshot replaces it whole. Records that cannot be parsed (written by a newer version, or by
hand) are left out and remembered in ``unreadable``. Not here: any decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from elasticd.core import keys
from elasticd.core.model import JobId, JobSpec, Member, Node, NodeId, Round
from elasticd.core.records import from_json
from elasticd.core.stragglers import Eviction, Offences, Quarantine, Tally
from elasticd.errors import ProtocolError

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One key as the store holds it; ``value`` is None when it was deleted."""

    key: str
    value: str | None
    create_revision: int = 0
    mod_revision: int = 0


@dataclass(frozen=True, slots=True)
class Keyed(Generic[T]):
    """A parsed record with the revisions that guard it."""

    value: T
    create_revision: int
    mod_revision: int


@dataclass(slots=True)
class Job:
    """All that is known of one job."""

    spec: Keyed[JobSpec] | None = None
    round: Keyed[Round] | None = None
    cancelled: bool = False
    members: dict[NodeId, Keyed[Member]] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.round is not None and self.round.value.phase.terminal


@dataclass(slots=True)
class View:
    """``loaded`` is False until the first snapshot has arrived."""

    revision: int = 0
    loaded: bool = False
    nodes: dict[NodeId, Keyed[Node]] = field(default_factory=dict)
    jobs: dict[JobId, Job] = field(default_factory=dict)
    drains: set[NodeId] = field(default_factory=set)
    evictions: dict[tuple[JobId, NodeId], Keyed[Eviction]] = field(default_factory=dict)
    offences: dict[NodeId, Keyed[Offences]] = field(default_factory=dict)
    quarantines: dict[NodeId, Keyed[Quarantine]] = field(default_factory=dict)
    tally: Keyed[Tally] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def replace(self, entries: Iterable[Entry], revision: int) -> None:
        """A snapshot: what it does not hold does not exist."""
        self.nodes, self.jobs, self.drains, self.unreadable = {}, {}, set(), {}
        self.evictions, self.offences, self.quarantines, self.tally = {}, {}, {}, None
        for entry in entries:
            self._apply(entry)
        self.revision, self.loaded = revision, True

    def change(self, entries: Iterable[Entry], revision: int) -> None:
        """What one revision changed."""
        for entry in entries:
            self._apply(entry)
        self.revision = max(self.revision, revision)

    def job(self, job_id: JobId) -> Job:
        return self.jobs.get(job_id) or Job()

    @property
    def cordoned(self) -> frozenset[NodeId]:
        """Nodes that take no job: drained, or in quarantine."""
        return frozenset(self.drains) | frozenset(self.quarantines)

    def aside(self, job_id: JobId) -> frozenset[NodeId]:
        """Nodes that were evicted from this job."""
        return frozenset(node for job, node in self.evictions if job == job_id)

    def _apply(self, entry: Entry) -> None:
        self.unreadable.pop(entry.key, None)
        if entry.key.startswith(keys.NODES):
            self._record(self.nodes, NodeId(entry.key.removeprefix(keys.NODES)), Node, entry)
        elif entry.key.startswith(keys.DRAINS):
            self._mark(entry)
        elif entry.key.startswith(keys.EVICTIONS):
            job_id, _, node_id = entry.key.removeprefix(keys.EVICTIONS).partition("/")
            self._record(self.evictions, (JobId(job_id), NodeId(node_id)), Eviction, entry)
        elif entry.key.startswith(keys.OFFENCES):
            self._record(self.offences, NodeId(entry.key.removeprefix(keys.OFFENCES)), Offences, entry)
        elif entry.key.startswith(keys.QUARANTINES):
            self._record(self.quarantines, NodeId(entry.key.removeprefix(keys.QUARANTINES)), Quarantine, entry)
        elif entry.key == keys.TALLY:
            self.tally = self._parse(Tally, entry)
        elif entry.key.startswith(keys.JOBS):
            self._apply_job(entry)

    def _mark(self, entry: Entry) -> None:
        node_id = NodeId(entry.key.removeprefix(keys.DRAINS))
        if entry.value is None:
            self.drains.discard(node_id)
        else:
            self.drains.add(node_id)

    def _apply_job(self, entry: Entry) -> None:
        job_id, _, rest = entry.key.removeprefix(keys.JOBS).partition("/")
        job = self.jobs.setdefault(JobId(job_id), Job())
        if rest == "spec":
            job.spec = self._parse(JobSpec, entry)
        elif rest == "round":
            job.round = self._parse(Round, entry)
        elif rest == "cancel":
            job.cancelled = entry.value is not None
        elif rest.startswith("members/"):
            self._record(job.members, NodeId(rest.removeprefix("members/")), Member, entry)
        if job.spec is None and job.round is None and not job.members and not job.cancelled:
            del self.jobs[JobId(job_id)]

    def _record(self, table: dict[K, Any], name: K, kind: type[Any], entry: Entry) -> None:
        parsed = self._parse(kind, entry)
        if parsed is None:
            table.pop(name, None)
        else:
            table[name] = parsed

    def _parse(self, kind: type[T], entry: Entry) -> Keyed[T] | None:
        if entry.value is None:
            return None
        try:
            value = from_json(kind, entry.value)
        except ProtocolError as error:
            self.unreadable[entry.key] = str(error)
            return None
        return Keyed(value, entry.create_revision, entry.mod_revision)
