"""A session of 8 micro-batches a step, of which a rank takes 4 at most: two nodes hold a step, and one does not.

A line for each completed step. A node is slow while there is a file of its name, and the job ends once there is one named
``finish``. Argument: FOLDER.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import elasticd


def main() -> None:
    folder, node = Path(sys.argv[1]), os.environ["ELASTICD_NODE_ID"]
    torch.set_num_threads(1)
    lines = Path(os.environ["ELASTICD_TEST_STEPS"], f"{os.getpid()}-{time.monotonic_ns()}.jsonl").open("w")  # noqa: SIM115
    with elasticd.Session(micro_batches=8, max_micro_batches=4, checkpoint_dir=folder / "checkpoints", seed=1) as session:
        model = DistributedDataParallel(torch.nn.Linear(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        session.restore()
        finish, numbers = torch.zeros(1), torch.arange(64.0)
        for step in session.steps():
            with step:
                for batch in step.micro_batches(numbers, size=2):
                    time.sleep(0.1 if (folder / node).exists() else 0.005)
                    step.backward(model(batch.unsqueeze(1)).square().mean())
                optimizer.step()
                finish.fill_((folder / "finish").exists())
                torch.distributed.all_reduce(finish)
            line = {"t": time.monotonic(), "round": session.round_number, "rank": session.rank, "step": session.step}
            lines.write(json.dumps({**line, "world": session.world_size, "node": node, "pid": os.getpid()}) + "\n")
            lines.flush()
            if finish == session.world_size:
                break


if __name__ == "__main__":
    main()
