"""One rank of the training that session_cost.py measures: a small byte GPT, by a Session and by plain DDP.

Both compute micro-batches of the same size from the same data set in a random order, and exchange gradients once a
step, by DDP. The plain loop is what one would write for torchrun: DataLoader, DistributedSampler, ``no_sync``.

With one ``--way``, a line for each completed step. With several, they take turns in this process, each with a model of
its own, and a line for each block of steps: what differs then is the loop and nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from elasticd import Session
from elasticd.examples.byte_gpt import ByteGPT, StandardLibrary, loss_of
from elasticd.torch_defects import keep_destroyed_groups

LENGTH, SEED = 64, 1
#: Steps that every way takes before anything is written.
WARM_UP = 10
#: A way's steps, one more each time it is asked.
Loop = Iterator[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is trained. ``tiny`` is next to no computing: what a loop costs by itself shows in full."""

    width: int
    layers: int
    size: int

    def model(self) -> torch.nn.Module:
        torch.manual_seed(SEED)
        return ByteGPT(length=LENGTH, width=self.width, layers=self.layers)


SHAPES = {"small": Shape(width=128, layers=2, size=5), "tiny": Shape(width=16, layers=1, size=1)}


def by_session(shape: Shape, micro_batches: int, **settings: Any) -> Loop:
    """``settings``: of the session. ``loss`` False: nobody asks for the mean loss of a step."""
    asks_loss = settings.pop("loss", True)
    with Session(micro_batches=micro_batches, seed=SEED, **settings) as session:
        data = StandardLibrary(LENGTH)
        model = DistributedDataParallel(shape.model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps():
            with step:
                for inputs, targets in step.micro_batches(data, size=shape.size):
                    step.backward(loss_of(model(inputs), targets))
                optimizer.step()
                if asks_loss:
                    step.report(loss=step.mean_loss())
            yield


def by_plain_ddp(shape: Shape, micro_batches: int) -> Loop:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    share = micro_batches // dist.get_world_size()
    batches = _batches(shape.size)
    model = DistributedDataParallel(shape.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    while True:
        optimizer.zero_grad()
        for number in range(share):
            inputs, targets = next(batches)
            with nullcontext() if number == share - 1 else model.no_sync():
                (loss_of(model(inputs), targets) / share).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield


def _batches(size: int) -> Iterator[Any]:
    data = StandardLibrary(LENGTH)
    sampler: DistributedSampler[Any] = DistributedSampler(data, seed=SEED)  # type: ignore[arg-type]
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from DataLoader(data, batch_size=size, sampler=sampler, drop_last=True)  # type: ignore[arg-type]


WAYS: dict[str, Callable[[Shape, int], Loop]] = {
    "plain": by_plain_ddp,
    "session": by_session,
    "no-loss": lambda shape, micro_batches: by_session(shape, micro_batches, loss=False),
    "equal": lambda shape, micro_batches: by_session(shape, micro_batches, loss=False, balance="off"),
    "exact": lambda shape, micro_batches: by_session(shape, micro_batches, exact=True),
}


def one_way(loop: Loop, steps: int, ledger: TextIO) -> None:
    for step in range(1, steps + 1):
        next(loop)
        if dist.get_rank() == 0:
            ledger.write(json.dumps({"t": time.monotonic(), "step": step}) + "\n")


def in_turns(loops: dict[str, Loop], blocks: int, block: int, ledger: TextIO) -> None:
    """``blocks`` blocks of each, in an order that turns round each time."""
    for loop in loops.values():
        for _ in range(WARM_UP):
            next(loop)
    for turn in range(blocks):
        for way in sorted(loops, reverse=bool(turn % 2)):
            started, cpu_started = time.perf_counter(), time.process_time()
            for _ in range(block):
                next(loops[way])
            seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
            if dist.get_rank() == 0:
                line = {"turn": turn, "way": way, "seconds": seconds / block, "cpu_s": cpu_s / block}
                ledger.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=list(WAYS), nargs="+", required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--micro-batches", type=int, required=True)
    parser.add_argument("--steps", type=int, default=0, help="of one way")
    parser.add_argument("--blocks", type=int, default=0, help="of each of several ways")
    parser.add_argument("--block", type=int, default=4, help="steps in a block")
    parser.add_argument("--ledger", type=Path, required=True)
    asked = parser.parse_args()
    loops = {way: WAYS[way](SHAPES[asked.shape], asked.micro_batches) for way in asked.way}
    with asked.ledger.open("a", buffering=1) as ledger:
        if len(loops) == 1:
            one_way(next(iter(loops.values())), asked.steps, ledger)
        else:
            in_turns(loops, asked.blocks, asked.block, ledger)
    for loop in loops.values():
        loop.close()  # type: ignore[attr-defined]
    if dist.is_initialized():
        keep_destroyed_groups()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
