"""Exact mode: gradients summed in fixed point, so that the sum has the same bits in any order and on any world.

Each micro-batch's gradients are kept until the step's last one, in one row. Then, for each parameter: the ranks agree
on the largest magnitude among all micro-batches, and with it on a power of two that lets as many such values fit 62
bits together; each gradient is multiplied by that (exactly: only the exponent changes) and rounded to an integer;
integers are summed here and over the ranks, which is associative; and the mean is taken in float64. What rounding takes
from a value is below 2**-60 of the largest one, times the number of micro-batches.

Infinity or NaN in any gradient, on any rank, raises NotFinite on all of them, before the optimizer sees it.

Cost: memory for the gradients of all of a rank's micro-batches, which is kept from step to step; eight bytes an element
cross the network instead of four, and after the backward pass instead of beside it.

What it does not make the same on any world: anything but the gradients. Kernels must be deterministic
(``torch.use_deterministic_algorithms``) and of one kind (the same GPU, the same number of CPU threads). fp16 loss
scaling reacts to infinities, which raise here: it is refused. So are sharded models, as FSDP2 adds up in its own way,
and pipelines.

BatchNorm: in training a micro-batch is normalised by its own mean and variance, so parameters have the same bits on any
world. The running mean and variance have not: each rank has those of the micro-batches that it has computed, stand-ins
with them, and DDP, which sends buffers where it averages gradients, does not send them here. A checkpoint holds those
of some rank. So what ``model.eval()`` gives depends on the world, until they are computed anew (with momentum=None, by
a pass over data). SyncBatchNorm computes over ranks: there the parameters depend on the world too.

Tensor parallel: the bits are the same on any number of replicas, but those of one split into two parts are not those of
one in three. The model is split and not wrapped; its first values must be the same on all replicas (first_values.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, cycle
from math import frexp, inf

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from elasticd.errors import ConfigError, NotFinite
from elasticd.worker.gradients import Scaler, own, replicas, trained
from elasticd.worker.layout import Arrangement
from elasticd.worker.state import Registered

#: The sum stays below 2**62, and so, with what rounding adds, inside an int64.
SUM_BITS = 62
#: Beyond this, a power of two or its inverse would itself leave float64; and, as a factor of a float32, that.
MAX_EXPONENT, MAX_FACTOR_EXPONENT = 1000, 126
#: So many elements are summed and sent at a time: what the int64 copies need stays small.
BUCKET_ELEMENTS = 1 << 20
#: The magnitude of a gradient that no micro-batch had.
_ABSENT = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bucket:
    """A stretch of a row: which parameters it has a part of, and how large that is."""

    at: slice
    places: list[int]
    sizes: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sum:
    """Of a bucket's integers: over this rank's micro-batches and, once ``work`` is done, over all ranks."""

    bucket: _Bucket
    total: torch.Tensor
    work: dist.Work | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scratch:
    """For one bucket at a time. Kept: fresh memory costs the kernel as much as a sum costs the processor."""

    peaks: torch.Tensor
    fixed: torch.Tensor
    means: torch.Tensor


class ExactGradients:
    """ConfigError when the model is sharded."""

    scatters_each = False

    def __init__(self, registered: Registered, *, micro_batches: int, arranged: Arrangement) -> None:
        model = trained(registered)
        named = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._names, self._parameters = list(named), list(named.values())
        meshes = {each.device_mesh.size() for each in self._parameters if isinstance(each, DTensor)}
        if meshes - {arranged.layout.tensor} or isinstance(model, FSDPModule) or arranged.layout.pipeline > 1:
            raise ConfigError(
                "exact mode needs the whole model on each rank, or on each tensor-parallel replica of the layout: use "
                "DistributedDataParallel, or no wrapper"
            )
        self._across = arranged.make_group_across()
        self._replicas = replicas(registered)
        self._micro_batches, self._world_size = micro_batches, arranged.world_size
        self.scale = 1.0
        kinds = {each.dtype for each in self._parameters}
        #: What holds every gradient as it is, and what every mean is rounded to once.
        self._kind = torch.float64 if torch.float64 in kinds else torch.float32
        self._mean_kind = kinds.pop() if len(kinds) == 1 else torch.float64
        self._sizes = [own(each).numel() for each in self._parameters]
        self._buckets = _make_buckets(self._sizes)
        #: Of each micro-batch so far; and those of the last step, to be filled anew.
        self._rows: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []
        #: The places of the parameters that have had a gradient.
        self._present: set[int] = set()

    def clear(self, *, unequal: bool) -> None:  # noqa: ARG002
        self._free, self._rows = self._rows, []
        self._present.clear()
        self._drop()

    def before(self, *, last: bool) -> None:  # noqa: ARG002
        for replica in self._replicas:
            replica.require_backward_grad_sync = False

    def backward(self, loss: torch.Tensor, *, counts: bool, scaler: Scaler | None = None) -> None:
        """ConfigError for a scaler that scales."""
        if scaler is not None and scaler.scale(loss) is not loss:
            raise ConfigError(
                "exact mode has no loss scaling, which reacts to infinite gradients: they raise here. Leave out exact, "
                "or train in bf16 without a GradScaler"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        if counts:
            self._keep()
        self._drop()

    def finish(self) -> None:
        magnitudes = self._agreed_magnitudes()
        self._refuse_infinite(magnitudes)
        exponents = [exponent_for(magnitude, self._micro_batches) for magnitude in magnitudes]
        means = self._scratch.means.new_empty(sum(self._sizes), dtype=self._mean_kind)
        under_way = deque[_Sum]()
        for bucket, total in zip(self._buckets, cycle(self._scratch.fixed[:2])):
            under_way.append(self._begin(bucket, exponents, total[: sum(bucket.sizes)]))
            if len(under_way) > 1:  # the other ranks' part of this one comes while the one before is ended
                self._end(under_way.popleft(), exponents, means)
        while under_way:
            self._end(under_way.popleft(), exponents, means)
        parts = torch.split(means, self._sizes)
        for parameter, part, magnitude in zip(self._parameters, parts, magnitudes, strict=True):
            if magnitude != _ABSENT:
                parameter.grad = _like(part.to(parameter.dtype), parameter)

    def _drop(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _keep(self) -> None:
        """The gradients of the micro-batch whose backward pass has just ended."""
        parts = []
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                parts.append(own(parameter).new_zeros(()).expand(self._sizes[place]))
            else:
                self._present.add(place)
                parts.append(_part_of(parameter.grad, parameter).reshape(-1))
        row = self._free.pop() if self._free else self._scratch.peaks.new_empty(sum(self._sizes))
        self._rows.append(torch.cat(parts, out=row))

    @cached_property
    def _scratch(self) -> _Scratch:
        most = max((sum(bucket.sizes) for bucket in self._buckets), default=0)
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        return _Scratch(
            peaks=torch.empty((2, most), dtype=self._kind, device=device),
            fixed=torch.empty((3, most), dtype=torch.int64, device=device),
            means=torch.empty(most, dtype=torch.float64, device=device),
        )

    def _agreed_magnitudes(self) -> list[float]:
        """The largest of each parameter's gradients, over all micro-batches; infinity for NaN as well."""
        found = [0.0 if place in self._present else _ABSENT for place in range(len(self._parameters))]
        if self._present:
            peaks = torch.stack([peak for bucket in self._buckets for peak in self._peaks(bucket)])
            places = [place for bucket in self._buckets for place in bucket.places]
            for place, peak in zip(places, peaks.nan_to_num_(nan=inf, posinf=inf).tolist(), strict=True):
                if place in self._present:
                    found[place] = max(found[place], peak)
        largest = torch.tensor(found, dtype=torch.float64, device=self._scratch.means.device)
        if self._world_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        agreed: list[float] = largest.tolist()
        return agreed

    def _peaks(self, bucket: _Bucket) -> list[torch.Tensor]:
        """By passes over whole buckets: linalg.vector_norm takes 25 times as long on a CPU."""
        peaks, one = self._scratch.peaks[:, : sum(bucket.sizes)]
        for number, row in enumerate(self._rows):
            torch.abs(row[bucket.at], out=one if number else peaks)
            if number:
                torch.maximum(peaks, one, out=peaks)
        return [part.amax() for part in torch.split(peaks, bucket.sizes)]

    def _refuse_infinite(self, magnitudes: list[float]) -> None:
        bad = [name for name, magnitude in zip(self._names, magnitudes, strict=True) if magnitude == inf]
        if bad:
            raise NotFinite(f"the gradient of {bad[0]} ({len(bad)} parameters in all) is infinite or not a number")

    def _begin(self, bucket: _Bucket, exponents: list[int], total: torch.Tensor) -> _Sum:
        own_exponents, one = [exponents[place] for place in bucket.places], self._scratch.fixed[2, : len(total)]
        if not self._rows:
            total.zero_()
        for number, row in enumerate(self._rows):
            (one if number else total).copy_(make_whole(row[bucket.at], bucket.sizes, own_exponents))
            if number:
                total += one
        work = dist.all_reduce(total, group=self._across, async_op=True) if self._world_size > 1 else None
        return _Sum(bucket=bucket, total=total, work=work)

    def _end(self, done: _Sum, exponents: list[int], means: torch.Tensor) -> None:
        if done.work is not None:
            done.work.wait()
        bucket, sums = done.bucket, self._scratch.means[: len(done.total)].copy_(done.total)
        divide(sums, bucket.sizes, [exponents[place] for place in bucket.places], self._micro_batches)
        means[bucket.at] = sums


def _make_buckets(sizes: Sequence[int]) -> list[_Bucket]:
    """Of rows that hold parameters of these sizes. A large one lies in many."""
    found = list[_Bucket]()
    begins = list(accumulate(sizes, initial=0))
    for first in range(0, begins[-1], BUCKET_ELEMENTS):
        after = min(first + BUCKET_ELEMENTS, begins[-1])
        inside = {
            place: part
            for place, size in enumerate(sizes)
            if (part := min(begins[place] + size, after) - max(begins[place], first)) > 0
        }
        found.append(_Bucket(at=slice(first, after), places=list(inside), sizes=list(inside.values())))
    return found


def exponent_for(magnitude: float, count: int) -> int:
    """The power of two by which ``count`` values, none larger than ``magnitude``, are multiplied to be summed."""
    if magnitude <= 0:
        return 0
    _, above = frexp(magnitude)  # magnitude < 2**above
    return min(MAX_EXPONENT, SUM_BITS - (count - 1).bit_length() - above)


def make_whole(values: torch.Tensor, sizes: list[int], exponents: Sequence[int]) -> torch.Tensor:
    """Each part times its power of two, rounded; in place. In two steps where one factor would leave float32."""
    parts = torch.split(values, sizes)
    torch._foreach_mul_(parts, [2.0 ** min(each, MAX_FACTOR_EXPONENT) for each in exponents])
    if max(exponents) > MAX_FACTOR_EXPONENT:
        torch._foreach_mul_(parts, [2.0 ** max(0, each - MAX_FACTOR_EXPONENT) for each in exponents])
    return values.round_()


def divide(sums: torch.Tensor, sizes: list[int], exponents: Sequence[int], count: int) -> None:
    """Each part of sums in float64 by its power of two and by ``count``, with one rounding; in place."""
    torch._foreach_div_(torch.split(sums, sizes), [count * 2.0**each for each in exponents])


def _part_of(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a gradient, split as its parameter is."""
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return own(gradient)


def _like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_part_of``; ``part`` is flat."""
    shaped = part.view_as(own(parameter))
    if not isinstance(parameter, DTensor):
        return shaped
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    whole: torch.Tensor = DTensor.from_local(
        shaped, mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
    return whole
