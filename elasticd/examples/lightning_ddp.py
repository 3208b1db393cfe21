"""A Lightning script as it is: an MLP 784-256-10 on scikit-learn's handwritten digits, DDP.

    elasticd run --nproc-per-node 2 --max-restarts 3 -m elasticd.examples.lightning_ddp --checkpoint-dir DIR
    torchrun --nproc-per-node 2 -m elasticd.examples.lightning_ddp --checkpoint-dir DIR

Nothing of elasticd is imported here. Lightning sees torchrun's environment and takes its world from it, but wants to be
told how it divides into nodes; nodes with unequal numbers of processes it cannot have. A restart resumes from the
newest checkpoint, with the model, the optimizer and the number of steps; Lightning shuffles the data anew.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

try:
    import lightning
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    sys.exit(f"lightning_ddp: {missing.name} is not installed: pip install 'elasticd[examples]'")


class Digits(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        return functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        right = (self.net(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, on_epoch=True, sync_dist=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Plain(Callback):  # type: ignore[misc]
    """One line of rank 0 each so many steps, which a log file keeps."""

    def __init__(self, every: int) -> None:
        self._every = every

    def on_train_start(self, trainer: Any, _: Any) -> None:
        if trainer.is_global_zero:
            print(f"begins at step {trainer.global_step} world {trainer.world_size}", flush=True)

    def on_train_batch_end(self, trainer: Any, _: Any, outputs: Any, *__: Any) -> None:
        if trainer.is_global_zero and trainer.global_step % self._every == 0:
            loss = float(outputs["loss"])
            print(f"step {trainer.global_step} world {trainer.world_size} loss {loss:.4f}", flush=True)


def loaders(batch: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """For training and for validation. Lightning gives each process its part of both."""
    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    grown = functional.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).flatten(1)
    data = TensorDataset(grown, torch.tensor(found.target))
    parts = torch.utils.data.random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    train, test = (DataLoader(part, batch, shuffle=number == 0) for number, part in enumerate(parts))
    return train, test


def train(arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", message=".*(num_workers|does not have many workers).*")
    lightning.seed_everything(1)
    checkpoints = ModelCheckpoint(
        arguments.checkpoint_dir, every_n_train_steps=arguments.save_every, save_last=True, save_top_k=1
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    trainer = lightning.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=local,
        num_nodes=int(os.environ.get("WORLD_SIZE", "1")) // local,
        strategy="ddp",
        max_steps=arguments.steps,
        callbacks=[checkpoints, Plain(arguments.print_every)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    train_loader, test_loader = loaders(arguments.batch)
    model = Digits()
    trainer.fit(model, train_loader, ckpt_path="last")
    (measured,) = trainer.validate(model, test_loader, verbose=False)
    if trainer.is_global_zero:
        print(f"accuracy {measured['accuracy']:.1%} at step {trainer.global_step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", required=True, help="where checkpoints are saved and resumed from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="images for each process")
    parser.add_argument("--save-every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--print-every", type=int, default=20)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
