"""How the ranks of a world are arranged, and which of them compute the same micro-batches.

A *replica* is the ranks that compute the same micro-batches together: ``tensor * pipeline`` of them, next to each other
in rank order. It is the unit of everything that is elastic: the plan divides a step's micro-batches among replicas,
gradients are averaged over replicas, and a world is a whole number of them. Without a layout each rank is one.

With ``shard`` several replicas hold one copy of the model together (HSDP): they still compute micro-batches of their
own, but a world is then a whole number of copies.

``session.mesh`` is torch's DeviceMesh of that, from the outside in: "dp", or "replicate" and "shard"; then "pp" and
"tp", where the layout has them. Not here: who is in the world, and in which order (core/rendezvous.py); the model's own
parallel plan, which is the script's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from elasticd.errors import ConfigError
from elasticd.torch_defects import draw_without_broadcast
from elasticd.worker.agreement import numbers_of_all
from elasticd.worker.world import Place

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """``tensor``: ranks that a layer is split over. ``pipeline``: stages that the layers are split into.

    ``shard``: replicas that hold one copy of the model together; a number, or "node" for as many as a node has. None
    says nothing of it: DDP, or FSDP2 over all of "dp". ConfigError when a number is not positive.
    """

    tensor: int = 1
    pipeline: int = 1
    shard: int | Literal["node"] | None = None

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "shard"):
            value = getattr(self, name)
            allowed = name == "shard" and value in (None, "node")
            if not allowed and not (type(value) is int and value >= 1):
                raise ConfigError(f"{name} of a layout is {value!r}: it must be at least 1")

    @property
    def replica_size(self) -> int:
        return self.tensor * self.pipeline

    @property
    def granularity(self) -> int:
        """The world is a multiple of so many ranks. ``shard`` must be a number, or None."""
        return self.replica_size * (self.shard if isinstance(self.shard, int) else 1)

    def __str__(self) -> str:
        parts = [f"{name} {value}" for name in ("tensor", "pipeline", "shard") if (value := getattr(self, name))]
        return ", ".join(part for part in parts if not part.endswith(" 1")) or "one rank a replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """A layout on a world, as one rank sees it. ``layout.shard`` is a number, or None. Make one with ``arrange``."""

    layout: Layout
    rank: int
    world_size: int

    @property
    def replicas(self) -> int:
        return self.world_size // self.layout.replica_size

    @property
    def replica(self) -> int:
        """The replica that this rank is part of."""
        return self.rank // self.layout.replica_size

    @property
    def stage(self) -> int:
        return self.rank // self.layout.tensor % self.layout.pipeline

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its replica, where one must: it has the loss. One rank of each replica."""
        return self.rank % self.layout.tensor == 0 and self.stage == self.layout.pipeline - 1

    @property
    def peers(self) -> list[int]:
        """The ranks with the same part of the model, this one among them: one of each replica."""
        size = self.layout.replica_size
        return list(range(self.rank % size, self.world_size, size))

    @property
    def first_rank(self) -> int:
        """Of this rank's replica."""
        return self.replica * self.layout.replica_size

    @property
    def shape(self) -> dict[str, int]:
        """The mesh's dimensions, from the outside in; those of pipeline and tensor only where there are several."""
        layout = self.layout
        inner = {"pp": layout.pipeline, "tp": layout.tensor}
        outer = {"dp": self.replicas}
        if isinstance(layout.shard, int):
            outer = {"replicate": self.replicas // layout.shard, "shard": layout.shard}
        return outer | {name: size for name, size in inner.items() if size > 1}

    def by_replica(self, of_ranks: Sequence[int]) -> list[list[int]]:
        """What there is one of for each rank, put together by replica."""
        size = self.layout.replica_size
        return [list(of_ranks[start : start + size]) for start in range(0, len(of_ranks), size)]

    def slowest(self, measures: Sequence[int]) -> list[int]:
        """A replica is as fast as its slowest rank; 0, for no measure, where one of its ranks has none."""
        return [0 if 0 in each else max(each) for each in self.by_replica(measures)]

    def make_group_across(self) -> dist.ProcessGroup | None:
        """Collective: the ranks with the same part of the model, one of each replica; None where that is everybody."""
        size = self.layout.replica_size
        if size == 1:
            return None
        groups = [dist.new_group(list(range(part, self.world_size, size))) for part in range(size)]
        group: dist.ProcessGroup = groups[self.rank % size]
        return group

    def make_mesh(self, device: torch.device) -> DeviceMesh:
        """Collective: it makes process groups."""
        mesh = init_device_mesh(device.type, tuple(self.shape.values()), mesh_dim_names=tuple(self.shape))
        if device.type == "cuda" and self.layout.tensor > 1:
            draw_without_broadcast(mesh, device)
        return mesh


def arrange(layout: Layout | None, place: Place, group: dist.ProcessGroup | None) -> Arrangement:
    """Collective, where there is a layout: the same on all ranks. ``group``: of all ranks; None in a world of one.

    ConfigError, on all ranks, when the world does not hold a whole number of replicas.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if layout is None:
        return Arrangement(layout=Layout(), rank=rank, world_size=world_size)
    if layout.shard == "node":
        local = place.local_world_size
        locals_ = [each for (each,) in numbers_of_all([local], group)]
        least, most = min(locals_), max(locals_)
        if least != most or local % layout.replica_size:
            ranks = f"{least}" if least == most else f"{least} to {most}"
            raise ConfigError(
                f'shard="node" needs as many ranks on each node, and a multiple of {layout.replica_size}; there are '
                f"{ranks}: say a number, shard=..."
            )
        layout = replace(layout, shard=local // layout.replica_size)
    if world_size % layout.granularity:
        raise ConfigError(
            f"a world of {world_size} ranks cannot hold this layout ({layout}): it takes a multiple of "
            f"{layout.granularity}. Start the job with --ranks-per-replica {layout.granularity} "
            f"(ranks_per_replica = {layout.granularity} in a job file), so that the world is rounded to it"
        )
    return Arrangement(layout=layout, rank=rank, world_size=world_size)
