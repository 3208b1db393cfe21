"""Checkpoints beside what else there is: plain DCP, torch.save, and the memory and the disk themselves.

The same sharded state is saved by each in turn, in one run, so that a disk that has a bad minute has it for all; a
sample is the ratio of two times from one turn. The state is 1 GB in all and then 4 GB, on one rank and on two
(checkpoint_ranks.py is what they run). Files go to /var/tmp, which is not a tmpfs anywhere that we know of.

What the disk itself does is measured with the same bytes, split over the same number of processes: each writes one file
in pieces of 16 MiB and flushes it once (``write`` and ``fsync``), or reads it in such pieces into one buffer, with
nothing of it in the page cache. The slowest process counts, as for everything else here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.options import Options
from elasticd.cluster.embedded import free_port
from elasticd.errors import ElasticdError

WORLDS = (1, 2)
#: GB of state, and how many turns.
SIZES = {1: 5, 4: 5}
SCRATCH = "/var/tmp"  # noqa: S108 - a directory of its own is made there
TIMEOUT_S = 280.0

#: One turn: seconds by what was done, the slowest rank's.
Turn = Mapping[str, float]

DCP, DCP_ASYNC, TORCH_SAVE, DISK = "plain DCP", "plain DCP, async", "torch.save", "the disk itself"


def measure(options: Options) -> list[Figure]:
    sizes = [options.checkpoint_gb] if options.checkpoint_gb else [1] if options.quick else list(SIZES)
    return [figure for gb in sizes for ranks in WORLDS for figure in figures_of(ranks, gb, _run(ranks, gb, options))]


def figures_of(ranks: int, gb: int, turns: Sequence[Turn]) -> list[Figure]:
    """Pure. Throughputs are goals as times: at most 100/90 of the disk's own. What no turn has measured is left out."""
    size = f"{gb} GB on {ranks} rank{'s' if ranks > 1 else ''}"

    def samples(value: Callable[[Turn], float]) -> tuple[float, ...]:
        return tuple(value(turn) for turn in turns)

    def seconds(what: str, system: str, name: str) -> Figure:
        return figure(what=what, system=system, unit="s", samples=samples(lambda turn: turn[name]))

    figure = partial(Figure, experiment="checkpoint")
    stall, save, restore = f"{size}: the step waits", f"{size}: durable save", f"{size}: verified restore"
    ours_of_disks = f"{ELASTICD}, of the disk's"
    found = [
        figure(
            what=stall,
            system=f"{ELASTICD}, of the copy's",
            unit="copies",
            samples=samples(lambda turn: turn["stall"] / turn["memory copy"]),
            goal=Goal(at_most=1.2),
        ),
        seconds(stall, ELASTICD, "stall"),
        *([seconds(stall, DCP_ASYNC, "dcp stall")] if "dcp stall" in turns[0] else []),
        *([seconds(stall, "torch's stager", "torch's stager")] if "torch's stager" in turns[0] else []),
        seconds(stall, "one memory copy", "memory copy"),
        figure(
            what=save,
            system=ours_of_disks,
            unit="%",
            samples=samples(lambda turn: 100 * turn["save"] / turn["disk write"]),
            goal=Goal(at_most=100 / 0.9),
        ),
        seconds(save, ELASTICD, "save"),
        seconds(save, DCP, "dcp save"),
        seconds(save, TORCH_SAVE, "torch.save"),
        seconds(save, DISK, "disk write"),
        figure(
            what=restore,
            system=ours_of_disks,
            unit="%",
            samples=samples(lambda turn: 100 * turn["restore"] / turn["disk read"]),
            goal=Goal(at_most=100 / 0.9),
        ),
        seconds(restore, ELASTICD, "restore"),
        seconds(restore, f"{DCP}, unverified", "dcp load"),
        seconds(restore, DISK, "disk read"),
    ]
    if "checksum" not in turns[0]:
        return found
    checksums = figure(
        what=f"{size}: checksums",
        system=f"{ELASTICD}, of the write's",
        unit="%",
        samples=samples(lambda turn: 100 * turn["checksum"] / turn["sealed write"]),
        goal=Goal(at_most=5),
    )
    return [*found, checksums]


def _run(ranks: int, gb: int, options: Options) -> list[Turn]:
    turns = options.ours(SIZES.get(gb, min(SIZES.values())))
    with tempfile.TemporaryDirectory(prefix="elasticd-bench-", dir=SCRATCH) as scratch, ExitStack() as stack:
        command = [
            sys.executable,
            "-m",
            "elasticd.bench.checkpoint_ranks",
            scratch,
            str(gb),
            str(turns),
        ]
        base = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started = []
        for rank in range(ranks):
            pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            environment = {**base, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, env=environment, stdout=pipe, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        output, _ = started[0].communicate(timeout=TIMEOUT_S * gb)
        if any(process.wait(30) for process in started):
            raise ElasticdError(f"the ranks of the checkpoint experiment ended with {[p.returncode for p in started]}")
    found: list[Turn] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for turn in found:
        options.say(", ".join(f"{name} {seconds:.3f} s" for name, seconds in turn.items()))
    return found
