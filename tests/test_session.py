"""Session in plain python, as a world of one: counting, resuming without a sample skipped or repeated, and wrong use."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from worker_runs import alone

from elasticd import Session
from elasticd.checkpoint import storage
from elasticd.errors import ConfigError
from elasticd.worker.data import Cursor, sample_ids
from elasticd.worker.state import apply_random, capture_random, derive_seed, seed_random

SIZE, BATCH = 40, 6


pytestmark = pytest.mark.usefixtures("in_plain_python")


def trainee(session: Session) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    session.register(model=model, optimizer=optimizer)
    return model, optimizer


def train(session: Session, until: int) -> list[list[int]]:
    """The ids of each completed step of this rank."""
    seen = []
    for step in session.steps(until=until):
        with step:
            ids = step.batch_indices(dataset_size=SIZE, global_batch=BATCH)
        seen.append(ids)
    return seen


def expected(first: int, last: int, *, seed: int = 0) -> list[int]:
    """The samples of steps ``first`` .. ``last`` - 1, said independently of Session."""
    return sample_ids(Cursor(), range(first * BATCH, last * BATCH), size=SIZE, seed=seed)


def flat(lists: list[list[int]]) -> list[int]:
    return [item for inner in lists for item in inner]


# --- plain python, a world of one ---


def test_steps_are_counted_and_the_samples_follow_one_another() -> None:
    with Session(seed=5) as session:
        assert (session.rank, session.world_size, session.local_rank, session.round_number) == (0, 1, 0, 0)
        indices = []
        seen = []
        for step in session.steps(until=20):
            indices.append(step.index)
            with step:
                seen.append(step.batch_indices(dataset_size=SIZE, global_batch=BATCH))
                assert step.loss_scale == 1.0
            assert session.step == step.index + 1
        assert indices == list(range(20))
        assert flat(seen) == expected(0, 20, seed=5)
    assert not dist.is_initialized()
    assert session.rank == 0  # still known, for a last line of a log


def test_a_group_that_the_script_made_is_used_and_left_to_it() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with Session():
        pass
    assert dist.is_initialized()


def test_a_step_whose_block_raised_is_not_counted_and_comes_again() -> None:
    with Session() as session:
        tries: list[tuple[int, list[int]]] = []
        for step in session.steps(until=3):
            try:
                with step:
                    tries.append((step.index, step.batch_indices(dataset_size=SIZE, global_batch=BATCH)))
                    if len(tries) in (2, 3):
                        raise ArithmeticError("loss is not a number")
            except ArithmeticError:
                assert session.step == 1
        assert [index for index, _ in tries] == [0, 1, 1, 1, 2]
        assert tries[1] == tries[2] == tries[3]
        assert flat([ids for _, ids in (tries[0], tries[3], tries[4])]) == expected(0, 3)


def test_a_resumed_run_goes_on_where_the_last_checkpoint_was(tmp_path: Path) -> None:
    with Session(checkpoint_dir=tmp_path, save_every_steps=4, seed=9) as session:
        trainee(session)
        assert session.restore() == 0
        steps = session.steps(until=100)
        first = []
        for _ in range(7):  # left in the middle, as a kill would
            step = next(steps)
            with step:
                first.append(step.batch_indices(dataset_size=SIZE, global_batch=BATCH))
    with Session(checkpoint_dir=tmp_path, save_every_steps=4, seed=9) as session:
        trainee(session)
        assert session.restore() == 4
        then = train(session, until=10)
    assert flat(first[:4] + then) == expected(0, 10, seed=9)
    assert storage.complete_steps(tmp_path) == [10, 8, 4]  # each fourth step, and the last one
    with Session(checkpoint_dir=tmp_path, seed=9) as session:
        trainee(session)
        assert session.restore() == 10
        assert train(session, until=10) == []


def test_model_optimizer_and_extras_come_back(tmp_path: Path) -> None:
    def run_until(until: int, *, resumed_at: int) -> tuple[list[float], float]:
        with Session(checkpoint_dir=tmp_path) as session:
            torch.manual_seed(resumed_at)
            model = nn.Linear(1, 1)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
            session.register(model=model, optimizer=optimizer, extra={"scheduler": scheduler})
            assert session.restore() == resumed_at
            for step in session.steps(until=until):
                with step:
                    ids = step.batch_indices(dataset_size=SIZE, global_batch=BATCH)
                    optimizer.zero_grad()
                    model(torch.tensor(ids).float().unsqueeze(1)).square().mean().backward()
                    optimizer.step()
                    scheduler.step()
            return [p.item() for p in model.parameters()], scheduler.get_last_lr()[0]

    parameters, rate = run_until(3, resumed_at=0)
    assert run_until(3, resumed_at=3) == (parameters, rate)
    resumed = run_until(6, resumed_at=3)
    shutil.rmtree(tmp_path)
    assert run_until(6, resumed_at=0) == resumed
    assert resumed[1] == pytest.approx(0.1 * 0.1**3)


def draw(count: int = 3) -> list[float]:
    return [value for _ in range(count) for value in (torch.rand(1).item(), random.random(), float(np.random.rand()))]


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    with Session(checkpoint_dir=tmp_path, seed=4) as session:
        trainee(session)
        draw()
        session.save()
        following = draw()
    with Session(checkpoint_dir=tmp_path, seed=4) as session:
        trainee(session)
        assert draw() != following
        session.restore()
        assert draw() == following


def test_a_seed_makes_the_first_values_repeatable_and_none_leaves_them_alone() -> None:
    def first(seed: int | None) -> list[float]:
        with Session(seed=seed):
            return draw(1)

    assert first(7) == first(7) != first(8)
    seed_random(3)
    undisturbed = draw(1)
    seed_random(3)
    assert first(None) == undisturbed


def test_random_states_survive_their_text_and_a_foreign_one_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    text = capture_random(cpu)
    following = draw()
    apply_random(text, cpu)
    assert draw() == following
    apply_random(json.dumps({"torch": "AAAA", "python": []}), cpu)
    assert "random states were not restored" in caplog.text


def test_derived_seeds_never_change_between_versions_and_differ() -> None:
    assert derive_seed(0, 4, 2) == 107304250991145828
    assert len({derive_seed(seed, step, rank) for seed in (0, -1, -2) for step in range(9) for rank in range(9)}) == 243
    assert all(0 <= derive_seed(n) < 2**63 for n in range(100))


def test_saving_by_hand_is_done_once_for_a_step(tmp_path: Path) -> None:
    with Session(checkpoint_dir=tmp_path) as session:
        trainee(session)
        train(session, until=2)
        assert session.save() is None  # saved at the end
        shutil.rmtree(tmp_path / "step-2")
        next(iter(session.steps())).__enter__().__exit__(None, None, None)
        saved = session.save()
        assert saved is not None
        assert (saved.step, saved.path) == (3, tmp_path / "step-3")
    with Session() as session:
        assert session.save() is None  # nowhere to save to


# --- wrong use ---


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="name a writable directory"):
        Session(checkpoint_dir=tmp_path / "file" / "sub")
    assert not dist.is_initialized()


def test_an_operators_error_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with alone(Session_in, tmp_path / "file" / "sub") as rank:
        assert rank.wait() == 1
        assert len(rank.output.splitlines()) == 1, rank.output
        assert rank.output.startswith("elasticd: error: cannot write checkpoints to ")


def Session_in(directory: Path) -> None:  # noqa: N802
    Session(checkpoint_dir=directory)


@pytest.mark.parametrize("wrong", [{"save_every_steps": -1}, {"keep": 0}])
def test_numbers_that_make_no_sense(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="must not be negative"):
        Session(**wrong)


def test_an_earlier_runs_checkpoints_that_were_not_restored(tmp_path: Path) -> None:
    with Session(checkpoint_dir=tmp_path) as session:
        trainee(session)
        train(session, until=1)
    with Session(checkpoint_dir=tmp_path) as session:
        trainee(session)
        with pytest.raises(ConfigError, match=r"call session.restore\(\) or name another one"):
            next(session.steps())


def test_a_directory_and_nothing_registered(tmp_path: Path) -> None:
    with Session(checkpoint_dir=tmp_path) as session:
        for use in (session.restore, session.save, lambda: next(session.steps())):
            with pytest.raises(RuntimeError, match=r"call session.register\("):
                use()


def test_registering_twice_too_late_or_half() -> None:
    model = nn.Linear(1, 1)
    with Session() as session:
        with pytest.raises(ValueError, match="register the model too"):
            session.register(optimizer=torch.optim.SGD(model.parameters()))
        session.register(model=model)
        with pytest.raises(RuntimeError, match="once, with everything, before"):
            session.register(model=model)


def test_a_checkpoint_of_another_seed_or_another_model(tmp_path: Path) -> None:
    with Session(checkpoint_dir=tmp_path, seed=1) as session:
        trainee(session)
        train(session, until=1)
    with Session(checkpoint_dir=tmp_path, seed=2) as session:
        trainee(session)
        with pytest.raises(ConfigError, match="was made with seed 1, not 2"):
            session.restore()
    with Session(checkpoint_dir=tmp_path, seed=1) as session:
        session.register(model=nn.Linear(2, 1))
        with pytest.raises(ConfigError, match="does not fit what was registered"):
            session.restore()


@pytest.mark.parametrize(("size", "batch"), [(5, 6), (5, 0), (0, 0), (5, -1)])
def test_a_batch_that_does_not_fit_the_data(size: int, batch: int) -> None:
    with (
        Session() as session,
        pytest.raises(ValueError, match="does not fit a data set"),
        next(session.steps()) as step,
    ):
        step.batch_indices(dataset_size=size, global_batch=batch)


def test_a_data_set_may_change_its_size_between_epochs_only(tmp_path: Path) -> None:
    with Session(checkpoint_dir=tmp_path) as session:
        trainee(session)
        train(session, until=3)
    with Session(checkpoint_dir=tmp_path) as session:
        trainee(session)
        session.restore()
        with (
            pytest.raises(ValueError, match="has 41 samples, but had 40 when this epoch began"),
            next(session.steps()) as step,
        ):
            step.batch_indices(dataset_size=SIZE + 1, global_batch=BATCH)
        steps = session.steps()
        with next(steps) as step:
            step.batch_indices(dataset_size=SIZE, global_batch=SIZE - 3 * BATCH)
        with next(steps) as step:
            assert sorted(step.batch_indices(dataset_size=50, global_batch=50)) == list(range(50))


def test_a_step_that_is_not_used_or_used_twice_or_saved_in() -> None:
    with Session() as session:
        with pytest.raises(RuntimeError, match="write 'with step:' in the loop"):
            for _ in session.steps(until=2):
                pass
        step = next(session.steps())
        with step, pytest.raises(RuntimeError, match="save between two steps"):
            session.save()
        with pytest.raises(RuntimeError, match="a step is used once"):
            step.__enter__()
