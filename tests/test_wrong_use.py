"""Mistakes of people who write a training script: each is told in the error that they get, and none hangs or passes unseen."""

from __future__ import annotations

import re
import time
from datetime import timedelta
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
from elasticd.errors import ConfigError
from elasticd.worker import losses
from elasticd.worker.layout import check_devices
from elasticd.worker.step import Step

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
        session.register(model=model, optimizer=torch.optim.SGD(model.parameters()))


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
    assert "micro-batches so far" not in caplog.text
    with Session(micro_batches=2, checkpoint_dir=tmp_path) as session:
        steps(session, trainee(session), until=2)
    assert "steps had 4 micro-batches so far, and 2 from here on" in caplog.text


def compute_on_unlike_devices() -> None:
    """Run by a rank: rank 1 says what it would on a node whose GPUs work, and rank 0 not."""
    with Session() as session:
        check_devices(torch.device("cuda", 0) if session.rank else session.device, session._control.group)


def test_ranks_without_a_gpu_among_others_that_have_one() -> None:
    with world(2, compute_on_unlike_devices) as ranks:
        for rank in ranks:
            assert rank.wait(30) == 1
            assert "error: some ranks compute on a GPU and others on the CPU (this one: c" in rank.output


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
            assert "elasticd: error: the ranks' data sets have [10, 11] samples" in rank.output
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


WAITS = "elasticd: rank 0 waits in step.mean_loss() for other ranks: all of them must call it, in the same steps"


def test_a_rank_that_waits_for_the_mean_loss_says_so_and_goes_on_waiting() -> None:
    first, second = run_world(2, ask_late, True)
    assert first.splitlines()[0] == WAITS
    assert first.splitlines()[1:] == second.splitlines()
    with world(2, ask_late, False) as ranks:
        eventually(lambda: WAITS in ranks[0].output, 30)
        assert all(rank.running for rank in ranks)
