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
infinities, which raise here. Sharded models are refused: FSDP2 adds up in its own way. So are pipelines.

Tensor parallel: the bits are the same on any number of replicas, but those of one split into two parts are not those of
one in three. The model is split and not wrapped; its first values must be the same on all replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import frexp

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elasticd.errors import ConfigError, NotFinite
from elasticd.worker.gradients import replicas, trained
from elasticd.worker.layout import Arrangement
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

    def __init__(self, registered: Registered, *, micro_batches: int, arranged: Arrangement) -> None:
        model = trained(registered)
        self._named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
        meshes = {each.device_mesh.size() for _, each in self._named if isinstance(each, DTensor)}
        if meshes - {arranged.layout.tensor} or isinstance(model, FSDPModule) or arranged.layout.pipeline > 1:
            raise ConfigError(
                "exact mode needs the whole model on each rank, or on each tensor-parallel replica of the layout: use "
                "DistributedDataParallel, or no wrapper"
            )
        self._across = arranged.make_group_across()
        self._replicas = replicas(registered)
        self._micro_batches, self._world_size = micro_batches, arranged.world_size
        self.scale = 1.0
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
                    kept.append(_part_of(parameter.grad, parameter))
        self._drop()

    def finish(self) -> None:
        magnitudes = self._agreed_magnitudes()
        self._refuse_infinite(magnitudes)
        exponents = [exponent_for(magnitude, self._micro_batches) for magnitude in magnitudes]
        present = [index for index, magnitude in enumerate(magnitudes) if magnitude != _ABSENT]
        for bucket in self._buckets(present):
            summed = torch.cat([self._summed(index, exponents[index]) for index in bucket])
            if self._world_size > 1:
                dist.all_reduce(summed, group=self._across)
            sizes = [_own(self._named[index][1]).numel() for index in bucket]
            for index, part in zip(bucket, torch.split(summed, sizes), strict=True):
                parameter = self._named[index][1]
                mean = from_fixed(part, exponents[index]) / self._micro_batches
                parameter.grad = _like(mean.to(parameter.dtype), parameter)
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
        largest = torch.stack(
            [torch.stack([_magnitude(g) for g in kept]).max() if kept else absent for kept in self._kept]
        )
        if self._world_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        found: list[float] = largest.tolist()
        return found

    def _refuse_infinite(self, magnitudes: list[float]) -> None:
        bad = [name for (name, _), magnitude in zip(self._named, magnitudes, strict=True) if magnitude == float("inf")]
        if bad:
            raise NotFinite(f"the gradient of {bad[0]} ({len(bad)} parameters in all) is infinite or not a number")

    def _summed(self, index: int, exponent: int) -> torch.Tensor:
        parameter = self._named[index][1]
        total = torch.zeros(_own(parameter).numel(), dtype=torch.int64, device=parameter.device)
        for gradient in self._kept[index]:
            total += to_fixed(gradient.reshape(-1), exponent)
        self._kept[index] = []
        return total

    def _buckets(self, indices: list[int]) -> Iterator[list[int]]:
        bucket: list[int] = []
        elements = 0
        for index in indices:
            bucket.append(index)
            elements += _own(self._named[index][1]).numel()
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


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part_of(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient, split as its parameter is."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return _own(gradient)


def _like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_part_of``; ``part`` is flat."""
    shaped = part.view_as(_own(parameter))
    if not isinstance(parameter, DTensor):
        return shaped
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    whole: torch.Tensor = DTensor.from_local(
        shaped, mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
    return whole


def _magnitude(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=gradient.device)
    largest = torch.linalg.vector_norm(gradient, ord=float("inf")).double()
    return torch.where(torch.isfinite(largest), largest, float("inf"))
