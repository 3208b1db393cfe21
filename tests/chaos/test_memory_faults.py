"""Whole nodes die under a job that keeps its state in RAM; daemons die in the middle of saves to disk. Real ones, all of it.

What the script trains depends on the number of a step alone, and it asserts that all of its state is of one step: so a
mix of two would end it, and a step that was lost shows in the numbers of the steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from drill import RECOVERY_S, SEED

from elasticd.checkpoint import storage
from elasticd.checkpoint.manifest import complete_name
from elasticd.core.model import Topology
from elasticd.errors import CheckpointInvalid
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.faults import CutNode, Fault, KillNode, KillWorker
from elasticd.testing.history import Trained

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]

SCRIPT = Path(__file__).with_name("remember.py")
EVERY = 4
#: Until a daemon that starts has workers: with torch's import, by several at a time.
START_S = 40.0
ZONES = tuple(Topology(zone=zone) for zone in "aab")


@pytest.fixture
def cluster(namespaces: None, tmp_path: Path) -> Iterator[Cluster]:
    print(f"seed {SEED}")
    spec = ClusterSpec(nodes=3, isolated=True, topology=ZONES)
    with Cluster(spec, folder=tmp_path / "cluster") as cluster:
        yield cluster


def newest_step(cluster: Cluster) -> int:
    return max(line.step for line in cluster.trained())


def first_of_next_round(cluster: Cluster, number: int, world: int, timeout_s: float = RECOVERY_S) -> Trained:
    """The first step of a round later than that one, of a world of that size."""

    def found() -> list[Trained]:
        return [line for line in cluster.trained() if line.round_number > number and line.world == world]

    return cluster.wait_until(found, timeout_s, f"a world of {world} after round {number}")[0]


def test_workers_and_nodes_that_die_cost_fewer_steps_than_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    cluster.submit("memory", [str(SCRIPT), str(tmp_path), str(EVERY)], nodes="1:3", max_restarts=9)
    cluster.wait_step(0, world=3, timeout_s=START_S)
    faults: list[Fault] = [KillNode(node=2), KillWorker(rank=1), CutNode(node=chance.randrange(2))]
    for fault in faults:
        cluster.wait_step(time.monotonic() + chance.uniform(0.3, 1.0), world=3)
        number = cluster.trained()[-1].round_number
        fault.apply(cluster)
        whole = 3 if isinstance(fault, KillWorker) else 2
        first = first_of_next_round(cluster, number, whole)
        done = max(line.step for line in cluster.trained() if line.round_number <= number)
        print(f"{fault}: {done} steps were completed, the next one was {first.step}")
        assert done - EVERY < first.step - 1 <= done
        fault.heal(cluster)
        if whole == 2:  # back by a planned change, which costs none
            number = first.round_number
            joined = first_of_next_round(cluster, number, 3, START_S)
            assert joined.step == 1 + max(line.step for line in cluster.trained() if line.round_number <= number)
    assert sources(cluster) == {"memory", "buddy"}
    apart = {event.details["apart"] for event in cluster.history() if event.name == "memory_kept"}
    assert "zone" in apart
    assert weights_are_a_function_of_the_step(tmp_path / "cluster" / "steps")
    (tmp_path / "finish").touch()
    cluster.wait_until(lambda: not list(cluster.memory.rglob("step-*")), 20, "nothing in RAM when the job is over")


def sources(cluster: Cluster) -> set[str]:
    """Where the ranks say that they took their state up from."""
    log = "".join(path.read_text(errors="replace") for path in cluster.folder.rglob("stderr*.log"))
    return {source for source in ("memory", "buddy") if f"is taken up from RAM ({source})" in log}


def weights_are_a_function_of_the_step(folder: Path) -> bool:
    known: dict[int, float] = {}
    for path in folder.glob("*.jsonl"):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            assert line["weights"] == pytest.approx(known.setdefault(line["step"], line["weights"]), rel=1e-5), line
    return len(known) > 20


def test_a_daemon_that_is_killed_takes_its_memory_along_and_the_disk_is_next(namespaces: None, tmp_path: Path) -> None:
    """A job on one node has no buddy. The daemon dies at chosen moments of durable saves, again and again.

    What is taken up is a checkpoint that was committed, the newest that stands, and never a mix of two.
    """
    chance, points = random.Random(SEED), int(os.environ.get("ELASTICD_TEST_POINTS", "2"))
    spec = ClusterSpec(nodes=1, isolated=True)
    with Cluster(spec, folder=tmp_path / "cluster") as cluster:
        options = ["--disk", "1", "--hold", "4000000", "--step", "0.01"]  # always in the middle of a save
        cluster.submit("disk", [str(SCRIPT), str(tmp_path), str(EVERY), *options], nodes="1", max_restarts=9)
        cluster.wait_step(0, timeout_s=START_S)
        for point in range(points):
            started = newest_step(cluster)
            cluster.wait_until(lambda started=started: newest_step(cluster) > started + 2, 20, "three steps")
            time.sleep(chance.uniform(0.0, 0.2))
            daemon = cluster.nodes[0].process
            assert daemon is not None
            os.kill(daemon.pid, signal.SIGKILL)
            daemon.wait()
            killed_at = time.monotonic()
            cluster.wait_until(lambda: not list(cluster.memory.iterdir()), 10, "nothing left in shared memory")
            cluster.wait_until(lambda: not workers(cluster), 10, "no worker outlives its daemon")
            stood = newest_that_verifies(tmp_path / "checkpoints")
            committed = max(
                e.details["step"] for e in cluster.history() if e.name == "commit" and e.details["committed"]
            )
            assert stood >= committed
            cluster.start_node(0)
            first = cluster.wait_step(killed_at, timeout_s=40)
            print(f"point {point}: committed {committed}, stood {stood}, next step {first.step}")
            assert first.step == stood + 1
        (tmp_path / "finish").touch()
        cluster.wait_until(lambda: any(event.name == "job_over" for event in cluster.history()), 20)
    assert storage.complete_steps(tmp_path / "checkpoints")


def newest_that_verifies(directory: Path) -> int:
    for step in storage.complete_steps(directory):
        with contextlib.suppress(CheckpointInvalid):
            return storage.verify(directory / complete_name(step)).step
    raise AssertionError("no checkpoint verifies")


def workers(cluster: Cluster) -> list[int]:
    """Processes on the node that were there before its daemon died."""
    return [pid for pid in cluster.nodes[0].host.pids() if Path(f"/proc/{pid}/cmdline").exists()]
