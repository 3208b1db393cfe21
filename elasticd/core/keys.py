"""The names of the keys in the store, in one place. Pure."""

from __future__ import annotations

from elasticd.core.model import JobId, NodeId

PREFIX = "/elasticd/v1/"
NODES = PREFIX + "nodes/"
JOBS = PREFIX + "jobs/"
DRAINS = PREFIX + "drains/"
EVICTIONS = PREFIX + "evictions/"
OFFENCES = PREFIX + "offences/"
QUARANTINES = PREFIX + "quarantines/"
TALLY = PREFIX + "tally"


def node(node_id: NodeId) -> str:
    return f"{NODES}{node_id}"


def drain(node_id: NodeId) -> str:
    return f"{DRAINS}{node_id}"


def eviction(job_id: JobId, node_id: NodeId) -> str:
    return f"{EVICTIONS}{job_id}/{node_id}"


def offences(node_id: NodeId) -> str:
    return f"{OFFENCES}{node_id}"


def quarantine(node_id: NodeId) -> str:
    return f"{QUARANTINES}{node_id}"


def spec(job_id: JobId) -> str:
    return f"{JOBS}{job_id}/spec"


def cancel(job_id: JobId) -> str:
    return f"{JOBS}{job_id}/cancel"


def round_(job_id: JobId) -> str:
    return f"{JOBS}{job_id}/round"


def checkpoint(job_id: JobId) -> str:
    return f"{JOBS}{job_id}/checkpoint"


def members(job_id: JobId) -> str:
    return f"{JOBS}{job_id}/members/"


def member(job_id: JobId, node_id: NodeId) -> str:
    return f"{JOBS}{job_id}/members/{node_id}"
