"""One rank of the training that balance.py and compression.py measure: the byte GPT, by a Session or by plain DDP.

All compute the same micro-batches of the same size, and exchange gradients once a step; plain DDP divides them
equally. A line for each completed step, with all that this node has sent so far, as its kernel counts it and as the
Session counts it. After some steps each rank trains a model of its own for a while, for what it can do by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from elasticd import Session
from elasticd.examples.byte_gpt import ByteGPT, StandardLibrary, loss_of
from elasticd.torch_defects import keep_destroyed_groups
from elasticd.worker.compress import Compression

#: A step is long beside the period of a control group's quota (0.1 s): whatever a node has left of it is lost.
LENGTH, SIZE, SEED = 64, 6, 1
Note = Callable[[int, int, int, int], None]


def by_session(micro_batches: int, steps: int, note: Note, compress: Compression | None = None) -> None:
    with Session(micro_batches=micro_batches, seed=SEED, compress=compress) as session:
        data = StandardLibrary(LENGTH)
        model = DistributedDataParallel(ByteGPT(length=LENGTH))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=steps):
            with step:
                for inputs, targets in step.micro_batches(data, size=SIZE):
                    step.backward(loss_of(model(inputs), targets))
                optimizer.step()
            note(session.rank, session.step, len(step.sample_ids) // SIZE, session.sent_bytes)


def by_plain_ddp(micro_batches: int, steps: int, note: Note) -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data = StandardLibrary(LENGTH)
    model = DistributedDataParallel(ByteGPT(length=LENGTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    share = micro_batches // world_size
    for step in range(steps):
        optimizer.zero_grad()
        for number in range(share):
            first = ((step * micro_batches + rank * share + number) * SIZE) % (len(data) - SIZE)
            inputs, targets = (torch.stack(part) for part in zip(*(data[first + k] for k in range(SIZE)), strict=True))
            with nullcontext() if number == share - 1 else model.no_sync():
                (loss_of(model(inputs), targets) / share).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        note(rank, step + 1, share, 0)
    keep_destroyed_groups()
    dist.destroy_process_group()


WAYS: dict[str, Callable[[int, int, Note], None]] = {
    "session": by_session,
    "bf16": partial(by_session, compress="bf16"),
    "fp16": partial(by_session, compress="fp16"),
    "powersgd": partial(by_session, compress="powersgd"),
    "plain": by_plain_ddp,
}


class Alone:
    """The same training by this rank for itself: nothing is exchanged."""

    def __init__(self, micro_batches: int) -> None:
        self._micro_batches, self._done = micro_batches, 0
        self._data = StandardLibrary(LENGTH)
        self._model = ByteGPT(length=LENGTH)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)

    def train(self, seconds: float) -> list[float]:
        """For so long. The seconds of each micro-batch."""
        took: list[float] = []
        while sum(took) < seconds:
            begun = time.monotonic()
            first = self._done * SIZE % (len(self._data) - SIZE)
            inputs, targets = (
                torch.stack(part) for part in zip(*(self._data[first + k] for k in range(SIZE)), strict=True)
            )
            (loss_of(self._model(inputs), targets) / self._micro_batches).backward()  # type: ignore[no-untyped-call]
            self._done += 1
            if self._done % self._micro_batches == 0:
                self._optimizer.step()
                self._optimizer.zero_grad()
            took.append(time.monotonic() - begun)
        return took


def sent_bytes() -> int:
    """Through the interface that gloo uses, in this process's network namespace; 0 where it has no such name."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        interface, _, counts = line.partition(":")
        if interface.strip() == name:
            return int(counts.split()[8])
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=list(WAYS), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro-batches", type=int, required=True)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--alone-after", type=int, nargs="*", default=[], help="steps after which each is by itself")
    parser.add_argument("--alone-seconds", type=float, default=0.0)
    asked = parser.parse_args()
    alone = Alone(asked.micro_batches)
    with asked.ledger.open("a", buffering=1) as ledger:

        def note(rank: int, step: int, share: int, counted: int) -> None:
            line: dict[str, object] = {"t": time.monotonic(), "rank": rank, "step": step, "share": share}
            line |= {"sent": sent_bytes(), "counted": counted}
            if step in asked.alone_after:
                line["alone"] = alone.train(asked.alone_seconds)
            ledger.write(json.dumps(line) + "\n")

        WAYS[asked.way](asked.micro_batches, asked.steps, note)


if __name__ == "__main__":
    main()
