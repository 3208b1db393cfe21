"""Losses: those of a GPU are on their way to the host before its last backward pass, once somebody has asked for them;
and the first step, at whose end ranks tell each other whether they have asked, when it is given up."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worker_runs import run_world, world

from elasticd import Session
from elasticd.worker import losses as module
from elasticd.worker.losses import StepLosses

GPU = torch.device("cuda", 0)
DATA = [torch.ones(1)] * 20


class Coming:
    """As from a device: what is said is what the losses were when they were put on their way."""

    def __init__(self, losses: Mapping[int, torch.Tensor]) -> None:
        self._found = [float(loss) for loss in losses.values()]

    def numbers(self) -> list[float]:
        return self._found


def test_they_are_sent_from_the_second_step_on_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = list[int]()

    class Counted(Coming):
        def __init__(self, losses: Mapping[int, torch.Tensor]) -> None:
            super().__init__(losses)
            sent.append(step)

    monkeypatch.setattr(module, "_Coming", Counted)
    losses = StepLosses(2, None, GPU)
    for step in range(5):
        losses.begin()
        found = {0: torch.tensor(1.0 + step), 1: torch.tensor(3.0)}
        losses.complete_here(found)
        if step in (1, 2):
            assert losses.mean(found) == (4.0 + step) / 2
            assert losses.mean(found) == (4.0 + step) / 2
    assert sent == [2, 3]  # the last one for nothing: who has asked once may ask again


def test_those_of_a_step_that_was_given_up_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_Coming", Coming)
    losses, found = StepLosses(1, None, GPU), {0: torch.tensor(1.0)}
    losses.begin()
    assert losses.mean(found) == 1.0
    losses.begin()
    losses.complete_here({0: torch.tensor(7.0)})
    losses.begin()  # again
    assert losses.mean(found) == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_is_not_waited_for_to_its_end() -> None:
    losses, busy = StepLosses(1, None, GPU), torch.randn(8192, 8192, device=GPU)
    for value in (1.0, 2.0):
        losses.begin()
        found = {0: torch.full((), value, device=GPU)}
        losses.complete_here(found)
        for _ in range(50):
            busy = (busy @ busy).tanh()
        behind = torch.cuda.Event()
        behind.record()
        assert losses.mean(found) == value
    assert not behind.query(), "what was put behind the losses had ended: it was waited for"


def give_up(in_the_loop: bool, on_all: bool) -> None:
    """Run by a rank: it gives up its first attempt at the first step, or only rank 1 does."""
    with Session(micro_batches=4) as session:
        model = DistributedDataParallel(nn.Linear(1, 1))
        session.register(model=model)
        failing = on_all or session.rank == 1
        for step in session.steps(until=3):
            try:
                with step:
                    for batch in step.micro_batches(DATA, size=1):
                        if failing and in_the_loop:
                            raise KeyError
                        step.backward(model(batch).mean())
                    if failing:
                        raise KeyError
            except KeyError:
                failing = False
        print("ended at", session.step)


@pytest.mark.parametrize("in_the_loop", [True, False])
def test_a_first_step_that_is_given_up_by_one_rank_ends_all_of_them(in_the_loop: bool) -> None:
    """It waited for the others in the loop, and they waited for it at its end."""
    with world(2, give_up, in_the_loop, False) as ranks:
        assert [rank.wait(20) for rank in ranks] == [1, 1]
        assert any("StepsDiverged: the first step's block raised, and was tried again" in each.output for each in ranks)


@pytest.mark.parametrize("in_the_loop", [True, False])
def test_a_first_step_that_is_given_up_by_all_is_done_again(in_the_loop: bool) -> None:
    assert run_world(2, give_up, in_the_loop, True) == ["ended at 3\n"] * 2
