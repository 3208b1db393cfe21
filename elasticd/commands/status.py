"""``elasticd status``: nodes and jobs, as a table, as JSON, once or as they change.

``describe`` is pure: a view of the cluster in, plain data out; the table is made from that same data. Not here: steps
and losses, which the daemons serve at /metrics.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elasticd.cluster.jobs import read_checkpoints, read_view
from elasticd.cluster.store import Store
from elasticd.commands.connect import open_cluster
from elasticd.core.model import JobId, Node
from elasticd.core.records import to_plain
from elasticd.core.seating import why_spare, why_waiting
from elasticd.core.view import Job, View
from elasticd.errors import StoreUnavailable

REFRESH_S = 0.5


def show_status(endpoints: str, config: str, *, watch: bool, as_json: bool) -> int:
    with open_cluster(endpoints, config) as store:
        if watch:
            _watch(store, as_json=as_json)
        elif as_json:
            print(json.dumps(_read(store), indent=2))  # noqa: T201
        else:
            Console().print(render(_read(store)))
    return 0


def _watch(store: Store, *, as_json: bool) -> None:
    """Until Ctrl-C. An etcd that is away for a while is said, and waited for."""
    if as_json:
        _repeat(store, lambda found: print(json.dumps(found), flush=True))  # noqa: T201
    else:
        with Live(refresh_per_second=4) as live:
            _repeat(store, lambda found: live.update(render(found)))


def _repeat(store: Store, show: Callable[[Mapping[str, Any]], None]) -> None:
    shown: Mapping[str, Any] = {}
    try:
        while True:
            try:
                found = _read(store)
            except StoreUnavailable as error:
                found = {**shown, "store_error": str(error)}
            if found != shown:
                show(found)
                shown = found
            time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        return


def _read(store: Store) -> dict[str, Any]:
    view = read_view(store)
    return describe(view, read_checkpoints(store, view))


# --- pure -------------------------------------------------------------------------------------------------------------


def describe(view: View, checkpoints: Mapping[JobId, Mapping[str, Any]]) -> dict[str, Any]:
    """The cluster as plain data: ``nodes`` and ``jobs`` sorted by name, ``quarantines``, and ``unreadable`` records."""
    return {
        "nodes": [_node(view, held.value) for _, held in sorted(view.nodes.items())],
        "jobs": [_job(job_id, job, checkpoints.get(job_id)) for job_id, job in sorted(view.jobs.items())],
        "quarantines": [to_plain(held.value) for _, held in sorted(view.quarantines.items())],
        "unreadable": dict(view.unreadable),
    }


def _node(view: View, node: Node) -> dict[str, Any]:
    job_id, state, ranks = _part(view, node)
    job = view.job(JobId(job_id)) if state == "spare" else None
    return {
        "node": node.node_id,
        "host": node.host,
        "address": node.address,
        "state": state,
        "drained": node.node_id in view.drains,
        "quarantined": node.node_id in view.quarantines,
        "job": job_id,
        "reason": why_spare(job.spec.value, job.round.value if job.round else None) if job and job.spec else "",
        "ranks": ranks,
        "cpus": node.capacity.cpu_count,
        "memory_bytes": node.capacity.memory_bytes,
        "gpus": [gpu.name for gpu in node.capacity.gpus],
        "topology": to_plain(node.topology),
        "metrics": node.metrics_target,
        "elasticd": node.elasticd_version,
        "torch": node.torch_version,
        "python": node.python_version,
    }


def _part(view: View, node: Node) -> tuple[str, str, list[int]]:
    """(job, state, ranks) of a node: what it does for which job."""
    for job_id, job in sorted(view.jobs.items()):
        member = job.members.get(node.node_id)
        if member is None or job.over:
            continue
        seat = job.round.value.seat_of(node.node_id) if job.round else None
        if seat is None:
            return job_id, "spare" if member.value.state.value == "ready" else member.value.state.value, []
        state = "running" if member.value.state.value == "ready" else member.value.state.value
        return job_id, state, list(range(seat.first_rank, seat.first_rank + seat.nproc))
    return "", "idle", []


def _job(job_id: JobId, job: Job, checkpoint: Mapping[str, Any] | None) -> dict[str, Any]:
    current = job.round.value if job.round else None
    spec = job.spec.value if job.spec else None
    phase = current.phase.value if current else "waiting"
    return {
        "job": job_id,
        "phase": "cancelling" if job.cancelled and not job.over else phase,
        "round": current.number if current else 0,
        "cause": current.cause.value if current else "",
        "world_size": current.world_size if current else 0,
        "nodes": [seat.node_id for seat in current.seats] if current else [],
        "members": sorted(job.members),
        "min_nodes": spec.min_nodes if spec else 0,
        "max_nodes": spec.max_nodes if spec else 0,
        "restarts": {cause.value: count for cause, count in current.restarts} if current else {},
        "max_restarts": spec.max_restarts if spec else 0,
        "checkpoint": dict(checkpoint) if checkpoint else None,
        "failure": to_plain(current.failure) if current and current.failure else None,
        "reason": why_waiting(job),
    }


def render(found: Mapping[str, Any]) -> Group:
    """Two tables, and a line for what is wrong."""
    parts: list[Any] = [_nodes_table(found.get("nodes", [])), _jobs_table(found.get("jobs", []))]
    for job in found.get("jobs", []):
        if job.get("reason"):
            parts.append(_wrong(job["job"], f": {job['reason']}"))
        if job["failure"]:
            failure = job["failure"]
            where = f"node {failure['node_id']}, rank {failure['rank']}, exit code {failure['exit_code']}"
            parts.append(_wrong(job["job"], f": first error on {where}: {failure['message']}"))
    parts += [_quarantine(one) for one in found.get("quarantines", [])]
    parts += [_wrong("unreadable", f" {key}: {why}") for key, why in found.get("unreadable", {}).items()]
    if found.get("store_error"):
        parts.append(_wrong("etcd does not answer", f": {found['store_error']}"))
    return Group(*parts)


def _quarantine(record: Mapping[str, Any]) -> Text:
    until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["until"]))
    text = f" is in quarantine until {until}: {record['grounds']}: {record['reason']} (offence {record['offences']}); "
    return _wrong(record["node_id"], f"{text}`elasticd undrain {record['node_id']}` ends it")


def _wrong(what: str, text: str) -> Text:
    """Not as markup: in a worker's message brackets are brackets."""
    return Text.assemble((what, "red"), text)


def _nodes_table(nodes: list[Mapping[str, Any]]) -> Table:
    table = _table("node", "address", "state", "job", "ranks", "cpus", "memory", "gpus")
    for node in nodes:
        marks = [mark for mark in ("drained", "quarantined") if node[mark]]
        state = f"{node['state']} ({', '.join(marks)})" if marks else node["state"]
        if node["reason"]:
            state += f": {node['reason']}"
        gpus = f"{len(node['gpus'])} x {node['gpus'][0]}" if node["gpus"] else "-"
        table.add_row(
            node["node"],
            node["address"],
            state,
            node["job"] or "-",
            _ranks(node["ranks"]),
            str(node["cpus"]),
            f"{node['memory_bytes'] / 2**30:.0f} GiB",
            gpus,
        )
    return table


def _jobs_table(jobs: list[Mapping[str, Any]]) -> Table:
    table = _table("job", "phase", "round", "cause", "world", "nodes", "restarts", "checkpoint")
    for job in jobs:
        restarts = ", ".join(f"{cause} {count}" for cause, count in job["restarts"].items()) or "-"
        table.add_row(
            job["job"],
            job["phase"],
            str(job["round"]),
            job["cause"] or "-",
            str(job["world_size"]),
            f"{len(job['nodes'])} of {job['min_nodes']}:{job['max_nodes']}",
            restarts,
            f"step {job['checkpoint']['step']}" if job["checkpoint"] else "-",
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _ranks(ranks: list[int]) -> str:
    if not ranks:
        return "-"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
