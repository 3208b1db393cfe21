"""What one node remembers of its part in a job, beyond what the store holds. Not here: any decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from elasticd.core.deadline import StepDeadline
from elasticd.core.model import BootId, Failure, JobSpec, Member, MemberState, Node, NodeId, Round, StepLimits
from elasticd.core.stages import Stage
from elasticd.core.stragglers import SpeedWatch
from elasticd.core.view import Job

_STATES = {
    Stage.PREPARING: MemberState.PREPARING,
    Stage.BROKEN: MemberState.FAILED,
    Stage.FINISHED: MemberState.SUCCEEDED,
}


@dataclass(slots=True)
class Task:
    """This node's part in its job."""

    spec: JobSpec
    nproc: int = 0
    store_port: int = 0
    started_round: int = 0
    last_round: Round | None = None
    failure: Failure | None = None
    finished: set[NodeId] = field(default_factory=set)
    sessions: dict[int, int | None] = field(default_factory=dict)  # rank -> step where it is parked
    boundary_asked: tuple[int, float] | None = None  # (round, when)
    deadline: StepDeadline = field(default_factory=StepDeadline)
    speeds: SpeedWatch = field(default_factory=SpeedWatch)
    told: set[object] = field(default_factory=set)  # of the speeds of this round: what was reported once
    limits: StepLimits | None = None  # as all ranks of this node said together, in whichever round
    said: dict[int, StepLimits | None] = field(default_factory=dict)  # by rank, in this round

    def parked(self) -> bool:
        return bool(self.sessions) and all(step is not None for step in self.sessions.values())

    def enter(self, number: int) -> None:
        """A new round: what was known of the last one's workers is void."""
        self.started_round, self.failure, self.boundary_asked = number, None, None
        self.sessions, self.finished = {}, set()
        self.deadline.reset()
        self.speeds.reset()
        self.told, self.said = set(), {}

    def join(self, rank: int, limits: StepLimits | None) -> None:
        """A session of this round. What its node takes of a step is known once all of its ranks have said so."""
        self.sessions[rank] = None
        self.said[rank] = limits
        if len(self.said) >= self.nproc:
            self.limits = _united([self.said[rank] for rank in sorted(self.said)])

    def remember(self, current: Round, job: Job) -> None:
        """Members that ended well may leave before the others have."""
        self.last_round = current
        for node_id, member in job.members.items():
            if member.value.state is MemberState.SUCCEEDED and member.value.round_number == current.number:
                self.finished.add(node_id)

    def boundary_at(self) -> float | None:
        """From when on a planned change need not wait for a step boundary; None: it must be asked for first."""
        if not self.sessions or self.parked():
            return 0.0
        if self.boundary_asked is None:
            return None
        return self.boundary_asked[1] + self.spec.boundary_timeout_s

    def tell(self, what: object) -> bool:
        """Whether this was not told in this round yet."""
        new = what not in self.told
        self.told.add(what)
        return new

    def member(
        self, node: Node, stage: Stage, *, leaving: bool, unreachable: tuple[BootId, ...] = (), trouble: str = ""
    ) -> Member:
        """The record that says what this node is to the job."""
        state = _STATES.get(stage, MemberState.READY)
        if leaving and state in (MemberState.READY, MemberState.PREPARING):
            state = MemberState.LEAVING
        about_round = state in (MemberState.FAILED, MemberState.SUCCEEDED)
        return Member(
            node_id=node.node_id,
            boot_id=node.boot_id,
            address=node.address,
            nproc=self.nproc,
            topology=node.topology,
            state=state,
            round_number=self.started_round if about_round else 0,
            store_port=self.store_port,
            failure=self.failure if state is MemberState.FAILED else None,
            unreachable=unreachable,
            trouble=trouble,
            limits=self.limits,
        )


def _united(of_ranks: Sequence[StepLimits | None]) -> StepLimits | None:
    """None unless all said something."""
    said = [limits for limits in of_ranks if limits is not None]
    if not said or len(said) < len(of_ranks):
        return None
    return replace(said[0], caps=tuple(cap for limits in said for cap in limits.caps))
