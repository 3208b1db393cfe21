"""From what is known of a job to a suspect, and from an exchange to the records that go with its round. Pure.

All of them are written in the transaction of the round itself: there is no moment at which a node has lost its seat
and is not counted, or is in quarantine and holds it. Not here: who is slow (stragglers.py), the round (rendezvous.py).
"""

from __future__ import annotations

from elasticd.core import keys
from elasticd.core.messages import Mark, Report, SpeedsMeasured
from elasticd.core.model import Cause, JobId, Round
from elasticd.core.rendezvous import Reason, Situation
from elasticd.core.stragglers import (
    Eviction,
    Exchange,
    Offences,
    Policy,
    Quarantine,
    Suspect,
    SuspectKept,
    Tally,
    find_suspect,
)
from elasticd.core.task import Task
from elasticd.core.view import Job, View


def note_speeds(task: Task, event: SpeedsMeasured, now: float) -> str:
    """Figures that cannot be are refused, and ranks without any are not judged: said once a round; "" otherwise."""
    current = task.last_round
    if current is None or current.number != event.round_number:
        return ""
    try:
        task.speeds.add(event.measured, current.seats, task.spec.straggler_factor, now)
        unknown = task.speeds.unknown()
        refused = f"no measure of ranks {list(unknown)}" if unknown else ""
    except ValueError as error:
        refused = str(error)
    return refused if refused and task.tell(refused) else ""


def suspect_of(task: Task, job: Job, view: View, policy: Policy, now: float) -> Suspect | None:
    """Whether a seat of the job should change hands; None also while another cause may have stopped the steps.

    A tally that cannot be read is a newer daemon's: no eviction could move it on.
    """
    if keys.TALLY in view.unreadable:
        return None
    if not policy.enabled or task.spec.straggler_factor <= 0 or job.round is None:
        return None
    troubles = {
        seat.node_id: job.members[seat.node_id].value.trouble
        for seat in job.round.value.seats
        if seat.node_id in job.members
    }
    left = len(view.evictions) < policy.allowed(len(view.nodes))
    return find_suspect(task.speeds, troubles, after_s=task.spec.straggler_after_s, budget_left=left, now=now)


def marks_of(exchange: Exchange, job_id: JobId, view: View, policy: Policy) -> tuple[Mark, ...]:
    """The tally's guard makes evictions of several jobs take turns, each with the budget before its eyes."""
    suspect = exchange.suspect
    node_id, tally = suspect.node_id, view.tally
    known = view.offences.get(node_id)
    count = 1 + (known.value.count if known else 0)
    counted = Tally(evictions=1 + (tally.value.evictions if tally else 0))
    eviction = Eviction(
        job_id=job_id,
        node_id=node_id,
        grounds=suspect.grounds,
        reason=suspect.reason,
        spare=exchange.spare or "",
    )
    marks = [
        Mark(key=keys.TALLY, record=counted, expected_mod_revision=tally.mod_revision if tally else 0),
        Mark(key=keys.eviction(job_id, node_id), record=eviction, ttl_s=policy.window_s),
        Mark(key=keys.offences(node_id), record=Offences(node_id=node_id, count=count), ttl_s=policy.forget_s),
    ]
    seconds = policy.sentence_s(suspect.grounds, count)
    if seconds:
        record = Quarantine(
            node_id=node_id, grounds=suspect.grounds, reason=suspect.reason, offences=count, seconds=seconds
        )
        marks.append(Mark(key=keys.quarantine(node_id), record=record, ttl_s=seconds))
    return tuple(marks)


def kept_of(task: Task, situation: Situation, reason: Reason | None) -> Report | None:
    """That a suspect keeps its seat, and why: once a round."""
    suspect = situation.suspect
    if not isinstance(reason, SuspectKept) or suspect is None or not task.tell(reason):
        return None
    return Report(
        event="straggler_kept",
        details=(
            *(("job", task.spec.job_id), ("round", task.started_round), ("straggler", reason.node_id)),
            *(("why", reason.why.value), ("grounds", suspect.grounds.value), ("reason", suspect.reason)),
        ),
    )


def report_of(current: Round, job_id: JobId, view: View) -> Report | None:
    """The decision with its reason, once it stands. Records of one transaction arrive together."""
    if current.cause not in (Cause.STRAGGLER, Cause.GPU_TROUBLE):
        return None
    records = [held for (job, node), held in view.evictions.items() if job == job_id and not current.seat_of(node)]
    if not records:
        return None
    eviction = max(records, key=lambda held: held.mod_revision).value
    quarantine = view.quarantines.get(eviction.node_id)
    return Report(
        event="straggler_exchanged",
        details=(
            *(("job", job_id), ("round", current.number), ("straggler", eviction.node_id)),
            *(("spare", eviction.spare), ("grounds", eviction.grounds.value), ("reason", current.reason)),
            ("quarantine_s", quarantine.value.seconds if quarantine else 0),
        ),
    )
