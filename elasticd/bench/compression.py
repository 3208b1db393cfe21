"""Gradients in fewer bytes: what a node sends in a step, as its kernel counts it, and how long a step takes.

Two nodes of one rank, the training of balance.py with one micro-batch a rank, so that a step is mostly the exchange of
gradients; in turns with the same Session without compression. On this network, a bridge in memory, bytes cost little
and rounding does not come free: the seconds say what is lost where the network is not what a step waits for.

And what is lost of the loss curve: the shipped byte GPT on two ranks, 200 steps, with and without compression, from the
same weights on the same batches, beside what chance does to that curve without any compression: other weights to begin
with, and other batches. Both are measured in the same run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations, pairwise
from math import inf, isfinite
from pathlib import Path
from statistics import fmean, median
from typing import Any

from elasticd.bench.balance import FAST, train
from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.options import Options
from elasticd.errors import ElasticdError
from elasticd.testing.history import read_trained

WAYS = {
    "session": f"{ELASTICD}, float32",
    "bf16": f"{ELASTICD}, bf16",
    "fp16": f"{ELASTICD}, fp16",
    "powersgd": f"{ELASTICD}, PowerSGD",
}
MODULE = "elasticd.examples.byte_gpt"
STEPS, QUICK_STEPS = 60, 20
#: Left out: connections are made, and DDP orders its buckets anew.
WARM_UP = 6
COMPRESSED = ("bf16", "fp16", "powersgd")
CURVE_STEPS, QUICK_CURVE_STEPS = 200, 60
#: Means over so many steps are compared: single losses differ more by their batch than by anything else.
WINDOW = 20
SEEDS = (1, 2, 3)
_CURVE_TIMEOUT_S = 300.0


def read_steps(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """MB sent a step and seconds a step, of rank 0 after its warm-up. Pure; ValueError when there are too few steps."""
    own = sorted((line for line in lines if line["rank"] == 0), key=lambda line: line["step"])[WARM_UP:]
    if len(own) < 2:
        raise ValueError(f"only {len(own)} steps after the warm-up")
    sent = (own[-1]["sent"] - own[0]["sent"]) / (len(own) - 1)
    return sent / 1e6, median(after["t"] - before["t"] for before, after in pairwise(own))


def curve_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two loss curves: by how much, in per cent, the means over WINDOW steps differ at most. Pure.

    Infinite where one of them is no number: such a model learns nothing.
    """
    if not all(map(isfinite, [*one, *other])):
        return inf
    starts = range(0, len(one), WINDOW)
    means = [(fmean(one[start : start + WINDOW]), fmean(other[start : start + WINDOW])) for start in starts]
    return max(100 * abs(ours - theirs) / theirs for ours, theirs in means)


def noise_of(curves: Sequence[Sequence[float]]) -> float:
    """The least distance between any two of them: the strictest that chance can be taken for. Pure."""
    return min(curve_distance(one, other) for one, other in combinations(curves, 2))


def curve(steps: int, *arguments: str) -> list[float]:
    """The loss of each step on two ranks of this machine. ElasticdError when they fail."""
    with tempfile.TemporaryDirectory(prefix="compression-bench-") as folder:
        ledger = Path(folder) / "ledger.jsonl"
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", MODULE]
        command += ["--steps", str(steps), "--ledger", str(ledger), *arguments]
        env = {name: value for name, value in os.environ.items() if not name.startswith("ELASTICD_")}
        done = subprocess.run(
            [sys.executable, *command],
            check=False,
            env={**env, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=_CURVE_TIMEOUT_S,
        )
        losses = [line.loss for line in read_trained(ledger) if line.rank == 0 and line.loss is not None]
    if done.returncode != 0 or len(losses) != steps:
        raise ElasticdError(f"{len(losses)} of {steps} steps: {done.stderr[-2000:]}")
    return losses


def measure_curves(options: Options) -> list[Figure]:
    """How far compression moves the curve, in parts of how far chance does. A sample for each seed."""
    steps, seeds = (QUICK_CURVE_STEPS, SEEDS[:2]) if options.quick else (CURVE_STEPS, SEEDS)
    plain = {seed: curve(steps, "--seed", str(seed)) for seed in seeds}
    noise = noise_of(list(plain.values()))
    options.say(f"loss curves of {steps} steps: two seeds differ by {noise:.2f} % at least")
    figure = partial(Figure, experiment="compression", unit="%")
    figures = [figure(what="loss curve: the least distance of two seeds", system=WAYS["session"], samples=(noise,))]
    for way, goal in (("bf16", Goal(at_most=100.0, of="max")), ("fp16", None), ("powersgd", None)):
        found = {
            seed: curve_distance(curve(steps, "--seed", str(seed), "--compress", way), plain[seed])
            for seed in (seeds if goal else seeds[:1])
        }
        options.say(f"{way}: {', '.join(f'{of:.2f} %' for of in found.values())} off float32 with the same seed")
        samples = tuple(100 * of / noise for of in found.values())
        what = "loss curve: distance to float32, of that of two seeds"
        figures.append(figure(what=what, system=WAYS[way], samples=samples, goal=goal))
    return figures


def measure(options: Options) -> list[Figure]:
    steps = QUICK_STEPS if options.quick else STEPS
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(options.ours(3)):
        for way, measured in found.items():
            measured.append(read_steps(train(way, (FAST, FAST), steps, micro_batches=2)[0]))
        options.say(", ".join(f"{way} {of[-1][0]:.2f} MB and {of[-1][1]:.4f} s" for way, of in found.items()))
    figure, halves = partial(Figure, experiment="compression"), []
    for way in COMPRESSED:
        pairs = zip(found[way], found["session"], strict=True)
        parts = tuple(100 * ours[0] / plain[0] for ours, plain in pairs)
        what = "sent in a step, of what float32 sends"
        halves.append(figure(what=what, system=WAYS[way], unit="%", samples=parts, goal=Goal(at_most=52.0)))
    seconds = [
        figure(what="a step of one micro-batch", system=name, unit="s", samples=tuple(each[1] for each in found[way]))
        for way, name in WAYS.items()
    ]
    return [*halves, *seconds, *measure_curves(options)]
