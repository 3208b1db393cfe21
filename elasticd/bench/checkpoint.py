"""Checkpoints beside what else there is: plain DCP, torch.save, and the memory and the disk themselves.

The same sharded state is saved by each in turn, in one run, so that a disk that has a bad minute has it for all; a
sample is the ratio of two times from one turn. The state is 1 GB in all, on one rank and on two (checkpoint_ranks.py
is what they run). Files go to /var/tmp, which is not a tmpfs anywhere that we know of.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.options import Options
from elasticd.errors import ElasticdError

WORLDS = (1, 2)
SCRATCH = "/var/tmp"  # noqa: S108 - a directory of its own is made there
TIMEOUT_S = 280.0

#: One turn: seconds by what was done, the slowest rank's.
Turn = Mapping[str, float]

DCP, DCP_ASYNC, TORCH_SAVE, DISK = "plain DCP", "plain DCP, async", "torch.save", "the disk itself"


def stall_ratio(turn: Turn) -> float:
    """How long the step waits, in times of one copy of its shard in memory."""
    return turn["stall"] / turn["memory copy"]


def write_percent(turn: Turn, what: str) -> float:
    """The durable throughput, in per cent of what a plain sequential write with one fsync reaches."""
    return 100 * turn["disk write"] / turn[what]


def read_percent(turn: Turn) -> float:
    return 100 * turn["disk read"] / turn["restore"]


def measure(options: Options) -> list[Figure]:
    return [figure for ranks in WORLDS for figure in figures_of(ranks, options.checkpoint_gb, _run(ranks, options))]


def figures_of(ranks: int, gb: int, turns: Sequence[Turn]) -> list[Figure]:
    """Pure. Throughputs are goals as times: at most 100/90 of the disk's own."""
    size = f"{gb} GB on {ranks} rank{'s' if ranks > 1 else ''}"

    def samples(value: Callable[[Turn], float]) -> tuple[float, ...]:
        return tuple(value(turn) for turn in turns)

    def seconds(what: str, system: str, name: str) -> Figure:
        return figure(what=what, system=system, unit="s", samples=samples(lambda turn: turn[name]))

    figure = partial(Figure, experiment="checkpoint")
    stall, save, restore = f"{size}: the step waits", f"{size}: durable save", f"{size}: verified restore"
    times = "copies"
    ours_of_disks = f"{ELASTICD}, of the disk's"
    return [
        figure(
            what=stall,
            system=f"{ELASTICD}, of the copy's",
            unit=times,
            samples=samples(stall_ratio),
            goal=Goal(at_most=1.2),
        ),
        seconds(stall, ELASTICD, "stall"),
        seconds(stall, DCP_ASYNC, "dcp stall"),
        seconds(stall, "torch's stager", "torch's stager"),
        seconds(stall, "one memory copy", "memory copy"),
        figure(
            what=save,
            system=ours_of_disks,
            unit="%",
            samples=samples(lambda turn: 1e4 / write_percent(turn, "save")),
            goal=Goal(at_most=100 / 0.9),
        ),
        seconds(save, ELASTICD, "save"),
        seconds(save, DCP, "dcp save"),
        seconds(save, TORCH_SAVE, "torch.save"),
        seconds(save, DISK, "disk write"),
        figure(
            what=f"{size}: checksums",
            system=f"{ELASTICD}, of the write's",
            unit="%",
            samples=samples(lambda turn: 100 * turn["checksum"] / turn["sealed write"]),
            goal=Goal(at_most=5),
        ),
        figure(
            what=restore,
            system=ours_of_disks,
            unit="%",
            samples=samples(lambda turn: 1e4 / read_percent(turn)),
            goal=Goal(at_most=100 / 0.9),
        ),
        seconds(restore, ELASTICD, "restore"),
        seconds(restore, f"{DCP}, unverified", "dcp load"),
        seconds(restore, DISK, "disk read"),
    ]


def _run(ranks: int, options: Options) -> list[Turn]:
    turns = options.ours(5)
    with tempfile.TemporaryDirectory(prefix="elasticd-bench-", dir=SCRATCH) as scratch, ExitStack() as stack:
        command = [
            sys.executable,
            "-m",
            "elasticd.bench.checkpoint_ranks",
            scratch,
            str(options.checkpoint_gb),
            str(turns),
        ]
        base = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        started = []
        for rank in range(ranks):
            pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            environment = {**base, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, env=environment, stdout=pipe, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        output, _ = started[0].communicate(timeout=TIMEOUT_S * options.checkpoint_gb)
        if any(process.wait(30) for process in started):
            raise ElasticdError(f"the ranks of the checkpoint experiment ended with {[p.returncode for p in started]}")
    found: list[Turn] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for turn in found:
        options.say(", ".join(f"{name} {seconds:.3f} s" for name, seconds in turn.items()))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
