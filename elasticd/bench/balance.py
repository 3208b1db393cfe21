"""Two nodes, one of which slows down to half its CPU: how much of what both can do is reached, and how soon.

The same training (balance_train.py) three times: on both nodes, each for itself; on both by a Session; and on both by
plain DDP, which divides a step equally. A sample is what is missing to the sum of the two for themselves, in per cent.
Those run at the same time too: two virtual processors share a core, or at least its memory, and so each is faster while
the other is idle. The slow node is held back by its control group once some steps are done: how many steps it takes
until shares have settled is counted from there, and the speed is that of the steps afterwards. Then the Session's node
is let go again, and the steps until shares have followed are counted once more.
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
FAST, SLOW, NO_LIMIT = 1.0, 0.5, 0.0
#: Shares are whole numbers. Of 24 the best would lose 3.7 % where the slow node comes to 0.47 of the fast one's speed.
MICRO_BATCHES = 48
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


#: The lines of each ledger, and when the nodes' speed was changed.
Trained = tuple[list[dict[str, Any]], list[float]]


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
    speed = (len(judged) - 1) / (judged[-1]["t"] - judged[0]["t"])
    return Run(steps_per_second=speed, settled_after=steps_to_settle(after), last_share=after[-1]["share"])


def steps_to_settle(own: Sequence[dict[str, Any]]) -> int:
    """Of one rank's lines since a change, how many have another share than at their end. Pure."""
    away = [number for number, line in enumerate(own, start=1) if abs(line["share"] - own[-1]["share"]) > 1]
    return max(away, default=0)


def read_release(lines: Sequence[dict[str, Any]], released_at: float, slow_share: int) -> int:
    """From rank 0's lines, for a node that was let go at that time: how many steps until shares had settled. Pure.

    ``slow_share``: of rank 0 until then. ValueError when its share has not become smaller: nothing has followed.
    """
    after = sorted((line for line in lines if line["rank"] == 0 and line["t"] > released_at), key=lambda x: x["step"])
    if not after or after[-1]["share"] >= slow_share:
        raise ValueError(f"shares have not followed in {len(after)} steps after the node was let go")
    return steps_to_settle(after)


def measure(options: Options) -> list[Figure]:
    steps = QUICK_STEPS if options.quick else STEPS
    missing: dict[str, list[float]] = {ELASTICD: [], PLAIN: []}
    settled, released = list[float](), list[float]()
    for _ in range(options.ours(2)):
        alone = [each.steps_per_second for each in run_apart("session", (FAST, SLOW), steps)]
        ours, after_release = run_and_release((FAST, SLOW), steps)
        for system, both in ((ELASTICD, ours), (PLAIN, run("plain", (FAST, SLOW), steps))):
            missing[system].append(percent_missing(both.steps_per_second, alone))
        settled.append(float(ours.settled_after))
        released.append(float(after_release))
        told = ", ".join(f"{system} {values[-1]:.1f} % missing" for system, values in missing.items())
        settling = f"settled in {settled[-1]:.0f} steps, and in {released[-1]:.0f} when it is fast again"
        options.say(f"apart {alone[0]:.2f} and {alone[1]:.2f} steps/s; {told}; {settling}")
    figure = partial(Figure, experiment="balance")
    what = "two nodes, one at half speed: missing to the sum of both"
    return [
        figure(what=what, system=ELASTICD, unit="%", samples=tuple(missing[ELASTICD]), goal=Goal(at_most=3.0)),
        figure(what=what, system=PLAIN, unit="%", samples=tuple(missing[PLAIN])),
        *(
            figure(what=what, system=ELASTICD, unit="steps", samples=tuple(found), goal=Goal(at_most=10, of="max"))
            for what, found in (
                ("a node slows down: until shares have settled", settled),
                ("it is fast again: until shares have settled", released),
            )
        ),
    ]


def run(way: str, fractions: Sequence[float], steps: int) -> Run:
    """One rank on each node; those with a fraction below one are slowed down once the first steps are done.

    ``steps``: those whose speed is taken, after all has settled.
    """
    lines, (slowed_at,) = train(way, fractions, BEFORE + SETTLING + steps)
    return read_run(lines, slowed_at)


def run_and_release(fractions: Sequence[float], steps: int) -> tuple[Run, int]:
    """The same by a Session, whose slow nodes are let go after that; the steps until shares have settled once more."""
    release_after = BEFORE + SETTLING + steps
    lines, (slowed_at, released_at) = train("session", fractions, release_after + SETTLING, release_after=release_after)
    held = read_run([line for line in lines if line["t"] < released_at], slowed_at)
    return held, read_release(lines, released_at, held.last_share)


def train(
    way: str,
    fractions: Sequence[float],
    steps: int,
    micro_batches: int = MICRO_BATCHES,
    release_after: int | None = None,
) -> Trained:
    """The lines of all ranks. Nodes with a fraction below one are slowed down after the first steps, and let go after
    ``release_after`` of them."""
    with _folder() as folder, open_hosts() as hosts:
        nodes = [hosts.add(f"node{rank}") for rank in range(len(fractions))]
        ledger, ranks = folder / "ledger.jsonl", []
        for rank, node in enumerate(nodes):
            env = _environment(nodes[0], node, rank, len(nodes))
            ranks.append(_start(node, folder, _command(way, steps, micro_batches, ledger), env))
        at = [(BEFORE, fractions)]
        if release_after is not None:
            at.append((release_after, [FAST] * len(fractions)))
        lines, changed_at = _train(nodes, ranks, at, folder, [ledger])
        return lines[ledger], changed_at


def run_apart(way: str, fractions: Sequence[float], steps: int) -> list[Run]:
    """The same, but each node is a world of its own: nothing is exchanged. The slowest takes ``steps`` of them."""
    with _folder() as folder, open_hosts() as hosts:
        nodes = [hosts.add(f"node{number}") for number in range(len(fractions))]
        ledgers = [folder / f"ledger{number}.jsonl" for number in range(len(fractions))]
        ranks = []
        for node, fraction, ledger in zip(nodes, fractions, ledgers, strict=True):
            count = BEFORE + SETTLING_ALONE + round(steps * fraction / min(fractions))  # so that all end together
            command = _command(way, count, MICRO_BATCHES, ledger)
            ranks.append(_start(node, folder, command, _environment(node, node, 0, 1)))
        lines, (slowed_at,) = _train(nodes, ranks, [(BEFORE, fractions)], folder, ledgers)
        return [read_run(lines[ledger], slowed_at, SETTLING_ALONE) for ledger in ledgers]


def _command(way: str, steps: int, micro_batches: int, ledger: Path) -> list[str]:
    return [
        *(sys.executable, str(SCRIPT), "--way", way, "--steps", str(steps)),
        *("--micro-batches", str(micro_batches), "--ledger", str(ledger)),
    ]


def _start(node: Host, folder: Path, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    return node.spawn(command, log=folder / f"{node.name}.log", env=env)


def _train(
    nodes: Sequence[Host],
    ranks: Sequence[subprocess.Popen[bytes]],
    changes: Sequence[tuple[int, Sequence[float]]],
    folder: Path,
    ledgers: Sequence[Path],
) -> tuple[dict[Path, list[dict[str, Any]]], list[float]]:
    """To the end. Nodes get the fractions of each change once rank 0 of all ledgers has done so many steps.

    The lines of each ledger, and when each change was made.
    """
    tails = {ledger: Tail() for ledger in ledgers}
    lines: dict[Path, list[dict[str, Any]]] = {ledger: [] for ledger in ledgers}
    deadline, changed_at = time.monotonic() + RUN_TIMEOUT_S, list[float]()
    try:
        for after, fractions in changes:
            while any(len([line for line in of if line["rank"] == 0]) < after for of in lines.values()):
                _check(nodes, ranks, folder, deadline)
                time.sleep(0.01)
                for ledger, tail in tails.items():
                    lines[ledger] += tail.read([ledger])
            for node, fraction in zip(nodes, fractions, strict=True):
                if fraction < FAST or changed_at:
                    node.slow(fraction if fraction < FAST else NO_LIMIT, PERIOD_S)
            changed_at.append(time.monotonic())
        for process in ranks:
            process.wait(max(0.0, deadline - time.monotonic()))
        _check(nodes, ranks, folder, deadline)
    except subprocess.TimeoutExpired as error:
        raise ElasticdError(f"training on {len(nodes)} nodes did not end in {RUN_TIMEOUT_S:g} s") from error
    finally:
        for node, process in zip(nodes, ranks, strict=True):
            node.kill()
            process.wait()
    return {ledger: [*of, *tails[ledger].read([ledger])] for ledger, of in lines.items()}, changed_at


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
