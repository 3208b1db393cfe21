"""Break a node of a running job, and see when the rest completes a step as a world of its own; again and again.

What node_kill, store_node_kill and silent_loss have in common. The clock starts right before the fault is applied and
stops at the time that a surviving rank wrote after its first step (its 50 ms included) in a world without the victim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elasticd.bench.figures import Sample
from elasticd.bench.jobs import Job, first_step, wait_line, wait_whole
from elasticd.errors import ElasticdError
from elasticd.testing.history import Trained

#: After a node is back, this long for what its start still costs the machine.
CALM_S = 1.0
NODES = 3

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """``victim`` names the node to break; without a step after ``bound_s``, that is the result."""

    victim: Callable[[Job], int]
    break_node: Callable[[Job, int], None]
    bound_s: float = 60.0


def seconds_to_step(lines: Sequence[Trained], broken_at: float, *, world: int) -> float | None:
    """From the fault to the first completed step of a world of that many ranks; None if there was none. Pure."""
    line = first_step(lines, broken_at, world=world)
    return None if line is None else line.t - broken_at


def measure_recovery(make_job: Callable[[], Job], drill: Drill, times: int, say: Say) -> tuple[Sample, ...]:
    """Always on a whole and calm job: the node is started again after each time; a job that ended is made anew."""
    samples: list[Sample] = []
    while len(samples) < times:
        with make_job() as job:
            while len(samples) < times:
                sample = _once(job, drill)
                samples.append(sample)
                say_sample(job, sample, say)
                if isinstance(sample, str):
                    break
    return tuple(samples)


def _once(job: Job, drill: Drill) -> Sample:
    become_whole(job, NODES)
    victim = drill.victim(job)
    broken_at = time.monotonic()
    drill.break_node(job, victim)
    wait_line(job, lambda lines: first_step(lines, broken_at, world=NODES - 1), drill.bound_s)
    sample = seconds_to_step(job.trained(), broken_at, world=NODES - 1)
    if sample is None:
        return "the job ends" if _gave_up(job, victim) else f"no step in {drill.bound_s:g} s"
    _mend(job, victim)
    return sample


def become_whole(job: Job, nodes: int) -> None:
    """Waits until all nodes step together, and then for calm. ElasticdError with the logs when they do not."""
    if not wait_whole(job, nodes):
        raise ElasticdError(f"{job.system}: {nodes} nodes never stepped together\n{job.last_words()}")
    time.sleep(CALM_S)


def say_sample(job: Job, sample: Sample, say: Say) -> None:
    say(f"{job.system}: {sample if isinstance(sample, str) else f'{sample:.3f} s'}")


def _gave_up(job: Job, victim: int) -> bool:
    """A victim that was only cut off may still run something."""
    job.kill_node(victim)
    return job.ended()


def _mend(job: Job, node: int) -> None:
    job.kill_node(node)
    job.host(node).heal()
    job.start_node(node)


def kill(job: Job, node: int) -> None:
    job.kill_node(node)


def cut(job: Job, node: int) -> None:
    job.host(node).cut()


def any_but_the_store(job: Job) -> int:
    """The highest node that does not host the job's store."""
    return max(node for node in range(NODES) if node != job.store_node())
