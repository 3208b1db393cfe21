"""Gradients cross the network in two bytes an element instead of four, by DDP's own communication hooks.

Each rank's sum over its micro-batches is in full precision; it is rounded once, for the average over ranks, and what
the optimizer gets is of the model's own type again. bf16 has the range of float32 and 8 bits of precision; fp16 has 11
bits, and what is larger than 65504 becomes infinity. Half of the bytes: nothing is gained where the network is not what
a step waits for, and rounding costs time.

Not here: gradients of sharded models, whose wrapper has a setting of its own; sums that do not depend on the order.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook

from elasticd.errors import ConfigError
from elasticd.worker.gradients import replicas, shards
from elasticd.worker.state import Registered

Compression = Literal["bf16", "fp16"]
_NAMES = get_args(Compression)
_HOOKS = {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}


def check_compression(wanted: Compression | None, *, exact: bool, group: dist.ProcessGroup | None) -> None:
    """Collective. ``group`` None: a world of one. ConfigError, on all ranks, when they do not mean the same."""
    if wanted is not None and wanted not in _NAMES:
        raise ConfigError(f"compress is {wanted!r}: say {' or '.join(map(repr, _NAMES))}, or None")
    if wanted is not None and exact:
        raise ConfigError("exact mode sums what is not rounded: leave out exact, or compress")
    if group is not None:
        said = torch.tensor([0 if wanted is None else 1 + _NAMES.index(wanted)])
        both = torch.cat([said, -said])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
        if both[0] != -both[1]:
            raise ConfigError("compress must be the same on all ranks")


def compress_gradients(registered: Registered, wanted: Compression, *, world_size: int) -> None:
    """ConfigError when the model's gradients are not averaged by DDP. RuntimeError, from torch, when it has a hook."""
    if shards(registered):
        raise ConfigError(
            "compress is for DistributedDataParallel: fully_shard has mp_policy=MixedPrecisionPolicy(reduce_dtype=...)"
        )
    averaged = replicas(registered)
    if not averaged and world_size > 1:
        raise ConfigError("compress needs a model in DistributedDataParallel: wrap it before session.register()")
    for replica in averaged:
        replica.register_comm_hook(replica.process_group, _HOOKS[wanted])
