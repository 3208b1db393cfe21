"""A byte-level GPT, trained on the text of Python's own standard library: real input that every machine has.

    elasticd run --nnodes 1:3 --nproc-per-node 1 -m elasticd.examples.byte_gpt --checkpoint-dir DIR
    torchrun --nproc-per-node 2 -m elasticd.examples.byte_gpt --steps 50
    python -m elasticd.examples.byte_gpt --steps 50
    elasticd run --nproc-per-node 4 --ranks-per-replica 2 -m elasticd.examples.byte_gpt --parallel pp --steps 50

--parallel says how the ranks share the model:

    ddp     each has all of it                          fsdp2   all have a part each
    hsdp    a node's ranks have a part each             tp      two split each layer; fsdp2 where there are more
    tp-ddp  two split each layer, whole copies of that  pp      two have half of the layers each, in a pipeline

A step is a fixed number of micro-batches: the loss curve is the same on any world, up to rounding; with --exact the
weights have the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from elasticd import Layout, Session

if TYPE_CHECKING:
    from elasticd import Pipeline


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        # Heads outermost: a rank that has half of the layer has half of the heads.
        split = self.qkv(self.norm_1(x)).view(batch, length, -1, 3, width // self.heads)
        q, k, v = split.permute(3, 0, 2, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        grown: torch.Tensor = self.down(functional.gelu(self.up(self.norm_2(x))))
        return x + grown


class ByteGPT(nn.Module):
    """Bytes in, logits of the next byte out: (batch, length) -> (batch, length, 256).

    A stage of it, without its beginning or its end, takes and gives (batch, length, width) there.
    """

    token: nn.Embedding | None
    position: nn.Embedding | None
    norm: nn.LayerNorm | None
    head: nn.Linear | None

    def __init__(self, *, length: int, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.apply(_initialise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.token is not None and self.position is not None:
            x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        x = self.blocks(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class StandardLibrary:
    """The top-level modules of the standard library as one text, cut into samples of ``length`` + 1 bytes."""

    def __init__(self, length: int) -> None:
        folder = Path(sysconfig.get_path("stdlib"))
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._length = length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and target, each (length,)."""
        tokens = self._text[index * self._length : (index + 1) * self._length + 1].long()
        return tokens[:-1], tokens[1:]


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


LAYOUTS = {
    "hsdp": Layout(shard="node"),
    "tp": Layout(tensor=2),
    "tp-ddp": Layout(tensor=2, shard=1),
    "pp": Layout(pipeline=2),
}


def parallelize(model: ByteGPT, parallel: str, session: Session) -> nn.Module:
    """What this rank trains of the model. Parameters keep their names: a checkpoint fits under every layout."""
    match parallel:
        case "ddp":
            return DistributedDataParallel(model)
        case "fsdp2":
            return shard(model, session.mesh)
        case "hsdp":
            return shard(model, session.mesh["replicate", "shard"])
        case "tp":
            split_layers(model, session.mesh["tp"])
            return shard(model, session.mesh["dp"]) if session.replicas > 1 else model
        case "tp-ddp":
            split_layers(model, session.mesh["tp"])
            return shard(model, session.mesh["replicate", "shard"])  # a shard is the whole here
        case _:
            keep_stage(model, session.mesh["pp"].get_local_rank(), session.mesh["pp"].size())
            group = session.mesh.get_group("dp")
            return DistributedDataParallel(model, process_group=group) if session.replicas > 1 else model


def shard(model: ByteGPT, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def split_layers(model: ByteGPT, mesh: DeviceMesh) -> None:
    """Tensor parallel: each rank has a part of the heads, and of the wide layer."""
    for block in model.blocks:
        plan = {"qkv": ColwiseParallel(), "out": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan)


def keep_stage(model: ByteGPT, stage: int, stages: int) -> None:
    """Leave out what other stages of the pipeline have."""
    for index in range(len(model.blocks)):
        if index * stages // len(model.blocks) != stage:
            model.blocks[index] = nn.Identity()
    if stage > 0:
        model.token = model.position = None
    if stage < stages - 1:
        model.norm = model.head = None


def make_pipeline(model: nn.Module, session: Session) -> Pipeline:
    from elasticd import Pipeline  # torch's pipelining takes a second to import: here, the other layouts do without

    return Pipeline(model, loss_of, mesh=session.mesh["pp"])


def train(arguments: argparse.Namespace) -> None:
    if arguments.exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds up in one order with it
        torch.use_deterministic_algorithms(mode=True)
    session = Session(
        layout=LAYOUTS.get(arguments.parallel),
        micro_batches=arguments.micro_batches,
        balance=arguments.balance,
        exact=arguments.exact,
        compress=arguments.compress,
        checkpoint_dir=arguments.checkpoint_dir,
        save_every_steps=arguments.save_every,
        memory_every_steps=arguments.memory_every,
        seed=arguments.seed,
    )
    data = StandardLibrary(arguments.length)
    whole = ByteGPT(length=arguments.length, width=arguments.width, layers=arguments.layers).to(session.device)
    model = parallelize(whole, arguments.parallel, session)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session.register(model=model, optimizer=optimizer)
    session.restore()
    pipeline = make_pipeline(model, session) if arguments.parallel == "pp" else None
    size = arguments.batch // arguments.micro_batches
    with session, open_ledger(arguments.ledger) as ledger:
        for step in session.steps(until=arguments.steps):
            ends_at = time.monotonic() + arguments.step_seconds
            with step:
                if pipeline is not None:
                    step.run_pipeline(pipeline, data, size=size)
                else:
                    for inputs, targets in step.micro_batches(data, size=size):
                        step.backward(loss_of(model(inputs), targets))
                optimizer.step()
                loss = step.mean_loss()
                step.report(loss=loss)
            time.sleep(max(0.0, ends_at - time.monotonic()))
            record(ledger, session, step.sample_ids if session.leads_replica else [], loss)
            if session.rank == 0 and session.step % arguments.print_every == 0:
                print(f"step {session.step} world {session.world_size} loss {loss:.4f}", flush=True)
        if arguments.exact and session.rank == 0:
            print(f"weights {fingerprint(whole)}", flush=True)


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_ledger(path: str | None) -> TextIO:
    """Appended to by all ranks: each line is one write, so that lines do not mix."""
    return Path(path or os.devnull).open("a", buffering=1, encoding="utf-8")


def record(ledger: TextIO, session: Session, ids: list[int], loss: float) -> None:
    """A completed step, on the clock that all processes of this machine share."""
    line = {
        "t": time.monotonic(),
        "step": session.step,
        "world": session.world_size,
        "rank": session.rank,
        "round": session.round_number,
        "pid": os.getpid(),
        "loss": loss,
        "ids": ids,
    }
    ledger.write(json.dumps(line) + "\n")


def balance_of(text: str) -> Any:
    """auto, on, off, or weights: 1:2:5."""
    return tuple(float(weight) for weight in text.split(":")) if ":" in text else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="train until this many steps are completed")
    parser.add_argument("--batch", type=int, default=12, help="sequences in the global batch")
    parser.add_argument("--micro-batches", type=int, default=6, help="of them a step; --batch is a multiple of this")
    parser.add_argument("--parallel", default="ddp", choices=["ddp", "fsdp2", *LAYOUTS], help="see above")
    parser.add_argument("--balance", type=balance_of, default="auto", help="auto, on, off, or fixed weights as 1:2:5")
    parser.add_argument("--exact", action="store_true", help="the same bits on any world; prints a hash at the end")
    parser.add_argument("--compress", help="gradients cross the network as bf16, fp16 or powersgd; for ddp")
    parser.add_argument("--length", type=int, default=64, help="bytes in a sequence")
    parser.add_argument("--width", type=int, default=128, help="width of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="pad each step to this length")
    parser.add_argument("--checkpoint-dir", help="directory for checkpoints; none are saved without it")
    parser.add_argument("--save-every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--memory-every", type=int, default=0, help="lose fewer steps than this: copies in RAM")
    parser.add_argument("--print-every", type=int, default=10)
    parser.add_argument("--ledger", help="append a JSON line for each completed step of each rank to this file")
    arguments = parser.parse_args()
    if arguments.micro_batches < 1 or arguments.batch % arguments.micro_batches:
        parser.error(f"--batch {arguments.batch} is not a multiple of --micro-batches {arguments.micro_batches}")
    train(arguments)


if __name__ == "__main__":
    main()
