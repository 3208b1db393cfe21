"""Exact mode: the same bits on any world, under any shares and whatever interrupts it; the fixed-point sums below it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainees import Points, fingerprint, small
from worker_runs import run_world

from elasticd import Session
from elasticd.errors import NotFinite
from elasticd.worker.exact import SUM_BITS, exponent_for, from_fixed, to_fixed

SEED, COUNT = 3, 8


def train_points(until: int, caps: list[int], directory: Path | None, exact: bool, workers: int = 0) -> None:
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
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2, workers=workers):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
        print(fingerprint(model))


def bits(until: int, caps: list[int], directory: Path | None = None, *, exact: bool = True) -> str:
    outputs = run_world(len(caps), train_points, until, caps, directory, exact)
    (found,) = {output.strip() for output in outputs}
    return found


def test_exact_mode_ends_in_the_same_bits_on_any_world_with_and_without_a_restart(tmp_path: Path) -> None:
    whole = bits(30, [8])
    for caps in ([4, 4], [8, 8, 8, 8], [1, 2, 5], [7, 1], [8, 0]):
        assert bits(30, caps) == whole, caps
    bits(11, [1, 7], tmp_path)
    bits(23, [3, 3, 2], tmp_path)
    assert bits(30, [4, 4], tmp_path) == whole


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


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
    st.integers(1, 39),
)
def test_the_fixed_point_sum_has_no_order_and_does_not_overflow(values: list[float], random, cut: int) -> None:
    exponent = exponent_for(max(abs(value) for value in values), len(values))
    fixed = [int(to_fixed(torch.tensor([value]), exponent)) for value in values]
    assert sum(abs(each) for each in fixed) < 2 ** (SUM_BITS + 1)
    total = torch.tensor(fixed).sum()
    random.shuffle(fixed)
    assert torch.tensor(fixed[:cut]).sum() + torch.tensor(fixed[cut:]).sum() == total
    assert from_fixed(total, exponent).item() == pytest.approx(
        math.fsum(values), abs=max(map(abs, values)) * 2.0**-52 * len(values)
    )


@pytest.mark.parametrize("magnitude", [0.0, 5e-324, 1e-300, 1e-45, 1.0, 3.4e38, 1.7e308])
def test_every_magnitude_has_a_scale(magnitude: float) -> None:
    exponent = exponent_for(magnitude, 1000)
    fixed = to_fixed(torch.tensor([magnitude], dtype=torch.float64), exponent)
    assert int(fixed) * 1000 <= 2**SUM_BITS
    assert from_fixed(fixed, exponent).item() == pytest.approx(magnitude, rel=1e-15, abs=2.0**-(1001))


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
