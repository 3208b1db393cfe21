"""Exact mode: gradients summed in fixed point, so that the sum has the same bits in any order and on any world.

Each micro-batch's gradient is kept until the step's last one. Then, for each parameter: the ranks agree on the largest
magnitude among all micro-batches, and with it on a power of two that lets as many such values fit 62 bits together;
each gradient is multiplied by that (exactly: a float32 has 24 bits, and the product is taken in float64) and rounded to
an integer; integers are summed here and over the ranks, which is associative; and the mean is taken in float64. What
rounding takes from a value is below 2**-60 of the largest one, times the number of micro-batches.

Infinity or NaN in any gradient, on any rank, raises NotFinite on all of them, before the optimizer sees it.

Cost: the gradients of all of a rank's micro-batches are in memory at the end of a step; eight bytes an element cross
the network instead of four, and after the backward pass instead of beside it.

What it does not make the same on any world: anything but the gradients. Kernels must be deterministic
(``torch.use_deterministic_algorithms``) and of one kind (the same GPU, the same number of CPU threads); buffers that
depend on the batches a rank has seen (BatchNorm's running means) are each rank's own; fp16 loss scaling reacts to
infinities, which raise here. Sharded models are refused: FSDP2 adds up in its own way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import frexp

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elasticd.errors import ConfigError, NotFinite
from elasticd.worker.gradients import replicas, trained
from elasticd.worker.state import Registered

#: The sum stays below 2**62, and so, with what rounding adds, inside an int64.
SUM_BITS = 62
#: Beyond this, a power of two or its inverse would itself leave float64.
MAX_EXPONENT = 1000
#: So many elements are summed at a time: what the int64 copies need stays small.
BUCKET_ELEMENTS = 1 << 22
#: The magnitude of a gradient that no micro-batch had.
_ABSENT = -1.0


class ExactGradients:
    """ConfigError when the model is sharded."""

    def __init__(self, registered: Registered, *, micro_batches: int, world_size: int) -> None:
        model = trained(registered)
        self._named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        if any(isinstance(each, DTensor) for _, each in self._named) or isinstance(model, FSDPModule):
            raise ConfigError(
                "exact mode needs the whole model on each rank: use DistributedDataParallel, or no wrapper"
            )
        self._replicas = replicas(registered)
        self._micro_batches, self._world_size = micro_batches, world_size
        self._kept: list[list[torch.Tensor]] = []

    def clear(self, *, unequal: bool) -> None:  # noqa: ARG002
        self._kept = [[] for _ in self._named]
        self._drop()

    def before(self, *, last: bool) -> None:  # noqa: ARG002
        for replica in self._replicas:
            replica.require_backward_grad_sync = False

    def backward(self, loss: torch.Tensor, *, counts: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if counts:
            for kept, (_, parameter) in zip(self._kept, self._named, strict=True):
                if parameter.grad is not None:
                    kept.append(parameter.grad)
        self._drop()

    def finish(self) -> None:
        magnitudes = self._agreed_magnitudes()
        self._refuse_infinite(magnitudes)
        exponents = [exponent_for(magnitude, self._micro_batches) for magnitude in magnitudes]
        present = [index for index, magnitude in enumerate(magnitudes) if magnitude != _ABSENT]
        for bucket in self._buckets(present):
            sizes = [self._named[index][1].numel() for index in bucket]
            summed = torch.zeros(sum(sizes), dtype=torch.int64, device=self._named[bucket[0]][1].device)
            parts = list(zip(bucket, torch.split(summed, sizes), strict=True))
            for index, part in parts:
                add_fixed(part, [each.reshape(-1) for each in self._kept[index]], exponents[index])
                self._kept[index] = []
            if self._world_size > 1:
                dist.all_reduce(summed)
            for index, part in parts:
                parameter = self._named[index][1]
                mean = from_fixed(part, exponents[index]).div_(self._micro_batches)
                parameter.grad = mean.to(parameter.dtype).view_as(parameter)
        self._kept = []

    def _drop(self) -> None:
        for _, parameter in self._named:
            parameter.grad = None

    def _agreed_magnitudes(self) -> list[float]:
        """The largest of each parameter's gradients, over all micro-batches; infinity for NaN as well."""
        if not self._named:
            return []
        device = self._named[0][1].device
        absent = torch.tensor(_ABSENT, dtype=torch.float64, device=device)
        largest = torch.stack([_magnitude(kept) if kept else absent for kept in self._kept])
        largest = torch.where(torch.isfinite(largest), largest, float("inf"))  # a maximum over ranks may lose a NaN
        if self._world_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        found: list[float] = largest.tolist()
        return found

    def _refuse_infinite(self, magnitudes: list[float]) -> None:
        bad = [name for (name, _), magnitude in zip(self._named, magnitudes, strict=True) if magnitude == float("inf")]
        if bad:
            raise NotFinite(f"the gradient of {bad[0]} ({len(bad)} parameters in all) is infinite or not a number")

    def _buckets(self, indices: list[int]) -> Iterator[list[int]]:
        bucket: list[int] = []
        elements = 0
        for index in indices:
            bucket.append(index)
            elements += self._named[index][1].numel()
            if elements >= BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
        if bucket:
            yield bucket


def exponent_for(magnitude: float, count: int) -> int:
    """The power of two by which ``count`` values, none larger than ``magnitude``, are multiplied to be summed."""
    if magnitude <= 0:
        return 0
    _, above = frexp(magnitude)  # magnitude < 2**above
    return min(MAX_EXPONENT, SUM_BITS - (count - 1).bit_length() - above)


def to_fixed(values: torch.Tensor, exponent: int) -> torch.Tensor:
    return values.double().mul_(2.0**exponent).round_().to(torch.int64)


def from_fixed(values: torch.Tensor, exponent: int) -> torch.Tensor:
    return values.double().mul_(2.0**-exponent)


def add_fixed(total: torch.Tensor, values: Sequence[torch.Tensor], exponent: int) -> None:
    """Add all of these, each as long as ``total`` and in one dimension, to it in fixed point."""
    for each in values:
        total += to_fixed(each, exponent)


def _magnitude(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest of all, in float64; not a number where one is."""
    if gradients[0].numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    return torch.stack([torch.linalg.vector_norm(each, ord=float("inf")) for each in gradients]).max().double()
