"""A script that keeps its state in RAM: steps whose weights depend on their number alone, a line for each one.

Arguments: FOLDER EVERY_STEPS [--hold N: floats of ballast in the state] [--step SECONDS] [--disk EVERY]. It ends when
all ranks have seen a file named ``finish``.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from elasticd import Session


class Net(torch.nn.Module):
    def __init__(self, ballast: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8, bias=False)
        self.register_buffer("ballast", torch.zeros(ballast))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("every", type=int)
    parser.add_argument("--hold", type=int, default=4096)
    parser.add_argument("--step", type=float, default=0.03)
    parser.add_argument("--disk", type=int, default=-1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with Session(
        memory_every_steps=asked.every,
        checkpoint_dir=asked.folder / "checkpoints" if asked.disk >= 0 else None,
        save_every_steps=max(0, asked.disk),
        seed=1,
    ) as session:
        torch.manual_seed(0)
        model = DistributedDataParallel(Net(asked.hold))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        restored = session.restore()
        name = f"{os.getpid()}-{time.monotonic_ns()}.jsonl"
        lines = Path(os.environ["ELASTICD_TEST_STEPS"], name).open("w")  # noqa: SIM115
        where = {"round": session.round_number, "rank": session.rank, "world": session.world_size, "pid": os.getpid()}
        where["node"] = os.environ["ELASTICD_NODE_ID"]

        def tell(**more: object) -> None:
            lines.write(json.dumps({"t": time.monotonic(), **where, **more}) + "\n")
            lines.flush()

        for step in session.steps():
            with step:
                started = time.monotonic()
                optimizer.zero_grad()
                model(torch.ones(4, 8)).square().mean().backward()
                optimizer.step()
                model.module.ballast.fill_(step.index + 1)
                done = torch.tensor([int((asked.folder / "finish").exists())])
                dist.all_reduce(done, op=dist.ReduceOp.MIN)
                time.sleep(max(0.0, asked.step - (time.monotonic() - started)))
            weights = model.module.linear.weight.double().sum().item()
            held = model.module.ballast
            assert held.min() == held.max() == session.step, "ballast of another step"
            tell(step=session.step, weights=weights, restored=restored)
            if done.item():
                break


if __name__ == "__main__":
    main()
