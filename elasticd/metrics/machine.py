"""What the machine knows, as metrics, as service discovery and as health. Pure: reads, and changes nothing.

All of it works from the last view while the store is away. Not here: HTTP (exporter.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client.metrics_core import Metric

from elasticd.core.machine import Machine
from elasticd.core.model import Cause, JobId, Node, NodeId, Phase
from elasticd.core.stages import Stage
from elasticd.core.stragglers import Grounds
from elasticd.core.task import Task
from elasticd.core.view import View
from elasticd.metrics import definitions


def is_registered(machine: Machine) -> bool:
    """Whether this node's key of this life stands in the last view."""
    held = machine.view.nodes.get(machine.node.node_id)
    return held is not None and held.value.boot_id == machine.node.boot_id


def is_leaving(machine: Machine) -> bool:
    return machine.leaving_since is not None or machine.node.node_id in machine.view.cordoned


def node_families(machine: Machine) -> Iterator[Metric]:
    """Of this node, whether or not it has a job."""
    node, view = machine.node, machine.view
    build = definitions.BUILD_INFO.family()
    build.add_metric([node.elasticd_version, node.torch_version, node.python_version], 1)
    stage, jobs, peers = (
        definition.family() for definition in (definitions.STAGE, definitions.CLUSTER_JOBS, definitions.PEERS)
    )
    for one in Stage:
        stage.add_metric([one.value], machine.stage is one)
    phases = Counter(job.round.value.phase for job in view.jobs.values() if job.round is not None)
    for phase in Phase:
        jobs.add_metric([phase.value], phases[phase])
    near = peers_of(machine)
    links = [link.down is None for peer, link in machine.links.items() if peer in near]
    peers.add_metric(["up"], links.count(True))
    peers.add_metric(["down"], links.count(False))
    yield from (build, stage, jobs, peers)
    yield definitions.REGISTERED.of(is_registered(machine))
    yield definitions.LEAVING.of(is_leaving(machine))
    yield definitions.GPU_TROUBLE.of(bool(machine.trouble))
    yield definitions.CLUSTER_NODES.of(len(view.nodes))
    yield definitions.QUARANTINED.of(len(view.quarantines))
    yield definitions.EVICTION_BUDGET.of(machine.settings.stragglers.allowed(len(view.nodes)))
    evictions = definitions.EVICTIONS.family()
    standing = Counter(held.value.grounds for held in view.evictions.values())
    for grounds in Grounds:
        evictions.add_metric([grounds.value], standing[grounds])
    yield evictions


def peers_of(machine: Machine) -> frozenset[NodeId]:
    """Whom the job knows: its members, and those with a seat. Links to all others are of the past."""
    if machine.task is None:
        return frozenset()
    job = machine.view.job(machine.task.spec.job_id)
    seats = job.round.value.seats if job.round else ()
    return frozenset(job.members) | {seat.node_id for seat in seats}


def job_families(machine: Machine, task: Task) -> Iterator[Metric]:
    """Of this node's job, as the store's record has it; as this node remembers it when the store has lost it."""
    spec, job = task.spec, machine.view.job(task.spec.job_id)
    yield definitions.MIN_NODES.of(spec.min_nodes, spec.job_id)
    yield definitions.MAX_NODES.of(spec.max_nodes, spec.job_id)
    yield definitions.BUDGET.of(spec.max_restarts, spec.job_id)
    yield definitions.MEMBERS.of(len(job.members), spec.job_id)
    current = job.round.value if job.round else task.last_round
    if current is None:
        return
    seat = current.seat_of(machine.node.node_id)
    yield definitions.ROUND.of(current.number, spec.job_id)
    yield definitions.WORLD_SIZE.of(current.world_size, spec.job_id)
    yield definitions.SEATS.of(len(current.seats), spec.job_id)
    yield definitions.SEATED.of(seat is not None, spec.job_id)
    yield definitions.STORE_HOST.of(seat is not None and current.store_address == seat.address, spec.job_id)
    restarts = definitions.RESTARTS.family()
    for cause in Cause:  # those at 0 too: an increase from nothing is none
        restarts.add_metric([spec.job_id, cause.value], current.restarts_by(cause))
    yield restarts
    slowdown = definitions.SLOWDOWN.family()
    known = task.speeds.slowdowns.get(machine.node.node_id)
    if known is not None:
        slowdown.add_metric([spec.job_id], known)
    yield slowdown


def target_groups(view: View, scheme: str) -> list[dict[str, Any]]:
    """Prometheus's HTTP service discovery: a target group for each node that etcd knows."""
    jobs = {node_id: job_id for job_id, job in view.jobs.items() for node_id in job.members}
    return [_target_group(held.value, jobs.get(node), scheme) for node, held in sorted(view.nodes.items())]


def _target_group(node: Node, job_id: JobId | None, scheme: str) -> dict[str, Any]:
    """Prometheus drops labels that are empty, and those that begin with __ after relabelling."""
    return {
        "targets": [node.metrics_target],
        "labels": {
            "node": node.node_id,
            "zone": node.topology.zone,
            "rack": node.topology.rack,
            "__scheme__": scheme,
            "__meta_elasticd_host": node.host,
            "__meta_elasticd_switch": node.topology.switch,
            "__meta_elasticd_version": node.elasticd_version,
            "__meta_elasticd_cpus": str(node.capacity.cpu_count),
            "__meta_elasticd_gpus": str(len(node.capacity.gpus)),
            "__meta_elasticd_job_id": job_id or "",
        },
    }


def health(machine: Machine, *, store_up: bool) -> dict[str, Any]:
    """Healthy is who is registered, or was until the store went away: training goes on without it."""
    registered = is_registered(machine)
    reason = "" if registered else "not registered: " + ("etcd does not answer" if not store_up else "not yet")
    return {
        "healthy": registered,
        "reason": reason,
        "node": machine.node.node_id,
        "store": "up" if store_up else "away; training goes on, changes of the world wait",
        "stage": machine.stage.value,
        "gpu_trouble": machine.trouble,
        "job_id": machine.task.spec.job_id if machine.task is not None else None,
    }
