"""The gradients of a step's micro-batches become one mean, the same on any world and under any shares.

A micro-batch's loss is the mean over its samples, and all have the same size: the step's loss is the mean over its
micro-batches. DDP and FSDP2 average over replicas instead (layout.py; without a layout each rank is one), so a loss is
multiplied by replicas / micro-batches. With DDP replicas talk only in the backward pass of their last micro-batch. One
that has none computes a stand-in with weight zero, to take part in that.

FSDP2 talks in every pass: a forward pass gathers parameters, and a backward pass leaves each rank its part of the
gradients (reduce-scatter), so that nobody holds more than a layer or two of either. With equal shares it stays so: all
ranks do as many micro-batches. Only what HSDP adds to it, the average over copies of the model (all-reduce over
"replicate"), is left to the last one. torch adds up flat parts until then, so all micro-batches of a step must reach
the same parameters.

Ranks with unequal shares would wait for each other in a forward pass for ever. Parameters are gathered once a step
then, and stay whole until its last backward pass, which reduces the gradients of all: each rank holds the whole model,
and the whole of its gradients, as if nothing were sharded but the optimizer's state. That is so from the first step
with unequal shares on. As long as they were always equal, what the script has set of resharding stands.

A loss in bf16 or fp16 would round that factor, as the gradient that its backward pass begins with, by up to 0.4 %, and
differently in each world. There the pass begins with a power of two, and gradients are multiplied by the rest at the
end. What a script casts after such a loss (``.float()``) cannot be seen here: cast what it is computed from.

Not here: sums that do not depend on the order (exact.py); gradients of micro-batches that a pipeline computes, which
torch.distributed.pipelining reduces once a step.
"""

from __future__ import annotations

from math import frexp
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from elasticd.errors import ConfigError
from elasticd.worker.layout import Arrangement
from elasticd.worker.sharded import forget_half_done, holds_back
from elasticd.worker.state import Registered

#: Types of a loss that hold too few digits of a factor.
_COARSE = (torch.bfloat16, torch.float16)


class Scaler(Protocol):
    """What torch.amp.GradScaler is to a backward pass."""

    def scale(self, outputs: torch.Tensor) -> torch.Tensor:
        """The loss times a factor that keeps its gradients inside fp16; the loss itself when it does not scale."""
        ...


class Gradients(Protocol):
    """Called in this order, once a step: clear, then (before, backward) for each micro-batch, then finish.

    A pipeline does the passes itself, with ``scale`` for ``backward``.
    """

    #: What a micro-batch's mean loss is multiplied by.
    scale: float

    @property
    def scatters_each(self) -> bool:
        """Whether each micro-batch's backward pass ends in a reduce-scatter, and not the last one's alone."""
        ...

    def clear(self, *, unequal: bool) -> None:
        """Gradients of an earlier step, or of one that was given up, are gone. ``unequal``: the shares of this step."""
        ...

    def before(self, *, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor, *, counts: bool, scaler: Scaler | None = None) -> None:
        """``counts`` False: of a stand-in."""
        ...

    def finish(self) -> None:
        """Collective: what the optimizer takes is in place on all ranks."""
        ...


class MeanGradients:
    """By the model's own DDP or FSDP2. ConfigError when it has neither and there are several ranks."""

    def __init__(self, registered: Registered, *, micro_batches: int, arranged: Arrangement) -> None:
        #: All of the model's, as the optimizers have them: FSDP2 puts others in their place for a forward pass.
        self._parameters = list(trained(registered).parameters())
        self.scale = arranged.replicas / micro_batches
        #: The power of two in it, which every type holds, and what remains.
        self._power = 2.0 ** (frexp(self.scale)[1] - 1)
        self._rest = self.scale / self._power
        #: Whether losses of this step begin with ``_power`` alone; None before there was one.
        self._coarse: bool | None = None
        self._weights: dict[tuple[float, torch.Size, torch.dtype, torch.device], torch.Tensor] = {}
        self._whole = self._unfinished = False
        #: A parameter that had a gradient after the last backward pass; that gradient, and its version then.
        self._witness: torch.nn.Parameter | None = None
        self._seen: tuple[torch.Tensor, int] | None = None
        self._replicas, self._shards = replicas(registered), shards(registered)
        if arranged.world_size > 1:
            self._check_layout(trained(registered), arranged)

    @property
    def scatters_each(self) -> bool:
        return bool(self._shards) and not self._whole

    def clear(self, *, unequal: bool) -> None:
        for parameter in self._parameters:  # also of those in no optimizer: they would add up for ever
            parameter.grad = None
        if self._unfinished:
            forget_half_done(self._shards)
        self._unfinished, self._coarse, self._seen = True, None, None
        if unequal and not self._whole:
            self._whole = True
            for module in self._shards:
                module.set_reshard_after_forward(False, recurse=False)

    def before(self, *, last: bool) -> None:
        for replica in self._replicas:  # as its no_sync() does
            replica.require_backward_grad_sync = last
        for module in self._shards:
            module.set_requires_gradient_sync(last or not self._whole, recurse=False)
            module.set_requires_all_reduce(last, recurse=False)
            if self._whole:
                module.set_reshard_after_backward(last, recurse=False)

    def backward(self, loss: torch.Tensor, *, counts: bool, scaler: Scaler | None = None) -> None:
        """ValueError when some of a step's losses are in half precision and some are not."""
        self._check_untouched()
        coarse = self._rest != 1.0 and loss.dtype in _COARSE
        if self._coarse not in (None, coarse):
            raise ValueError(f"a loss in {loss.dtype} after others in another type: all of a step must have one type")
        self._coarse = coarse
        if scaler is not None:
            loss = scaler.scale(loss)
        factor = self._power if coarse else self.scale
        loss.backward(self._weight(loss, factor if counts else 0.0))  # type: ignore[no-untyped-call]
        self._look()

    def finish(self) -> None:
        """RuntimeError when torch has kept gradients back, which would count in the next step (HSDP)."""
        self._check_untouched()
        self._unfinished = False
        if holds_back(self._shards):
            raise RuntimeError(
                "the last micro-batch has not reached all parameters that others of its step have: under fully_shard "
                'with "replicate" each must (see FSDPModule.set_reduce_scatter_unused_params)'
            )
        gradients = [own(each.grad) for each in self._parameters if each.grad is not None] if self._coarse else []
        if gradients:
            torch._foreach_mul_(gradients, self._rest)

    def _look(self) -> None:
        """FSDP2 keeps what it adds up to itself, out of reach of an optimizer."""
        if self._shards:
            return
        if self._witness is None or self._witness.grad is None:
            self._witness = next((each for each in self._parameters if each.grad is not None), None)
        if self._witness is not None and self._witness.grad is not None:
            self._seen = self._witness.grad, _version(self._witness.grad)

    def _check_untouched(self) -> None:
        """Nothing is added to gradients, or taken from them, between two backward passes of a step."""
        if self._seen is None or self._witness is None:
            return
        gradient, version = self._seen
        if self._witness.grad is not gradient or _version(gradient) != version:
            raise RuntimeError(
                "gradients were changed in the loop over step.micro_batches(), in which they add up: leave zero_grad() "
                "out (the loop clears them as it begins), and clip or scale them after it"
            )

    def _weight(self, loss: torch.Tensor, value: float) -> torch.Tensor:
        """As the gradient of the loss: to multiply the loss would be two more operations a micro-batch."""
        key = (value, loss.shape, loss.dtype, loss.device)
        if key not in self._weights:
            self._weights[key] = torch.full_like(loss, value)
        return self._weights[key]

    def _check_layout(self, model: torch.nn.Module, arranged: Arrangement) -> None:
        """Each replica is to compute micro-batches of its own, and gradients are to be averaged over all of them."""
        if arranged.replicas > 1:
            self._check_wrapped(model, arranged.replicas)
        for replica in self._replicas:
            if any(hasattr(each, "_st_info") for each in replica.parameters()):  # tensor/parallel/ddp.py
                raise ConfigError(
                    "DistributedDataParallel makes plain tensors of a tensor-parallel model's parameters, new ones in "
                    'each step: use fully_shard with mesh=session.mesh["replicate", "shard"] and Layout(shard=1)'
                )
            if replica.static_graph:  # torch's reducer fails on an assertion of its own (2.13)
                raise ConfigError(
                    "DistributedDataParallel(static_graph=True) must average in its first pass, and a step of several "
                    "micro-batches averages in its last: leave it out (for torch.utils.checkpoint: use_reentrant=False)"
                )
            over = dist.get_process_group_ranks(replica.process_group)
            if sorted(over) != arranged.peers:
                raise ConfigError(
                    f"DistributedDataParallel averages over {len(over)} ranks ({_told(over)}), and there are "
                    f"{arranged.replicas} replicas (with the same part of the model: {_told(arranged.peers)}): "
                    'say process_group=session.mesh.get_group("dp")'
                )
        self._check_meshes(model, arranged)

    def _check_wrapped(self, model: torch.nn.Module, count: int) -> None:
        """What a wrapper was told to leave out is the script's decision."""
        wrappers: list[torch.nn.Module] = [*self._replicas, *self._shards]  # type: ignore[list-item]
        if not wrappers:
            raise ConfigError(
                f"nothing averages the gradients of this model over its {count} replicas: wrap it in "
                "DistributedDataParallel, or in fully_shard, before session.register()"
            )
        inside = {id(each) for wrapper in wrappers for each in wrapper.parameters()}
        left = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in inside]
        if left:
            raise ConfigError(
                f"nothing averages the gradient of parameter {left[0]} ({len(left)} in all) over the {count} replicas: "
                "wrap the whole model in DistributedDataParallel, or its root in fully_shard too, or say "
                "requires_grad_(False)"
            )

    def _check_meshes(self, model: torch.nn.Module, arranged: Arrangement) -> None:
        tensor = arranged.layout.tensor
        over = (arranged.replicas, arranged.replicas * tensor)
        laid_out = [(name, each.device_mesh) for name, each in model.named_parameters() if isinstance(each, DTensor)]
        ranks_of = {mesh: mesh.mesh.flatten().tolist() for _, mesh in laid_out}
        for name, mesh in laid_out:
            ranks = ranks_of[mesh]
            if self._shards and (len(ranks) not in over or not set(arranged.peers) <= set(ranks)):
                raise ConfigError(
                    f"parameter {name} is laid out over {len(ranks)} ranks ({_told(ranks)}), and the layout "
                    f"({arranged.layout}) has {arranged.replicas} replicas (with the same part of the model: "
                    f"{_told(arranged.peers)}): use meshes of session.mesh"
                )
            if not self._shards and len(ranks) != tensor:
                raise ConfigError(
                    f"parameter {name} is laid out for ranks that compute the same samples (tensor parallel), and the "
                    f"layout is {arranged.layout}: say Session(layout=Layout(tensor={len(ranks)}))"
                )


def _version(gradient: torch.Tensor) -> int:
    """How often it was changed in place."""
    return gradient._version  # noqa: SLF001 (there is no public way to ask)


def _told(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def trained(registered: Registered) -> torch.nn.Module:
    """RuntimeError when no model was registered."""
    if registered.model is None:
        raise RuntimeError("step.micro_batches needs the model: call session.register(model=..., optimizer=...) first")
    return registered.model


def replicas(registered: Registered) -> list[DistributedDataParallel]:
    return [module for module in trained(registered).modules() if isinstance(module, DistributedDataParallel)]


def shards(registered: Registered) -> list[FSDPModule]:
    return [module for module in trained(registered).modules() if isinstance(module, FSDPModule)]


def own(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
