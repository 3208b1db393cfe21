"""The losses of a GPU are on their way to the host before its last backward pass, once somebody has asked for them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from elasticd.worker import losses as module
from elasticd.worker.losses import StepLosses

GPU = torch.device("cuda", 0)


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
