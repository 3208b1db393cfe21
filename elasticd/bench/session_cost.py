"""A healthy run of two equal nodes: the speed of steps by a Session, and in exact mode, beside plain DDP.

The training of balance.py, with nobody slowed down. The three ways follow one another, in an order that turns round; a
sample is what one of ours has lost to the plain run of the same turn, in per cent.
"""

from __future__ import annotations

from functools import partial

from elasticd.bench.balance import FAST, PLAIN, run
from elasticd.bench.figures import ELASTICD, Figure, Goal
from elasticd.bench.options import Options
from elasticd.bench.overhead import percent_lost

EXACT = f"{ELASTICD}, exact mode"
WAYS = {PLAIN: "plain", ELASTICD: "session", EXACT: "exact"}
STEPS, QUICK_STEPS = 40, 15


def measure(options: Options) -> list[Figure]:
    steps = QUICK_STEPS if options.quick else STEPS
    lost: dict[str, list[float]] = {ELASTICD: [], EXACT: []}
    for turn in range(options.ours(6)):
        speeds = {
            system: run(WAYS[system], (FAST, FAST), steps).steps_per_second
            for system in sorted(WAYS, reverse=bool(turn % 2))
        }
        for system, values in lost.items():
            values.append(percent_lost(speeds[PLAIN], speeds[system]))
        options.say(", ".join(f"{system} {speed:.2f} steps/s" for system, speed in speeds.items()))
    figure = partial(Figure, experiment="session_cost", what="a step by Session: speed lost to plain DDP", unit="%")
    return [
        figure(system=ELASTICD, samples=tuple(lost[ELASTICD]), goal=Goal(at_most=1.0)),
        figure(system=EXACT, samples=tuple(lost[EXACT])),
    ]
