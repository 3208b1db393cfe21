"""An unchanged torchrun script, the classic of the field: an MLP 784-256-10 on handwritten digits, DDP over gloo.

    torchrun --nproc-per-node 2 plain_ddp.py --checkpoint ckpt.pt
    elasticd run --nnodes 1:3 --nproc-per-node 2 plain_ddp.py --checkpoint ckpt.pt

Nothing of elasticd is imported here, and the idioms are torchrun's own: the group from the environment, a checkpoint
that rank 0 writes with torch.save, and a restart that resumes from it. The digits are scikit-learn's where it is
installed, otherwise synthetic ones; --step-seconds pads a step to the length of real work.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

PIXELS, CLASSES, BATCH = 784, 10, 32


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 784) in 0..1 and their labels (count,)."""
    if find_spec("sklearn") is not None:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]

        found: Any = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
        grown = functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
        return grown.flatten(1), torch.tensor(found.target)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (1797,), generator=generator)
    prototypes = torch.rand(CLASSES, PIXELS, generator=generator)
    return prototypes[labels] + 0.5 * torch.randn(1797, PIXELS, generator=generator), labels


def save(path: str, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Written beside and renamed, so that a kill leaves the old one whole."""
    temporary = f"{path}.tmp"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    Path(temporary).replace(path)


def resume(path: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of completed steps; 0 without a checkpoint."""
    if not path or not Path(path).exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def train(arguments: argparse.Namespace) -> None:
    timeout = timedelta(seconds=arguments.group_timeout) if arguments.group_timeout else None
    dist.init_process_group("gloo", timeout=timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    images, labels = digits()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, CLASSES)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = resume(arguments.checkpoint, model, optimizer)
    with Path(arguments.ledger or os.devnull).open("a", buffering=1, encoding="utf-8") as ledger:
        for step in range(first, arguments.steps):
            ends_at = time.monotonic() + arguments.step_seconds
            picked = torch.arange(BATCH) * world + rank + step * BATCH * world
            picked %= len(labels)
            loss = functional.cross_entropy(model(images[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            time.sleep(max(0.0, ends_at - time.monotonic()))
            line = {"t": time.monotonic(), "step": step + 1, "world": world, "rank": rank, "loss": loss.item()}
            line |= {"pid": os.getpid(), "round": int(os.environ.get("ELASTICD_ROUND", "0"))}
            ledger.write(json.dumps(line) + "\n")
            if rank == 0 and (step + 1) % arguments.print_every == 0:
                print(f"step {step + 1} world {world} loss {loss.item():.4f}", flush=True)
            if rank == 0 and arguments.checkpoint and (step + 1) % arguments.save_every == 0:
                save(arguments.checkpoint, model, optimizer, step + 1)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="pad each step to this length")
    parser.add_argument("--checkpoint", default="", help="file to resume from and to save to")
    parser.add_argument("--save-every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--print-every", type=int, default=10)
    parser.add_argument("--group-timeout", type=float, default=0.0, help="seconds; 0: torch's default, half an hour")
    parser.add_argument("--ledger", help="append a JSON line for each completed step of each rank to this file")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
