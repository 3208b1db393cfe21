"""What operators ask of the cluster, as guarded transactions: submit, cancel, drain.

Blocking, for short-lived commands. Not here: what daemons then do (core/machine.py), how it is shown (commands/).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, TypeVar

from elasticd.cluster.store import Compare, Delete, KeyValue, Operation, Put, Store
from elasticd.core import keys
from elasticd.core.model import Cause, JobId, JobSpec, NodeId, Phase, Round
from elasticd.core.records import from_json, to_json
from elasticd.core.view import Entry, View
from elasticd.errors import JobRefused, ProtocolError

T = TypeVar("T")

_TRIES = 3


def read_view(store: Store) -> View:
    """The whole cluster, as of one revision."""
    snapshot = store.snapshot(keys.PREFIX)
    view = View()
    entries = (
        Entry(key=e.key, value=e.value, create_revision=e.create_revision, mod_revision=e.mod_revision)
        for e in snapshot.entries
    )
    view.replace(entries, snapshot.revision)
    return view


def read_checkpoints(store: Store, view: View) -> dict[JobId, dict[str, Any]]:
    """The commit record of each job that has one: step, path, round."""
    found = {job_id: store.get(keys.checkpoint(job_id)) for job_id in view.jobs}
    return {job_id: json.loads(record.value) for job_id, record in found.items() if record is not None}


def submit_job(store: Store, spec: JobSpec) -> None:
    """A job for daemons to take. JobRefused when one of that id is not over yet."""
    for _ in range(_TRIES):
        if _create(store, spec):
            return
        held = store.get(keys.spec(spec.job_id))
        if held is None:
            continue
        if _phase(store, spec.job_id) is None:
            raise JobRefused(f"job {spec.job_id!r} is there already; `elasticd cancel {spec.job_id}` ends it")
        _clear(store, held, spec.job_id)
    raise JobRefused(f"job {spec.job_id!r} keeps changing; try again")


def prepare_job(store: Store, spec: JobSpec) -> None:
    """The spec of an ``elasticd run``, made by whichever node comes first. JobRefused when ours does not fit."""
    shared = replace(spec, env=(), working_dir="", log_dir="")
    for _ in range(_TRIES):
        if _create(store, shared):
            return
        held = store.get(keys.spec(spec.job_id))
        if held is None:
            continue
        other = _parsed(JobSpec, held)
        if not other.by_run:
            raise JobRefused(f"job {spec.job_id!r} was submitted to daemons; use another --rdzv-id")
        phase = _phase(store, spec.job_id)
        if phase is None:
            _must_agree(spec, other)
            return
        if phase is Phase.SUCCEEDED:  # a node that comes a moment late must not train it all again
            raise JobRefused(
                f"job {spec.job_id!r} has just succeeded; to run it again use another --rdzv-id, or wait a minute"
            )
        _clear(store, held, spec.job_id)
    raise JobRefused(f"job {spec.job_id!r} keeps changing; try again")


def cancel_job(store: Store, job_id: JobId) -> None:
    """Asks the job's nodes to stop it; a job that has none is over at once, since nobody else would say so.

    JobRefused when there is no such job, or when it is over.
    """
    for _ in range(_TRIES):
        held, record = store.get(keys.spec(job_id)), store.get(keys.round_(job_id))
        if held is None:
            raise JobRefused(f"there is no job {job_id!r}; `elasticd status` shows the jobs that are")
        current = _parsed(Round, record) if record is not None else None
        if current is not None and current.phase.terminal:
            raise JobRefused(f"job {job_id!r} is over: {current.phase.value}")
        guards = [
            Compare(key=held.key, mod_revision=held.mod_revision),
            Compare(key=keys.round_(job_id), mod_revision=record.mod_revision if record is not None else 0),
        ]
        if store.snapshot(keys.members(job_id)).entries:
            operations: list[Operation] = [Put(key=keys.cancel(job_id), value="1")]
        else:
            operations = [
                Put(key=keys.round_(job_id), value=to_json(_cancelled(current))),
                Delete(key=keys.cancel(job_id)),
            ]
        if store.txn(guards, operations).succeeded:
            return
    raise JobRefused(f"job {job_id!r} keeps changing; try again")


def _cancelled(current: Round | None) -> Round:
    return Round(
        number=(current.number if current else 0) + 1,
        phase=Phase.CANCELLED,
        cause=Cause.CANCELLED,
        restarts=current.restarts if current else (),
    )


def drain_node(store: Store, node_id: NodeId) -> None:
    """The node leaves its job at a step boundary and takes none. JobRefused when it is not there."""
    if store.get(keys.node(node_id)) is None:
        raise JobRefused(f"there is no node {node_id!r}; `elasticd status` shows the nodes that are")
    store.put(keys.drain(node_id), "1")


def undrain_node(store: Store, node_id: NodeId) -> bool:
    """Whether it was drained, or in quarantine: that ends too, and its offences are forgotten."""
    freed = [store.delete(key(node_id)) for key in (keys.drain, keys.quarantine)]
    store.delete(keys.offences(node_id))
    return any(freed)


def _create(store: Store, spec: JobSpec) -> bool:
    key = keys.spec(spec.job_id)
    return store.txn([Compare(key=key, create_revision=0)], [Put(key=key, value=to_json(spec))]).succeeded


def _parsed(kind: type[T], held: KeyValue) -> T:
    try:
        return from_json(kind, held.value)
    except ProtocolError as error:
        raise JobRefused(f"{held.key} cannot be read ({error}): another version of elasticd may hold it") from error


def _phase(store: Store, job_id: JobId) -> Phase | None:
    """How the job ended; None while it has not."""
    record = store.get(keys.round_(job_id))
    if record is None:
        return None
    phase = _parsed(Round, record).phase
    return phase if phase.terminal else None


def _clear(store: Store, held: KeyValue, job_id: JobId) -> None:
    """Removes what an ended job left behind, once its nodes have left."""
    if store.snapshot(keys.members(job_id)).entries:
        raise JobRefused(f"job {job_id!r} has just ended; its nodes are leaving: try again in a moment")
    doomed = [held.key, keys.round_(job_id), keys.cancel(job_id), keys.checkpoint(job_id)]
    store.txn([Compare(key=held.key, mod_revision=held.mod_revision)], [Delete(key=name) for name in doomed])


def _must_agree(mine: JobSpec, other: JobSpec) -> None:
    ours, theirs = (mine.min_nodes, mine.max_nodes), (other.min_nodes, other.max_nodes)
    if ours != theirs:
        raise JobRefused(
            f"job {mine.job_id!r} runs with --nnodes {theirs[0]}:{theirs[1]}; you gave {ours[0]}:{ours[1]} "
            f"(`elasticd cancel {mine.job_id}` ends it)"
        )
    if mine.ranks_per_replica != other.ranks_per_replica:
        raise JobRefused(
            f"job {mine.job_id!r} runs with --ranks-per-replica {other.ranks_per_replica}; you gave "
            f"{mine.ranks_per_replica} (`elasticd cancel {mine.job_id}` ends it)"
        )
