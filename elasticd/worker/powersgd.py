"""PowerSGD: of each matrix of gradients, ranks exchange two thin ones, and remember what those left out.

Vogels et al. 2019 (arXiv:1905.13727). For a matrix M (n x m) and rank r: P = M Q is summed over ranks and made
orthonormal, Q = M^T P is averaged, and the optimizer gets P Q^T: r (n + m) numbers cross the network instead of n m.
What P P^T leaves of a rank's own M is its error, which it adds to its next gradient; Q begins the next step. The result
depends on the mean of M over ranks alone: shares may be unequal or zero, and the curve is the same on any world.

torch's powerSGD_hook computes the same sums, and is not used. Under gloo it starts all-reduces in callbacks, in an
order that may differ between ranks, and waits for them in gloo's own threads, of which there are two. It keeps errors
by bucket, and DDP makes other buckets after the first step of each process. A gradient that is infinite once stays in
its errors for ever, and its Gram-Schmidt takes rounding for a direction where a gradient has a lower rank than r (a
gradient of rank 1 at r = 2: 17 % wrong). Here a bucket's P, and what is not worth compressing, goes out while the
backward pass goes on, and all Q go out together at its end: buckets + 1 messages, in the order of the buckets.

**Checkpoints** hold each rank's errors and the common Q: as many bytes more as each rank has in compressed matrices. On
the same world a run goes on as if it had not been interrupted. On one of another size, what the errors add to the next
mean is kept: n old ranks' errors go to rank (old modulo new) of n' and are multiplied by n' / n. What a checkpoint does
not have begins afresh: all of it where it was saved without PowerSGD, or by one rank without DDP; Q where the rank r is
another one; a matrix's error where another r makes it not worth compressing.

Infinity or NaN in a matrix's gradient reaches the optimizer (a GradScaler waits for it), and its error and Q begin
afresh. A step that is given up after its backward pass leaves its errors. Orthonormal columns are computed on each
rank: ranks with other kinds of processors may differ in the last bits, as their weights will.

Not here: when a step is exchanged at all (gradients.py, compress.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from elasticd.errors import ConfigError
from elasticd.worker.state import derive_seed

#: A matrix is compressed when that leaves less than one in so many of its numbers to send; as in torch's hook.
MIN_RATE = 2
Future = torch.futures.Future[torch.Tensor]
#: Told of each all-reduce: its bytes, and of how many ranks.
Sent = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerSGD:
    """``rank``: of what is sent for each matrix. The steps before ``start_step`` are averaged in full.

    A higher rank follows the gradient more closely, and sends more: 1 to 4 is usual. ConfigError for what is no number
    of those.
    """

    rank: int = 4
    start_step: int = 0

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"PowerSGD's rank is {self.rank!r}: say a whole number from 1")
        if type(self.start_step) is not int or self.start_step < 0:
            raise ConfigError(f"PowerSGD's start_step is {self.start_step!r}: say a whole number from 0")


class _Matrix:
    """A parameter's gradient as a matrix of n x m, and what is remembered of it; ``q``: m x r, orthonormal."""

    def __init__(self, name: str, parameter: torch.Tensor, rank: int) -> None:
        self._seed = derive_seed(*name.encode())  # all ranks draw the same
        kind = torch.promote_types(parameter.dtype, torch.float32)
        self.error = torch.zeros(*shape_of(parameter), dtype=kind, device=parameter.device)
        self.q = self.error.new_zeros(self.error.shape[1], rank)
        self.p = self.error.new_zeros(0)
        self.gradient = self.error  # of the step that is under way: a view of its bucket
        self.draw_q()

    def draw_q(self) -> None:
        generator = torch.Generator().manual_seed(self._seed)
        self.q.copy_(orthonormal(torch.randn(self.q.shape, generator=generator, dtype=self.q.dtype)))

    def forget(self) -> None:
        self.error.zero_()
        self.draw_q()

    def begin(self, gradient: torch.Tensor) -> torch.Tensor:
        """This rank's part of P. Until ``leave_error`` the error holds M."""
        self.gradient = gradient
        return self.error.add_(gradient.reshape(self.error.shape)) @ self.q

    def leave_error(self, own_q: torch.Tensor) -> None:
        self.error.addmm_(self.p, own_q.t(), alpha=-1)

    def end(self, mean_q: torch.Tensor) -> torch.Tensor:
        """What the optimizer takes is in place. Whether P and Q are finite, as a tensor."""
        self.gradient.copy_((self.p @ mean_q.t()).view_as(self.gradient))
        # Nothing is gained by forgetting where to look because there was nothing to see.
        self.q.copy_(torch.where(mean_q.any(), orthonormal(mean_q), self.q))
        return self.p.isfinite().all() & mean_q.isfinite().all()


@dataclass(frozen=True, slots=True)
class _Bucket:
    """What was sent of one, and is under way: first what is not compressed, then each matrix's P."""

    plain: list[torch.Tensor]
    matrices: list[_Matrix]
    packed: torch.Tensor
    work: dist.Work
    buffer: torch.Tensor
    done: Future


class LowRankAverage:
    """One for each DistributedDataParallel. ``named``: its parameters. ``step``: how many are completed."""

    def __init__(
        self,
        how: PowerSGD,
        group: dist.ProcessGroup,
        named: Mapping[str, torch.nn.Parameter],
        step: Callable[[], int],
        sent: Sent,
    ) -> None:
        self.group, self.sent, self._how, self._step = group, sent, how, step
        self._matrices: dict[str, _Matrix] = {}
        self._of: dict[torch.Tensor, _Matrix] = {}
        for name, parameter in named.items():
            rank = rank_for(parameter, how.rank)
            if rank and parameter.requires_grad:
                self._matrices[name] = self._of[parameter] = _Matrix(name, parameter, rank)
        self._under_way: list[_Bucket] = []
        #: How many ranks' errors the checkpoint has that was asked about last.
        self._held_ranks = 0

    @property
    def applies(self) -> bool:
        return self._step() >= self._how.start_step

    def average(self, bucket: dist.GradBucket) -> Future:  # type: ignore[name-defined]
        """In the backward pass, which goes on, except from the last bucket."""
        if bucket.index() == 0:
            self._under_way.clear()  # of a backward pass that failed
        self._under_way.append(begun := self._begin(bucket))
        if bucket.is_last():
            self._finish(self._under_way)
            self._under_way = []
        return begun.done

    def _begin(self, bucket: dist.GradBucket) -> _Bucket:  # type: ignore[name-defined]
        plain, matrices, ps = [], [], []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if (matrix := self._of.get(parameter)) is None:
                plain.append(gradient)
            else:
                matrices.append(matrix)
                ps.append(matrix.begin(gradient))
        packed = torch.cat([each.reshape(-1) for each in [*plain, *ps]])
        self.sent(packed.nbytes, self.group.size())
        buffer = bucket.buffer()
        work = dist.all_reduce(packed, group=self.group, async_op=True)
        done: Future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        return _Bucket(plain, matrices, packed, work, buffer, done)

    def _finish(self, buckets: list[_Bucket]) -> None:
        for bucket in buckets:
            bucket.work.wait()
            sizes = [*map(torch.numel, bucket.plain), *map(_p_size, bucket.matrices)]
            parts = iter(torch.split(bucket.packed, sizes))
            for gradient in bucket.plain:
                gradient.copy_(next(parts).view_as(gradient) / self.group.size())
            for matrix in bucket.matrices:
                matrix.p = orthonormal(next(parts).view(-1, matrix.q.shape[1]))
        self._exchange_q([matrix for bucket in buckets for matrix in bucket.matrices])
        for bucket in buckets:
            bucket.done.set_result(bucket.buffer)

    def _exchange_q(self, matrices: list[_Matrix]) -> None:
        if not matrices:
            return
        own = [matrix.error.t() @ matrix.p for matrix in matrices]
        packed = torch.cat([each.reshape(-1) for each in own])
        self.sent(packed.nbytes, self.group.size())
        work = dist.all_reduce(packed, group=self.group, async_op=True)
        for matrix, q in zip(matrices, own, strict=True):
            matrix.leave_error(q)
        work.wait()
        packed /= self.group.size()
        means = torch.split(packed, [matrix.q.numel() for matrix in matrices])
        finite = [matrix.end(mean.view_as(matrix.q)) for matrix, mean in zip(matrices, means, strict=True)]
        for matrix, is_finite in zip(matrices, torch.stack(finite).tolist(), strict=True):  # the same on all ranks
            if not is_finite:
                matrix.forget()

    # What a checkpoint holds (state.Carried).

    def state(self) -> dict[str, Any]:
        if not self._matrices:
            return {}
        own = {name: matrix.error for name, matrix in self._matrices.items()}
        return {
            "error": {str(self.group.rank()): own},
            "q": {name: matrix.q for name, matrix in self._matrices.items()},
        }

    def wanted(self, held: Mapping[str, torch.Size]) -> dict[str, Any]:
        """In tensors of its own: what is remembered stands until ``take``."""
        found: dict[str, Any] = {}
        self._held_ranks = max((_ranks_in(held, name) for name in self._matrices), default=0)
        for name, matrix in self._matrices.items():
            if held.get(f"q.{name}") == matrix.q.shape:
                found.setdefault("q", {})[name] = torch.empty_like(matrix.q)
            for old in range(self.group.rank(), _ranks_in(held, name), self.group.size()):
                if held[f"error.{old}.{name}"] == matrix.error.shape:
                    found.setdefault("error", {}).setdefault(str(old), {})[name] = torch.empty_like(matrix.error)
        return found

    def take(self, filled: Mapping[str, Any]) -> None:
        for name, matrix in self._matrices.items():
            matrix.forget()
            if name in filled.get("q", {}):
                matrix.q.copy_(filled["q"][name])
            for errors in filled.get("error", {}).values():
                if name in errors:
                    matrix.error.add_(errors[name], alpha=self.group.size() / self._held_ranks)


def rank_for(parameter: torch.Tensor, wanted: int) -> int:
    """Of what is sent for it; 0 when it is not worth compressing."""
    if parameter.dim() < 2:
        return 0
    n, m = shape_of(parameter)
    rank = min(n, m, wanted)
    return rank if (n + m) * rank * MIN_RATE < n * m else 0


def shape_of(parameter: torch.Tensor) -> tuple[int, int]:
    """As a matrix: a row for each output."""
    return parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """A basis of what they span; where they span less, of any more dimensions. NaN where anything is not finite."""
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


def _p_size(matrix: _Matrix) -> int:
    return matrix.error.shape[0] * matrix.q.shape[1]


def _ranks_in(held: Mapping[str, torch.Size], name: str) -> int:
    """How many ranks' errors a checkpoint has."""
    ranks = 0
    while f"error.{ranks}.{name}" in held:
        ranks += 1
    return ranks
