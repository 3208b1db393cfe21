"""How often the ranks talk at the boundaries of steps: real worlds of two."""

from __future__ import annotations

import itertools
import time

import torch.distributed as dist
from worker_runs import run_world

from elasticd.worker.control import MAX_STEPS_APART, Control
from elasticd.worker.world import Place, choose_device, join_world

SLOW_S, FAST_S = 0.04, 0.001


def talk(step_s: float, count: int) -> None:
    """Run by a rank: prints the steps with an exchange, first usually, then in a hurry."""
    place = Place.from_environment()
    join_world(place, choose_device(place, "cpu"))
    control = Control()
    for hurried in (False, True):
        talked = []
        for step in range(count):
            control.start(step, stop_wanted=0, due=step == count - 1, hurried=hurried, own=lambda: 7)
            time.sleep(step_s)  # a step's work
            control.finish(step)
            if control.told:
                talked.append(step)
        print(*talked, sep=",", flush=True)
        control = Control()
    dist.barrier()


def told_steps(step_s: float, count: int) -> list[list[int]]:
    first, second = run_world(2, talk, step_s, count)
    assert first == second, "the ranks did not talk in the same steps"
    return [[int(step) for step in line.split(",")] for line in first.splitlines()]


def test_ranks_talk_less_than_once_a_step_and_more_often_in_a_hurry_and_always_when_it_is_due() -> None:
    usual, hurried = told_steps(SLOW_S, 16)
    assert usual[0] == hurried[0] == 0
    assert usual[-1] == hurried[-1] == 15
    assert len(usual) < len(hurried) <= 16, (usual, hurried)


def test_however_short_steps_are_they_talk_now_and_then() -> None:
    for talked in told_steps(FAST_S, 3 * MAX_STEPS_APART):
        assert max(later - earlier for earlier, later in itertools.pairwise(talked)) == MAX_STEPS_APART
