"""The machine: one node's whole behaviour as ``handle(event, now) -> effects``. Pure: no I/O, clock or thread.

Every event first changes what the machine knows; then the machine looks at everything it knows and returns what to do
(level-triggered: a lost event costs time, never correctness). It keeps only what the store does not: its own stage,
the links, which writes are in flight.

Not here: what the next round is (rendezvous.py), who is alive (membership.py), which job to take (scheduling.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from elasticd.core import keys, messages
from elasticd.core.deadline import StepDeadline
from elasticd.core.evictions import kept_of, marks_of, note_speeds, report_of, suspect_of
from elasticd.core.membership import Evidence, Link
from elasticd.core.messages import Down, Effect, Event, Guard, Mark, PeerAddress, Report, Write
from elasticd.core.model import Failure, JobSpec, Node, NodeId, Phase, Round
from elasticd.core.proposer import Proposer
from elasticd.core.rendezvous import NothingToChange, Proposal
from elasticd.core.scheduling import choose_job
from elasticd.core.situation import Knowledge, assess, outsider_lost_all, peers_wanted, seniority, unreachable
from elasticd.core.stages import Stage, Trigger, advance
from elasticd.core.stragglers import Policy, SuspectKept
from elasticd.core.task import Task
from elasticd.core.versions import explain, speaks_otherwise, torch_versions
from elasticd.core.view import Job, Keyed, View

#: A silence that began while the store was away too may be our own: wait this long for links to come back.
RECONNECT_GRACE_S = 1.5
#: etcd takes 128 comparisons and as many operations in a transaction (--max-txn-ops). In a larger world the last seats
#: go unguarded: whose holder has just vanished is put out by the next round. An evicted node's key that is not deleted
#: lapses with its lease.
MAX_GUARDS = 120
MAX_EVICTED = 50
#: What is left of a submitted job that is over can be asked for as long.
KEPT_S = 7 * 24 * 3600
LINGER_S = {Phase.SUCCEEDED: 60, Phase.CANCELLED: 60, Phase.FAILED: 10}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the machine is told once. ``fixed_job``: ``elasticd run``, one job and then exit."""

    lease_ttl_s: float = 5.0
    fixed_job: JobSpec | None = None
    shutdown_grace_s: float = 10.0
    step_floor_s: float = 60.0
    stragglers: Policy = field(default_factory=Policy)


class Machine:
    """One node. ``wake_at`` says when the machine wants a Ticked if nothing else happens."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self.node = node
        self.settings = settings
        self.view = View()
        self.stage = Stage.IDLE
        self.task: Task | None = None
        self.links: dict[NodeId, Link] = {}
        self.store_up_since: float | None = None
        self.store_back_at = float("-inf")
        self.leaving_since: float | None = None
        self.ended: Round | None = None
        self.trouble = ""
        self.wake_at: float | None = None
        self._proposer = Proposer()
        self._in_flight: set[Write] = set()
        self._written_revision = 0
        self._must_reload = False
        self._watched: frozenset[PeerAddress] = frozenset()
        self._exited = False

    # --- the one way in ---------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What to do now, in order. Equal histories give equal effects."""
        if isinstance(event, messages.StepCompleted | messages.PauseReported):
            # They come many times a second and say nothing of the world: in a large one, deciding anew takes long.
            return self._note_step(event, now)
        self.wake_at = None
        effects = list(self._absorb(event, now))
        effects += self._decide(now)
        return effects

    def _note_step(self, event: Event, now: float) -> list[Effect]:
        """The deadline moves on; whatever else was to be done at ``wake_at`` still is."""
        effects = list(self._absorb(event, now))
        expires_at = self.task.deadline.expires_at() if self.task is not None else None
        if expires_at is not None:
            self._wake(expires_at)
        return effects

    # --- events change what is known --------------------------------------------------------------

    def _absorb(self, event: Event, now: float) -> Iterator[Effect]:  # noqa: C901
        match event:
            case messages.SnapshotLoaded():
                if self.store_up_since is None:
                    self.store_up_since = now
                self._in_flight.clear()
                self._must_reload = False
                self.view.replace(event.entries, event.revision)
            case messages.KeysChanged():
                self.view.change(event.entries, event.revision)
            case messages.StoreLost():
                if self.store_up_since is not None:
                    yield Report(event="store_lost")
                self.store_up_since, self.view.loaded = None, False
            case messages.StoreBack():
                self.store_up_since = self.store_back_at = now
                yield Report(event="store_back")
            case messages.LeaseLost():
                yield Report(event="lease_lost")
            case messages.WriteFinished():
                yield from self._write_finished(event, now)
            case messages.PeerUp() | messages.PeerDown():
                yield from self._link_changed(event, now)
            case messages.ShutdownRequested():
                yield from self._shutdown(event, now)
            case messages.GpuTroubled():
                self.trouble = event.trouble
                yield Report(event="gpu_trouble", details=(("trouble", event.trouble),))
            case messages.Ticked():
                pass
            case _:
                if self.task is not None:
                    yield from self._absorb_task(event, self.task, now)

    def _absorb_task(self, event: Event, task: Task, now: float) -> Iterator[Effect]:
        match event:
            case messages.AgentReady():
                task.store_port, task.nproc = event.store_port, event.nproc
                if self.stage is Stage.PREPARING:
                    self._advance(Trigger.AGENT_READY)
                    yield Report(event="agent_ready", details=(("job", task.spec.job_id),))
            case messages.AgentExited():
                yield from self._agent_exited(task, event.reason)
            case messages.RoundWanted():
                if self.stage is Stage.RUNNING and event.after == task.started_round:
                    yield from self._fail(task, _foreign_failure(self.node.node_id))
            case messages.WorkersSucceeded():
                if self.stage is Stage.RUNNING and event.round_number == task.started_round:
                    self._advance(Trigger.WORKERS_SUCCEEDED)
                    yield self._report_round("workers_succeeded", event.round_number)
            case messages.WorkersFailed():
                if self.stage is Stage.RUNNING and event.round_number == task.started_round:
                    yield from self._fail(task, event.failure)
            case messages.WorkersStarted():
                yield self._report_round("workers_started", event.round_number)
            case messages.WorkersStopped():
                yield self._report_round("workers_stopped", event.round_number)
            case _:
                yield from self._absorb_session(event, task, now)

    def _absorb_session(self, event: Event, task: Task, now: float) -> Iterator[Effect]:
        match event:
            case messages.SessionJoined() if event.round_number == task.started_round:
                task.join(event.rank, event.limits)
            case messages.SessionLeft() if event.round_number == task.started_round:
                task.sessions.pop(event.rank, None)
            case messages.StepCompleted() if event.round_number == task.started_round:
                task.deadline.completed(event.seconds, now)
            case messages.PauseReported() if event.round_number == task.started_round:
                task.deadline.postpone(now)
            case messages.BoundaryReached() if event.round_number == task.started_round:
                task.sessions[event.rank] = event.step
                yield self._report_round("boundary", event.round_number, step=event.step)
            case messages.SpeedsMeasured() if event.round_number == task.started_round:
                refused = note_speeds(task, event, now)
                if refused:
                    yield self._report_round("speeds_refused", event.round_number, reason=refused)
            case _:
                pass  # about an older round: its workers are being stopped

    def _write_finished(self, event: messages.WriteFinished, now: float) -> Iterator[Effect]:
        self._in_flight.discard(event.write)
        self._written_revision = max(self._written_revision, event.revision)
        if event.write is Write.ROUND and event.known:
            self._proposer.answered(accepted=event.succeeded, now=now)
        if event.write is Write.REGISTER and event.succeeded:
            yield Report(event="registered")
        if not event.known or not event.succeeded:
            self._must_reload = True
            yield messages.Reload()

    def _link_changed(self, event: messages.PeerUp | messages.PeerDown, now: float) -> Iterator[Effect]:
        down = event.how if isinstance(event, messages.PeerDown) else None
        self.links[event.node_id] = Link(boot_id=event.boot_id, down=down, since=now)
        peer = ("peer", event.node_id)
        if isinstance(event, messages.PeerDown):
            yield Report(event="peer_down", details=(peer, ("how", event.how.value), ("silence_s", event.silence_s)))
        else:
            yield Report(event="peer_up", details=(peer,))

    def _shutdown(self, event: messages.ShutdownRequested, now: float) -> Iterator[Effect]:
        if self.leaving_since is None:
            self.leaving_since = now
            yield Report(event="leaving")
        if event.at_once and self.task is not None and self.stage is not Stage.ENDING:
            yield from self._end(self.task, Trigger.DISMISSED)

    def _agent_exited(self, task: Task, reason: str) -> Iterator[Effect]:
        if self.stage is Stage.ENDING:
            self._advance(Trigger.AGENT_GONE)
            yield messages.DeleteMember(job_id=task.spec.job_id)
            self.task = None
            return
        yield Report(event="agent_lost", details=(("job", task.spec.job_id), ("reason", reason)))
        self._advance(Trigger.AGENT_LOST)
        task.store_port, task.sessions = 0, {}
        yield messages.StartAgent(spec=task.spec)

    def _fail(self, task: Task, failure: Failure) -> Iterator[Effect]:
        task.failure = failure
        self._advance(Trigger.WORKERS_FAILED)
        yield self._report_round(
            "workers_failed",
            task.started_round,
            rank=failure.rank,
            exit_code=failure.exit_code,
            message=failure.message,
        )

    # --- what is known decides what to do ---------------------------------------------------------

    def _decide(self, now: float) -> Iterator[Effect]:
        if self.task is not None and self.view.loaded:
            yield from self._follow_round(self.task)
        yield from self._choose_job()  # after that: who has lost its seat may have to leave, and no event need follow
        if self.task is not None:
            yield from self._watch_steps(self.task, now)
        yield from self._watch_peers()
        yield from self._register()
        if self.task is not None:
            yield from self._publish(self.task)
            yield from self._propose(self.task, now)
        yield from self._finish(now)

    def _choose_job(self) -> Iterator[Effect]:
        me, fixed = self.node.node_id, self.settings.fixed_job
        sick = bool(self.trouble) and not (fixed and fixed.max_nodes == 1)  # who is alone leaves his job to nobody
        away = self.leaving_since is not None or me in self.view.cordoned or sick
        if self.stage is Stage.IDLE and not self._exited and self.view.loaded:
            spec = self._fixed_job(fixed) if fixed else None if away else self._open_job()
            if spec is not None and not away:
                yield from self._take(spec)
        elif self.task is not None and self.stage in (Stage.WAITING, Stage.PREPARING):
            job = self.view.job(self.task.spec.job_id)
            current = self.task.spec.job_id
            moved = not fixed and choose_job(self.view.jobs, me, current, aside=self.view.aside) != current
            seated = job.round is not None and job.round.value.seat_of(me) is not None
            if self.view.loaded and not seated and not job.over and (away or moved):
                yield from self._end(self.task, Trigger.DISMISSED)

    def _fixed_job(self, fixed: JobSpec) -> JobSpec | None:
        """The job of a run, until it is over: perhaps while this node was drained, and had no part in it."""
        record = self.view.job(fixed.job_id).round
        if self.ended is None and record is not None and record.value.phase.terminal:
            self.ended = record.value
        return fixed if self.ended is None else None

    def _open_job(self) -> JobSpec | None:
        job_id = choose_job(self.view.jobs, self.node.node_id, aside=self.view.aside)
        spec = self.view.job(job_id).spec if job_id else None
        return spec.value if spec else None

    def _take(self, spec: JobSpec) -> Iterator[Effect]:
        self.task = Task(spec=spec, deadline=StepDeadline(floor_s=self.settings.step_floor_s))
        self._advance(Trigger.JOB_TAKEN)
        yield Report(event="job_taken", details=(("job", spec.job_id),))
        yield messages.StartAgent(spec=spec)

    def _follow_round(self, task: Task) -> Iterator[Effect]:
        record = self.view.job(task.spec.job_id).round
        if record is None or self.stage is Stage.ENDING:
            return
        current = record.value
        if current.phase.terminal:
            self.ended = current
            yield Report(event="job_over", details=(("job", task.spec.job_id), ("phase", current.phase.value)))
            yield from self._end(task, Trigger.JOB_OVER)
        elif current.number > task.started_round:
            yield from self._enter_round(task, current)
        task.remember(current, self.view.job(task.spec.job_id))

    def _enter_round(self, task: Task, current: Round) -> Iterator[Effect]:
        evicted = report_of(current, task.spec.job_id, self.view) if current.proposer == self.node.node_id else None
        if evicted is not None:
            yield evicted
        seat = current.seat_of(self.node.node_id)
        if seat is not None and seat.boot_id == self.node.boot_id and self.stage is not Stage.PREPARING:
            task.enter(current.number)
            self._advance(Trigger.ADMITTED)
            yield Report(event="round_seen", details=(("job", task.spec.job_id), ("round", current)))
            found = torch_versions(current, self.view)
            if len(found) > 1:
                yield self._report_round("torch_versions_differ", current.number, versions=" ".join(found))
            yield messages.StartRound(job_id=task.spec.job_id, round=current)
        elif self.stage in (Stage.RUNNING, Stage.BROKEN, Stage.FINISHED):
            task.enter(current.number)
            self._advance(Trigger.FENCED)
            yield Report(event="round_seen", details=(("job", task.spec.job_id), ("round", current)))
            yield self._report_round("fenced", current.number)
            yield messages.StopWorkers(
                job_id=task.spec.job_id, round_number=current.number, timeout_s=task.spec.stop_timeout_s
            )

    def _watch_steps(self, task: Task, now: float) -> Iterator[Effect]:
        if self.stage is not Stage.RUNNING or task.parked() or task.boundary_asked is not None:
            return
        expires_at = task.deadline.expires_at()
        if expires_at is None:
            return
        if now >= expires_at:
            message = "no rank of this node completed a step within the deadline learned from earlier steps"
            rank = min(task.sessions, default=0)
            yield from self._fail(task, replace(_foreign_failure(self.node.node_id), rank=rank, message=message))
        else:
            self._wake(expires_at)

    def _register(self) -> Iterator[Effect]:
        if self.store_up_since is None or not self.view.loaded or self._exited or self._mine() is not None:
            return
        other = speaks_otherwise(self.node, (held.value for held in self.view.nodes.values()))
        if other is not None:
            self._exited = True
            yield messages.Exit(status=2, message=explain(self.node, other))
            return
        if self._may_write(Write.REGISTER):
            self._in_flight.add(Write.REGISTER)
            yield messages.Register()

    def _publish(self, task: Task) -> Iterator[Effect]:
        mine, job_id = self._mine(), task.spec.job_id
        if mine is None or self.stage is Stage.ENDING or not self._may_write(Write.MEMBER):
            return
        job = self.view.job(job_id)
        lost = unreachable(self.links, job, self._watched)
        leaving = self.leaving_since is not None
        wanted = task.member(self.node, self.stage, leaving=leaving, unreachable=lost, trouble=self.trouble)
        held = job.members.get(self.node.node_id)
        if held is None or held.value != wanted:
            self._in_flight.add(Write.MEMBER)
            yield messages.PutMember(job_id=job_id, member=wanted, node_create_revision=mine.create_revision)

    def _propose(self, task: Task, now: float) -> Iterator[Effect]:
        mine, job_id = self._mine(), task.spec.job_id
        job = self.view.job(job_id)
        if mine is None or self.stage is Stage.ENDING or self.node.node_id not in job.members:
            return
        if not self._may_write(Write.ROUND) or Write.MEMBER in self._in_flight:
            return
        if keys.round_(job_id) in self.view.unreadable:  # a newer daemon's: no guard of ours would hold
            return
        parked = task.parked() and self.stage is Stage.RUNNING
        situation = assess(self._knowledge(job, task, now), job, task, parked=parked)
        situation = replace(situation, suspect=suspect_of(task, job, self.view, self.settings.stragglers, now))
        boundary_at = task.boundary_at() if self.stage is Stage.RUNNING else 0.0
        place = seniority(situation, self.node.node_id, self.links)
        due = self._proposer.consider(situation, place, boundary_at, now)
        kept = kept_of(task, situation, self._proposer.reason) if place == 0 else None
        if kept is not None:
            yield kept
        if due.ask_boundary and task.boundary_asked is None:
            task.boundary_asked = (task.started_round, now)
            yield messages.RequestBoundary(round_number=task.started_round, need=due.need)
            self._wake(now + task.spec.boundary_timeout_s)
        if due.wake_at is not None:
            self._wake(due.wake_at)
        if due.proposal is not None:
            yield from self._write_round(task, job, mine, due.proposal, due.waited_s)
        elif job.round is None and task.last_round is not None and self._nothing_to_change():
            # The store came back empty: the world that stands is written again as it was.
            yield from self._write_round(task, job, mine, Proposal(round=task.last_round), 0.0)

    def _nothing_to_change(self) -> bool:
        return isinstance(self._proposer.reason, NothingToChange | SuspectKept)

    def _knowledge(self, job: Job, task: Task, now: float) -> Knowledge:
        """What may count as evidence now: silence that began in an outage of the store may be our own."""
        linked = frozenset(peer.node_id for peer in self._watched)
        # What was heard of a node while it was a neighbour says nothing of it now.
        known = links = {node: link for node, link in self.links.items() if node in linked}
        in_grace = now < self.store_back_at + RECONNECT_GRACE_S
        if in_grace or outsider_lost_all(self.node.node_id, job, links):
            links = {n: link for n, link in links.items() if link.down is not Down.SILENT}
        if in_grace:
            self._wake(self.store_back_at + RECONNECT_GRACE_S)
        store_up_s = 0.0 if self.store_up_since is None else now - self.store_up_since
        evidence = Evidence(
            me=self.node.node_id, links=links, store_up_s=store_up_s, lease_ttl_s=self.settings.lease_ttl_s
        )
        aside = self.view.aside(task.spec.job_id)
        return Knowledge(evidence=evidence, links=known, linked=linked, drained=self.view.cordoned, aside=aside)

    def _write_round(
        self, task: Task, job: Job, mine: Keyed[Node], proposal: Proposal, waited_s: float
    ) -> Iterator[Effect]:
        job_id, wanted = task.spec.job_id, proposal.round
        guards = [Guard(key=keys.node(self.node.node_id), create_revision=mine.create_revision)]
        deletes = [keys.cancel(job_id)] if wanted.phase.terminal else []  # or it would end the next job of this name
        for node_id in sorted(proposal.evict)[:MAX_EVICTED]:
            known = self.view.nodes.get(node_id)
            guards.append(Guard(key=keys.node(node_id), create_revision=known.create_revision if known else 0))
            deletes += [keys.node(node_id), keys.member(job_id, node_id)]
        for seat in wanted.seats[: MAX_GUARDS - len(guards)]:
            held = job.members[seat.node_id]
            guards.append(Guard(key=keys.member(job_id, seat.node_id), create_revision=held.create_revision))
        linger_s = 0
        if wanted.phase.terminal:
            linger_s = LINGER_S[wanted.phase] if task.spec.by_run else KEPT_S
        self._in_flight.add(Write.ROUND)
        yield self._report_round("round_proposed", wanted.number, cause=wanted.cause.value, waited_s=waited_s)
        marks: tuple[Mark, ...] = ()
        if proposal.exchange is not None:
            marks = marks_of(proposal.exchange, job_id, self.view, self.settings.stragglers)
        yield messages.ProposeRound(
            job_id=job_id,
            round=replace(wanted, proposer=self.node.node_id),
            expected_mod_revision=job.round.mod_revision if job.round else 0,
            guards=tuple(guards),
            delete_keys=tuple(deletes),
            linger_s=linger_s,
            spec=task.spec if job.spec is None else None,
            marks=marks,
        )

    def _watch_peers(self) -> Iterator[Effect]:
        if not self.view.loaded or self.store_up_since is None:
            return  # while the store is away, what is missing from the view proves nothing
        wanted = peers_wanted(self.node.node_id, self.view, self.task, self._watched)
        if wanted != self._watched:
            self._watched = wanted
            yield messages.WatchPeers(peers=wanted)

    def _finish(self, now: float) -> Iterator[Effect]:
        """The end of the process: a run's job is over, or a shutdown has got as far as it can."""
        if self._exited:
            return
        if self.leaving_since is not None and self.task is not None and self.stage is not Stage.ENDING:
            grace_s = self.settings.shutdown_grace_s + self.task.spec.boundary_timeout_s
            if now >= self.leaving_since + grace_s:
                yield from self._end(self.task, Trigger.DISMISSED)
            else:
                self._wake(self.leaving_since + grace_s)
        if self.task is None and (self.leaving_since is not None or (self.settings.fixed_job and self.ended)):
            self._exited = True
            yield messages.Exit(status=self._status())

    def _status(self) -> int:
        if self.ended is not None:
            return 0 if self.ended.phase is Phase.SUCCEEDED else 1
        return 1 if self.settings.fixed_job else 0

    # --- small things -----------------------------------------------------------------------------

    def _end(self, task: Task, trigger: Trigger) -> Iterator[Effect]:
        self._advance(trigger)
        yield messages.EndAgent(job_id=task.spec.job_id, timeout_s=task.spec.stop_timeout_s)

    def _advance(self, trigger: Trigger) -> None:
        self.stage = advance(self.stage, trigger)

    def _mine(self) -> Keyed[Node] | None:
        """This node's key, when it is of this life."""
        held = self.view.nodes.get(self.node.node_id)
        return held if held is not None and held.value.boot_id == self.node.boot_id else None

    def _may_write(self, write: Write) -> bool:
        """One write of a kind at a time, and none before the view shows the last one."""
        up = self.store_up_since is not None and self.view.loaded and not self._must_reload
        return up and write not in self._in_flight and self.view.revision >= self._written_revision

    def _report_round(self, event: str, number: int, **details: object) -> Report:
        job_id = self.task.spec.job_id if self.task else ""
        return Report(event=event, details=(("job", job_id), ("round", number), *details.items()))

    def _wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)


def _foreign_failure(node_id: NodeId) -> Failure:
    return Failure(node_id=node_id, rank=0, local_rank=0, exit_code=1, message="the agent asked for a new round")
