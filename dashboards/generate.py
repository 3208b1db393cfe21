"""Writes elasticd.json: the Grafana dashboard, from the panels listed here. Standard library only.

    python dashboards/generate.py

A test holds the JSON to this file, every query to the metrics that exist, and every panel to data from a real run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("elasticd.json")
COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

J = 'job_id="$job"'
N = 'node=~"$node"'
RATE = "[$__rate_interval]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """``unit``: one of Grafana's. ``low`` and ``high``: the axis, where it has natural ends."""

    title: str
    queries: tuple[Query, ...]
    about: str
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 7
    low: float | None = 0
    high: float | None = None
    stacked: bool = False
    names: dict[int, str] = field(default_factory=dict)


def stat(title: str, expr: str, about: str, **more: Any) -> Panel:
    return Panel(title=title, queries=(Query(expr=expr),), about=about, kind="stat", width=4, height=4, **more)


def plot(title: str, expr: str, legend: str, about: str, **more: Any) -> Panel:
    return Panel(title=title, queries=(Query(expr=expr, legend=legend),), about=about, **more)


FLEET = (
    stat("Nodes in etcd", "max(elasticd_cluster_nodes)", "Daemons that hold their key."),
    stat("Nodes that report", "count(elasticd_build_info)", "Daemons that Prometheus scrapes."),
    stat("Nodes in a world", "sum(elasticd_job_seated)", "Nodes whose workers are in the current round of a job."),
    stat("Jobs running", 'max(elasticd_cluster_jobs{phase="running"})', "Jobs whose newest round runs."),
    stat(
        "etcd answers",
        "avg(elasticd_store_up)",
        "Share of the nodes that etcd answers. Training goes on without it; changes of the world wait.",
        unit="percentunit",
        high=1,
    ),
    stat("Versions", "count(count by (version) (elasticd_build_info))", "Different versions of elasticd."),
    plot(
        "Nodes by stage",
        "sum by (stage) (elasticd_stage)",
        "{{stage}}",
        "What each node does for its job.",
        stacked=True,
    ),
    plot(
        "Since etcd last answered",
        "max by (node) (elasticd_store_last_answer_age_seconds)",
        "{{node}}",
        "Normally under a third of the lease's time to live.",
        unit="s",
    ),
    Panel(
        title="Evictions",
        queries=(
            Query(expr="max by (grounds) (elasticd_cluster_evictions)", legend="{{grounds}}, within the window"),
            Query(expr="max(elasticd_cluster_eviction_budget)", legend="budget"),
            Query(expr="max(elasticd_cluster_quarantined_nodes)", legend="nodes in quarantine"),
        ),
        about="Nodes that lost their seats: because they were slow for long, or a GPU was in trouble.",
    ),
    plot("Links between daemons", "sum by (state) (elasticd_peers)", "{{state}}", "Each link is seen from both ends."),
    plot(
        "Time to detect a loss",
        "sum by (how) (elasticd_detection_seconds_sum) / (sum by (how) (elasticd_detection_seconds_count) > 0)",
        "{{how}}",
        "Mean since the daemons started, by the evidence: refused connections are fast, silence takes the deadline.",
        unit="s",
    ),
    plot(
        "Losses detected",
        "sum by (how) (elasticd_detection_seconds_count)",
        "{{how}}",
        "Since the daemons started. A lost node counts on each of its neighbours.",
    ),
    Panel(
        title="What each node does",
        queries=(Query(expr="max by (node, zone, rack, stage) (elasticd_stage == 1)"),),
        about="Node, where it stands, stage.",
        kind="table",
    ),
)

JOB = (
    stat("Step", f"max(elasticd_job_step{{{J}}})", "The newest completed step."),
    stat("Round", f"max(elasticd_job_round{{{J}}})", "Each change of the world is a new round."),
    stat("Ranks", f"max(elasticd_job_world_size{{{J}}})", "Size of the world; 0 while it waits for nodes."),
    stat(
        "Restarts left",
        f'max(elasticd_job_restart_budget{{{J}}}) - max(elasticd_job_restarts_total{{{J},cause="worker_failed"}})',
        "How often the script may still fail by itself. Lost nodes and joins are free.",
        low=None,
    ),
    stat(
        "Since the last step",
        f"time() - max(elasticd_job_last_step_timestamp_seconds{{{J}}})",
        "As reported by scripts that use a Session.",
        unit="s",
    ),
    stat(
        "Since the last checkpoint",
        f"time() - max(elasticd_checkpoint_last_commit_timestamp_seconds{{{J}}})",
        "What would be lost if everything stopped now.",
        unit="s",
    ),
    plot(
        "Steps per second",
        f"max(rate(elasticd_rank_steps_total{{{J}}}{RATE}))",
        "steps",
        "All ranks complete the same steps.",
        unit="ops",
    ),
    plot(
        "Samples per second",
        f"sum(rate(elasticd_rank_samples_total{{{J}}}{RATE}))",
        "samples",
        "Over all ranks.",
        unit="ops",
    ),
    plot(
        "What the script reports",
        f"avg by (name) (elasticd_job_metric{{{J}}})",
        "{{name}}",
        "step.report(loss=...): the last value, the mean over the nodes.",
        low=None,
    ),
    plot(
        "Step time by rank",
        f"max by (rank) (elasticd_rank_step_seconds{{{J}}})",
        "rank {{rank}}",
        "Waiting for the others included.",
        unit="s",
    ),
    plot(
        "Sent for gradients by rank",
        f"max by (rank) (rate(elasticd_rank_sent_bytes_total{{{J}}}{RATE}))",
        "rank {{rank}}",
        "Counted from the sizes of what is averaged over ranks, after compression.",
        unit="Bps",
    ),
    plot(
        "Share of the step spent waiting",
        f"sum by (rank) (rate(elasticd_rank_wait_seconds_total{{{J}}}{RATE}))"
        f" / (sum by (rank) (rate(elasticd_rank_wait_seconds_total{{{J}}}{RATE}))"
        f" + sum by (rank) (rate(elasticd_rank_busy_seconds_total{{{J}}}{RATE})))",
        "rank {{rank}}",
        "The rank that waits least is the slow one.",
        unit="percentunit",
        high=1,
    ),
    Panel(
        title="Imbalance",
        queries=(
            Query(expr=f"job_id:elasticd_imbalance:ratio_rate5m{{{J}}}", legend="all ranks (5 min)"),
            Query(expr=f"max by (node) (elasticd_job_imbalance_ratio{{{J}}})", legend="{{node}}, now"),
        ),
        about="The slowest over the mean of the busy time per step: 1.0 is perfect, 1.2 costs a sixth of the fleet.",
        low=1,
    ),
    plot(
        "Slowdown by node",
        f"max by (node) (elasticd_job_slowdown_ratio{{{J}}})",
        "{{node}}",
        "Its slowest rank over the median of all ranks. Above the job's straggler_factor for long, it is exchanged.",
        low=1,
    ),
    Panel(
        title="World",
        queries=(
            Query(expr=f"max(elasticd_job_nodes{{{J}}})", legend="nodes"),
            Query(expr=f"max(elasticd_job_members{{{J}}})", legend="nodes, spares included"),
            Query(expr=f"max(elasticd_job_min_nodes{{{J}}})", legend="minimum"),
            Query(expr=f"max(elasticd_job_max_nodes{{{J}}})", legend="maximum"),
        ),
        about="Nodes that compute, and those that could.",
    ),
    plot(
        "Restarts by cause",
        f"max by (cause) (elasticd_job_restarts_total{{{J}}})",
        "{{cause}}",
        "Since the job's start. Only worker_failed is charged to the script.",
    ),
    plot(
        "Recovery",
        f"sum by (cause, until) (elasticd_recovery_seconds_sum{{{J}}})"
        f" / sum by (cause, until) (elasticd_recovery_seconds_count{{{J}}})",
        "{{cause}}, until {{until}}",
        "Mean from the first evidence until the workers ran again, and until they completed a step.",
        unit="s",
    ),
    plot(
        "Who has a seat",
        f"max by (node) (elasticd_job_seated{{{J}}})",
        "{{node}}",
        "A spare is warm, and in no world.",
        kind="state-timeline",
        names={0: "spare", 1: "seated"},
    ),
    plot(
        "Who hosts the rendezvous store",
        f"max by (node) (elasticd_job_store_host{{{J}}})",
        "{{node}}",
        "Any node may: a new round has a new store.",
        kind="state-timeline",
        names={0: " ", 1: "host"},
    ),
    Panel(
        title="Checkpoints",
        queries=(
            Query(expr=f"max(elasticd_job_step{{{J}}})", legend="completed step"),
            Query(expr=f"max(elasticd_checkpoint_step{{{J}}})", legend="committed step"),
        ),
        about="The distance is what a restart would repeat.",
    ),
    plot(
        "Checkpoint commits",
        f"sum by (result) (elasticd_checkpoint_commits_total{{{J}}})",
        "{{result}}",
        "Refused: it came from a round that was over.",
    ),
    Panel(
        title="Copies in RAM",
        queries=(
            Query(expr=f"max(elasticd_job_step{{{J}}})", legend="completed step"),
            Query(expr=f"max(elasticd_memory_copy_step{{{J}}})", legend="newest whole copy"),
        ),
        about="The distance is what a lost worker or node costs: Session(memory_every_steps=...).",
    ),
    plot(
        "Memory that copies take",
        "sum by (node, origin) (elasticd_memory_held_bytes)",
        "{{node}}: {{origin}}",
        "Own: of this node's workers. Copied: kept for other nodes.",
        unit="bytes",
    ),
    plot(
        "Copying to the buddy",
        f"sum by (node) (elasticd_memory_sent_bytes_total{{{J}}})"
        f" / (sum by (node) (elasticd_memory_send_seconds_sum{{{J}}}) > 0)",
        "{{node}}",
        "Bytes a second while a copy is under way, checking it included; the mean since the job came.",
        unit="Bps",
    ),
    plot(
        "State taken up from",
        f"sum by (source) (elasticd_restores_total{{{J}}})",
        "{{source}}",
        "Memory: of the nodes that wrote it. Buddy: one of those was gone. Disk: a checkpoint. By rank.",
    ),
    plot(
        "Parts of checkpoints",
        f"sum by (result) (increase(elasticd_checkpoint_saves_total{{{J}}}[5m]))",
        "{{result}}",
        "Each rank saves its part; one that fails fails the checkpoint. In five minutes.",
    ),
    plot(
        "Bandwidth of a save",
        f"sum by (node) (rate(elasticd_checkpoint_written_bytes_total{{{J}}}[5m]))"
        f" / (sum by (node) (rate(elasticd_checkpoint_save_seconds_sum{{{J}}}[5m])) > 0)",
        "{{node}}",
        "Bytes of a rank's part over the seconds from the copy until it was durable, mean over ranks.",
        unit="Bps",
    ),
    plot(
        "Seconds of a save",
        f"sum by (node) (rate(elasticd_checkpoint_save_seconds_sum{{{J}}}[5m]))"
        f" / (sum by (node) (rate(elasticd_checkpoint_save_seconds_count{{{J}}}[5m])) > 0)",
        "{{node}}",
        "From the copy of the state until the checkpoint was durable.",
        unit="s",
    ),
    plot(
        "Written to checkpoints",
        f"sum by (node) (increase(elasticd_checkpoint_written_bytes_total{{{J}}}[5m]))",
        "{{node}}",
        "In five minutes.",
        unit="bytes",
    ),
    plot(
        "Steps that wait for checkpoints",
        f"sum by (node) (rate(elasticd_checkpoint_stall_seconds_total{{{J}}}[5m]))",
        "{{node}}",
        "Seconds of stall a second, over the node's ranks.",
        unit="percentunit",
    ),
    plot(
        "Checkpoints that do not verify",
        f"sum by (node) (elasticd_checkpoint_damaged_total{{{J}}})",
        "{{node}}",
        "Passed over by a restore: damaged, or published by a round that was over.",
    ),
    plot(
        "Rounds proposed",
        f"sum by (node, cause) (elasticd_rounds_proposed_total{{{J}}})",
        "{{node}}: {{cause}}",
        "In calm times the oldest live node proposes.",
    ),
    plot(
        "Failures of workers",
        f"sum by (node) (elasticd_worker_failures_total{{{J}}})",
        "{{node}}",
        "Collectives that failed because a node was lost are among them.",
    ),
)

NODE = (
    plot(
        "CPU",
        f'1 - sum by (node) (rate(elasticd_node_cpu_seconds_total{{{N},mode="idle"}}{RATE}))'
        f" / sum by (node) (rate(elasticd_node_cpu_seconds_total{{{N}}}{RATE}))",
        "{{node}}",
        "Share of the machine's CPU time that was not idle.",
        unit="percentunit",
        high=1,
    ),
    plot(
        "Load per CPU",
        f'sum by (node) (elasticd_node_load_average{{{N},window="1m"}}) / sum by (node) (elasticd_node_cpus{{{N}}})',
        "{{node}}",
        "Over one minute.",
    ),
    plot(
        "Memory",
        f"1 - sum by (node) (elasticd_node_memory_available_bytes{{{N}}})"
        f" / sum by (node) (elasticd_node_memory_bytes{{{N}}})",
        "{{node}}",
        "Share that programs cannot get any more.",
        unit="percentunit",
        high=1,
    ),
    Panel(
        title="Network",
        queries=(
            Query(
                expr=f"sum by (node, interface) (rate(elasticd_node_network_received_bytes_total{{{N}}}{RATE}))",
                legend="{{node}} {{interface}} in",
            ),
            Query(
                expr=f"sum by (node, interface) (rate(elasticd_node_network_sent_bytes_total{{{N}}}{RATE}))",
                legend="{{node}} {{interface}} out",
            ),
        ),
        about="The machine's own interfaces.",
        unit="Bps",
    ),
    plot(
        "Network errors",
        f"sum by (node, interface) (rate(elasticd_node_network_errors_total{{{N}}}{RATE}))",
        "{{node}} {{interface}}",
        "Errors and drops, both ways.",
        unit="ops",
    ),
    Panel(
        title="Disk",
        queries=(
            Query(
                expr=f"sum by (node) (rate(elasticd_node_disk_read_bytes_total{{{N}}}{RATE}))",
                legend="{{node}} read",
            ),
            Query(
                expr=f"sum by (node) (rate(elasticd_node_disk_written_bytes_total{{{N}}}{RATE}))",
                legend="{{node}} written",
            ),
        ),
        about="All disks of the machine.",
        unit="Bps",
    ),
    plot(
        "File systems",
        f"1 - sum by (node, path) (elasticd_node_filesystem_available_bytes{{{N}}})"
        f" / sum by (node, path) (elasticd_node_filesystem_bytes{{{N}}})",
        "{{node}} {{path}}",
        "Share in use, under the paths that the daemon writes to.",
        unit="percentunit",
        high=1,
    ),
    Panel(
        title="The daemon",
        queries=(
            Query(
                expr=f"sum by (node) (rate(elasticd_process_cpu_seconds_total{{{N}}}{RATE}))",
                legend="{{node}} CPU",
            ),
            Query(expr=f"max by (node) (elasticd_loop_delay_seconds{{{N}}})", legend="{{node}} loop's delay (s)"),
        ),
        about="Share of one CPU, and how long the loop took to answer the scrape.",
        unit="none",
    ),
    plot(
        "The daemon's memory",
        f"max by (node) (elasticd_process_resident_memory_bytes{{{N}}})",
        "{{node}}",
        "Without its warm server and the workers.",
        unit="bytes",
    ),
    plot(
        "GPU use",
        f"max by (node, gpu) (elasticd_gpu_utilization_ratio{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "Share of time in which a kernel ran.",
        unit="percentunit",
        high=1,
    ),
    plot(
        "GPU memory",
        f"sum by (node, gpu) (elasticd_gpu_memory_used_bytes{{{N}}})"
        f" / sum by (node, gpu) (elasticd_gpu_memory_bytes{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "Share in use.",
        unit="percentunit",
        high=1,
    ),
    plot(
        "GPU temperature",
        f"max by (node, gpu) (elasticd_gpu_temperature_celsius{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "The chip.",
        unit="celsius",
    ),
    plot(
        "GPU power",
        f"max by (node, gpu) (elasticd_gpu_power_watts{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "Drawn now.",
        unit="watt",
    ),
    plot(
        "GPU ECC errors",
        f"sum by (node, gpu, kind) (elasticd_gpu_ecc_errors_total{{{N}}})",
        "{{node}} GPU {{gpu}} {{kind}}",
        "Since the driver was loaded. Uncorrected ones end the process that used the memory.",
    ),
    plot(
        "GPUs that answer",
        f"min by (node, gpu) (elasticd_gpu_up{{{N}}})",
        "{{node}} GPU {{gpu}}",
        "A GPU that is lost needs a reset, or the node a reboot.",
        kind="state-timeline",
        names={0: "lost", 1: "up"},
    ),
)

ROWS = {"Fleet": FLEET, "Job $job": JOB, "Node $node": NODE}


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_row(len(panels) + 1, title, top))
        top = _place(panels, row, top + 1)
    return {
        "uid": "elasticd",
        "title": "elasticd",
        "tags": ["elasticd", "training"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": [_restarts()]},
        "panels": panels,
    }


def _place(panels: list[dict[str, Any]], row: tuple[Panel, ...], top: int) -> int:
    """From left to right, and then below; returns where the next row begins."""
    left, height = 0, 0
    for panel in row:
        if left + panel.width > COLUMNS:
            left, top, height = 0, top + height, 0
        place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
        panels.append(_panel(len(panels) + 1, panel, place))
        left, height = left + panel.width, max(height, panel.height)
    return top + height


def _row(number: int, title: str, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
    return {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": [_target(panel, index, query) for index, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _target(panel: Panel, index: int, query: Query) -> dict[str, Any]:
    table = panel.kind == "table"
    return {
        "refId": chr(ord("A") + index),
        "datasource": SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "instant": table,
        "range": not table,
        "format": "table" if table else "time_series",
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": panel.unit}
    ends = {"min": panel.low, "max": panel.high}
    found |= {name: value for name, value in ends.items() if value is not None}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        found["custom"] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 60 if panel.stacked else 10}
        found["custom"] |= {"showPoints": "never", "spanNulls": False, "stacking": stacking}
    if panel.names:
        texts = {str(value): {"text": text, "index": value} for value, text in panel.names.items()}
        found["mappings"] = [{"type": "value", "options": texts}]
    return found


def _options(panel: Panel) -> dict[str, Any]:
    match panel.kind:
        case "stat":
            reduce = {"calcs": ["lastNotNull"], "fields": "", "values": False}
            return {"reduceOptions": reduce, "colorMode": "value", "graphMode": "area", "textMode": "value"}
        case "timeseries":
            legend = {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []}
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
        case "state-timeline":
            return {"showValue": "auto", "mergeValues": True, "legend": {"showLegend": False}}
        case _:
            return {"showHeader": True}


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    job = _variable("job", "Job", "label_values(elasticd_job_round, job_id)")
    node = _variable("node", "Node", "label_values(elasticd_build_info, node)")
    return [source, job, node | {"multi": True, "includeAll": True, "allValue": ".*"}]


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    asked = {"query": query, "refId": name}
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": asked,
        "refresh": 2,
        "sort": 1,
    }


def _restarts() -> dict[str, Any]:
    """A line through all panels at each restart."""
    return {
        "name": "Restarts",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": f"max by (cause) (increase(elasticd_job_restarts_total{{{J}}}{RATE})) > 0",
        "titleFormat": "restart: {{cause}}",
        "step": "10s",
    }


if __name__ == "__main__":
    OUTPUT.write_text(json.dumps(dashboard(), indent=1) + "\n")
