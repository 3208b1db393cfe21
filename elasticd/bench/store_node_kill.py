"""The node dies that hosts the store: the workers' (elasticd), or the rendezvous' and the workers' (torchrun).

The same clock as node_kill. torchrun's job ends with that node, whatever its flags are.
"""

from __future__ import annotations

from functools import partial

from elasticd.bench.figures import Figure, Goal
from elasticd.bench.jobs import BEST, DEFAULTS, ElasticdJob, Job, JobShape, TorchrunJob
from elasticd.bench.options import Options
from elasticd.bench.recovery import Drill, kill, measure_recovery


def the_store(job: Job) -> int:
    return job.store_node()


DRILL = Drill(victim=the_store, break_node=kill, bound_s=60.0)


def measure(options: Options) -> list[Figure]:
    figure = partial(
        Figure, experiment="store_node_kill", what="the store's node is killed: to the next step", unit="s"
    )
    shape = JobShape()
    ours = measure_recovery(lambda: ElasticdJob(shape), DRILL, options.ours(8), options.say)
    figures = [figure(system=ElasticdJob.system, samples=ours, goal=Goal(at_most=1.0))]
    for flags in (BEST,) if options.quick else (BEST, DEFAULTS):
        theirs = measure_recovery(partial(TorchrunJob, shape, flags), DRILL, 1, options.say)
        figures.append(figure(system=flags.name, samples=theirs))
    return figures
