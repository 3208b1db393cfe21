"""torch's rendezvous handlers side by side: c10d's and elasticd's, three processes on three hosts (probe.py).

From the last process's asking for a handler until every one holds the round: to make the handler (a connection to the
store; for elasticd also the node's loop and its registration in etcd), and ``next_rendezvous()``.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from elasticd.bench.probe import Probe, Said
from elasticd.testing.cluster import Cluster, ClusterSpec

PORT = 29400
START_TIMEOUT_S = 60.0
ROUND_TIMEOUT_S = 60.0


def milliseconds_to_hold(said: Sequence[Said]) -> float:
    """From the last one's asking to the last one's return. Pure."""
    return 1e3 * (max(line["returned"] for line in said) - max(line["asked"] for line in said))


def measure_handlers(backend: str, conf: str, nodes: int, times: int) -> tuple[float, ...]:
    folder = Path(tempfile.mkdtemp(prefix="rendezvous-bench-"))
    with Cluster(ClusterSpec(nodes=0), folder=folder) as cluster:
        hosts = [cluster.hosts.add(f"probe{index}") for index in range(nodes)]
        own = f"{hosts[0].address}:{PORT}"
        endpoint = own if backend == "c10d" else ",".join(cluster.etcd.endpoints)
        for index, host in enumerate(hosts):
            probe = Probe(
                backend=backend,
                endpoint=endpoint,
                conf=conf,
                address=host.address,
                index=index,
                nodes=nodes,
                times=times,
                folder=str(folder),
            )
            host.spawn([sys.executable, "-m", "elasticd.bench.probe", probe.to_json()], log=folder / f"log-{index}")
        try:
            samples = tuple(_round(cluster, number, nodes) for number in range(times))
        finally:
            for host in hosts:
                host.kill()
    shutil.rmtree(folder)
    return samples


def _round(cluster: Cluster, number: int, nodes: int) -> float:
    """All probes are ready for this one; they are told to go; all have returned."""
    folder = cluster.folder
    ready = [folder / f"ready-{number}-{index}" for index in range(nodes)]
    done = [folder / f"done-{number}-{index}" for index in range(nodes)]
    cluster.wait_until(lambda: all(file.exists() for file in ready), START_TIMEOUT_S, f"probes ready, {folder}")
    (folder / f"go-{number}").touch()
    cluster.wait_until(lambda: all(file.exists() for file in done), ROUND_TIMEOUT_S, f"probes returned, {folder}")
    return milliseconds_to_hold([json.loads(file.read_text()) for file in done])
