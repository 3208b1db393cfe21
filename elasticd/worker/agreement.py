"""What all ranks must say alike: compared before it is used, so that a difference is an error and no hang.

Not here: what may change from step to step, which goes along with the exchange that the ranks have anyway (control.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist

from elasticd.errors import ConfigError

#: So much of a value is shown, of each rank.
_SHOWN_BYTES = 60


def agree(
    call: str, settings: Mapping[str, Any], group: dist.ProcessGroup | None, *, advice: Mapping[str, str] | None = None
) -> None:
    """Collective: all ranks name the same settings, in the same order. ``group`` None: a world of one.

    ConfigError, on all ranks, that names each setting of ``call`` with different values, who says what, and what to do
    where ``advice`` has something on it. Values are compared as text.
    """
    if group is None:
        return
    own = [str(value).encode() for value in settings.values()]
    sums = zip(*numbers_of_all([crc32(text) for text in own], group), strict=True)
    faults = [
        _fault(f"{call}({name}=...)", text, by_rank, group) + (f": {advice[name]}" if advice and name in advice else "")
        for name, text, by_rank in zip(settings, own, sums, strict=True)
        if len(set(by_rank)) > 1
    ]
    if faults:
        raise ConfigError("; ".join(faults))


def _fault(name: str, own: bytes, sums: Sequence[int], group: dist.ProcessGroup) -> str:
    """Collective: what rank 0 says, and the first rank that says something else."""
    shown = numbers_of_all(list(own.ljust(_SHOWN_BYTES)[:_SHOWN_BYTES]), group)
    other = next(rank for rank, each in enumerate(sums) if each != sums[0])
    first, second = (bytes(shown[rank]).decode(errors="replace").rstrip() for rank in (0, other))
    return f"{name} must be the same on all ranks: rank 0 says {first}, rank {other} says {second}"


def numbers_of_all(own: list[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    """Collective: what each rank says, by rank; as many numbers on each of them, of 64 bits."""
    if group is None:
        return [own]
    said = torch.zeros(dist.get_world_size(group), len(own), dtype=torch.int64)
    said[dist.get_rank(group)] = torch.tensor(own, dtype=torch.int64)
    dist.all_reduce(said, group=group)
    numbers: list[list[int]] = said.tolist()
    return numbers
