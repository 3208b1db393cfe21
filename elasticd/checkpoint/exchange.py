"""What each rank has to say, for all to hear: JSON over the job's own group. Not here: what is said."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def share(said: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Collective. What every rank said, by rank; of a world of one only its own."""
    if group is None:
        return [said]
    content = torch.frombuffer(bytearray(json.dumps(said, separators=(",", ":")).encode()), dtype=torch.uint8)
    size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(content)]), group=group)
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(content)] = content
    heard = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(heard, padded, group=group)
    return [json.loads(bytes(one[: int(length)].numpy())) for one, length in zip(heard, lengths, strict=True)]
