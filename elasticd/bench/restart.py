"""A worker dies: SIGKILL to one of two on one node, and both are started again.

From the moment before the signal to the first completed step of a process that was not there before. elasticd forks
workers from its warm server; torchrun spawns interpreters that import torch anew.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial

from elasticd.bench.figures import Figure, Sample
from elasticd.bench.jobs import BEST, ElasticdJob, Job, JobShape, TorchrunJob, wait_line
from elasticd.bench.options import Options
from elasticd.bench.recovery import Say, become_whole, say_sample
from elasticd.testing.history import Trained

WORKERS = 2
BOUND_S = 60.0
SHAPE = JobShape(nodes=1, limits="1:1", nproc=WORKERS)


def first_new_step(lines: Sequence[Trained], killed_at: float) -> Trained | None:
    """The first step after ``killed_at`` by a process that had completed none before. Pure."""
    old = {line.pid for line in lines if line.t <= killed_at}
    return next((line for line in lines if line.t > killed_at and line.pid not in old), None)


def measure(options: Options) -> list[Figure]:
    figure = partial(Figure, experiment="restart", what="a worker is killed: to the next step", unit="s")
    ours = _measure(lambda: ElasticdJob(SHAPE), options.ours(10), options.say)
    theirs = _measure(lambda: TorchrunJob(SHAPE, BEST), options.theirs(4), options.say)
    return [figure(system=ElasticdJob.system, samples=ours), figure(system=BEST.name, samples=theirs)]


def _measure(make_job: Callable[[], Job], times: int, say: Say) -> tuple[Sample, ...]:
    samples: list[Sample] = []
    with make_job() as job:
        while len(samples) < times:
            samples.append(_once(job))
            say_sample(job, samples[-1], say)
    return tuple(samples)


def _once(job: Job) -> Sample:
    become_whole(job, WORKERS)
    victim = next(line.pid for line in reversed(job.trained()) if line.rank == WORKERS - 1)
    killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    line = wait_line(job, lambda lines: first_new_step(lines, killed_at), BOUND_S)
    return f"no step in {BOUND_S:g} s" if line is None else line.t - killed_at
