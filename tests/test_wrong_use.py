"""Mistakes of people who write a training script: each is told in the error that they get, and none hangs or passes unseen."""

from __future__ import annotations

import contextlib
import os
import re
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import eventually
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worker_runs import run_world, world

from elasticd import Session
from elasticd.checkpoint.save import Saved, Saver
from elasticd.errors import ConfigError
from elasticd.worker import losses
from elasticd.worker import session as session_module
from elasticd.worker.data import Cursor
from elasticd.worker.loading import Source
from elasticd.worker.step import Step
from elasticd.worker.world import join_world

DATA = [torch.ones(1)] * 20
pytestmark = pytest.mark.usefixtures("in_plain_python")


class NoLength:
    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(1)


def steps(session: Session, model: nn.Module, *, until: int = 1, data: Any = DATA, size: Any = 1, **how: Any) -> None:
    """As it is meant."""
    for step in session.steps(until=until):
        with step:
            for batch in step.micro_batches(data, size=size, **how):
                step.backward(model(batch).mean())


def trainee(session: Session) -> nn.Module:
    model = nn.Linear(1, 1)
    session.register(model=model)
    session.restore()
    return model


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"micro_batches": 0}, "micro_batches must be at least 1"),
        ({"micro_batches": 2.5}, "micro_batches is 2.5: say a whole number"),
        ({"micro_batches": "8"}, "micro_batches is '8': say a whole number"),
        ({"micro_batches": 8, "max_micro_batches": 1.5}, "max_micro_batches is 1.5: say a whole number"),
        ({"micro_batches": 8, "balance": True}, "balance is True: say 'auto', 'on', 'off'"),
        ({"seed": 1.5}, "seed is 1.5: say a whole number"),
        ({"seed": "x"}, "seed is 'x': say a whole number"),
    ],
)
def test_of_the_session(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Session(**wrong)


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (DATA, 0, "a micro-batch has at least 1 sample"),
        (DATA, 2.0, "a micro-batch has at least 1 sample"),
        (DATA, 6, "4 micro-batches of 6: a global batch of 24 does not fit a data set of 20 samples"),
        ([], 1, "a global batch of 4 does not fit a data set of 0 samples"),
        (NoLength(), 1, "NoLength is no data set: it needs __len__ and __getitem__(index)"),
        (None, 1, "NoneType is no data set"),
        ({"inputs": torch.ones(20, 1)}, 1, "dict is no data set"),
    ],
)
def test_of_the_data(data: Any, size: Any, message: str) -> None:
    with Session(micro_batches=4) as session, pytest.raises(ValueError, match=re.escape(message)):
        steps(session, trainee(session), data=data, size=size)


def indices_too(step: Step, batch: torch.Tensor, model: nn.Module) -> None:
    step.batch_indices(dataset_size=20, global_batch=4)


def nothing(step: Step, batch: torch.Tensor, model: nn.Module) -> None:
    """As a loss.backward() of the script's own."""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda step, batch, model: step.backward(model(batch).repeat(2, 1)), "a loss of shape (2, 1): give"),
        (lambda step, batch, model: step.backward(model(batch).mean().item()), "a loss that no parameter has part in"),
        (
            lambda step, batch, model: step.backward(model(batch).mean().detach()),
            "a loss that no parameter has part in",
        ),
        (indices_too, "or step.batch_indices(), not from both"),
        (nothing, "a micro-batch had no step.backward(loss)"),
    ],
)
def test_in_the_loop(wrong: Any, message: str) -> None:
    with Session(micro_batches=4) as session:
        model = trainee(session)

        def train(step: Step) -> None:
            for batch in step.micro_batches(DATA, size=1):
                wrong(step, batch, model)

        with pytest.raises((ValueError, RuntimeError), match=re.escape(message)), next(session.steps()) as step:
            train(step)


def clear_first(step: Step, batch: torch.Tensor, model: nn.Module) -> None:
    model.zero_grad()
    step.backward(model(batch).mean())


def clear_to_zero(step: Step, batch: torch.Tensor, model: nn.Module) -> None:
    step.backward(model(batch).mean())
    model.zero_grad(set_to_none=False)


def clip(step: Step, batch: torch.Tensor, model: nn.Module) -> None:
    step.backward(model(batch).mean())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def one_step(session: Session, model: nn.Module, each: Any) -> None:
    with next(session.steps()) as step:
        for batch in step.micro_batches(DATA, size=1):
            each(step, batch, model)


@pytest.mark.parametrize("wrong", [clear_first, clear_to_zero, clip])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_that_are_changed_in_the_loop(wrong: Any, frozen: bool) -> None:
    with Session(micro_batches=4) as session:
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        model[0].requires_grad_(not frozen)
        session.register(model=model)
        with pytest.raises(RuntimeError, match="gradients were changed in the loop"):
            one_step(session, model, wrong)


def test_gradients_that_are_changed_after_the_last_micro_batch_of_the_loop() -> None:
    with Session(micro_batches=1) as session:
        model = trainee(session)
        with pytest.raises(RuntimeError, match="gradients were changed in the loop"):
            one_step(session, model, clear_to_zero)


def two_optimizers(session: Session) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    session.register(model=model, optimizer=optimizers)
    return model, optimizers


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
def test_an_update_in_the_loop(which: int, exact: bool) -> None:
    with Session(micro_batches=4, exact=exact) as session:
        model, optimizers = two_optimizers(session)
        before = [each.clone() for each in model.parameters()]

        def update(step: Step, batch: torch.Tensor, model: nn.Module) -> None:
            step.backward(model(batch).mean())
            optimizers[which].step()

        with pytest.raises(RuntimeError, match=r"call optimizer.step\(\) after the loop over step.micro_batches\(\)"):
            one_step(session, model, update)
        assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
        for step in session.steps(until=1):  # nothing was updated: it can be done again
            with step:
                for batch in step.micro_batches(DATA, size=1):
                    step.backward(model(batch).mean())
                optimizers[which].step()
        assert session.step == 1


@pytest.mark.parametrize("planned", [False, True])
def test_a_step_that_raised_after_its_update_is_not_done_again(tmp_path: Path, planned: bool) -> None:
    with Session(micro_batches=4 if planned else None, checkpoint_dir=tmp_path) as session:
        model, optimizers = two_optimizers(session)
        tries = 0

        def train() -> None:
            nonlocal tries
            for step in session.steps(until=3):
                tries += 1
                try:
                    with step:
                        for batch in step.micro_batches(DATA, size=1) if planned else ():
                            step.backward(model(batch).mean())
                        if tries == 1:
                            raise ArithmeticError
                        optimizers[1].step()
                        if tries == 3:
                            step.report(loss="x")  # type: ignore[arg-type]
                except (ArithmeticError, ValueError):
                    pass

        with pytest.raises(
            RuntimeError, match=r"step 1 raised after optimizer.step\(\): its update is applied"
        ) as caught:
            train()
        assert isinstance(caught.value.__cause__, ValueError)
        assert (tries, session.step) == (3, 1)
        for use in (session.save, session.begin_save, lambda: next(session.steps()), train):
            assert session.restore() == 1  # there is none
            with pytest.raises(RuntimeError, match=r"call session.restore\(\), or start again"):
                use()


def test_a_script_that_goes_back_to_the_last_checkpoint_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a spike: although an update has been applied, and the checkpoint is under way still."""
    save = Saver.save

    def take_long(*arguments: Any, **how: Any) -> Saved:
        time.sleep(0.3)
        return save(*arguments, **how)

    monkeypatch.setattr(Saver, "save", take_long)
    with Session(micro_batches=4, checkpoint_dir=tmp_path, save_every_steps=2, seed=1) as session:
        model, optimizers = two_optimizers(session)
        trained: list[list[float]] = []

        def train(*, spike: bool) -> None:
            for step in session.steps(until=5):
                with step:
                    for batch in step.micro_batches(torch.arange(20.0).unsqueeze(1), size=1):
                        step.backward(model(batch).mean())
                    for optimizer in optimizers:
                        optimizer.step()
                    trained.append([step.index, *step.sample_ids, *(each.item() for each in model.parameters())])
                    if spike and step.index == 2:
                        raise ArithmeticError

        with pytest.raises(ArithmeticError):
            train(spike=True)
        assert session.restore() == 2
        train(spike=False)
        assert [step for step, *_ in trained] == [0, 1, 2, 2, 3, 4]
        assert trained[2] == trained[3]


def test_a_step_whose_update_was_skipped_is_done_again() -> None:
    """A GradScaler that meets infinity does not call the optimizer."""
    with Session(micro_batches=1) as session:
        model, (optimizer, _) = two_optimizers(session)
        scaler, tries = torch.amp.GradScaler("cpu"), 0
        for step in session.steps(until=1):
            tries += 1
            with contextlib.suppress(ArithmeticError), step:
                for batch in step.micro_batches(DATA, size=1):
                    step.backward(scaler.scale(model(batch).mean() * (float("inf") if tries == 1 else 1.0)))
                scaler.step(optimizer)
                scaler.update()
                if tries == 1:
                    raise ArithmeticError
        assert (tries, session.step) == (2, 1)


def test_samples_from_both_sides() -> None:
    with Session(micro_batches=4) as session:
        trainee(session)
        with next(session.steps()) as step:
            step.batch_indices(dataset_size=20, global_batch=4)
            with pytest.raises(RuntimeError, match="not from both"):
                step.micro_batches(DATA, size=1)


def test_a_loop_in_a_loop_and_a_session_that_is_closed() -> None:
    with Session(micro_batches=4) as session:
        model = trainee(session)
        with next(session.steps()), pytest.raises(RuntimeError, match="a step is under way"):
            steps(session, model)
    with pytest.raises(RuntimeError, match="the session is closed"):
        steps(session, model, until=9)


def test_what_is_registered() -> None:
    model = nn.Linear(1, 1)
    with Session() as session:
        with pytest.raises(ValueError, match=r"the model is a str, and not a torch.nn.Module"):
            session.register(model="net")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="parameters that are not the model's: wrap the model first"):
            session.register(model=model, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters()))
        sgd = torch.optim.SGD(model.parameters())
        with pytest.raises(ValueError, match=r"extra\['sgd'\] is an optimizer: give all of them together, optimizer="):
            session.register(model=model, optimizer=torch.optim.Adam(model.parameters()), extra={"sgd": sgd})
        with pytest.raises(
            ValueError, match=r"parameter \w+ is in two optimizers"
        ):
            session.register(model=model, optimizer=[sgd, torch.optim.Adam(model.parameters())])
        with pytest.raises(ValueError, match=r"an optimizer is a StepLR, and not a torch.optim.Optimizer"):
            session.register(model=model, optimizer=[torch.optim.lr_scheduler.StepLR(sgd, 1)])  # type: ignore[list-item]
        session.register(model=model, optimizer=sgd)


def test_progress_of_something_else() -> None:
    with Session() as session, pytest.raises(TypeError, match=re.escape("session.progress(session.steps(...))")):
        session.progress(10)  # type: ignore[arg-type]


def test_another_data_set_after_a_restart_is_refused_and_another_number_of_micro_batches_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Session(micro_batches=4, checkpoint_dir=tmp_path) as session:
        steps(session, trainee(session))
    with Session(micro_batches=4, checkpoint_dir=tmp_path) as session:
        model = trainee(session)
        with pytest.raises(ValueError, match="the data set has 40 samples, but had 20 when this epoch began"):
            steps(session, model, until=2, data=DATA + DATA)
    assert "so far" not in caplog.text
    with Session(micro_batches=2, checkpoint_dir=tmp_path) as session:
        steps(session, trainee(session), until=2)
    assert "steps had 4 micro-batches so far, and 2 from here on" in caplog.text
    assert "samples so far" not in caplog.text


def test_another_size_after_a_restart_is_told_once_and_a_checkpoint_that_does_not_say_it_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = "micro-batches had 2 samples so far, and 1 from here on"
    with Session(micro_batches=4, checkpoint_dir=tmp_path) as session:
        steps(session, trainee(session), size=2)
    for until in (2, 3):
        caplog.clear()
        with Session(micro_batches=4, checkpoint_dir=tmp_path) as session:
            model = trainee(session)
            session.save()  # before a step has said it again
            steps(session, model, until=until)
            steps(session, model, until=until, size=2)
        assert caplog.text.count(told) == (until == 2)
    with Session(micro_batches=4) as session:
        model = trainee(session)
        session.planned.resume({"micro_batches": 4, "stream": None})
        steps(session, model)
    assert caplog.text.count(told) == 0


class Ones:
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(1)


def collated(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples)


@pytest.mark.parametrize(
    ("data", "collate", "workers", "what"),
    [
        (Ones, lambda: None, 1, "dataset"),
        (lambda: DATA, lambda: partial(collated), 1, "collate"),
        (Ones, lambda: partial(collated), 1, "dataset and collate"),
        (lambda: DATA, lambda: collated, 1, None),
        (Ones, lambda: partial(collated), 0, None),
    ],
)
def test_workers_that_start_anew_in_each_step_are_told_of_once(
    data: Any, collate: Any, workers: int, what: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with Session(micro_batches=2) as session:
        model = trainee(session)
        for step in session.steps(until=3):
            with step:
                for batch in step.micro_batches(data(), size=1, collate=collate(), workers=workers):
                    step.backward(model(batch).mean())
    told = [record.getMessage() for record in caplog.records if "start anew" in record.getMessage()]
    assert len(told) == (what is not None)
    assert what is None or f"got another {what} than in the step before, so its 1 workers start anew" in told[0]


def test_workers_for_a_gpu_pin_what_they_load() -> None:
    for device in ("cpu", "cuda"):
        with Session(micro_batches=2, device="cpu") as session:
            trainee(session)
            session.planned._device = torch.device(device)
            loader = session.planned._loader_of(Source(dataset=DATA, length=20, size=1, workers=1), 0, Cursor())
            assert loader._loader.pin_memory == (device == "cuda")


def compute_on_unlike_devices() -> None:
    """Run by a rank: rank 1 has a GPU, as far as a machine without any can tell, and rank 0's driver is broken."""
    if os.environ["RANK"] == "1":
        session_module.choose_device = lambda *_: torch.device("cuda", 0)
    session_module.join_world = lambda place, _: join_world(place, torch.device("cpu"))
    Session()


def test_ranks_without_a_gpu_among_others_that_have_one() -> None:
    """They would wait for each other in NCCL."""
    with world(2, compute_on_unlike_devices) as ranks:
        for rank in ranks:
            assert rank.wait(30) == 1
            assert "error: Session(device=...) must be the same on all ranks: rank 0 says cpu, rank 1 says cuda: see why" in rank.output


def test_an_error_on_a_gpu_is_not_held_up_by_the_others() -> None:
    """NCCL's groups end together: who leaves with an error leaves them to the system. (gloo's here, told otherwise.)"""
    session = Session()
    session.device = torch.device("cuda", 0)
    with pytest.raises(ZeroDivisionError), session:
        _ = 1 / 0
    assert dist.is_initialized()
    dist.destroy_process_group()


def divided_data() -> None:
    """Run by a rank: it gives the step its own part of the data, as with a DistributedSampler."""
    with Session(micro_batches=4) as session:
        model = DistributedDataParallel(nn.Linear(1, 1))
        session.register(model=model)
        steps(session, model, data=DATA[: 10 + session.rank])


def test_ranks_with_data_sets_of_their_own_end_with_one_line_each() -> None:
    with world(2, divided_data) as ranks:
        for rank in ranks:
            assert rank.wait(30) == 1
            assert "elasticd: error: step.micro_batches(dataset=...) must be the same on all ranks" in rank.output
            assert "rank 0 says 10 samples, rank 1 says 11 samples: give each rank the whole data set" in rank.output
            assert "Traceback" not in rank.output


def ask_on_rank_0() -> None:
    """Run by a rank: as it is natural to write, where other frameworks have rank 0's loss."""
    with Session(micro_batches=4) as session:
        model = DistributedDataParallel(nn.Linear(1, 1))
        session.register(model=model)
        for step in session.steps(until=50):
            with step:
                for batch in step.micro_batches(DATA, size=1):
                    step.backward(model(batch).mean())
                if session.rank == 0:
                    print(step.mean_loss())


@pytest.mark.parametrize("size", [2, 3])
def test_the_mean_loss_on_one_rank_ends_all_of_them_at_once(size: int) -> None:
    """It waited for ever, or gloo ended the process: what others said next was of another length."""
    with world(size, ask_on_rank_0) as ranks:
        for rank in ranks:
            assert rank.wait(20) == 1
            assert "step.mean_loss() was called in a step on some ranks only: all must call it" in rank.output


def ask_late(on_all: bool) -> None:
    """Run by a rank: rank 1 comes late, or never, to what is asked for in the second step."""
    losses.PATIENCE = timedelta(seconds=0.3)
    with Session(micro_batches=4) as session:
        model = DistributedDataParallel(nn.Linear(1, 1))
        session.register(model=model)
        for step in session.steps(until=50 if not on_all else 3):
            with step:
                for batch in step.micro_batches(DATA, size=1):
                    step.backward(model(batch).mean())
                if step.index == 1 and session.rank == 1:
                    time.sleep(1)
                if step.index == 1 and (on_all or session.rank == 0):
                    print(step.mean_loss())


WAITS = "elasticd: rank 0 waits in step.mean_loss() for other ranks: all must call it, in the same steps"


def test_a_rank_that_waits_for_the_mean_loss_says_so_and_goes_on_waiting() -> None:
    first, second = run_world(2, ask_late, True)
    assert first.splitlines().count(WAITS) == 1
    numbers = [[line for line in each.splitlines() if "waits" not in line] for each in (first, second)]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 1
    with world(2, ask_late, False) as ranks:
        eventually(lambda: WAITS in ranks[0].output, 30)
        assert all(rank.running for rank in ranks)
