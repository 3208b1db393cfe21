"""What a rank waited for others: measured where the device does the waiting, and counted when it is known."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from elasticd.worker import waiting
from elasticd.worker.marks import CpuMark, Mark
from elasticd.worker.speeds import BusySteps
from elasticd.worker.waiting import GradientWait


def attached(device: torch.device) -> tuple[GradientWait, nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wait = GradientWait(device)
    wait.attach(model.parameters(), [optimizer])
    return wait, model, optimizer


def backward(model: nn.Module) -> None:
    model(torch.ones(1, 4, device=next(model.parameters()).device)).sum().backward()


def test_a_wait_is_from_the_last_gradient_to_the_optimizers_step() -> None:
    wait, model, optimizer = attached(torch.device("cpu"))
    backward(model)
    time.sleep(0.05)
    last_pass_at = time.perf_counter()
    backward(model)
    time.sleep(0.05)
    optimizer.step()
    at_most_s = time.perf_counter() - last_pass_at
    assert 0.05 <= wait.take() <= at_most_s
    assert wait.take() == 0.0
    optimizer.step()  # without a gradient, as some do to make its state
    assert wait.take() == 0.0


def test_a_step_that_was_given_up_waited_for_nobody() -> None:
    wait, model, optimizer = attached(torch.device("cpu"))
    backward(model)
    optimizer.step()
    backward(model)
    wait.drop()
    optimizer.step()
    assert wait.take() == 0.0


class LateMark(CpuMark):
    """Of a device that is behind: it passes no mark before it is let on."""

    passed = False

    def seconds_since(self, earlier: Mark) -> float | None:
        return super().seconds_since(earlier) if self.passed else None


def test_a_device_that_is_behind_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "marks_of", lambda _: LateMark)
    wait, model, optimizer = attached(torch.device("cpu"))
    for _ in range(2):
        backward(model)
        time.sleep(0.02)
        optimizer.step()
        assert wait.take() == 0.0
    monkeypatch.setattr(LateMark, "passed", True)
    assert wait.take() >= 0.04
    monkeypatch.setattr(LateMark, "passed", False)
    for _ in range(2 * waiting.MAX_PENDING):  # and one that hangs costs no memory without an end
        backward(model)
        optimizer.step()
    assert len(wait._pending) == waiting.MAX_PENDING


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_waits_by_itself() -> None:
    """What lies between the gradients and the optimizer on the device is the wait, whenever the host put it there."""
    device = torch.device("cuda", 0)
    wait, model, optimizer = attached(device)
    busy = torch.randn(8192, 8192, device=device)
    backward(model)
    torch.cuda.synchronize()
    backward(model)
    for _ in range(50):
        busy = (busy @ busy).tanh()
    optimizer.step()
    assert wait.take() == 0.0, "the device cannot have come to it yet"
    torch.cuda.synchronize()
    assert wait.take() > 0.005


def test_waits_that_are_known_a_step_later_leave_the_mean_right() -> None:
    busy = BusySteps()
    assert math.isnan(busy.take())
    for seconds, waited_s in ((1.0, 0.0), (0.25, 0.5), (1.0, 0.5)):  # the last one's is not known yet
        busy.add(seconds - waited_s)
    assert busy.take() == pytest.approx((2.25 - 1.0) / 3)
    assert math.isnan(busy.take())
