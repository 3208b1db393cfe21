"""Gradients in fewer bytes: what a node sends in a step, as its kernel counts it, and how long a step takes.

Two nodes of one rank, the training of balance.py with one micro-batch a rank, so that a step is mostly the exchange of
gradients; in turns with the same Session without compression. On this network, a bridge in memory, bytes cost little
and rounding does not come free: the seconds say what is lost where the network is not what a step waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from elasticd.bench.balance import FAST, train
from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.options import Options

WAYS = {
    "session": f"{ELASTICD}, float32",
    "bf16": f"{ELASTICD}, bf16",
    "fp16": f"{ELASTICD}, fp16",
    "powersgd": f"{ELASTICD}, PowerSGD",
}
STEPS, QUICK_STEPS = 60, 20
#: Left out: connections are made, and DDP orders its buckets anew.
WARM_UP = 6


def read_steps(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """MB sent a step and seconds a step, of rank 0 after its warm-up. Pure; ValueError when there are too few steps."""
    own = sorted((line for line in lines if line["rank"] == 0), key=lambda line: line["step"])[WARM_UP:]
    if len(own) < 2:
        raise ValueError(f"only {len(own)} steps after the warm-up")
    sent = (own[-1]["sent"] - own[0]["sent"]) / (len(own) - 1)
    return sent / 1e6, median(after["t"] - before["t"] for before, after in pairwise(own))


def measure(options: Options) -> list[Figure]:
    steps = QUICK_STEPS if options.quick else STEPS
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(options.ours(3)):
        for way, measured in found.items():
            measured.append(read_steps(train(way, (FAST, FAST), steps, micro_batches=2)[0]))
        options.say(", ".join(f"{way} {of[-1][0]:.2f} MB and {of[-1][1]:.4f} s" for way, of in found.items()))
    figure, halves = partial(Figure, experiment="compression"), []
    for way in ("bf16", "fp16", "powersgd"):
        pairs = zip(found[way], found["session"], strict=True)
        parts = tuple(100 * ours[0] / plain[0] for ours, plain in pairs)
        what = "sent in a step, of what float32 sends"
        halves.append(figure(what=what, system=WAYS[way], unit="%", samples=parts, goal=Goal(at_most=52.0)))
    seconds = [
        figure(what="a step of one micro-batch", system=name, unit="s", samples=tuple(each[1] for each in found[way]))
        for way, name in WAYS.items()
    ]
    return [*halves, *seconds]
