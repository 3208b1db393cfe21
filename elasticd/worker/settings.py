"""What a session was told: whether it makes sense, and whether all ranks were told the same.

Not here: what one part of a session alone understands (shares.py, layout.py, compress.py).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from elasticd.errors import ConfigError
from elasticd.worker.agreement import agree

_ADVICE = {"device": "see why CUDA does not work on every node, or say 'cpu' to all"}


def check_settings(*, save_every_steps: int, memory_every_steps: int, keep: object, seed: int | None) -> None:
    """ConfigError for numbers that are none."""
    if save_every_steps < 0 or (isinstance(keep, int) and keep < 1):
        raise ConfigError("save_every_steps must not be negative, and keep must be at least 1")
    if memory_every_steps < 0:
        raise ConfigError("memory_every_steps must not be negative")
    if seed is not None and type(seed) is not int:
        raise ConfigError(f"seed is {seed!r}: say a whole number")


def agree_on_settings(group: dist.ProcessGroup | None, **settings: Any) -> None:
    """Collective. ConfigError, on all ranks, when they were not told the same. ``group`` None: a world of one."""
    agree("Session", settings, group, advice=_ADVICE)
