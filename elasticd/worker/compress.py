"""Gradients cross the network in fewer bytes, by a communication hook of DDP: in two an element, or by PowerSGD.

bf16 and fp16: each rank's sum over its micro-batches is in full precision; it is rounded once, for the average over
ranks, and what the optimizer gets is of the model's own type again. bf16 has the range of float32 and 8 bits of
precision; fp16 has 11 bits, and what is larger than 65504 becomes infinity. Half of the bytes: nothing is gained where
the network is not what a step waits for, and rounding costs time.

The hook does what torch's bf16_compress_hook and fp16_compress_hook do. DDP refuses the former, by its name, wherever
there is no NCCL; but gloo adds up bf16 as well.

Not here: PowerSGD itself (powersgd.py); gradients of sharded models, whose wrapper has a setting of its own; sums that
do not depend on the order.
"""

# Without the import of annotations from __future__: torch looks at those of a communication hook.
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.distributed as dist

from elasticd.errors import ConfigError
from elasticd.worker.gradients import replicas, shards, trained
from elasticd.worker.powersgd import Future, LowRankAverage, PowerSGD, Sent
from elasticd.worker.state import Registered

Compression = Literal["bf16", "fp16", "powersgd"]
_NAMES = get_args(Compression)
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_compression(wanted: Compression | PowerSGD | None, *, exact: bool) -> None:
    """ConfigError when it is none, or contradicts exact mode."""
    if wanted is not None and not isinstance(wanted, PowerSGD) and wanted not in _NAMES:
        raise ConfigError(f"compress is {wanted!r}: say {', '.join(map(repr, _NAMES))}, PowerSGD(rank=...) or None")
    if wanted is not None and exact:
        raise ConfigError("exact mode sums what is not rounded: leave out exact, or compress")


def compress_gradients(
    registered: Registered,
    wanted: Compression | PowerSGD,
    *,
    world_size: int,
    step: Callable[[], int],
    sent: Sent,
) -> None:
    """``step``: how many are completed. ``sent`` is told of each all-reduce: its bytes, and how many ranks.

    ConfigError when the model's gradients are not averaged by DDP. RuntimeError, from torch, when it has a hook.
    """
    if shards(registered):
        raise ConfigError(
            "compress is for DistributedDataParallel: fully_shard has mp_policy=MixedPrecisionPolicy(reduce_dtype=...)"
        )
    averaged = replicas(registered)
    if not averaged and world_size > 1:
        raise ConfigError("compress needs a model in DistributedDataParallel: wrap it before session.register()")
    how = PowerSGD() if wanted == "powersgd" else wanted
    if isinstance(how, PowerSGD):
        names = {parameter: name for name, parameter in trained(registered).named_parameters()}
        for replica in averaged:
            named = {names[each]: each for each in replica.parameters()}
            low_rank = LowRankAverage(how, replica.process_group, named, step, sent)
            replica.register_comm_hook(low_rank, _average_in_low_rank)
            registered.compression.append(low_rank)
        return
    for replica in averaged:
        replica.register_comm_hook((replica.process_group, _TYPES[how], sent), _average_rounded)


def _average_in_low_rank(low_rank: LowRankAverage, bucket: dist.GradBucket) -> Future:  # type: ignore[name-defined]
    if low_rank.applies:
        return low_rank.average(bucket)
    return _average_rounded((low_rank.group, bucket.buffer().dtype, low_rank.sent), bucket)


def _average_rounded(how: tuple[dist.ProcessGroup, torch.dtype, Sent], bucket: dist.GradBucket) -> Future:  # type: ignore[name-defined]
    """Called in the backward pass, which goes on."""
    group, kind, sent = how
    gradients: torch.Tensor = bucket.buffer()
    rounded = gradients.to(kind).div_(group.size())
    sent(rounded.nbytes, group.size())

    def widen(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        return gradients.copy_(done.value()[0])

    summed: Future = dist.all_reduce(rounded, group=group, async_op=True).get_future().then(widen)
    return summed
