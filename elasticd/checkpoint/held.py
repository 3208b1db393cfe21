"""What a checkpoint holds, for whoever must ask before it is loaded: DCP refuses to load what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """``world_size``: of the ranks that saved it. ``sizes``: of its tensors, by DCP's name ("model.0.weight")."""

    world_size: int
    sizes: Mapping[str, torch.Size]


def held_by(metadata: Metadata, world_size: int) -> Held:
    named = metadata.state_dict_metadata.items()
    return Held(
        world_size=world_size,
        sizes={name: each.size for name, each in named if isinstance(each, TensorStorageMetadata)},
    )
