"""Whether replicas begin with the same weights, where nothing has made them the same.

DDP sends rank 0's weights to all when it is made. Nothing does so for a model without a wrapper, which exact mode
takes, or in fully_shard over a mesh with "replicate": made without a seed, replicas would take the same gradients and
stay different for good. So they compare before a job's first step, when a pretrained model would be in.

One pass over this rank's parameters, where they are, and one small exchange. Not here: later steps, in which all do the
same to what was the same; buffers, which are each rank's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from elasticd.errors import ConfigError
from elasticd.worker.agreement import numbers_of_all
from elasticd.worker.gradients import own, trained
from elasticd.worker.layout import Arrangement
from elasticd.worker.state import Registered

#: So many elements are added up at a time: what the int64 copies need stays small.
PART_ELEMENTS = 1 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_first_values(
    registered: Registered, arranged: Arrangement, group: dist.ProcessGroup | None, *, exact: bool
) -> None:
    """Collective. ``group`` None: a world of one. ConfigError, on all ranks, when any two differ that must not."""
    named = list(trained(registered).named_parameters())
    compared = {name: each for name, each in named if exact or _is_replicated(each)}
    # Stages of a pipeline may be sharded in different ways.
    if group is None or not (exact or any(found for (found,) in numbers_of_all([bool(compared)], group))):
        return
    said = numbers_of_all([_part_held(compared, arranged), checksum(compared.values())], group)
    if len({(part, values) for part, values in said}) > len({part for part, _ in said}):
        raise ConfigError(
            "replicas begin with different weights, and nothing makes them the same: give the Session a seed, and make "
            f"the model after it{', or wrap it in DistributedDataParallel' if exact else ''}"
        )


def _is_replicated(parameter: torch.Tensor) -> bool:
    """By fully_shard: copies inside a tensor-parallel replica are torch's own, and the same."""
    if not isinstance(parameter, DTensor):
        return False
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    return any(
        name != "tp" and size > 1 and isinstance(placement, Replicate)
        for name, size, placement in zip(names, mesh.shape, parameter.placements, strict=True)
    )


def _part_held(parameters: Mapping[str, torch.Tensor], arranged: Arrangement) -> int:
    """A number that ranks share when they hold the same part of the model, and so must hold the same values."""
    places = [(name, _place(each)) for name, each in parameters.items()]
    digest = hashlib.sha256(repr((arranged.stage, places)).encode()).digest()
    return int.from_bytes(digest[:8], signed=True)


def _place(parameter: torch.Tensor) -> list[int]:
    if not isinstance(parameter, DTensor):
        return []
    coordinates = list(parameter.device_mesh.get_coordinate() or ())
    placed = zip(coordinates, parameter.placements, strict=True)
    return [coordinate for coordinate, placement in placed if not isinstance(placement, Replicate)]


@torch.no_grad()
def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """Of the bits of what this rank has of them, in their order: the same on every kind of device."""
    parts = [part for each in tensors for part in torch.split(_bits(own(each)), PART_ELEMENTS) if len(part)]
    if not parts:
        return 0
    sums = [_weigh(part).to(parts[0].device) for part in parts]
    return int(_weigh(torch.stack(sums)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(_INTEGERS.get(tensor.element_size(), torch.int8))


def _weigh(numbers: torch.Tensor) -> torch.Tensor:
    """Modulo 2**64, with an odd weight for each place: another number at any one place is another sum."""
    weights = torch.arange(1, 2 * len(numbers), 2, device=numbers.device)
    return (numbers.long() * weights).sum()
