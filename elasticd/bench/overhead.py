"""A healthy run: steps per second of the same script under ``torchrun`` and under ``elasticd run``, on one node.

Two workers, no padding of steps: what a supervisor takes from the machine shows in full, its etcd included. A run's
speed is that of rank 0 from its warm-up to its last step, so start and end do not count. They run in pairs, and
the other goes first each time; a sample is how many per cent of torchrun's speed elasticd lost in one pair. Gloo
over loopback makes one run differ from the next by some per cent, whoever starts it: look at every pair, in the JSON.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.jobs import SCRIPT
from elasticd.bench.options import Options
from elasticd.errors import ElasticdError
from elasticd.testing.history import Tail, Trained, parse_trained
from elasticd.testing.hosts import open_hosts

WORKERS = 2
STEPS, QUICK_STEPS = 6000, 2000
WARM_UP = 500
RUN_TIMEOUT_S = 120.0
COMMANDS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone"),
    "elasticd": ("-m", "elasticd.cli", "run"),
}


def steps_per_second(lines: Sequence[Trained], warm_up: int) -> float:
    """Of rank 0, from the end of its warm-up to its last step. Pure; ValueError when it did not get that far."""
    times = [line.t for line in lines if line.rank == 0 and line.step >= warm_up]
    if len(times) < 2:
        raise ValueError(f"rank 0 recorded {len(times)} steps after step {warm_up}")
    return (len(times) - 1) / (times[-1] - times[0])


def percent_lost(theirs: float, ours: float) -> float:
    """How much slower we are, in per cent of their speed; negative when we are faster. Pure."""
    return 100 * (1 - ours / theirs)


def measure(options: Options) -> list[Figure]:
    steps = QUICK_STEPS if options.quick else STEPS
    losses: list[float] = []
    speeds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for pair in range(options.ours(8)):
        for name in sorted(COMMANDS, reverse=bool(pair % 2)):
            speeds[name].append(_run(name, steps))
        losses.append(percent_lost(speeds["torchrun"][-1], speeds["elasticd"][-1]))
        rates = ", ".join(f"{name} {rate[-1]:.1f} steps/s" for name, rate in speeds.items())
        options.say(f"{rates}: {losses[-1]:+.2f} % lost")
    figure = partial(Figure, experiment="overhead")
    return [
        figure(
            what="a healthy run: speed lost to torchrun",
            system=ELASTICD,
            unit="%",
            samples=tuple(losses),
            goal=Goal(at_most=1.0),
        ),
        *(
            figure(what="a healthy run: speed", system=name, unit="steps/s", samples=tuple(rates))
            for name, rates in speeds.items()
        ),
    ]


def _run(name: str, steps: int) -> float:
    folder = Path(tempfile.mkdtemp(prefix="overhead-bench-"))
    ledger, log = folder / "ledger.jsonl", folder / "log"
    script = [str(SCRIPT), "--steps", str(steps), "--ledger", str(ledger), "--print-every", str(steps)]
    command = [sys.executable, *COMMANDS[name], "--nproc-per-node", str(WORKERS), *script]
    with open_hosts() as hosts:
        host = hosts.add("node0")
        env = {"OMP_NUM_THREADS": "1", **os.environ, "GLOO_SOCKET_IFNAME": "lo"}
        process = host.spawn(command, log=log, env=env)
        try:
            status = process.wait(RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            host.kill()
            process.wait()
    if status != 0:
        raise ElasticdError(f"{name} did not succeed (status {status})\n{log.read_text(errors='replace')[-4000:]}")
    lines = [parse_trained(line) for line in Tail().read([ledger])]
    shutil.rmtree(folder)
    return steps_per_second(lines, WARM_UP)
