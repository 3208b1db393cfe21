"""Two nodes, one of which slows down to half its CPU: how much of what both can do is reached, and how soon.

The same training (balance_train.py) by a Session and by plain DDP, which divides a step equally. The slow node is held
back by its control group once some steps are done: how many steps it takes until shares have settled is counted from
there. Then nodes take turns: some steps together, and a while in which each trains by itself, both at the same time,
since two virtual processors share a core, or at least its memory. A sample is what a turn misses to the sum of both by
themselves just before and after it, in per cent: the speed of a rented machine drifts by a tenth within a minute. It
also varies from second to second, and a step waits for whoever is slow just then: what that alone must cost is computed
from how unevenly each node trains by itself. Then the Session's node is let go again, and the steps until shares have
followed are counted once more.
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
from itertools import chain, pairwise, product
from pathlib import Path
from statistics import fmean, median
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
#: A step of some three seconds. Shares are whole numbers: of 24 the best would lose 3.7 % where the slow node comes to
#: 0.47 of the fast one's speed. And what a step has once (the exchange, the optimizer) took 1.8 % of one with 48 here.
MICRO_BATCHES = 96
#: Of the slow node's quota. A node that has used its quota up when gradients are to be exchanged holds all others up
#: until the next period: half of the kernel's usual 0.1 s would be 5 % of a step here, and that is the quota's, not
#: the slow processor's that it stands for.
PERIOD_S = 0.01
#: Shares that differ by no more than this are equally good, and chance decides between them: they make a step longer by
#: less than what Session changes shares for (core/balance.py, WORTHWHILE).
AS_GOOD = 2
#: Done before a node is slowed down, and afterwards until shares must have settled, by a wide margin.
BEFORE, SETTLING = 6, 14
#: In a turn the first step is not timed: nodes do not end their time by themselves at the same moment.
TURNS, QUICK_TURNS, TURN_STEPS, ALONE_S = 6, 1, 5, 8.0
PORT = 29511
RUN_TIMEOUT_S = 600.0


#: The lines of each ledger, and when the nodes' speed was changed.
Trained = tuple[list[dict[str, Any]], list[float]]


def read_turns(lines: Sequence[dict[str, Any]], micro_batches: int) -> list[float]:
    """Of each turn, what is missing to the sum of all, each for itself before and after it. Pure.

    ValueError when there is no whole turn.
    """
    ended_at = {line["step"]: line["t"] for line in lines if line["rank"] == 0}
    alone: dict[int, float] = {}
    for line in lines:
        if "alone" in line:
            alone[line["step"]] = alone.get(line["step"], 0.0) + len(line["alone"]) / sum(line["alone"])
    missing = []
    for before, after in pairwise(sorted(alone)):
        steps = after - (before + 1)
        together = micro_batches * steps / (ended_at[after] - ended_at[before + 1])
        missing.append(100 * (1 - together / fmean([alone[before], alone[after]])))
    if not missing:
        raise ValueError(f"nodes were by themselves {len(alone)} times: no turn between")
    return missing


def lost_to_unevenness(lines: Sequence[dict[str, Any]]) -> float:
    """What must be missing, in per cent, as nodes that train by themselves do not take the same time for as many
    micro-batches as they have in a step. Pure.

    For each node, how long its last share would have taken, time after time, in parts of their mean. The step of each
    combination takes as long as the longest.
    """
    relative = []
    for rank in {line["rank"] for line in lines}:
        own = [line for line in lines if line["rank"] == rank and "alone" in line]
        took, share = list(chain.from_iterable(line["alone"] for line in own)), own[-1]["share"]
        lasts = [sum(took[first : first + share]) for first in range(0, len(took) - share + 1, share)]
        relative.append([each / fmean(lasts) for each in lasts])
    return 100 * (1 - 1 / fmean(map(max, product(*relative))))


def read_settling(lines: Sequence[dict[str, Any]], slowed_at: float) -> tuple[int, int]:
    """From rank 0's lines, for a node that was slowed down at that time: how many steps until shares had settled, and
    its own share then. Pure."""
    after = sorted((line for line in lines if line["rank"] == 0 and line["t"] > slowed_at), key=lambda x: x["step"])
    return steps_to_settle(after), after[-1]["share"]


def steps_to_settle(own: Sequence[dict[str, Any]]) -> int:
    """Of one rank's lines since a change, how many have another share than at their end. Pure."""
    away = [number for number, line in enumerate(own, start=1) if abs(line["share"] - own[-1]["share"]) > AS_GOOD]
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
    turns = QUICK_TURNS if options.quick else TURNS
    missing: dict[str, list[float]] = {ELASTICD: [], PLAIN: []}
    uneven, settled, released = list[float](), list[float](), list[float]()
    for _ in range(options.ours(2)):
        ours = run("session", turns)
        missing[ELASTICD] += ours.missing_percent
        uneven.append(ours.uneven_percent)
        settled.append(float(ours.settled_after))
        released.append(float(ours.followed_after))
        missing[PLAIN] += run("plain", QUICK_TURNS).missing_percent
        told = ", ".join(f"{system} {median(values):.1f} % missing" for system, values in missing.items())
        settling = f"settled in {settled[-1]:.0f} steps, and in {released[-1]:.0f} when it is fast again"
        turn_by_turn = " ".join(f"{each:.1f}" for each in ours.missing_percent)
        options.say(f"{told}; {turn_by_turn} turn by turn, unevenness {uneven[-1]:.1f} %; {settling}")
    figure = partial(Figure, experiment="balance")
    what = "two nodes, one at half speed: missing to the sum of both"
    return [
        figure(what=what, system=ELASTICD, unit="%", samples=tuple(missing[ELASTICD]), goal=Goal(at_most=3.0)),
        figure(what=what, system=PLAIN, unit="%", samples=tuple(missing[PLAIN])),
        figure(what="... what their own unevenness must cost", system="this machine", unit="%", samples=tuple(uneven)),
        *(
            figure(what=what, system=ELASTICD, unit="steps", samples=tuple(found), goal=Goal(at_most=10, of="max"))
            for what, found in (
                ("a node slows down: until shares have settled", settled),
                ("it is fast again: until shares have settled", released),
            )
        ),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What each turn misses, and must miss as nodes are uneven; the steps until shares had settled at first, and after
    the release."""

    missing_percent: list[float]
    uneven_percent: float
    settled_after: int
    followed_after: int


def run(way: str, turns: int) -> Run:
    """By plain DDP, which has nothing to settle, without the release."""
    first = BEFORE + SETTLING
    alone_after = range(first, first + turns * TURN_STEPS + 1, TURN_STEPS)
    release_after = alone_after[-1] + 1 if way == "session" else None
    lines, changed_at = train(
        way,
        (FAST, SLOW),
        alone_after[-1] + (SETTLING if release_after else 0),
        release_after=release_after,
        alone_after=alone_after,
    )
    settled_after, slow_share = read_settling([line for line in lines if line["step"] <= first], changed_at[0])
    return Run(
        missing_percent=read_turns(lines, MICRO_BATCHES),
        uneven_percent=lost_to_unevenness(lines),
        settled_after=settled_after,
        followed_after=read_release(lines, changed_at[1], slow_share) if release_after else 0,
    )


def train(
    way: str,
    fractions: Sequence[float],
    steps: int,
    micro_batches: int = MICRO_BATCHES,
    release_after: int | None = None,
    alone_after: Sequence[int] = (),
) -> Trained:
    """The lines of all ranks, one on each node. Nodes with a fraction below one are slowed down after the first steps,
    and let go after ``release_after`` of them. After those of ``alone_after`` each node trains by itself for a while.
    """
    with _folder() as folder, open_hosts() as hosts:
        nodes = [hosts.add(f"node{rank}") for rank in range(len(fractions))]
        ledger, ranks = folder / "ledger.jsonl", []
        for rank, node in enumerate(nodes):
            env = _environment(nodes[0], node, rank, len(nodes))
            command = [
                *(sys.executable, str(SCRIPT), "--way", way, "--steps", str(steps)),
                *("--micro-batches", str(micro_batches), "--ledger", str(ledger), "--alone-seconds", str(ALONE_S)),
                *("--alone-after", *map(str, alone_after)),
            ]
            ranks.append(node.spawn(command, log=folder / f"{node.name}.log", env=env))
        at = [(BEFORE, fractions)]
        if release_after is not None:
            at.append((release_after, [FAST] * len(fractions)))
        return _train(nodes, ranks, at, folder, ledger)


def _train(
    nodes: Sequence[Host],
    ranks: Sequence[subprocess.Popen[bytes]],
    changes: Sequence[tuple[int, Sequence[float]]],
    folder: Path,
    ledger: Path,
) -> Trained:
    """To the end. Nodes get the fractions of each change once rank 0 has done so many steps."""
    tail, lines = Tail(), list[dict[str, Any]]()
    deadline, changed_at = time.monotonic() + RUN_TIMEOUT_S, list[float]()
    try:
        for after, fractions in changes:
            while len([line for line in lines if line["rank"] == 0]) < after:
                _check(nodes, ranks, folder, deadline)
                time.sleep(0.01)
                lines += tail.read([ledger])
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
    return [*lines, *tail.read([ledger])], changed_at


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
