"""What the chaos tests share: a cluster that is whole again before each test, and one job a test.

A drill is: a healthy job, a fault, survivors that go on, the heal, a healthy job again, its end; then the validators.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from elasticd.testing import validators
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.history import Event, Trained, events_of
from elasticd.testing.validators import Pause, Violation

SEED = int(os.environ.get("ELASTICD_CHAOS_SEED", "1"))
#: Generous, since other work may share the machine; the bench measures what is usual.
RECOVERY_S = 8.0
SCRIPT = str(Path(__file__).with_name("train.py"))
LEASE_TTL_S = 5


class Drill:
    """A job of three nodes that may run on one, from before the fault to its end."""

    def __init__(self, cluster: Cluster, job: str) -> None:
        self.cluster, self.job = cluster, job
        self.folder = Path(tempfile.mkdtemp(prefix="drill-", dir=cluster.folder))
        self.nodes = [node.name for node in cluster.nodes]
        self.pauses: list[Pause] = []
        self.before = time.monotonic()
        #: What other drills on this cluster did stays out of the judgement of this one.
        self._first_line = len(cluster.trained())

    def start(self) -> None:
        command = [SCRIPT, str(self.folder)]
        self.cluster.submit(self.job, command, nodes=f"1:{len(self.nodes)}", max_restarts=3)
        self.whole(timeout_s=30)

    def whole(self, timeout_s: float = 20.0) -> Trained:
        """Healthy: all nodes are seated, and a step of the whole world was completed in this round."""
        self.cluster.wait_for(self._all_seated, timeout_s, "all nodes seated")
        return self.cluster.wait_step(time.monotonic(), world=len(self.nodes), timeout_s=timeout_s)

    def _all_seated(self, history: list[Event]) -> bool:
        return not validators.healthy(history, self.job, self.nodes)

    def survivors_step(self, since: float, *, without: int) -> Trained:
        """The first step of a world without that node."""
        size = len(self.nodes) - 1
        gone = self.nodes[without]
        self.cluster.wait_for(lambda _: gone not in self.cluster.seated(self.job), RECOVERY_S, f"{gone} out")
        return self.cluster.wait_step(since, world=size, timeout_s=RECOVERY_S)

    def events(self, *names: str, node: int | None = None) -> list[Event]:
        found = events_of(self.cluster.history(), *names)
        return [
            event
            for event in found
            if event.t >= self.before
            and event.job in ("", self.job)
            and (node is None or event.node == self.nodes[node])
        ]

    def wait_event(self, name: str, *, node: int, since: float = 0.0, timeout_s: float = 20.0) -> Event:
        def first() -> Event | None:
            return next((event for event in self.events(name, node=node) if event.t >= since), None)

        event = self.cluster.wait_until(first, timeout_s, f"{name} on {self.nodes[node]}")
        assert event is not None
        return event

    def finish(self) -> None:
        """The script ends by itself, and every node hears that the job succeeded."""
        (self.folder / "finish").touch()
        self.cluster.wait_until(self._over_everywhere, 30, "job over on all nodes")

    def _over_everywhere(self) -> bool:
        over = self.events("job_over")
        return {event.node for event in over if event.details["phase"] == "succeeded"} == set(self.nodes)

    def trained(self) -> list[Trained]:
        return self.cluster.trained()[self._first_line :]

    def judge(self, *, failures: int = 0) -> None:
        """Every validator over all that was recorded; ``failures``: what the script itself did wrong."""
        history = self.cluster.history()
        found = validators.validate(history, self.pauses)
        found += validators.workers_train_one_world(self.trained(), history, self.job)
        found += validators.budget_charged(history, self.job, failures)
        found += steps_never_repeat(self.trained())
        assert found == []


def steps_never_repeat(trained: list[Trained]) -> list[Violation]:
    """A rank completes no step twice in a round, and a round starts at most one step behind the last."""
    found = []
    last: dict[tuple[int, int], int] = {}
    for line in trained:
        known = last.get((line.round_number, line.rank))
        if known is not None and line.step != known + 1:
            what = f"step {line.step} after step {known}"
            found.append(Violation(rule="steps_never_repeat", t=line.t, node=line.node, what=what))
        last[line.round_number, line.rank] = line.step
    return found


def make_cluster(folder: Path) -> Cluster:
    spec = ClusterSpec(nodes=3, etcd_members=3, isolated=True, lease_ttl_s=LEASE_TTL_S)
    return Cluster(spec, folder=folder)
