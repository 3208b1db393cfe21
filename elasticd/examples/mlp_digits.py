"""The classic of the field: an MLP 784-256-10 on handwritten digits, with elasticd.Session.

    elasticd run --nproc-per-node 2 -m elasticd.examples.mlp_digits --checkpoint-dir DIR
    torchrun --nproc-per-node 2 -m elasticd.examples.mlp_digits
    python -m elasticd.examples.mlp_digits

The digits are the 1797 real ones that come with scikit-learn, grown from 8x8 to 28x28 so that the net is the classic
one; one in five is kept for the test. MNIST itself is taken where torchvision finds its files below --mnist: nothing is
downloaded. Rank 0 prints the test accuracy at the end, which is the same on any world, up to rounding.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from elasticd import Session

PIXELS, HIDDEN, CLASSES = 784, 256, 10


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's, for training and for the test: images (784,) in 0..1 and labels."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        sys.exit("mlp_digits: scikit-learn has the digits and is not installed: pip install 'elasticd[examples]'")
    found: Any = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    grown = functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).flatten(1)
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(labels) // 5], order[len(labels) // 5 :]
    return TensorDataset(grown[train], labels[train]), TensorDataset(grown[test], labels[test])


def load_mnist(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """The 60000 and 10000 of MNIST, from the files that torchvision once laid below ``folder``."""
    try:
        from torchvision.datasets import MNIST
    except ModuleNotFoundError:
        sys.exit(f"mlp_digits: to read the MNIST below {folder}, install the torchvision that fits your torch")
    parts = [MNIST(str(folder), train=train, download=False) for train in (True, False)]
    train, test = (TensorDataset(part.data.flatten(1) / 255, part.targets) for part in parts)
    return train, test


def load(mnist: Path) -> tuple[str, TensorDataset, TensorDataset]:
    if (mnist / "MNIST" / "raw").is_dir():
        return "MNIST", *load_mnist(mnist)
    return "scikit-learn's digits", *load_digits()


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset, device: torch.device) -> float:
    images, labels = (tensor.to(device) for tensor in data.tensors)
    return float((model(images).argmax(1) == labels).float().mean())


def train(arguments: argparse.Namespace) -> None:
    session = Session(
        micro_batches=arguments.micro_batches,
        checkpoint_dir=arguments.checkpoint_dir,
        save_every_steps=arguments.save_every,
        seed=arguments.seed,
    )
    name, digits, test = load(arguments.mnist)
    net = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)).to(session.device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    session.register(model=model, optimizer=optimizer)
    first = session.restore()
    if session.rank == 0:
        print(f"begins at step {first} world {session.world_size}", flush=True)
    with session:
        steps = session.steps(until=arguments.steps)
        for step in session.progress(steps, every_s=arguments.progress_seconds):
            ends_at = time.monotonic() + arguments.step_seconds
            with step:
                for images, labels in step.micro_batches(digits, size=arguments.batch // arguments.micro_batches):
                    step.backward(functional.cross_entropy(model(images), labels))
                optimizer.step()
                step.report(loss=step.mean_loss())
            time.sleep(max(0.0, ends_at - time.monotonic()))
        if session.rank == 0:
            share = accuracy(net, test, session.device)
            print(f"accuracy {share:.1%} on {len(test)} test images of {name}, step {session.step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="train until this many steps are completed")
    parser.add_argument("--batch", type=int, default=128, help="images in the global batch")
    parser.add_argument("--micro-batches", type=int, default=8, help="of them a step; --batch is a multiple of this")
    parser.add_argument("--mnist", type=Path, default=Path("data"), help="torchvision's folder, if MNIST is on disk")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="pad each step to this length")
    parser.add_argument("--checkpoint-dir", help="directory for checkpoints; none are saved without it")
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--progress-seconds", type=float, default=10.0, help="between two lines, where no terminal is")
    arguments = parser.parse_args()
    if arguments.micro_batches < 1 or arguments.batch % arguments.micro_batches:
        parser.error(f"--batch {arguments.batch} is not a multiple of --micro-batches {arguments.micro_batches}")
    train(arguments)


if __name__ == "__main__":
    main()
