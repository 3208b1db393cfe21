"""A healthy run of two equal ranks: what a step by a Session costs beside plain DDP.

Both take turns in one process and on one model (cost_train.py), under ``elasticd run``, so that reports to a daemon
are in it: from one process to the next, the same program differs by more than what is looked for. A sample is one run's
median over pairs of blocks that follow one another. "Plain DDP again" takes turns too: what is found for it is noise,
and a cost below that was not measured. CPU seconds are less noisy than the clock on a machine that others use.

Steps take 50 ms and more, four micro-batches a rank. A Session costs so much a step and so much a micro-batch, whatever
they compute, so it is less for longer ones: both parts are found by steps of next to no computing.
Not here: what the daemon takes from the machine (overhead.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import elasticd.bench
from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.options import Options
from elasticd.errors import ElasticdError
from elasticd.testing.history import Tail
from elasticd.testing.hosts import open_hosts

SCRIPT = Path(elasticd.bench.__file__).with_name("cost_train.py")
WORKERS = 2
MICRO_BATCHES = 8
#: Per rank, of the steps that compute next to nothing.
FEW, MANY = 2, 16
RUN_TIMEOUT_S = 300.0
AGAIN = "plain DDP again"
EXACT = f"{ELASTICD}, exact mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one way beside another: medians over pairs of blocks."""

    percent: float
    cpu_percent: float
    cpu_us: float


def cost_of(lines: Iterable[Mapping[str, Any]], way: str, plain: str) -> Cost:
    """From one run's lines. Pure; ValueError when there is no whole turn."""
    turns: dict[int, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for line in lines:
        turns[line["turn"]][line["way"]] = line
    pairs = [(turn[way], turn[plain]) for turn in turns.values() if way in turn and plain in turn]
    if not pairs:
        raise ValueError(f"no turn of both {way} and {plain}")
    more_us = median((ours["cpu_s"] - theirs["cpu_s"]) * 1e6 for ours, theirs in pairs)
    return Cost(
        percent=median(100 * (ours["seconds"] / theirs["seconds"] - 1) for ours, theirs in pairs),
        cpu_percent=100 * more_us * 1e-6 / median(theirs["cpu_s"] for _, theirs in pairs),
        cpu_us=more_us,
    )


def measure(options: Options) -> list[Figure]:
    blocks, many = (10, 10) if options.quick else (40, 120)
    costs: dict[str, list[Cost]] = defaultdict(list)
    micro_batch_us, step_us = list[float](), list[float]()
    for _ in range(options.ours(4)):
        lines = run(("plain", "again", "session"), blocks=many)
        costs[ELASTICD].append(cost_of(lines, "session", "plain"))
        costs[AGAIN].append(cost_of(lines, "again", "plain"))
        with_loss = run(("plain+loss", "session+loss"), blocks=blocks)
        costs["loss"].append(cost_of(with_loss, "session+loss", "plain+loss"))
        costs[EXACT].append(cost_of(run(("plain", "exact"), blocks=blocks), "exact", "plain"))
        of_few, of_many = (tiny_us(count, blocks) for count in (FEW, MANY))
        micro_batch_us.append((of_many - of_few) / (MANY - FEW))
        step_us.append(of_few - FEW * micro_batch_us[-1])
        told = ", ".join(
            f"{name} {of[-1].percent:+.2f} % (CPU {of[-1].cpu_percent:+.2f} %)" for name, of in costs.items()
        )
        options.say(f"{told}; {step_us[-1]:.0f} us a step and {micro_batch_us[-1]:.0f} us a micro-batch")
    return _figures(costs, step_us, micro_batch_us)


def tiny_us(micro_batches: int, blocks: int) -> float:
    """What a step of so many micro-batches a rank costs in microseconds of CPU, where it computes next to nothing."""
    lines = run(("plain", "session"), blocks=blocks, block=10, shape="tiny", micro_batches=WORKERS * micro_batches)
    return cost_of(lines, "session", "plain").cpu_us


def _figures(costs: Mapping[str, Sequence[Cost]], step_us: list[float], micro_batch_us: list[float]) -> list[Figure]:
    figure = partial(Figure, experiment="session_cost")
    time, cpu = "a step by Session: time lost to plain DDP", "a step by Session: CPU time beside plain DDP"
    loss = "the same, and the mean loss of each step on both sides"
    found = []
    for what, read in ((time, lambda cost: cost.percent), (cpu, lambda cost: cost.cpu_percent)):
        for system in (ELASTICD, EXACT, AGAIN):
            goal = Goal(at_most=1.0) if system == ELASTICD else None
            samples = tuple(map(read, costs[system]))
            found.append(figure(what=what, system=system, unit="%", samples=samples, goal=goal))
        found.append(figure(what=loss, system=ELASTICD, unit="%", samples=tuple(map(read, costs["loss"]))))
    us = partial(figure, system=ELASTICD, unit="us")
    return [
        *found,
        us(what="a Session's CPU time beside plain DDP: a step", samples=tuple(step_us)),
        us(what="a Session's CPU time beside plain DDP: a micro-batch", samples=tuple(micro_batch_us)),
    ]


def run(
    ways: Sequence[str], *, blocks: int, block: int = 4, shape: str = "small", micro_batches: int = MICRO_BATCHES
) -> list[dict[str, Any]]:
    """A line for each block of each way. ElasticdError when it did not succeed."""
    folder = Path(tempfile.mkdtemp(prefix="cost-bench-"))
    ledger, log = folder / "ledger.jsonl", folder / "log"
    command = [
        *(sys.executable, "-m", "elasticd.cli", "run", "--nproc-per-node", str(WORKERS), str(SCRIPT)),
        *("--way", *ways, "--shape", shape, "--micro-batches", str(micro_batches)),
        *("--blocks", str(blocks), "--block", str(block), "--ledger", str(ledger)),
    ]
    try:
        with open_hosts() as hosts:
            host = hosts.add("node0")
            env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            process = host.spawn(command, log=log, env=env)
            try:
                status = process.wait(RUN_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                host.kill()
                process.wait()
        if status != 0:
            said = log.read_text(errors="replace")[-4000:]
            raise ElasticdError(f"{' and '.join(ways)} did not succeed (status {status})\n{said}")
        return list(Tail().read([ledger]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
