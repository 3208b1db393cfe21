"""A daemon with nothing to do: its share of one core, and its resident memory, without the warm server that it keeps.

Twice: registered in etcd under a lease, and no job at all; then with links to two others, in a job that waits for a
fourth node which never comes. CPU is the process's user and system time over a window, from the kernel's accounts; the
warm servers have imported what they preload before it begins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import psutil

from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.options import Options
from elasticd.testing.cluster import Cluster, ClusterNode, ClusterSpec
from elasticd.testing.history import Event, events_of

NODES = 3
WINDOW_S, QUICK_WINDOW_S = 20.0, 5.0
START_TIMEOUT_S = 90.0
CALM_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Of one process, at one time: seconds of CPU since its start, resident bytes."""

    t: float
    cpu_s: float
    resident_bytes: int


def cpu_percent(before: Usage, after: Usage) -> float:
    """The share of one core between two looks. Pure."""
    return 100 * (after.cpu_s - before.cpu_s) / (after.t - before.t)


def all_registered(history: Sequence[Event], nodes: int) -> bool:
    return len({event.node for event in events_of(history, "registered")}) == nodes


def all_linked(history: Sequence[Event], nodes: int) -> bool:
    """Whether every node has had a link to every other. Pure."""
    links = {(event.node, event.details["peer"]) for event in events_of(history, "peer_up")}
    return len(links) == nodes * (nodes - 1)


def measure(options: Options) -> list[Figure]:
    window_s = QUICK_WINDOW_S if options.quick else WINDOW_S
    with Cluster(ClusterSpec(nodes=NODES)) as cluster:
        cluster.wait_for(partial(all_registered, nodes=NODES), START_TIMEOUT_S, "all daemons registered")
        cluster.wait_until(lambda: all(map(_warm, cluster.nodes)), START_TIMEOUT_S, "warm servers preloaded")
        alone = _watch(cluster, window_s)
        cluster.submit("waits", ["true"], nodes=f"{NODES + 1}:{NODES + 1}", no_python=True)
        cluster.wait_for(partial(all_linked, nodes=NODES), START_TIMEOUT_S, "all daemons linked")
        linked = _watch(cluster, window_s)
    figures = _figures("an idle daemon, no job", alone) + _figures("an idle daemon, linked to two", linked)
    options.say("; ".join(f"{figure.what} {figure.max:.2f} {figure.unit}" for figure in figures))
    return figures


def _figures(what: str, usages: Sequence[tuple[Usage, Usage]]) -> list[Figure]:
    figure = partial(Figure, experiment="idle", system=ELASTICD)
    shares = tuple(cpu_percent(before, after) for before, after in usages)
    sizes = tuple(after.resident_bytes / 1e6 for _, after in usages)
    return [
        figure(what=f"{what}: CPU", unit="% of a core", samples=shares, goal=Goal(at_most=1.0, of="max")),
        figure(what=f"{what}: memory", unit="MB", samples=sizes, goal=Goal(at_most=150.0, of="max")),
    ]


def _watch(cluster: Cluster, window_s: float) -> list[tuple[Usage, Usage]]:
    """Each daemon before and after the window."""
    time.sleep(CALM_S)
    daemons = [psutil.Process(node.process.pid) for node in cluster.nodes if node.process is not None]
    before = [look(daemon) for daemon in daemons]
    time.sleep(window_s)
    return [(old, look(daemon)) for old, daemon in zip(before, daemons, strict=True)]


def look(process: psutil.Process) -> Usage:
    times = process.cpu_times()
    cpu_s = times.user + times.system
    return Usage(t=time.monotonic(), cpu_s=cpu_s, resident_bytes=process.memory_info().rss)


def _warm(node: ClusterNode) -> bool:
    return node.log.exists() and "warm: imports took" in node.log.read_text(errors="replace")
