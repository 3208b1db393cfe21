"""A node dies: SIGKILL to everything on one of three, but not on the one that hosts the workers' store.

From the moment before the signal to the first completed step of the two that are left (recovery.py); the script is
unchanged, its checkpoint at most ten steps old.
"""

from __future__ import annotations

from functools import partial

from elasticd.bench.figures import Figure, Goal
from elasticd.bench.jobs import BEST, DEFAULTS, ElasticdJob, JobShape, TorchrunJob
from elasticd.bench.options import Options
from elasticd.bench.recovery import Drill, any_but_the_store, kill, measure_recovery

DRILL = Drill(victim=any_but_the_store, break_node=kill, bound_s=120.0)


def measure(options: Options) -> list[Figure]:
    figure = partial(Figure, experiment="node_kill", what="a node is killed: to the next step", unit="s")
    shape = JobShape()
    ours = measure_recovery(lambda: ElasticdJob(shape), DRILL, options.ours(10), options.say)
    tuned = measure_recovery(lambda: TorchrunJob(shape, BEST), DRILL, options.theirs(4), options.say)
    figures = [
        figure(system=ElasticdJob.system, samples=ours, goal=Goal(at_most=1.0)),
        figure(system=BEST.name, samples=tuned),
    ]
    if not options.quick:
        plain = measure_recovery(lambda: TorchrunJob(shape, DEFAULTS), DRILL, 1, options.say)
        figures.append(figure(system=DEFAULTS.name, samples=plain))
    return figures
