"""The values that everything else talks about: nodes, jobs, members, rounds. Frozen, and nothing but data.

Not here: how they are written to etcd (records.py), who is alive (membership.py), who is in the world (rendezvous.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType, Self

NodeId = NewType("NodeId", str)
BootId = NewType("BootId", str)
JobId = NewType("JobId", str)

#: Version of the records in etcd and of the messages on links. Daemons of different protocol versions do not mix.
PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as NVML describes it."""

    index: int
    name: str
    uuid: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a node has to offer."""

    cpu_count: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Where a node stands, outermost first; empty strings where the operator said nothing."""

    zone: str = ""
    rack: str = ""
    switch: str = ""

    def key(self) -> tuple[str, str, str]:
        return (self.zone, self.rack, self.switch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """``nodes/<id>``: a live daemon. The boot id tells two lives of the same node id apart.

    ``metrics_address``: where scrapers reach it, if not at ``address``.
    """

    node_id: NodeId
    boot_id: BootId
    host: str
    address: str
    peer_port: int
    metrics_port: int
    capacity: Capacity
    topology: Topology = field(default_factory=Topology)
    elasticd_version: str = ""
    torch_version: str = ""
    python_version: str = ""
    protocol: int = PROTOCOL_VERSION
    metrics_address: str = ""
    #: Where it takes and gives copies of workers' memory; 0: it keeps none.
    memory_port: int = 0

    @property
    def metrics_target(self) -> str:
        """host:port, as scrapers want it."""
        host = self.metrics_address or self.address
        return f"[{host}]:{self.metrics_port}" if ":" in host else f"{host}:{self.metrics_port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """``jobs/<job>/spec``: what to run, and on how many nodes.

    ``command`` is what follows the interpreter: the script (or module, or program) and its arguments.
    ``nproc_per_node`` is a number, or one of torchrun's words: ``auto``, ``gpu``, ``cpu``.
    """

    job_id: JobId
    min_nodes: int
    max_nodes: int
    command: tuple[str, ...]
    nproc_per_node: str = "1"
    is_module: bool = False
    no_python: bool = False
    max_restarts: int = 0
    working_dir: str = ""
    env: tuple[tuple[str, str], ...] = ()
    user: str = ""
    log_dir: str = ""
    warm: bool = True
    stop_timeout_s: float = 5.0
    boundary_timeout_s: float = 30.0
    #: Spares kept warm above the maximum; more nodes than that stay free for other jobs.
    spares: int = 1
    #: A world is a multiple of so many ranks: those that hold one copy of the model together (tensor parallel, pipeline
    #: stages, a sharded copy). Nodes that would break one up wait as spares.
    ranks_per_replica: int = 1
    #: A node this much slower than the median for so long is exchanged (stragglers.py); 0: never.
    straggler_factor: float = 1.5
    straggler_after_s: float = 60.0
    #: Made by ``elasticd run`` on each node (the command may differ by node and is not taken from here).
    by_run: bool = False


class MemberState(StrEnum):
    """What a member says of itself."""

    PREPARING = "preparing"
    READY = "ready"
    FAILED = "failed"
    SUCCEEDED = "succeeded"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The first error of a worker group: who, and why. ``traceback`` is bounded by the writer.

    ``final``: whoever says it has spent a budget of restarts of its own (torchrun's agent).
    """

    node_id: NodeId
    rank: int
    local_rank: int
    exit_code: int
    message: str
    traceback: str = ""
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """How much of a job's step its training scripts take (``Session(max_micro_batches=...)``).

    ``caps``: of a step's ``micro_batches``, the most for each rank, in order. ``replica_size``: so many ranks in a row
    compute a micro-batch together.
    """

    micro_batches: int
    caps: tuple[int, ...]
    replica_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """``jobs/<job>/members/<node>``: a node that takes part in a job, or wants to.

    ``round_number`` is the round that ``state`` speaks of: FAILED and SUCCEEDED are about the workers of that round;
    READY says that the member can enter any later round. ``store_port`` is where its rendezvous store for the next
    round already listens (0: none yet). ``unreachable``: lives of nodes that this member's own links have lost, and
    that hold no seat now: they are not let in beside it before its link is up again. ``trouble``: of a GPU, or "".
    ``limits``: as the node's workers said when they last ran; None before that, or where they said nothing.
    """

    node_id: NodeId
    boot_id: BootId
    address: str
    nproc: int
    topology: Topology = field(default_factory=Topology)
    state: MemberState = MemberState.PREPARING
    round_number: int = 0
    store_port: int = 0
    failure: Failure | None = None
    unreachable: tuple[BootId, ...] = ()
    trouble: str = ""
    limits: StepLimits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A member's place in a round: its group rank, and the ranks of its workers (first_rank .. first_rank+nproc-1)."""

    node_id: NodeId
    boot_id: BootId
    address: str
    group_rank: int
    first_rank: int
    nproc: int
    topology: Topology = field(default_factory=Topology)


class Phase(StrEnum):
    """What a round says of its job."""

    RUNNING = "running"
    WAITING = "waiting"  # too few nodes: everybody stops and waits
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


class OpenEnum(StrEnum):
    """Words in records that nothing hangs on: one that a newer daemon writes is read, and written again, as it is."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        unknown = str.__new__(cls, value)
        unknown._name_ = unknown._value_ = value
        return unknown


class Cause(OpenEnum):
    """Why a round was written. Only WORKER_FAILED counts against the job's restart budget."""

    START = "start"
    JOIN = "join"
    NODE_LOST = "node_lost"
    WORKER_FAILED = "worker_failed"
    DRAIN = "drain"
    LEAVE = "leave"
    STRAGGLER = "straggler"  # a node that held the job up lost its seat
    GPU_TROUBLE = "gpu_trouble"  # a node with a sick GPU lost its seat
    FINISHED = "finished"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """``jobs/<job>/round``: the world. One record, changed by one transaction.

    ``restarts`` counts the rounds of this job by cause since its start; ``proposer`` wrote it (for the record).
    """

    number: int
    phase: Phase
    cause: Cause
    seats: tuple[Seat, ...] = ()
    store_address: str = ""
    store_port: int = 0
    restarts: tuple[tuple[Cause, int], ...] = ()
    proposer: str = ""
    reason: str = ""
    failure: Failure | None = None

    @property
    def world_size(self) -> int:
        return sum(seat.nproc for seat in self.seats)

    @property
    def restart_count(self) -> int:
        return sum(count for _, count in self.restarts)

    def restarts_by(self, cause: Cause) -> int:
        return dict(self.restarts).get(cause, 0)

    def seat_of(self, node_id: NodeId) -> Seat | None:
        return next((seat for seat in self.seats if seat.node_id == node_id), None)
