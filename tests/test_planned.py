"""Steps as micro-batches: the same curve and the same samples on any world and under any shares, and bits in exact mode.

Worlds of forked ranks over real gloo. Shares are forced by caps that leave no choice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import eventually
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from worker_runs import FakeDaemon, ledger, run_world, world

from elasticd import Session
from elasticd.bench.balance import FAST, SLOW, train
from elasticd.errors import ConfigError, NotFinite, StepsDiverged
from elasticd.testing import cgroups
from elasticd.worker.clock import MicroBatchClock
from elasticd.worker.data import Cursor, sample_ids
from elasticd.worker.exact import SUM_BITS, exponent_for, from_fixed, to_fixed
from elasticd.worker.loading import PrefetchingLoader, Source
from elasticd.worker.losses import StepLosses
from elasticd.worker.order import Key
from elasticd.worker.shares import as_told
from elasticd.worker.step import Step
from elasticd.worker.world import make_side_group

SEED, COUNT = 3, 8


pytestmark = pytest.mark.usefixtures("in_plain_python")


class Points:
    """A regression that a small model can learn; with ``broken``, a sample that is not a number."""

    def __init__(self, size: int = 40, broken: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(size, 6, generator=generator)
        self.targets = self.inputs.sin().sum(1, keepdim=True)
        if broken is not None:
            self.inputs[broken] = math.nan

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]


def small(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))


def fingerprint(model: nn.Module) -> str:
    parts = [each.detach().contiguous().numpy().tobytes() for each in model.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def flat(lists: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


# --- the same on any world ---


def train_gpt(path: Path, caps: list[int], steps: int, workers: int) -> None:
    """Run by a rank: a tiny byte GPT; a line for each step."""
    from elasticd.examples.byte_gpt import ByteGPT, StandardLibrary, loss_of

    rank = int(os.environ["RANK"])
    with Session(micro_batches=COUNT, max_micro_batches=caps[rank], seed=SEED) as session, path.open("a") as file:
        data = StandardLibrary(16)
        model = DistributedDataParallel(ByteGPT(length=16, width=16, layers=2, heads=2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=steps):
            with step:
                for inputs, targets in step.micro_batches(data, size=2, workers=workers):
                    step.backward(loss_of(model(inputs), targets))
                optimizer.step()
                loss = step.mean_loss()
            line = {"step": session.step, "loss": loss, "ids": step.sample_ids, "of": len(data)}
            file.write(json.dumps(line) + "\n")


def curve(tmp_path: Path, caps: list[int], *, steps: int = 200, workers: int = 0) -> dict[int, float]:
    """The loss of each step; the ledger must show each sample exactly once, and the shares that were forced."""
    path = tmp_path / f"{len(caps)}-{caps}-{workers}.jsonl"
    run_world(len(caps), train_gpt, path, caps, steps, workers)
    losses: dict[int, float] = {}
    ids, shares = defaultdict(list), defaultdict(list)
    for line in ledger(path):
        assert losses.setdefault(line["step"], line["loss"]) == line["loss"]
        ids[line["step"]] += line["ids"]
        shares[line["step"]].append(len(line["ids"]) // 2)
        size = line["of"]
    order = sample_ids(Cursor(), range(steps * COUNT * 2), size=size, seed=SEED)
    assert sorted(losses) == list(range(1, steps + 1))
    for step in losses:
        assert sorted(ids[step]) == sorted(order[(step - 1) * COUNT * 2 : step * COUNT * 2])
        if sum(caps) == COUNT:
            assert sorted(shares[step]) == sorted(caps)
    return losses


def test_the_loss_curve_is_the_same_on_any_world_and_under_any_shares(tmp_path: Path) -> None:
    alone = curve(tmp_path, [COUNT])
    assert alone[200] < 0.8 * alone[1]
    for caps, workers in (([4, 4], 0), ([3, 3, 2], 0), ([1, 2, 5], 1), ([0, 8], 0)):
        other = curve(tmp_path, caps, workers=workers)
        for step, loss in alone.items():
            assert other[step] == pytest.approx(loss, rel=1e-4), (caps, step)


def train_epochs(until: int, directory: Path, path: Path) -> None:
    """Run by a rank: 40 samples, 16 a step, so that the third and the fifth step hold an epoch's end."""
    with Session(checkpoint_dir=directory, micro_batches=COUNT, seed=SEED) as session, path.open("a") as file:
        model = DistributedDataParallel(small())
        session.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
        session.restore()
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(40), size=2):
                    step.backward((model(inputs) - targets).square().mean())
            file.write(json.dumps({"step": session.step, "ids": step.sample_ids, "epoch": session.cursor.epoch}) + "\n")


def test_an_epoch_ends_in_the_middle_of_a_step_and_of_a_resize_with_each_sample_once(tmp_path: Path) -> None:
    """Nothing is dropped or padded: the step takes the rest from the next epoch."""
    path = tmp_path / "ledger"
    for size, until in ((2, 2), (3, 3), (1, 5)):
        run_world(size, train_epochs, until, tmp_path / "checkpoints", path)
    by_step = defaultdict(list)
    for line in ledger(path):
        by_step[line["step"]] += line["ids"]
    assert {step: len(ids) for step, ids in by_step.items()} == dict.fromkeys(range(1, 6), 16)
    for epoch in (0, 1):
        order = sample_ids(Cursor(epoch=epoch), range(40), size=40, seed=SEED)
        assert sorted(order) == list(range(40))
        first = 40 * epoch
        for step, ids in by_step.items():
            span = range(max(first, 16 * (step - 1)), min(first + 40, 16 * step))
            assert {order[position - first] for position in span} <= set(ids), (epoch, step)
    assert sorted(sample for ids in by_step.values() for sample in ids) == sorted([*range(40), *range(40)])
    assert {line["step"]: line["epoch"] for line in ledger(path)} == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2}


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


def train_sharded(caps: list[int], replicas: int) -> None:
    """Run by a rank: FSDP2, or HSDP with several replicas; prints the whole weights."""
    with Session(micro_batches=COUNT, max_micro_batches=caps[int(os.environ["RANK"])], seed=SEED) as session:
        model = small()
        dims = (session.world_size,) if replicas == 1 else (replicas, session.world_size // replicas)
        mesh = init_device_mesh("cpu", dims, mesh_dim_names=("replicate", "shard")[-len(dims) :])
        for layer in (model[0], model[3], model):
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=20):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
        print(json.dumps([each.full_tensor().flatten().tolist() for each in model.parameters()]))


def test_a_sharded_model_takes_unequal_shares_too() -> None:
    ends = []
    for caps, replicas in (([8], 1), ([4, 4], 1), ([6, 2], 1), ([2, 2, 2, 2], 2), ([4, 1, 1, 2], 2)):
        (first, *_) = run_world(len(caps), train_sharded, caps, replicas)
        ends.append(torch.tensor(flat(json.loads(first))))
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-4, atol=1e-5)


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


def exchange_losses() -> None:
    """Run by a rank: both give up their second step, and rank 0 before its losses were known."""
    with Session() as session:
        losses = StepLosses(2, make_side_group(), session.device)
        losses.begin()
        print(losses.mean({session.rank: torch.tensor(1.0 + session.rank)}))
        losses.begin()
        if session.rank == 1:
            losses.complete_here({})  # so an exchange is under way
        losses.begin()
        if session.rank == 0:
            with pytest.raises(StepsDiverged):
                losses.mean({})
        dist.barrier()


def test_losses_of_a_step_that_was_given_up_are_not_mixed_with_the_next() -> None:
    assert run_world(2, exchange_losses) == ["1.5\n", "1.5\n"]


# --- balance ---


def timed(clock: MicroBatchClock, model: nn.Module, count: int, *, waited: bool) -> None:
    """One step of so many micro-batches, each of which takes 20 ms and a backward pass."""
    clock.begin(count)
    for number in range(count):
        if number == count - 1:
            clock.begin_last()
        time.sleep(0.02)
        model(torch.ones(1, 6)).sum().backward()
    time.sleep(0.3 * count)  # for other ranks
    clock.end(waited=waited)


def test_waiting_for_others_is_not_in_the_measure_of_a_step() -> None:
    """Nor where the end of the last micro-batch cannot be seen: it is left out then."""
    for seen, count in ((True, 1), (True, 3), (False, 3)):
        clock, model, told = MicroBatchClock(torch.device("cpu")), small(), list[int]()
        if seen:
            clock.watch(model, lambda: told.append(1))
        timed(clock, model, count, waited=True)
        assert 0.02 <= clock.take() < 0.3, (seen, count)
        assert len(told) == seen
        assert math.isnan(clock.take())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_not_waited_for_to_be_measured() -> None:
    """By events, which are read when the device has passed them."""
    device = torch.device("cuda", 0)
    clock, model = MicroBatchClock(device), small().to(device)
    clock.watch(model, lambda: None)
    busy = torch.randn(8192, 8192, device=device)
    clock.begin(1)
    clock.begin_last()
    for _ in range(50):
        busy = (busy @ busy).tanh()
    model(busy[:1, :6]).sum().backward()
    clock.end(waited=True)
    assert math.isnan(clock.take()), "the device cannot have come to it yet"
    torch.cuda.synchronize()
    assert clock.take() > 0


def train_unequal(until: int, balance: str) -> None:
    """Run by a rank: rank 1 takes three times as long for each micro-batch, from step 20 on as long as rank 0."""
    with Session(micro_batches=COUNT, balance=balance) as session:
        model = DistributedDataParallel(small())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    time.sleep(0.09 if session.rank == 1 and step.index < 20 else 0.03)
                    step.backward((model(inputs) - targets).square().mean())
                optimizer.step()
            print(json.dumps([session.step, len(step.sample_ids) // 2]))


def test_shares_follow_speed_within_ten_steps_and_say_why(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path / "socket") as daemon:
        env = {"ELASTICD_SOCKET": daemon.path, "ELASTICD_JOB_ID": "job", "ELASTICD_ROUND": "1"}
        outputs = run_world(2, train_unequal, 34, "auto", **env)
        eventually(daemon.heard_out)
        events, speeds = daemon.of_type("rebalanced"), daemon.of_type("speeds")
    shares = list(zip(*([json.loads(line)[1] for line in output.splitlines()] for output in outputs), strict=True))
    assert shares[0] == (4, 4)
    # 6 and 2, then 4 and 4 again, or one beside that: whatever else runs here may hold a rank up.
    assert {first for first, _ in shares[10:20]} <= {5, 6, 7}
    assert {first for first, _ in shares[30:]} <= {3, 4, 5}
    assert events[0]["shares"][0] > 4
    assert events[0]["reason"] == "rank 1 ended last"
    assert events[0]["after_s"] < events[0]["before_s"]
    first, other = speeds[0]["seconds"]
    assert 0 < first < other
    assert (sum(speeds[0]["shares"]), speeds[0]["balanced"]) == (COUNT, True)


def test_balance_off_gives_equal_shares() -> None:
    for output in run_world(2, train_unequal, 8, "off"):
        assert {json.loads(line)[1] for line in output.splitlines()} == {4}


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("namespaces")
def test_a_node_that_is_held_to_a_quarter_of_its_cpu_gives_work_away() -> None:
    """By its control group, in mid-run: what that is worth is the bench's to say."""
    if cgroups.v1_root("cpu") is None:
        pytest.skip("no cpu controller of cgroup version 1")
    lines, (slowed_at,) = train("session", (FAST, SLOW / 2), 16, micro_batches=24)
    # The most, not the last: while something else runs on this machine, the fast node is slow too.
    assert max(line["share"] for line in lines if line["rank"] == 0 and line["t"] > slowed_at) >= 14


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
def test_a_speed_that_is_none_is_told_as_none(bad: float) -> None:
    assert as_told(bad) == 0
    assert as_told(1e-12) == 1
    assert as_told(0.25) == 250_000_000


# --- loading ahead ---


class Ids:
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return index


def test_batches_are_right_whatever_the_shares_become_and_however_often_a_step_is_done() -> None:
    asked: list[Key] = []

    def ids_of(key: Key) -> list[int]:
        asked.append(key)
        return [key[0] * 10 + key[1]]

    loader = PrefetchingLoader(Source(dataset=Ids(), length=1000, size=1, workers=1, prefetch=3), ids_of)
    owned = [(0, 1, 2)] * 4 + [(0, 1, 2, 5)] * 3 + [(1,)] * 3 + [(0, 1, 2, 3, 4, 5)] * 4
    for step, mine in enumerate(owned):
        for attempt in range(2 if step in (2, 5) else 1):
            loader.begin(step, mine)
            for micro_batch in mine[: 2 if attempt == 0 and step in (2, 5) else None]:
                assert loader.take((step, micro_batch)).tolist() == [step * 10 + micro_batch]
    needed = sum(len(mine) for mine in owned)
    assert len(asked) < 1.5 * needed
    assert len(loader._ready) + len(loader._asked) < 12


# --- exact sums ---


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


# --- wrong use ---


def planned(**settings: object) -> tuple[Session, nn.Module, torch.optim.Optimizer]:
    session = Session(**{"micro_batches": 4, **settings})
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session.register(model=model, optimizer=optimizer)
    return session, model, optimizer


def test_a_data_set_shorter_than_a_step() -> None:
    session, _, _ = planned()
    with (
        session,
        pytest.raises(ValueError, match="a global batch of 44 does not fit a data set of 40 samples"),
        next(session.steps()) as step,
    ):
        step.micro_batches(Points(), size=11)


def leave_early(step: Step, model: nn.Module) -> None:
    with step:
        for inputs, _ in step.micro_batches(Points(), size=2):
            step.backward(model(inputs).mean())
            break


def test_samples_that_would_be_missing() -> None:
    session, model, _ = planned()
    with session:
        with pytest.raises(RuntimeError, match="was left early"):
            leave_early(next(session.steps()), model)
        with pytest.raises(RuntimeError, match=r"had no step.backward\(loss\)"), next(session.steps()) as step:
            list(step.micro_batches(Points(), size=2))
        assert session.step == 0


def test_calls_in_the_wrong_place() -> None:
    session, model, _ = planned()
    with session, next(session.steps()) as step:
        for call in (lambda: step.backward(torch.ones(())), step.mean_loss):
            with pytest.raises(RuntimeError, match=r"loop over step.micro_batches\(\) first"):
                call()
        batches = step.micro_batches(Points(), size=2)
        with pytest.raises(RuntimeError, match="once in each step"):
            step.micro_batches(Points(), size=2)
        for inputs, _ in batches:
            loss = model(inputs)
            with pytest.raises(ValueError, match=r"a loss of shape \(2, 1\)"):
                step.backward(loss)
            step.backward(loss.mean())
            with pytest.raises(RuntimeError, match="once for each micro-batch"):
                step.backward(loss.mean())


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"micro_batches": 0}, "micro_batches must be at least 1"),
     ({"micro_batches": 4, "max_micro_batches": 3}, "at most 3 micro-batches together, and a step has 4"),
     ({"micro_batches": 4, "balance": "yes"}, "balance is 'yes'"),
        ({"micro_batches": 4, "balance": (1, math.nan)}, "weights are positive numbers"),
        ({"micro_batches": 4, "balance": ()}, "weights are positive numbers"),
     ({"exact": True}, "mean nothing without micro_batches"),
     ({"max_micro_batches": 3}, "mean nothing without micro_batches")],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Session(**settings)


def test_micro_batches_that_were_not_told_or_have_no_model() -> None:
    with Session() as session, pytest.raises(ConfigError, match="Session"), next(session.steps()) as step:
        step.micro_batches(Points(), size=2)
    with Session(micro_batches=2) as session, next(session.steps()) as step:
        batches = step.micro_batches(Points(), size=2)
        with pytest.raises(RuntimeError, match="needs the model"):
            next(batches)
        step._work = None


def disagree() -> None:
    """Run by a rank: each says another number of micro-batches."""
    Session(micro_batches=4 + int(os.environ["RANK"]))


def leave_unaveraged() -> None:
    """Run by a rank: a model that nothing averages."""
    Session(micro_batches=4).register(model=small())


def shard_in_exact_mode() -> None:
    """Run by a rank."""
    session = Session(micro_batches=4, exact=True)
    session.register(model=fully_shard(small()))


@pytest.mark.parametrize(
    ("target", "why"),
    [(disagree, "must be the same on all ranks"), (leave_unaveraged, "wrap it in DistributedDataParallel"),
     (shard_in_exact_mode, "exact mode needs the whole model on each rank")],
)  # fmt: skip
def test_what_ranks_cannot_do_together_ends_all_of_them_with_one_line(target, why: str) -> None:
    with world(2, target) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
            assert len(rank.output.splitlines()) == 1, rank.output
            assert why in rank.output


def fewer_than_ranks() -> None:
    """Run by a rank: two micro-batches for three ranks."""
    with Session(micro_batches=2, seed=SEED) as session:
        model = DistributedDataParallel(small())
        session.register(model=model)
        with next(session.steps()) as step:
            for inputs, targets in step.micro_batches(Points(), size=2):
                step.backward((model(inputs) - targets).square().mean())
        print(json.dumps([step.sample_ids, model.module[3].bias.grad.item()]))


def test_with_more_ranks_than_micro_batches_some_add_nothing() -> None:
    outputs = run_world(3, fewer_than_ranks)
    assert "2 micro-batches for 3 ranks: 1 of them add nothing to a step" in outputs[0]
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert found[2][0] == []
    assert flat([ids for ids, _ in found]) == sample_ids(Cursor(), range(4), size=40, seed=SEED)
    data, model = Points(), small()
    ids = sample_ids(Cursor(), range(4), size=40, seed=SEED)
    (model(data.inputs[ids]) - data.targets[ids]).square().mean().backward()
    for _, gradient in found:
        assert gradient == pytest.approx(model[3].bias.grad.item(), rel=1e-5)
