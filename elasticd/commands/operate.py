"""``elasticd submit``, ``cancel``, ``drain`` and ``undrain``: one guarded transaction each, and a line that says so."""

from __future__ import annotations

import click

from elasticd.cluster.jobs import cancel_job, drain_node, submit_job, undrain_node
from elasticd.commands.connect import open_cluster
from elasticd.core.model import JobId, NodeId
from elasticd.job_file import load_job


def submit_file(job_file: str, endpoints: str, config: str) -> int:
    spec = load_job(job_file)  # refused before anything is written
    with open_cluster(endpoints, config) as store:
        submit_job(store, spec)
    nodes = f"{spec.min_nodes}" if spec.min_nodes == spec.max_nodes else f"{spec.min_nodes} to {spec.max_nodes}"
    click.echo(f"job {spec.job_id} submitted, for {nodes} node{'' if nodes == '1' else 's'}")
    return 0


def cancel_job_id(job_id: str, endpoints: str, config: str) -> int:
    with open_cluster(endpoints, config) as store:
        cancel_job(store, JobId(job_id))
    click.echo(f"job {job_id} is being cancelled")
    return 0


def drain_node_id(node_id: str, endpoints: str, config: str) -> int:
    with open_cluster(endpoints, config) as store:
        drain_node(store, NodeId(node_id))
    click.echo(f"node {node_id} is draining: it leaves its job at a step boundary and takes no other")
    return 0


def undrain_node_id(node_id: str, endpoints: str, config: str) -> int:
    with open_cluster(endpoints, config) as store:
        was_drained = undrain_node(store, NodeId(node_id))
    click.echo(f"node {node_id} takes jobs again" if was_drained else f"node {node_id} was not drained")
    return 0
