"""Faults as frozen values: each can be applied to a cluster and healed. Which ones, is chosen from a seed.

Not here: what must hold afterwards (validators.py).
"""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass
from typing import Protocol

from elasticd.testing.cluster import Cluster


class Fault(Protocol):
    """``heal`` brings back what ``apply`` took, and does not wait until the cluster has noticed."""

    def apply(self, cluster: Cluster) -> None: ...

    def heal(self, cluster: Cluster) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KillWorker:
    """SIGKILL to one rank of the newest round that has trained. Its replacement is the daemons' work."""

    rank: int

    def apply(self, cluster: Cluster) -> None:
        lines = cluster.trained()
        newest = lines[-1].round_number  # of the job that runs now
        pid = next(line.pid for line in reversed(lines) if (line.round_number, line.rank) == (newest, self.rank))
        assert pid > 1, "the training script does not tell its pid"
        os.kill(pid, signal.SIGKILL)

    def heal(self, cluster: Cluster) -> None:
        """Nothing to bring back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KillNode:
    """SIGKILL to the daemon, its workers and all else on a node; healed by a new daemon."""

    node: int

    def apply(self, cluster: Cluster) -> None:
        cluster.kill_node(self.node)

    def heal(self, cluster: Cluster) -> None:
        cluster.start_node(self.node)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutNode:
    """Silent loss: the node runs on, nothing gets in or out."""

    node: int

    def apply(self, cluster: Cluster) -> None:
        cluster.nodes[self.node].host.cut()

    def heal(self, cluster: Cluster) -> None:
        cluster.nodes[self.node].host.heal()


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeNode:
    """Everything on the node stops, its connections stay open."""

    node: int

    def apply(self, cluster: Cluster) -> None:
        cluster.nodes[self.node].host.freeze()

    def heal(self, cluster: Cluster) -> None:
        cluster.nodes[self.node].host.thaw()


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Two nodes do not hear each other; both still reach everybody else."""

    node: int
    other: int

    def apply(self, cluster: Cluster) -> None:
        cluster.hosts.partition(cluster.nodes[self.node].host, cluster.nodes[self.other].host)

    def heal(self, cluster: Cluster) -> None:
        cluster.hosts.heal()


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowNode:
    """The node gets this fraction of one CPU."""

    node: int
    fraction: float

    def apply(self, cluster: Cluster) -> None:
        cluster.nodes[self.node].host.slow(self.fraction)

    def heal(self, cluster: Cluster) -> None:
        cluster.nodes[self.node].host.slow(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class KillEtcdMember:
    """SIGKILL to one member of etcd."""

    member: int

    def apply(self, cluster: Cluster) -> None:
        cluster.etcd.kill(self.member)

    def heal(self, cluster: Cluster) -> None:
        cluster.etcd.restart(self.member)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEtcd:
    """All of etcd is away; its data comes back with it."""

    def apply(self, cluster: Cluster) -> None:
        cluster.etcd.kill_all()

    def heal(self, cluster: Cluster) -> None:
        cluster.etcd.start_all()


def choose_fault(seed: int, nodes: int, etcd_members: int = 1) -> Fault:
    """One fault that a cluster of that size must survive; the same seed gives the same fault."""
    chance = random.Random(seed)
    node = chance.randrange(nodes)
    kinds: list[Fault] = [KillWorker(rank=node), KillNode(node=node), CutNode(node=node), FreezeNode(node=node)]
    if etcd_members >= 3:
        kinds.append(KillEtcdMember(member=chance.randrange(etcd_members)))
    return chance.choice(kinds)
