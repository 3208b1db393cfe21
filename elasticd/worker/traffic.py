"""How many bytes this rank sends for its gradients, so that people see what a step costs the network.

Counted, not measured: an all-reduce of B bytes over n ranks sends 2 (n - 1) / n B from each, as gloo's ring does and as
NCCL's rings do; NCCL's trees and switches that add up send other amounts. Where a compression of ours is the hook, it
says what it has sent, message by message. Otherwise it follows from the sizes of the parameters:

- DDP: all that require gradients, in their own type, once a step; exact mode: eight bytes an element, over replicas;
- DDP averaged in two levels (hierarchy.py): within the node and across nodes together;
- FSDP2, HSDP: a reduce-scatter for each of the rank's micro-batches (with unequal shares, and in a pipeline, one a
  step: gradients.py), then an all-reduce over "replicate", in the parameters' own type, whatever ``reduce_dtype`` says.

Not here: what is no gradient (parameters that FSDP2 gathers, activations between pipeline stages and inside tensor
parallel layers, the few bytes in which ranks agree on a step), a script's own communication hook, TCP's headers.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from elasticd.worker.gradients import own, replicas, shards, trained
from elasticd.worker.hierarchy import is_in_two_levels
from elasticd.worker.layout import Arrangement
from elasticd.worker.state import Registered

#: Of an element's integer in exact mode.
_EXACT_BYTES = 8


class Traffic:
    """One for each session."""

    def __init__(self, arranged: Arrangement, *, exact: bool) -> None:
        self._arranged, self._exact = arranged, exact
        self._registered: Registered | None = None
        #: What a step sends once, and for each reduce-scatter.
        self._each: tuple[float, float] | None = None
        self._taken_bytes = 0
        self._total = 0.0

    def use(self, registered: Registered) -> None:
        """The model whose gradients are meant."""
        self._registered = registered

    def all_reduced(self, size_bytes: int, ranks: int) -> None:
        """By a hook of ours, whose model is not counted by its sizes."""
        self._total += ring_bytes(size_bytes, ranks)

    @property
    def sent_bytes(self) -> int:
        """So far."""
        return round(self._total)

    def take(self, *, scatters: int) -> int:
        """Once a step, when it is completed: what was sent since the last one was.

        ``scatters``: of how many micro-batches a sharded model's gradients were reduced, each by itself.
        """
        if self._each is None:  # a script may give its model a hook after it has registered it
            self._each = (0.0, 0.0) if self._registered is None else self._by_sizes(self._registered)
        once, each_scatter = self._each
        self._total += once + scatters * each_scatter
        taken, self._taken_bytes = self.sent_bytes - self._taken_bytes, self.sent_bytes
        return taken

    def _by_sizes(self, registered: Registered) -> tuple[float, float]:
        if registered.model is None or self._arranged.world_size == 1:
            return 0.0, 0.0
        if self._exact:
            elements = sum(own(each).numel() for each in _gradients(trained(registered)))
            return ring_bytes(_EXACT_BYTES * elements, self._arranged.replicas), 0.0
        sharded = map(_of_shard, _gradients(trained(registered)) if shards(registered) else [])
        once, each_scatter = (sum(sizes) for sizes in zip((0.0, 0.0), *sharded, strict=True))
        return once + sum(map(self._of_replica, replicas(registered))), each_scatter

    def _of_replica(self, replica: DistributedDataParallel) -> float:
        size_bytes = sum(each.nbytes for each in _gradients(replica))
        ranks, shard = replica.process_group.size(), self._arranged.layout.shard
        if not replica._comm_hooks:  # noqa: SLF001 (there is no public way to ask)
            return ring_bytes(size_bytes, ranks)
        if not is_in_two_levels(replica) or not isinstance(shard, int):
            return 0.0
        return ring_bytes(size_bytes, shard) + ring_bytes(size_bytes / shard, ranks // shard)


def ring_bytes(size_bytes: float, ranks: int) -> float:
    """Sent by each rank of an all-reduce, half of it in its first half: a reduce-scatter."""
    return 2 * (ranks - 1) / ranks * size_bytes


def _of_shard(parameter: torch.Tensor) -> tuple[float, float]:
    """Of a model in fully_shard: by the all-reduce over "replicate", and by a reduce-scatter."""
    if not isinstance(parameter, DTensor):
        return 0.0, 0.0
    own_bytes, reduced, scattered = own(parameter).nbytes, 0.0, 0.0
    names = parameter.device_mesh.mesh_dim_names or ("",) * parameter.device_mesh.ndim
    for name, size, placement in zip(names, parameter.device_mesh.shape, parameter.placements, strict=True):
        if name == "tp":
            continue
        if isinstance(placement, Replicate):
            reduced += ring_bytes(own_bytes, size)
        else:
            scattered += (size - 1) * own_bytes
    return reduced, scattered


def _gradients(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]
