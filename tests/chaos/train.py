"""A torchrun-style script that knows nothing of elasticd: tiny DDP steps, a line for each completed one.

It resumes from a step number in a file, as an unchanged script with a checkpoint would, and ends when all ranks have
seen a file named ``finish``. Arguments: FOLDER [STEP_SECONDS].
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    folder = Path(sys.argv[1])
    step_s = float(sys.argv[2]) if len(sys.argv) > 2 else 0.02
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lines = Path(os.environ["ELASTICD_TEST_STEPS"], f"{os.getpid()}-{time.monotonic_ns()}.jsonl").open("w")  # noqa: SIM115
    step = load(folder, rank)
    while True:
        started = time.monotonic()
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
        finish = torch.tensor(float((folder / "finish").exists()))
        dist.all_reduce(finish)
        step += 1
        if rank == 0:
            save(folder, step)
        line = {
            "t": time.monotonic(),
            "round": int(os.environ.get("ELASTICD_ROUND", 0)),
            "rank": rank,
            "step": step,
            "world": world,
            "node": os.environ.get("ELASTICD_NODE_ID", ""),
            "pid": os.getpid(),
        }
        lines.write(json.dumps(line) + "\n")
        lines.flush()
        if finish == world:
            break
        time.sleep(max(0.0, started + step_s - time.monotonic()))
    dist.destroy_process_group()


def load(folder: Path, rank: int) -> int:
    """Rank 0 reads the number of completed steps and tells the others."""
    known = torch.zeros(1, dtype=torch.int64)
    if rank == 0 and (folder / "step").exists():
        known[0] = int((folder / "step").read_text())
    dist.broadcast(known, 0)
    return int(known)


def save(folder: Path, step: int) -> None:
    (folder / "step.tmp").write_text(str(step))
    (folder / "step.tmp").rename(folder / "step")


if __name__ == "__main__":
    main()
