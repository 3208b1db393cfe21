"""A daemon with nothing to do: its share of one core, and its resident memory, without the warm server it keeps.

Three daemons, registered in etcd under leases, linked to each other, their warm servers preloaded, no job. CPU is the
process's user and system time over the window, from the kernel's accounts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import psutil

from elasticd.bench.figures import Figure, Goal
from elasticd.bench.jobs import ElasticdJob
from elasticd.bench.options import Options
from elasticd.testing.cluster import Cluster, ClusterNode, ClusterSpec
from elasticd.testing.history import Event, events_of

NODES = 3
WINDOW_S, QUICK_WINDOW_S = 20.0, 8.0
PRELOAD_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Of one process, at one time: seconds of CPU since its start, resident bytes."""

    t: float
    cpu_s: float
    resident_bytes: int


def cpu_percent(before: Usage, after: Usage) -> float:
    """The share of one core between two looks. Pure."""
    return 100 * (after.cpu_s - before.cpu_s) / (after.t - before.t)


def all_linked(history: list[Event], nodes: int) -> bool:
    """Whether every node is registered and has links to all others. Pure."""
    registered = {event.node for event in events_of(history, "registered")}
    links = {(event.node, event.details["peer"]) for event in events_of(history, "peer_up")}
    return len(registered) == nodes and len(links) == nodes * (nodes - 1)


def measure(options: Options) -> list[Figure]:
    with Cluster(ClusterSpec(nodes=NODES)) as cluster:
        cluster.wait_for(lambda history: all_linked(history, NODES), 30, "all daemons linked")
        cluster.wait_until(lambda: all(map(_warm, cluster.nodes)), PRELOAD_TIMEOUT_S, "warm servers preloaded")
        daemons = [psutil.Process(node.process.pid) for node in cluster.nodes if node.process is not None]
        before = [look(daemon) for daemon in daemons]
        time.sleep(QUICK_WINDOW_S if options.quick else WINDOW_S)
        after = [look(daemon) for daemon in daemons]
    shares = tuple(cpu_percent(old, new) for old, new in zip(before, after, strict=True))
    sizes = tuple(usage.resident_bytes / 1e6 for usage in after)
    options.say(f"{ElasticdJob.system}: {max(shares):.2f} % of a core, {max(sizes):.0f} MB")
    figure = partial(Figure, experiment="idle", system=ElasticdJob.system)
    return [
        figure(what="an idle daemon: CPU, of one core", unit="%", samples=shares, goal=Goal(at_most=1.0, of="max")),
        figure(what="an idle daemon: memory", unit="MB", samples=sizes, goal=Goal(at_most=150.0, of="max")),
    ]


def look(process: psutil.Process) -> Usage:
    times = process.cpu_times()
    cpu_s = times.user + times.system
    return Usage(t=time.monotonic(), cpu_s=cpu_s, resident_bytes=process.memory_info().rss)


def _warm(node: ClusterNode) -> bool:
    return node.log.exists() and "warm: imports took" in node.log.read_text(errors="replace")
