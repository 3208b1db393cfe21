"""A node falls silent: its link is cut without a packet to anybody, while all its processes run on.

From the moment before the cut to the first completed step of the two that are left. The script leaves its process
group's time-out at torch's default of half an hour, which is when torchrun would notice; torchrun is also given a
script that is tuned, too: with a group time-out of 5 s.
"""

from __future__ import annotations

from functools import partial

from elasticd.bench.figures import Figure, Goal
from elasticd.bench.jobs import BEST, ElasticdJob, JobShape, TorchrunJob
from elasticd.bench.options import Options
from elasticd.bench.recovery import Drill, any_but_the_store, cut, measure_recovery

DRILL = Drill(victim=any_but_the_store, break_node=cut, bound_s=30.0)
SHORT_TIMEOUT_S = 5.0


def measure(options: Options) -> list[Figure]:
    figure = partial(Figure, experiment="silent_loss", what="a node falls silent: to the next step", unit="s")
    shape, short = JobShape(), JobShape(group_timeout_s=SHORT_TIMEOUT_S)
    ours = measure_recovery(lambda: ElasticdJob(shape), DRILL, options.ours(8), options.say)
    figures = [figure(system=ElasticdJob.system, samples=ours, goal=Goal(at_most=1.5))]
    if not options.quick:
        plain = measure_recovery(lambda: TorchrunJob(shape, BEST), DRILL, 1, options.say)
        figures.append(figure(system=BEST.name, samples=plain))
    tuned = measure_recovery(lambda: TorchrunJob(short, BEST), DRILL, options.theirs(2), options.say)
    figures.append(figure(system=f"{BEST.name}, and the script too", samples=tuned))
    return figures
