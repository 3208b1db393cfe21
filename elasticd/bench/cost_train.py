"""One rank of the training that session_cost.py measures: a small byte GPT, by a Session and by plain DDP.

Both compute micro-batches of the same size from the same data set in a random order, and exchange gradients once a
step, by DDP. The plain loop is what one would write for torchrun: DataLoader, DistributedSampler, ``no_sync``.

The ways take turns in one process, and leave a line for each block of steps. They train the same model: two that are
equal differ by 3 % in speed, by where they lie in memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
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
Loop = Generator[None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """``tiny`` is next to no computing: what a loop costs by itself shows in full."""

    width: int
    layers: int
    size: int


SHAPES = {"small": Shape(width=128, layers=2, size=5), "tiny": Shape(width=16, layers=1, size=1)}


class Training:
    """What all ways have in common: the model, its optimizer, the size of a step and of a micro-batch."""

    def __init__(self, shape: Shape, micro_batches: int) -> None:
        dist.init_process_group("gloo")
        torch.manual_seed(SEED)
        self.model = DistributedDataParallel(ByteGPT(length=LENGTH, width=shape.width, layers=shape.layers))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.size, self.micro_batches = shape.size, micro_batches


def by_session(training: Training, *, asks_loss: bool = False, **settings: Any) -> Loop:
    """``settings``: of the session."""
    model, optimizer, data = training.model, training.optimizer, StandardLibrary(LENGTH)
    with Session(micro_batches=training.micro_batches, seed=SEED, **settings) as session:
        session.register(model=model, optimizer=optimizer)
        for step in session.steps():
            with step:
                for inputs, targets in step.micro_batches(data, size=training.size):
                    step.backward(loss_of(model(inputs), targets))
                optimizer.step()
                if asks_loss:
                    step.report(loss=step.mean_loss())
            yield


def by_plain_ddp(training: Training, *, asks_loss: bool = False) -> Loop:
    """``asks_loss``: all ranks agree on the step's mean loss, as one would write it."""
    model, optimizer = training.model, training.optimizer
    share = training.micro_batches // dist.get_world_size()
    batches = _batches(training.size)
    while True:
        model.require_backward_grad_sync = True  # whatever another way has left
        optimizer.zero_grad()
        total = torch.zeros(())
        for number in range(share):
            inputs, targets = next(batches)
            with nullcontext() if number == share - 1 else model.no_sync():
                loss = loss_of(model(inputs), targets) / share
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        optimizer.step()
        if asks_loss:
            dist.all_reduce(total)
            total.item()
        yield


def _batches(size: int) -> Iterator[Any]:
    data = StandardLibrary(LENGTH)
    sampler: DistributedSampler[Any] = DistributedSampler(data, seed=SEED)  # type: ignore[arg-type]
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from DataLoader(data, batch_size=size, sampler=sampler, drop_last=True)  # type: ignore[arg-type]


WAYS: dict[str, Callable[[Training], Loop]] = {
    "plain": by_plain_ddp,
    "again": by_plain_ddp,
    "session": by_session,
    "exact": partial(by_session, exact=True),
    "plain+loss": partial(by_plain_ddp, asks_loss=True),
    "session+loss": partial(by_session, asks_loss=True),
}


def in_turns(loops: dict[str, Loop], blocks: int, block: int, ledger: TextIO) -> None:
    """``blocks`` blocks of each, in an order that turns round each time. ``cpu_s``: of rank 0, all its threads."""
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
    parser.add_argument("--blocks", type=int, required=True, help="of each way")
    parser.add_argument("--block", type=int, required=True, help="steps in a block")
    parser.add_argument("--ledger", type=Path, required=True)
    asked = parser.parse_args()
    training = Training(SHAPES[asked.shape], asked.micro_batches)
    loops = {way: WAYS[way](training) for way in asked.way}
    with asked.ledger.open("a", buffering=1) as ledger:
        in_turns(loops, asked.blocks, asked.block, ledger)
    for loop in loops.values():
        loop.close()
    keep_destroyed_groups()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
