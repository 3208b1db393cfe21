"""Which job an idle node takes. Pure.

The oldest job that is short of nodes comes first, then the oldest that has room for a spare. A spare moves on when
another job is short. Not here: which members of a job are in its world (rendezvous.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from elasticd.core.model import JobId, NodeId
from elasticd.core.view import Job

Aside = Callable[[JobId], frozenset[NodeId]]


def choose_job(
    jobs: Mapping[JobId, Job], me: NodeId, current: JobId | None = None, *, aside: Aside = lambda _: frozenset()
) -> JobId | None:
    """The job to be in; ``current`` when there is no reason to move.

    ``aside``: who was evicted from a job. They take nobody's place there, and come after everybody else.
    """
    open_jobs = [
        (job.spec.create_revision, job_id, job)
        for job_id, job in jobs.items()
        if job.spec is not None and not job.spec.value.by_run and not job.over and not job.cancelled
    ]
    open_jobs.sort(key=lambda item: item[:2])
    for _, job_id, job in open_jobs:
        if _room(job, me, aside(job_id), spares=False) and (job_id == current or me not in job.members):
            return job_id
    if current is not None and any(job_id == current for _, job_id, _ in open_jobs):
        return current
    return next((job_id for _, job_id, job in open_jobs if _room(job, me, aside(job_id), spares=True)), None)


def _room(job: Job, me: NodeId, aside: frozenset[NodeId], *, spares: bool) -> bool:
    """Whether fewer nodes came before me than the job wants."""
    assert job.spec is not None
    spec = job.spec.value
    wanted = spec.max_nodes + (spec.spares if spares else 0)
    return _place(job, me, aside) < wanted


def _place(job: Job, me: NodeId, aside: frozenset[NodeId]) -> int:
    """How many members come before me: all that do not count as aside, when I am no member or aside myself."""
    seats = {seat.node_id for seat in job.round.value.seats} if job.round is not None else set()
    if me in seats:
        return 0
    uncounted = aside | {me}
    others = {node: member for node, member in job.members.items() if node in seats or node not in uncounted}
    mine = job.members.get(me)
    if mine is None or me in aside:
        return len(others)
    return sum(node in seats or member.create_revision < mine.create_revision for node, member in others.items())
