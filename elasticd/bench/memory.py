"""Copies of the state in RAM: what a step waits for one, how fast it is back, and a node made up for by its buddy.

Two nodes of one rank each, with a shard of 1 GB a rank, by real daemons: torch.save and torch.load on the same tmpfs,
and DCP there, do the same beside it in the same run. While a copy is on its way to the buddy the daemon's loop is asked
how long it takes to answer: its heartbeats hang on it. Then three nodes, one of which is killed again and again.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.jobs import STEP_S, ElasticdJob, JobShape
from elasticd.bench.options import Options
from elasticd.bench.recovery import NODES, Drill, any_but_the_store, kill, measure_recovery
from elasticd.errors import ElasticdError
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.history import Trained

RANKS = 2
#: Of the node that is killed: fewer completed steps than this are lost.
EVERY_STEPS = 4
TIMEOUT_S = 240.0
DRILL = Drill(victim=any_but_the_store, break_node=kill, bound_s=60.0)

#: One turn: seconds by what was done, the slowest rank's.
Turn = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShape(JobShape):
    """A script that keeps its state in RAM. By name: beside bench/__main__.py no script can start warm."""

    module: bool = True

    def command(self, folder: Path) -> list[str]:
        del folder
        return ["elasticd.bench.memory_train", str(EVERY_STEPS), str(STEP_S)]


def measure(options: Options) -> list[Figure]:
    turns, delays = _run_ranks(options)
    figures = figures_of(turns, delays)
    jobs: list[ElasticdJob] = []

    def make_job() -> ElasticdJob:
        jobs.append(ElasticdJob(MemoryShape()))
        return jobs[-1]

    seconds = measure_recovery(make_job, DRILL, options.ours(5), options.say)
    lost = [count for job in jobs for count in steps_lost(job.cluster.trained(), world=NODES - 1)]
    figure = partial(Figure, experiment="memory", system=ELASTICD)
    return [
        *figures,
        figure(what="a node is killed: to a step from its buddy's RAM", unit="s", samples=seconds),
        figure(
            what="a node is killed: completed steps lost",
            unit="steps",
            samples=tuple(float(count) for count in lost) or ("no world without the node",),
            goal=Goal(at_most=EVERY_STEPS - 1, of="max"),
        ),
    ]


def figures_of(turns: Sequence[Turn], delays_s: Sequence[float]) -> list[Figure]:
    """Pure. ``delays_s``: of the daemon's loop while copies were on their way."""

    def seconds(what: str, system: str, name: str, goal: Goal | None = None) -> Figure:
        samples = tuple(turn[name] for turn in turns)
        return Figure(experiment="memory", what=what, system=system, unit="s", samples=samples, goal=goal)

    size = "1 GB a rank, in RAM"
    return [
        seconds(f"{size}: restore", ELASTICD, "restore", Goal(at_most=0.5)),
        seconds(f"{size}: restore", "torch.load, unverified", "torch.load"),
        seconds(f"{size}: restore", "plain DCP, unverified", "dcp load"),
        seconds(f"{size}: the step waits", ELASTICD, "stall"),
        seconds(f"{size}: the step waits", "torch.save", "torch.save"),
        seconds(f"{size}: the step waits", "plain DCP, async", "dcp stall"),
        seconds(f"{size}: the step waits", "one memory copy", "memory copy"),
        seconds(f"{size}: until a buddy has it, checked", ELASTICD, "safe"),
        Figure(
            experiment="memory",
            what=f"{size}: the daemon's loop answers meanwhile",
            system=ELASTICD,
            unit="ms",
            samples=tuple(1000 * delay for delay in delays_s) or ("never asked",),
            goal=Goal(at_most=100, of="max"),
        ),
    ]


def steps_lost(lines: Sequence[Trained], *, world: int) -> list[int]:
    """Of each round of so many ranks: the completed steps of the rounds before that it had to repeat. Pure."""
    lost, newest = [], 0
    seen: set[int] = set()
    for line in sorted(lines, key=lambda line: line.t):
        if line.round_number not in seen:
            seen.add(line.round_number)
            if line.world == world:
                lost.append(newest - (line.step - 1))
        newest = max(newest, line.step)
    return lost


def _run_ranks(options: Options) -> tuple[list[Turn], list[float]]:
    folder, scratch = (Path(tempfile.mkdtemp(prefix="elasticd-bench-", dir=at)) for at in (None, "/dev/shm"))  # noqa: S108
    turns = options.ours(5)
    spec = ClusterSpec(nodes=RANKS, memory_bytes=6 * 10**9, env={"ELASTICD_BENCH_SHM": str(scratch)})
    try:
        with Cluster(spec, folder=folder / "cluster") as cluster, _Loop(cluster, folder / "copying") as loop:
            arguments = (str(folder), "1", str(turns))
            cluster.submit("ranks", ["elasticd.bench.memory_ranks", *arguments], module=True, nodes=str(RANKS))
            over = partial(_is_over, cluster)
            cluster.wait_until(over, TIMEOUT_S, "the ranks of the memory experiment end")
        text = (folder / "turns.jsonl").read_text() if (folder / "turns.jsonl").exists() else ""
        found: list[Turn] = [json.loads(line) for line in text.splitlines()]
        if len(found) < turns:
            raise ElasticdError(f"the ranks of the memory experiment failed\n{cluster.last_words()}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
    for turn in found:
        options.say(", ".join(f"{name} {seconds:.3f} s" for name, seconds in turn.items()))
    return found, loop.delays_s


def _is_over(cluster: Cluster) -> bool:
    return any(event.name == "job_over" for event in cluster.history())


class _Loop:
    """Asks a daemon's loop how long it takes to answer, for as long as copies are on their way."""

    def __init__(self, cluster: Cluster, flag: Path) -> None:
        self._url, self._flag = cluster.nodes[0].metrics_url, flag
        self.delays_s: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> _Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.05):
            if self._flag.exists():
                with contextlib.suppress(OSError), urllib.request.urlopen(self._url, timeout=5) as answer:  # noqa: S310
                    found = re.search(r"^elasticd_loop_delay_seconds (\S+)", answer.read().decode(), re.MULTILINE)
                    if found is not None:
                        self.delays_s.append(float(found[1]))
