"""All events that the machine hears and all effects that it asks for, side by side. Frozen values, nothing else.

Events are in the past tense, effects in the imperative. Every effect that touches a round carries it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elasticd.core.memory import Need
from elasticd.core.model import BootId, Failure, JobId, JobSpec, Member, NodeId, Round, StepLimits
from elasticd.core.stragglers import Eviction, Measured, Offences, Quarantine, Tally
from elasticd.core.view import Entry

# --- Events: the store ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotLoaded:
    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysChanged:
    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class StoreLost:
    """No endpoint answers."""


@dataclass(frozen=True, slots=True)
class StoreBack:
    """An endpoint answers again (a fresh snapshot follows)."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease is gone, and the keys on it."""


class Write(StrEnum):
    """Which of the machine's writes an answer belongs to; one of each kind is in flight at most."""

    REGISTER = "register"
    MEMBER = "member"
    ROUND = "round"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFinished:
    """``revision`` is the store's after the write; ``known`` is False when its outcome is unknown."""

    write: Write
    succeeded: bool
    revision: int = 0
    known: bool = True


# --- Events: the links to other daemons -----------------------------------------------------------


class Down(StrEnum):
    """How a link went down: the strength of the evidence."""

    REFUSED = "refused"  # end-of-file, and the reconnect was refused: the process is dead
    SILENT = "silent"  # no heartbeat within the deadline: dead, frozen or cut off


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerUp:
    node_id: NodeId
    boot_id: BootId


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDown:
    """``silence_s``: since the peer was last heard; None when it never was. For the metrics: it decides nothing."""

    node_id: NodeId
    boot_id: BootId
    how: Down
    silence_s: float | None = None


# --- Events: the agent and its workers ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReady:
    job_id: JobId
    store_port: int
    nproc: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentExited:
    job_id: JobId
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundWanted:
    """A foreign agent (torchrun's) stopped its workers by itself and wants a round newer than ``after``."""

    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersStarted:
    round_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersSucceeded:
    round_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersFailed:
    round_number: int
    failure: Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersStopped:
    round_number: int


# --- Events: training scripts that use a Session --------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionJoined:
    """``limits``: of this rank alone; None where its script divides its batches itself."""

    round_number: int
    rank: int
    limits: StepLimits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLeft:
    round_number: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCompleted:
    round_number: int
    rank: int
    step: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseReported:
    """A rank is between two steps just now: it saves a checkpoint, or evaluates. No step is under way."""

    round_number: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryReached:
    round_number: int
    rank: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedsMeasured:
    """How fast every rank of the world is, as a local rank heard it from all of them."""

    round_number: int
    measured: Measured


# --- Events: the process itself -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownRequested:
    """``at_once``: without waiting for a step boundary."""

    at_once: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTroubled:
    """A GPU of this node is sick, and how; "" when none is any more."""

    trouble: str


Event = (
    SnapshotLoaded
    | KeysChanged
    | StoreLost
    | StoreBack
    | LeaseLost
    | WriteFinished
    | PeerUp
    | PeerDown
    | AgentReady
    | AgentExited
    | RoundWanted
    | WorkersStarted
    | WorkersSucceeded
    | WorkersFailed
    | WorkersStopped
    | SessionJoined
    | SessionLeft
    | StepCompleted
    | PauseReported
    | BoundaryReached
    | SpeedsMeasured
    | Ticked
    | ShutdownRequested
    | GpuTroubled
)

# --- Effects: the store ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Register:
    """Hold a lease, and put this node's key on it."""


@dataclass(frozen=True, slots=True)
class Reload:
    """Load a snapshot: what the machine knows may have a gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PutMember:
    """Put the member's key on the lease, if this node's key is still the one of ``node_create_revision``."""

    job_id: JobId
    member: Member
    node_create_revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteMember:
    job_id: JobId


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """The key must still have this create_revision (0: must not exist)."""

    key: str
    create_revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A record to put beside a round: on a lease of its own that nobody keeps alive, or for good (``ttl_s`` 0)."""

    key: str
    record: Eviction | Offences | Quarantine | Tally
    ttl_s: int = 0
    #: The key must still be at this mod_revision (0: must not exist); None: whatever it is.
    expected_mod_revision: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposeRound:
    """Write the round if the round record is still at ``expected_mod_revision`` and every guard holds."""

    job_id: JobId
    round: Round
    expected_mod_revision: int
    guards: tuple[Guard, ...]
    delete_keys: tuple[str, ...] = ()
    #: A job's last record goes away by itself after this time; 0 keeps it.
    linger_s: int = 0
    #: The job's spec, when the store has lost it.
    spec: JobSpec | None = None
    #: What is written in the same transaction.
    marks: tuple[Mark, ...] = ()


# --- Effects: links, agent, workers ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAddress:
    node_id: NodeId
    boot_id: BootId
    address: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPeers:
    """Hold links to exactly these."""

    peers: frozenset[PeerAddress]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartAgent:
    spec: JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRound:
    job_id: JobId
    round: Round


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorkers:
    """Stop the workers of every round up to this one, and stay ready."""

    job_id: JobId
    round_number: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EndAgent:
    """Stop the workers and the agent."""

    job_id: JobId
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBoundary:
    """Ask the local sessions to stop at the next common step boundary, the state in such a place by then."""

    round_number: int
    need: Need = Need.DISK


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Something worth a line in the log, the history and the metrics."""

    event: str
    details: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The daemon's work is done."""

    status: int
    message: str = ""


Effect = (
    Register
    | Reload
    | PutMember
    | DeleteMember
    | ProposeRound
    | WatchPeers
    | StartAgent
    | StartRound
    | StopWorkers
    | EndAgent
    | RequestBoundary
    | Report
    | Exit
)
