"""A node joins two that train: the longest gap between two completed steps of rank 0, who was there before.

From the start of the new node's daemon (or torchrun) until the larger world has stepped for a second. The script is
unchanged, so its workers are started anew in the larger world; the gap holds their start, their checkpoint's loading
and one step of 50 ms. What remains of it without a join is the step itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from elasticd.bench.figures import Figure, Goal, Sample
from elasticd.bench.jobs import BEST, DEFAULTS, ElasticdJob, Job, JobShape, TorchrunJob, first_step, wait_line
from elasticd.bench.options import Options
from elasticd.bench.recovery import Say, become_whole, say_sample
from elasticd.testing.history import Trained

BEFORE, AFTER = 2, 3
BOUND_S = 60.0
STEADY_S = 1.0


def longest_gap(lines: Sequence[Trained], start: float, end: float) -> float:
    """The longest time between two completed steps of rank 0 in ``start`` .. ``end``. Pure."""
    times = [line.t for line in lines if line.rank == 0 and start <= line.t <= end]
    return max((after - before for before, after in pairwise([start, *times, end])), default=0.0)


def measure(options: Options) -> list[Figure]:
    figure = partial(Figure, experiment="join", what="a node joins: the others' longest gap", unit="s")
    shape = JobShape(nodes=BEFORE)
    ours = _measure(lambda: ElasticdJob(shape), options.ours(6), options.say)
    tuned = _measure(lambda: TorchrunJob(shape, BEST), options.theirs(3), options.say)
    figures = [
        figure(system=ElasticdJob.system, samples=ours, goal=Goal(at_most=1.0)),
        figure(system=BEST.name, samples=tuned),
    ]
    if not options.quick:
        plain = _measure(lambda: TorchrunJob(shape, DEFAULTS), 1, options.say)
        figures.append(figure(system=DEFAULTS.name, samples=plain))
    return figures


def _measure(make_job: Callable[[], Job], times: int, say: Say) -> tuple[Sample, ...]:
    """The joiner is killed after each time, so that it can join again."""
    samples: list[Sample] = []
    while len(samples) < times:
        with make_job() as job:
            while len(samples) < times:
                sample = _once(job)
                samples.append(sample)
                say_sample(job, sample, say)
                if isinstance(sample, str):
                    break
                job.kill_node(AFTER - 1)
    return tuple(samples)


def _once(job: Job) -> Sample:
    become_whole(job, BEFORE)
    start = time.monotonic()
    job.start_node(AFTER - 1)
    grown = wait_line(job, lambda lines: first_step(lines, start, world=AFTER), BOUND_S)
    if grown is None:
        return "the job ends" if job.ended() else f"no step of {AFTER} nodes in {BOUND_S:g} s"
    end = grown.t + STEADY_S
    wait_line(job, lambda lines: first_step(lines, end, world=AFTER), BOUND_S)
    return longest_gap(job.trained(), start, end)
