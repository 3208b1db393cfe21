"""The gradients of a step's micro-batches become one mean, the same on any world and under any shares.

A micro-batch's loss is the mean over its samples, and all have the same size: the step's loss is the mean over its
micro-batches. DDP and FSDP2 average over ranks instead, so each loss is multiplied by ranks / micro-batches; and ranks
talk only in the backward pass of their last micro-batch. A rank that has none computes a stand-in with weight zero, to
take part in that.

Under FSDP2 a forward pass gathers parameters from all ranks, so ranks with unequal shares would wait for each other for
ever. Parameters are gathered once a step then, and stay whole until its last backward pass, which costs the memory that
sharding them had saved (gradients and optimizer stay sharded). As long as shares were always equal,
what the script has set stands.

Not here: sums that do not depend on the order (exact.py).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from elasticd.errors import ConfigError
from elasticd.worker.state import Registered


class Gradients(Protocol):
    """Called in this order, once a step: clear, then (before, backward) for each micro-batch, then finish."""

    def clear(self, *, unequal: bool) -> None:
        """Gradients of an earlier step, or of one that was given up, are gone. ``unequal``: the shares of this step."""
        ...

    def before(self, *, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor, *, counts: bool) -> None:
        """``counts`` False: of a stand-in."""
        ...

    def finish(self) -> None:
        """Collective: what the optimizer takes is in place on all ranks."""
        ...


class MeanGradients:
    """By the model's own DDP or FSDP2. ConfigError when it has neither and there are several ranks."""

    def __init__(self, registered: Registered, *, micro_batches: int, world_size: int) -> None:
        self._zero = registered.optimizer or trained(registered)
        self._scale = world_size / micro_batches
        self._weights: dict[tuple[float, torch.Size, torch.dtype, torch.device], torch.Tensor] = {}
        self._whole = False
        self._replicas, self._shards = replicas(registered), shards(registered)
        if world_size > 1:
            self._check_layout(trained(registered), world_size)

    def clear(self, *, unequal: bool) -> None:
        self._zero.zero_grad()
        if unequal and not self._whole:
            self._whole = True
            for module in self._shards:
                module.set_reshard_after_forward(False, recurse=False)

    def before(self, *, last: bool) -> None:
        for replica in self._replicas:  # as its no_sync() does
            replica.require_backward_grad_sync = last
        for module in self._shards:
            module.set_requires_gradient_sync(last, recurse=False)
            if self._whole:
                module.set_reshard_after_backward(last, recurse=False)

    def backward(self, loss: torch.Tensor, *, counts: bool) -> None:
        loss.backward(self._weight(loss, self._scale if counts else 0.0))  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        pass

    def _weight(self, loss: torch.Tensor, value: float) -> torch.Tensor:
        """As the gradient of the loss: to multiply the loss would be two more operations a micro-batch."""
        key = (value, loss.shape, loss.dtype, loss.device)
        if key not in self._weights:
            self._weights[key] = torch.full_like(loss, value)
        return self._weights[key]

    def _check_layout(self, model: torch.nn.Module, world_size: int) -> None:
        """Every rank is to compute micro-batches of its own, and gradients are to be averaged over all of them."""
        if not (self._replicas or self._shards):
            raise ConfigError(
                "nothing averages the gradients of this model over its ranks: wrap it in DistributedDataParallel, "
                "or in fully_shard, before session.register()"
            )
        for name, each in model.named_parameters():
            if isinstance(each, DTensor):
                split = sum(placement.is_shard() for placement in each.placements)
                if split > 1 or each.device_mesh.size() != world_size:
                    raise ConfigError(
                        f"parameter {name} is laid out for ranks that compute the same samples (tensor parallel), or "
                        "for a part of the world: step.micro_batches gives each rank samples of its own; "
                        "use step.batch_indices"
                    )


def trained(registered: Registered) -> torch.nn.Module:
    """RuntimeError when no model was registered."""
    if registered.model is None:
        raise RuntimeError("step.micro_batches needs the model: call session.register(model=..., optimizer=...) first")
    return registered.model


def replicas(registered: Registered) -> list[DistributedDataParallel]:
    return [module for module in trained(registered).modules() if isinstance(module, DistributedDataParallel)]


def shards(registered: Registered) -> list[FSDPModule]:
    return [module for module in trained(registered).modules() if isinstance(module, FSDPModule)]
