"""What the memory experiment trains: 50 ms steps by a Session whose state is in RAM, a line for each completed one.

Arguments: EVERY_STEPS STEP_SECONDS. Ends with its daemon.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from elasticd import Session
from elasticd.testing.cluster import STEPS_VARIABLE


def main() -> None:
    every, step_s = int(sys.argv[1]), float(sys.argv[2])
    torch.set_num_threads(1)
    with Session(memory_every_steps=every, seed=1) as session:
        model = DistributedDataParallel(torch.nn.Linear(512, 512))
        optimizer = torch.optim.AdamW(model.parameters())
        session.register(model=model, optimizer=optimizer)
        session.restore()
        name = f"{os.getpid()}-{time.monotonic_ns()}.jsonl"
        where = {"round": session.round_number, "rank": session.rank, "world": session.world_size, "pid": os.getpid()}
        with Path(os.environ[STEPS_VARIABLE], name).open("w") as lines:
            for step in session.steps():
                with step:
                    started = time.monotonic()
                    optimizer.zero_grad()
                    model(torch.ones(4, 512)).square().mean().backward()
                    optimizer.step()
                    time.sleep(max(0.0, step_s - (time.monotonic() - started)))
                lines.write(json.dumps({"t": time.monotonic(), "step": session.step, **where}) + "\n")
                lines.flush()


if __name__ == "__main__":
    main()
