"""Exact mode: the same bits on any world, under any shares and whatever interrupts it; the fixed-point sums below it."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainees import Points, fingerprint, small
from worker_runs import run_world

from elasticd import Session
from elasticd.errors import ConfigError, NotFinite
from elasticd.worker import exact
from elasticd.worker.exact import SUM_BITS, ExactGradients, divide, exponent_for, make_whole
from elasticd.worker.layout import Arrangement, Layout
from elasticd.worker.state import Registered

SEED, COUNT = 3, 8


class Augmented(Points):
    """Each time with another noise."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = super().__getitem__(index)
        return inputs + 0.1 * torch.randn(6) + 0.1 * random.random(), targets


def train_points(
    until: int, caps: list[int], directory: Path | None, exact: bool, workers: int = 0, data: type[Points] = Points
) -> None:
    """Run by a rank: prints the SHA-256 of the weights at the end."""
    rank = int(os.environ["RANK"])
    settings = {"micro_batches": COUNT, "max_micro_batches": caps[rank], "exact": exact}
    with Session(checkpoint_dir=directory, seed=SEED, **settings) as session:
        model: nn.Module = small(dropout=0.2)
        if session.world_size > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        session.restore()
        points = data()
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(points, size=2, workers=workers):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
        print(fingerprint(model))


def train_in_buckets(*arguments: object) -> None:
    """Run by a rank: the same, with the gradients in three parts."""
    exact.BUCKET_ELEMENTS = 20
    train_points(*arguments)


def train_augmented(*arguments: Any) -> None:
    """Run by a rank: the same, with random augmentation."""
    train_points(*arguments, data=Augmented)


def train_augmented_with_a_worker(*arguments: Any) -> None:
    """Run by a rank: the same, where DataLoader's worker draws."""
    train_points(*arguments, workers=1, data=Augmented)


def bits(until: int, caps: list[int], directory: Path | None = None, *, exact: bool = True, run=train_points) -> str:
    outputs = run_world(len(caps), run, until, caps, directory, exact)
    (found,) = {output.strip() for output in outputs}
    return found


def test_exact_mode_ends_in_the_same_bits_on_any_world_with_and_without_a_restart(tmp_path: Path) -> None:
    whole = bits(30, [8])
    for caps in ([4, 4], [8, 8, 8, 8], [1, 2, 5], [7, 1], [8, 0]):
        assert bits(30, caps) == whole, caps
    assert bits(30, [1, 4, 3], run=train_in_buckets) == whole
    bits(11, [1, 7], tmp_path)
    bits(23, [3, 3, 2], tmp_path)
    assert bits(30, [4, 4], tmp_path) == whole


def test_random_augmentation_has_the_same_bits_on_any_world(tmp_path: Path) -> None:
    whole = bits(10, [8], run=train_augmented)
    assert bits(10, [3, 5], run=train_augmented) == whole
    bits(4, [5, 3], tmp_path, run=train_augmented)
    assert bits(10, [1, 7], tmp_path, run=train_augmented_with_a_worker) == whole
    assert whole != bits(10, [8])


def test_without_exact_mode_the_bits_differ(tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    assert bits(30, [8], exact=False) != bits(30, [1, 2, 5], exact=False)


def train_with_a_fault(until: int, faulty: bool) -> None:
    """Run by a rank: with a fault, step 3 raises on all ranks after its second micro-batch, and is done again."""
    with Session(micro_batches=COUNT, exact=True, seed=SEED) as session:
        model = DistributedDataParallel(small(dropout=0.2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        session.register(model=model, optimizer=optimizer)
        data = Points()
        for step in session.steps(until=until):
            try:
                with step:
                    loader = step.micro_batches(data, size=2, workers=1)
                    for number, (inputs, targets) in enumerate(loader):
                        step.backward((model(inputs) - targets).square().mean())
                        if faulty and step.index == 3 and number == 1:
                            faulty = False
                            raise ArithmeticError
                    optimizer.step()
            except ArithmeticError:
                pass
        print(fingerprint(model.module))


def test_a_step_that_is_done_again_ends_in_the_same_bits() -> None:
    assert run_world(2, train_with_a_fault, 8, True) == run_world(2, train_with_a_fault, 8, False)


# --- the sums ---


def fixed(value: float, exponent: int, dtype: torch.dtype = torch.float32) -> int:
    return int(make_whole(torch.tensor([value], dtype=dtype), [1], [exponent]).long())


def mean(total: int, exponent: int, count: int = 1) -> float:
    sums = torch.tensor([total]).double()
    divide(sums, [1], [exponent], count)
    return sums.item()


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
    st.integers(1, 39),
)
def test_the_fixed_point_sum_has_no_order_and_does_not_overflow(values: list[float], random, cut: int) -> None:
    exponent = exponent_for(max(abs(value) for value in values), len(values))
    whole = [fixed(value, exponent) for value in values]
    assert sum(abs(each) for each in whole) < 2 ** (SUM_BITS + 1)
    total = torch.tensor(whole).sum()
    random.shuffle(whole)
    assert torch.tensor(whole[:cut]).sum() + torch.tensor(whole[cut:]).sum() == total
    assert mean(int(total), exponent, 3) == pytest.approx(
        math.fsum(values) / 3, abs=max(map(abs, values)) * 2.0**-52 * len(values)
    )


@pytest.mark.parametrize("magnitude", [0.0, 5e-324, 1e-300, 1e-45, 3e-39, 1e-20, 1.0, 3.4e38, 1.7e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_magnitude_has_a_scale(magnitude: float, dtype: torch.dtype) -> None:
    value = min(torch.tensor(magnitude, dtype=dtype).item(), torch.finfo(dtype).max)
    exponent = exponent_for(value, 1000)
    whole = fixed(value, exponent, dtype)
    assert whole * 1000 <= 2**SUM_BITS
    assert mean(whole, exponent) == pytest.approx(value, rel=1e-15, abs=2.0**-(1001))


def train_normalised(caps: list[int]) -> None:
    """Run by a rank: with BatchNorm. Prints the SHA-256 of the weights, and the running mean."""
    with Session(micro_batches=COUNT, max_micro_batches=caps[int(os.environ["RANK"])], exact=True, seed=SEED) as session:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        if session.world_size > 1:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=10):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
        buffers = [each.flatten().tolist() for each in model.buffers()]
        print(json.dumps([fingerprint(model), buffers]))


def test_batch_norm_has_the_same_parameters_on_any_world_and_running_means_of_each_rank_s_own() -> None:
    """As exact.py says: in training nothing depends on the latter."""
    found = [
        json.loads(output)
        for caps in ([8], [4, 4], [1, 2, 5], [0, 8])
        for output in run_world(len(caps), train_normalised, caps)
    ]
    assert len({weights for weights, _ in found}) == 1
    means = [buffers[0] for _, buffers in found[:6]]  # in the last world one rank has computed them all again
    assert all(means.count(mean) == 1 for mean in means)


def test_a_scaler_is_refused_unless_it_does_not_scale(in_plain_python: None) -> None:
    model = small()
    with Session(micro_batches=2, exact=True) as session:
        session.register(model=model)

        def train(*, enabled: bool) -> None:
            scaler = torch.amp.GradScaler("cpu", enabled=enabled)
            with next(session.steps()) as step:
                for inputs, _ in step.micro_batches(Points(), size=2):
                    step.backward(model(inputs).mean(), scaler=scaler)

        train(enabled=False)
        with pytest.raises(ConfigError, match="exact mode has no loss scaling"):
            train(enabled=True)
        assert session.step == 1


class Uneven(nn.Module):
    """Parameters of three types, one that only some micro-batches reach, an empty one, and one that none reaches."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.single = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.seldom = nn.Parameter(torch.randn(4, generator=generator))
        self.in_double = nn.Parameter(torch.randn(6, generator=generator).double())
        self.empty = nn.Parameter(torch.zeros(0))
        self.in_half = nn.Parameter(torch.randn(7, generator=generator).bfloat16())
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, number: int) -> torch.Tensor:
        factor = 0.1 + number / 3
        loss = (self.single * factor).sin().sum() * 1e-30 + (self.in_double * factor).cos().sum() + self.empty.sum()
        loss = loss + (self.in_half * factor).float().square().sum()
        return loss + (self.seldom * factor).exp().sum() if number % 2 else loss


@pytest.mark.parametrize("bucket", [1, 9, 1 << 20])
def test_the_mean_is_that_of_exact_arithmetic(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, so that what is kept from a step must not be seen in the next."""
    monkeypatch.setattr("elasticd.worker.exact.BUCKET_ELEMENTS", bucket)
    model, count = Uneven(), 5
    gradients = ExactGradients(
        Registered(model=model), micro_batches=count, arranged=Arrangement(layout=Layout(), rank=0, world_size=1)
    )
    for _ in range(2):
        gradients.clear(unequal=False)
        each = []
        for number in range(count):
            each.append(torch.autograd.grad(model(number), list(model.parameters()), allow_unused=True))
            gradients.backward(model(number), counts=True)
        gradients.finish()
        for (name, parameter), of_it in zip(model.named_parameters(), zip(*each, strict=True), strict=True):
            known = [gradient.flatten().tolist() for gradient in of_it if gradient is not None]
            assert (parameter.grad is None) == (not known), name
            if known:
                means = [math.fsum(values) / count for values in zip(*known, strict=True)]
                wanted = torch.tensor(means, dtype=torch.double).to(parameter.dtype)
                torch.testing.assert_close(parameter.grad.flatten(), wanted, rtol=1e-15, atol=0)


def meet_a_nan() -> None:
    """Run by a rank: one sample of the data is not a number, and only one rank has it."""
    with Session(micro_batches=4, exact=True, seed=SEED) as session:
        model = DistributedDataParallel(small())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        session.register(model=model, optimizer=optimizer)
        data = Points(broken=7)
        for step in session.steps(until=10):
            before = fingerprint(model)
            try:
                with step:
                    for inputs, targets in step.micro_batches(data, size=2):
                        step.backward((model(inputs) - targets).square().mean())
                    optimizer.step()
            except NotFinite as error:
                print("refused", session.step, 7 in step.sample_ids, fingerprint(model) == before, error)
                return


def test_a_gradient_that_is_not_a_number_is_refused_by_all_ranks() -> None:
    first, second = (output.split() for output in run_world(2, meet_a_nan))
    assert (first[0], first[1], first[3:]) == (second[0], second[1], second[3:])
    assert {first[2], second[2]} == {"True", "False"}
    assert first[3] == "True"
    assert "module.0.weight" in first
