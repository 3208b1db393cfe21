"""torch's tracker of random operations on DTensors, which CUDA has: told so that it reaches for no other rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import _random

from elasticd.torch_defects import draw_without_broadcast


def test_the_tracker_is_made_without_a_broadcast_and_for_the_gpu_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 5 is the second of its node, which has 4 GPUs: torch would take the one of the same rank there as elsewhere."""

    def broadcast(*_: object) -> None:
        raise AssertionError("the other ranks may not be there")

    gpus = SimpleNamespace(is_available=lambda: True, device_count=lambda: 4, current_device=lambda: 1)
    monkeypatch.setattr(_random, "_get_device_handle", lambda _: gpus)
    monkeypatch.setattr(_random, "_rng_tracker", None)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    mesh = SimpleNamespace(device_type="cuda", get_rank=lambda: 6)
    draw_without_broadcast(mesh, torch.device("cuda", 1))  # type: ignore[arg-type]
    tracker = _random._rng_tracker
    assert tracker is not None  # so that torch makes none
    assert tracker._device == torch.device("cuda", 1)
