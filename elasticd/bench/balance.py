"""Two nodes, one of which slows down to half its CPU: how much of what both can do is reached, and how soon.

The same training (balance_train.py) three times: on both nodes, each for itself; on both by a Session; and on both by
plain DDP, which divides a step equally. A sample is what is missing to the sum of the two for themselves, in per cent.
Those run at the same time too: two virtual processors share a core, or at least its memory, and so each is faster while
the other is idle. The slow node is held back by its control group once some steps are done: how many steps it takes
until shares have settled is counted from there, and the speed is that of the steps afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import elasticd.bench
from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.options import Options
from elasticd.errors import ElasticdError
from elasticd.testing.history import Tail
from elasticd.testing.hosts import Host, open_hosts

SCRIPT = Path(elasticd.bench.__file__).with_name("balance_train.py")
PLAIN = "plain DDP"
FAST, SLOW = 1.0, 0.5
#: Shares of 16 and 8 are as 2 to 1: nothing is lost by shares being whole numbers.
MICRO_BATCHES = 24
STEPS, QUICK_STEPS = 20, 8
#: Of the slow node's quota. A node that has used its quota up when gradients are to be exchanged holds all others up
#: until the next period: half of the kernel's usual 0.1 s would be 5 % of a step here, and that is the quota's, not
#: the slow processor's that it stands for.
PERIOD_S = 0.01
#: Done before a node is slowed down, and left out of the speed afterwards, whatever happens in them.
BEFORE, SETTLING = 6, 12
#: A node for itself settles at once.
SETTLING_ALONE = 2
PORT = 29511
RUN_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """``steps_per_second`` once shares should have settled; ``settled_after``: the steps that they took to.

    ``last_share``: the micro-batches of rank 0 in the last step.
    """

    steps_per_second: float
    settled_after: int
    last_share: int


def percent_missing(reached: float, alone: Sequence[float]) -> float:
    """What of the sum of all, each for itself, is not reached, in per cent. Pure."""
    return 100 * (1 - reached / sum(alone))


def read_run(lines: Sequence[dict[str, Any]], slowed_at: float, settling: int = SETTLING) -> Run:
    """From rank 0's lines, for a node that was slowed down at that time. Pure.

    ValueError when there are too few steps. Shares that differ by one from those at the end have settled: between two
    that are equally good, chance decides.
    """
    own = sorted((line for line in lines if line["rank"] == 0), key=lambda line: line["step"])
    after = [line for line in own if line["t"] > slowed_at]
    judged = after[settling:]
    if len(judged) < 2:
        raise ValueError(f"only {len(after)} steps after the node was slowed down")
    away = [number for number, line in enumerate(after, start=1) if abs(line["share"] - after[-1]["share"]) > 1]
    speed = (len(judged) - 1) / (judged[-1]["t"] - judged[0]["t"])
    return Run(steps_per_second=speed, settled_after=max(away, default=0), last_share=after[-1]["share"])


def measure(options: Options) -> list[Figure]:
    steps = QUICK_STEPS if options.quick else STEPS
    missing: dict[str, list[float]] = {ELASTICD: [], PLAIN: []}
    settled: list[float] = []
    for _ in range(options.ours(2)):
        alone = [each.steps_per_second for each in run_apart("session", (FAST, SLOW), steps)]
        for system, way in ((ELASTICD, "session"), (PLAIN, "plain")):
            both = run(way, (FAST, SLOW), steps)
            missing[system].append(percent_missing(both.steps_per_second, alone))
            if system == ELASTICD:
                settled.append(float(both.settled_after))
        told = ", ".join(f"{system} {values[-1]:.1f} % missing" for system, values in missing.items())
        options.say(f"apart {alone[0]:.2f} and {alone[1]:.2f} steps/s; {told}; settled in {settled[-1]:.0f} steps")
    figure = partial(Figure, experiment="balance")
    what = "two nodes, one at half speed: missing to the sum of both"
    return [
        figure(what=what, system=ELASTICD, unit="%", samples=tuple(missing[ELASTICD]), goal=Goal(at_most=3.0)),
        figure(what=what, system=PLAIN, unit="%", samples=tuple(missing[PLAIN])),
        figure(
            what="a node slows down: until shares have settled",
            system=ELASTICD,
            unit="steps",
            samples=tuple(settled),
            goal=Goal(at_most=10, of="max"),
        ),
    ]


def run(way: str, fractions: Sequence[float], steps: int) -> Run:
    """One rank on each node; those with a fraction below one are slowed down once the first steps are done.

    ``steps``: those whose speed is taken, after all has settled.
    """
    with _folder() as folder, open_hosts() as hosts:
        nodes = [hosts.add(f"node{rank}") for rank in range(len(fractions))]
        ledger, count = folder / "ledger.jsonl", BEFORE + SETTLING + steps
        ranks = [
            _start(node, folder, way, count, ledger, _environment(nodes[0], node, rank, len(nodes)))
            for rank, node in enumerate(nodes)
        ]
        lines, slowed_at = _train(nodes, ranks, fractions, folder, [ledger])
        return read_run(lines[ledger], slowed_at)


def run_apart(way: str, fractions: Sequence[float], steps: int) -> list[Run]:
    """The same, but each node is a world of its own: nothing is exchanged. The slowest takes ``steps`` of them."""
    with _folder() as folder, open_hosts() as hosts:
        nodes = [hosts.add(f"node{number}") for number in range(len(fractions))]
        ledgers = [folder / f"ledger{number}.jsonl" for number in range(len(fractions))]
        ranks = []
        for node, fraction, ledger in zip(nodes, fractions, ledgers, strict=True):
            count = BEFORE + SETTLING_ALONE + round(steps * fraction / min(fractions))  # so that all end together
            ranks.append(_start(node, folder, way, count, ledger, _environment(node, node, 0, 1)))
        lines, slowed_at = _train(nodes, ranks, fractions, folder, ledgers)
        return [read_run(lines[ledger], slowed_at, SETTLING_ALONE) for ledger in ledgers]


def _start(
    node: Host, folder: Path, way: str, steps: int, ledger: Path, env: dict[str, str]
) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, str(SCRIPT), "--way", way, "--steps", str(steps)),
        *("--micro-batches", str(MICRO_BATCHES), "--ledger", str(ledger)),
    ]
    return node.spawn(command, log=folder / f"{node.name}.log", env=env)


def _train(
    nodes: Sequence[Host],
    ranks: Sequence[subprocess.Popen[bytes]],
    fractions: Sequence[float],
    folder: Path,
    ledgers: Sequence[Path],
) -> tuple[dict[Path, list[dict[str, Any]]], float]:
    """To the end. The lines of each ledger, and when nodes were slowed down: after the first steps of all."""
    tails = {ledger: Tail() for ledger in ledgers}
    lines: dict[Path, list[dict[str, Any]]] = {ledger: [] for ledger in ledgers}
    deadline = time.monotonic() + RUN_TIMEOUT_S
    try:
        while any(len([line for line in of if line["rank"] == 0]) < BEFORE for of in lines.values()):
            _check(nodes, ranks, folder, deadline)
            time.sleep(0.01)
            for ledger, tail in tails.items():
                lines[ledger] += tail.read([ledger])
        for node, fraction in zip(nodes, fractions, strict=True):
            if fraction < 1:
                node.slow(fraction, PERIOD_S)
        slowed_at = time.monotonic()
        for process in ranks:
            process.wait(max(0.0, deadline - time.monotonic()))
        _check(nodes, ranks, folder, deadline)
    except subprocess.TimeoutExpired as error:
        raise ElasticdError(f"training on {len(nodes)} nodes did not end in {RUN_TIMEOUT_S:g} s") from error
    finally:
        for node, process in zip(nodes, ranks, strict=True):
            node.kill()
            process.wait()
    return {ledger: [*of, *tails[ledger].read([ledger])] for ledger, of in lines.items()}, slowed_at


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="balance-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(nodes: Sequence[Host], processes: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    """ElasticdError when a rank has failed, or time is up."""
    for node, process in zip(nodes, processes, strict=True):
        if process.poll():
            log = (folder / f"{node.name}.log").read_text(errors="replace")
            raise ElasticdError(f"{node.name} ended with status {process.returncode}\n{log[-4000:]}")
    if time.monotonic() > deadline:
        raise ElasticdError(f"no steps in {RUN_TIMEOUT_S:g} s")


def _environment(first: Host, node: Host, rank: int, world_size: int) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ELASTICD_", "TORCHELASTIC_"))}
    return {
        **clean,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": node.interface,
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": first.address,
        "MASTER_PORT": str(PORT),
    }
