"""What ranks train in tests: a small regression."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn


class Points:
    """A regression that a small model can learn; with ``broken``, a sample that is not a number."""

    def __init__(self, size: int = 40, broken: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(size, 6, generator=generator)
        self.targets = self.inputs.sin().sum(1, keepdim=True)
        if broken is not None:
            self.inputs[broken] = math.nan

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]


def small(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))


def fingerprint(model: nn.Module) -> str:
    parts = [each.detach().contiguous().numpy().tobytes() for each in model.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()
