"""Session: counting, reports, the boundary protocol, resuming without a sample skipped or repeated, and wrong use.

In plain python as a world of one, in worlds of forked ranks over real gloo, and under a scripted daemon.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worker_runs import FakeDaemon, alone, byte_gpt, ledger, run, run_world, world

from elasticd import Session
from elasticd.checkpoint import storage
from elasticd.errors import ConfigError, Fenced
from elasticd.worker import link
from elasticd.worker.data import Cursor, sample_ids
from elasticd.worker.link import MAX_REPORTS_PER_S, Folded, StepReport
from elasticd.worker.session import EXIT_PARKED
from elasticd.worker.state import apply_random, capture_random, derive_seed, seed_random
from elasticd.worker.world import Place, choose_device

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


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_is_half_there_names_what_is_missing(missing: str) -> None:
    for half in ({**WHOLE, missing: ""}, {name: value for name, value in WHOLE.items() if name != missing}):
        with pytest.raises(ConfigError, match=f"{missing} must be set too"):
            Place.from_environment(half)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("RANK", "x", "RANK is 'x', not a number"), ("RANK", "2", "no such rank"), ("RANK", "-1", "no such rank"),
     ("WORLD_SIZE", "0", "no such rank"), ("LOCAL_RANK", "1.5", "LOCAL_RANK is '1.5'"),
     ("ELASTICD_ROUND", "one", "ELASTICD_ROUND is 'one'")],
)  # fmt: skip
def test_an_environment_that_is_wrong_names_the_variable(name: str, value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Place.from_environment({**WHOLE, name: value})


def test_the_place_is_torchruns_and_elasticds_add_to_it() -> None:
    assert Place.from_environment({"MASTER_ADDR": "left over"}) == Place()
    place = Place.from_environment(WHOLE | {"TORCHELASTIC_RUN_ID": "t", "TORCHELASTIC_RESTART_COUNT": "3"})
    assert (place.rank, place.world_size, place.job_id, place.round_number, place.launched) == (1, 2, "t", 3, True)
    place = Place.from_environment(WHOLE | {"TORCHELASTIC_RUN_ID": "t", "ELASTICD_JOB_ID": "e", "ELASTICD_ROUND": "8"})
    assert (place.job_id, place.round_number) == ("e", 8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a node without a GPU says")
def test_a_device_that_is_not_there() -> None:
    assert choose_device(Place(), None) == torch.device("cpu")
    for wanted in ("cuda", "cuda:3"):
        with pytest.raises(ConfigError, match="this node has 0; lower --nproc-per-node"):
            choose_device(Place(), wanted)
    with pytest.raises(ConfigError, match="device 'gpu' is none that torch knows"):
        choose_device(Place(), "gpu")


# --- worlds over gloo ---


@pytest.mark.parametrize(("batch", "worlds"), [(7, (2, 3)), (2, (3,))], ids=["uneven shares", "an empty share"])
def test_the_loss_curve_does_not_depend_on_the_world(tmp_path: Path, batch: int, worlds: tuple[int, ...]) -> None:
    curves = {}
    for size in (1, *worlds):
        path = tmp_path / f"{size}.jsonl"
        arguments = ("--steps", "8", "--batch", str(batch), "--micro-batches", str(batch), "--ledger", str(path))
        run_world(size, byte_gpt, *arguments)
        curves[size] = {line["step"]: line["loss"] for line in ledger(path)}
        ids = defaultdict(list)
        for line in sorted(ledger(path), key=lambda line: line["rank"]):
            ids[line["step"]] += line["ids"]
        assert all(len(set(found)) == len(found) == batch for found in ids.values())
    assert curves[1].keys() == set(range(1, 9))
    assert curves[1][8] < curves[1][1]
    for size in worlds:
        for step, loss in curves[1].items():
            assert curves[size][step] == pytest.approx(loss, abs=1e-4)


def test_a_restart_neither_skips_nor_repeats_a_sample(tmp_path: Path) -> None:
    """Kills by SIGKILL at seeded points, each restart with another world size; then every sample of every step, once.

    In exact mode: the weights have the bits of a run that nobody disturbed, on a world of one.
    """
    seed, until, batch = 20, 30, 12
    (undisturbed,) = run_world(1, byte_gpt, "--steps", str(until), "--batch", str(batch), "--exact")
    moment = random.Random(seed)
    directory, attempts = tmp_path / "checkpoints", []
    for number, size in enumerate((2, 3, 1, 3, 2)):
        path = tmp_path / f"{number}.jsonl"
        arguments = ("--steps", str(until), "--batch", str(batch), "--save-every", "3", "--ledger", str(path), "--exact")
        restored = max(storage.complete_steps(directory), default=0) if directory.exists() else 0
        with world(size, byte_gpt, *arguments, "--checkpoint-dir", str(directory)) as ranks:
            if size == 2 and number:  # the last one
                assert [rank.wait() for rank in ranks] == [0] * size, ranks[0].output
                assert ranks[0].output.splitlines()[-1] == undisturbed.splitlines()[-1]
                assert undisturbed.splitlines()[-1].startswith("weights ")
            else:
                enough = moment.randint(1, 7) * size
                eventually(lambda: len(ledger(path)) >= enough, 60, f"{enough} lines of attempt {number}")
                time.sleep(moment.uniform(0, 0.03))
                for victim in moment.sample(ranks, moment.randint(1, size)):
                    victim.kill()
                statuses = [rank.wait() for rank in ranks]  # a survivor of a dead rank ends by itself
                assert 0 not in statuses, f"seed {seed}: attempt {number} was over before the kill"
        attempts.append((size, restored, ledger(path)))
    assert max(storage.complete_steps(directory)) == until
    counted = _committed(attempts)
    size_of_data = len(_library())
    order = sample_ids(Cursor(), range(until * batch), size=size_of_data, seed=1)
    assert sorted(counted) == list(range(1, until + 1))
    for step, ids in counted.items():
        # Which rank computes which of them is not asked: shares follow speed.
        assert sorted(ids) == sorted(order[(step - 1) * batch : step * batch]), f"seed {seed}: step {step}"


def _library() -> object:
    from elasticd.examples.byte_gpt import StandardLibrary

    return StandardLibrary(16)


def _committed(attempts: list[tuple[int, int, list[dict]]]) -> dict[int, list[int]]:
    """The samples of each step, from the last attempt that completed it; each attempt begins where it was restored."""
    counted: dict[int, list[int]] = {}
    for size, restored, lines in attempts:
        by_step: dict[int, dict[int, list[int]]] = defaultdict(dict)
        for line in lines:
            assert line["rank"] not in by_step[line["step"]], "a rank completed a step twice"
            by_step[line["step"]][line["rank"]] = line["ids"]
        assert sorted(by_step) == list(range(restored + 1, restored + 1 + len(by_step)))
        for step, shares in by_step.items():
            if len(shares) == size:
                counted[step] = flat([shares[rank] for rank in range(size)])
    return counted


def swallow_on_one_rank() -> None:
    """Run by a rank: the block of step 1 raises on rank 1 alone, and the script goes on."""
    with Session() as session:
        tried = False
        for step in session.steps(until=4):
            try:
                with step:
                    if session.rank == 1 and session.step == 1 and not tried:
                        tried = True
                        raise ArithmeticError
            except ArithmeticError:
                pass


def test_ranks_that_go_apart_are_found_out(tmp_path: Path) -> None:
    with world(2, swallow_on_one_rank) as ranks:
        for rank in ranks:
            assert rank.wait() == 1
        together = "".join(rank.output for rank in ranks)
        assert "StepsDiverged: ranks are in steps 1 to " in together


def raise_everywhere() -> None:
    """Run by a rank: the block of step 1 raises on all ranks, twice."""
    with Session() as session:
        tries = []
        for step in session.steps(until=3):
            try:
                with step:
                    tries.append(step.index)
                    if tries.count(1) in (1, 2) and step.index == 1:
                        raise ArithmeticError
            except ArithmeticError:
                pass
        assert tries == [0, 1, 1, 1, 2], tries


def test_a_step_that_raised_on_all_ranks_is_done_again_by_all() -> None:
    run_world(3, raise_everywhere)


def draw_a_step(directory: Path, until: int) -> None:
    """Run by a rank: resume, draw from each random state in each step, print what was drawn."""
    with Session(checkpoint_dir=directory, seed=6) as session:
        trainee(session)
        session.restore()
        for step in session.steps(until=until):
            with step:
                drawn = draw(1)
            print(json.dumps({"step": session.step, "drawn": drawn}))


def drawn_by(size: int, directory: Path, until: int) -> list[dict[int, list[float]]]:
    outputs = run_world(size, draw_a_step, directory, until)
    lines = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    return [{line["step"]: line["drawn"] for line in rank} for rank in lines]


def test_random_states_are_each_ranks_own_and_a_new_rank_gets_a_repeatable_one(tmp_path: Path) -> None:
    whole = drawn_by(2, tmp_path / "whole", 4)
    drawn_by(2, tmp_path / "halves", 2)
    for copy in ("again", "wider", "wider too"):
        shutil.copytree(tmp_path / "halves", tmp_path / copy)
    resumed = drawn_by(2, tmp_path / "again", 4)
    assert resumed == [{step: rank[step] for step in (3, 4)} for rank in whole]
    wider = drawn_by(3, tmp_path / "wider", 4)
    assert wider[:2] == resumed
    assert wider == drawn_by(3, tmp_path / "wider too", 4)
    assert wider[2][3] not in [drawn for rank in whole for drawn in rank.values()]


def fail_some_saves(directory: Path) -> None:
    """Run by a rank: on rank 1 the kernel refuses to write in steps 2 to 4, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Session(checkpoint_dir=directory, save_every_steps=1) as session:
        session.register(model=DistributedDataParallel(nn.Linear(50, 50)))
        session.restore()
        for step in session.steps(until=6):
            with step:
                session._checkpoints._saver.wait()  # the limit is for one save each
                full = session.rank == 1 and 1 <= step.index <= 3
                resource.setrlimit(resource.RLIMIT_FSIZE, (100 if full else soft, hard))


def test_a_disk_that_is_full_on_one_rank_does_not_end_training(tmp_path: Path) -> None:
    outputs = run_world(2, fail_some_saves, tmp_path)
    assert storage.complete_steps(tmp_path) == [6, 5, 1]
    assert [f"checkpoint of step {step} was not saved: rank 1" in outputs[0] for step in range(1, 7)] == [
        False, True, True, True, False, False]  # fmt: skip
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_plain_torchrun_runs_it(tmp_path: Path) -> None:
    """Two real ranks under torchrun itself; then plain python takes up where they ended."""
    module = [
        "-m",
        "elasticd.examples.byte_gpt",
        "--length",
        "16",
        "--width",
        "16",
        "--checkpoint-dir",
        str(tmp_path / "c"),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *module]
    status, output = run([*command, "--steps", "4", "--print-every", "2"])
    assert status == 0, output
    assert "step 4 world 2 loss" in output
    status, output = run([sys.executable, *module, "--steps", "6", "--print-every", "2"])
    assert status == 0, output
    assert [line.split(" loss")[0] for line in output.splitlines()] == ["step 6 world 1"]


# --- under a daemon ---


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "socket") as started:
        yield started


def env(daemon: FakeDaemon, *, round_number: int = 7) -> dict[str, str]:
    return {"ELASTICD_SOCKET": daemon.path, "ELASTICD_JOB_ID": "job", "ELASTICD_ROUND": str(round_number)}


def step_unequally(until: int) -> None:
    """Run by a rank that divides its batch itself: rank 1 takes three times as long."""
    with Session() as session:
        model, optimizer = trainee(session)
        model = DistributedDataParallel(model)
        for step in session.steps(until=until):
            with step:
                optimizer.zero_grad()
                loss = model(torch.ones(1, 1)).sum()
                time.sleep(0.09 if session.rank else 0.03)
                loss.backward()
                optimizer.step()


def test_the_daemon_hears_how_fast_the_ranks_are_that_divide_their_batch_themselves(daemon: FakeDaemon) -> None:
    run_world(2, step_unequally, 16, **env(daemon))
    eventually(daemon.heard_out)
    fast, slow = daemon.of_type("speeds")[0]["seconds"]
    assert 2 * fast < slow  # without the waiting
    assert "shares" not in daemon.of_type("speeds")[0]
    assert {message["connection"] for message in daemon.of_type("speeds")} == {
        message["connection"] for message in daemon.of_type("worker_hello") if message["rank"] == 0
    }


def step_until_told(directory: Path | None, until: int, step_s: float = 0.002) -> None:
    """Run by a rank: steps of a known length."""
    with Session(checkpoint_dir=directory) as session:
        trainee(session)
        session.restore()
        for step in session.steps(until=until):
            with step:
                step.batch_indices(dataset_size=SIZE, global_batch=BATCH)
                time.sleep(step_s)
                step.report(loss=torch.tensor(1.5), accuracy=0.25)
    print("ended at", session.step)


def test_workers_say_who_they_are_and_what_they_did(daemon: FakeDaemon, tmp_path: Path) -> None:
    run_world(2, step_until_told, tmp_path / "c", 40, **env(daemon))
    eventually(daemon.heard_out)
    hellos = sorted(daemon.of_type("worker_hello"), key=lambda hello: hello["rank"])
    assert [(h["rank"], h["local_rank"], h["job"], h["round"]) for h in hellos] == [(0, 0, "job", 7), (1, 1, "job", 7)]
    assert all(isinstance(h["pid"], int) for h in hellos)
    for hello in hellos:
        reports = [m for m in daemon.of_type("step") if m["connection"] == hello["connection"]]
        assert next(m["type"] for m in daemon.messages if m["connection"] == hello["connection"]) == "worker_hello"
        assert sum(m["steps"] for m in reports) == 40
        assert reports[-1]["step"] == 40
        assert all(
            m["step"] - m["steps"] == before
            for before, m in zip([0, *(m["step"] for m in reports)], reports, strict=False)
        )
        assert sum(m["samples"] for m in reports) == 40 * BATCH / 2
        assert all(m["round"] == 7 and m["seconds"] >= 0.002 and m["wait_seconds"] >= 0 for m in reports)
        assert all(m["metrics"] == {"loss": 1.5, "accuracy": 0.25} for m in reports)
    (commit,) = daemon.of_type("commit")
    assert (commit["step"], commit["path"], commit["round"]) == (40, str(tmp_path / "c" / "step-40"), 7)


def wait_for_a_slow_rank() -> None:
    """Run by a rank: real gradients over DDP, with rank 1 late in each step."""
    with Session() as session:
        model = DistributedDataParallel(nn.Linear(4, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.register(model=model, optimizer=optimizer)
        for step in session.steps(until=8):
            with step:
                if session.rank == 1:
                    time.sleep(0.05)
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()


def test_the_time_spent_waiting_for_others_is_known(daemon: FakeDaemon) -> None:
    run_world(2, wait_for_a_slow_rank, **env(daemon))
    eventually(daemon.heard_out)
    waited = {}
    for hello in daemon.of_type("worker_hello"):
        reports = [m for m in daemon.of_type("step") if m["connection"] == hello["connection"]]
        waited[hello["rank"]] = sum(m["wait_seconds"] * m["steps"] for m in reports)
    assert waited[0] > 8 * 0.05 * 0.8
    assert waited[0] > 2 * waited[1]


def test_one_rank_is_asked_and_all_stop_at_the_same_step(daemon: FakeDaemon, tmp_path: Path) -> None:
    with world(3, step_until_told, tmp_path / "c", 100_000, **env(daemon)) as ranks:
        eventually(lambda: len(daemon.of_type("step")) > 6, 60, "steps")
        daemon.tell(1, {"type": "boundary_wanted", "round": 6})  # of an older round: not meant
        more = len(daemon.of_type("step")) + 6
        eventually(lambda: len(daemon.of_type("step")) > more, 60, "more steps")
        assert daemon.of_type("boundary") == []
        daemon.tell(1, {"type": "boundary_wanted", "round": 7})
        eventually(lambda: len(daemon.of_type("boundary")) == 3, 60, "boundary")
        (step,) = {message["step"] for message in daemon.of_type("boundary")}
        assert storage.complete_steps(tmp_path / "c") == [step]
        assert storage.verify(tmp_path / "c" / f"step-{step}").world_size == 3
        eventually(lambda: len(daemon.of_type("commit")) == 1, 60, "the commit")
        for hello in daemon.of_type("worker_hello"):
            own = [m for m in daemon.messages if m["connection"] == hello["connection"]]
            assert max(m["step"] for m in own if m["type"] == "step") <= step
        assert all(rank.running for rank in ranks)  # parked, until the agent stops them or the daemon is gone
        daemon.close()
        assert [rank.wait() for rank in ranks] == [EXIT_PARKED] * 3
    run_world(2, step_until_told, tmp_path / "c", step + 2)
    assert storage.complete_steps(tmp_path / "c")[0] == step + 2


def test_a_stop_at_the_last_step_is_an_end(daemon: FakeDaemon, tmp_path: Path) -> None:
    """The job is over: there is nothing to park for."""
    with alone(step_until_told, tmp_path / "c", 1, 1.0, **env(daemon)) as rank:
        eventually(lambda: len(daemon.of_type("worker_hello")) == 1, 60, "the hello")
        daemon.tell(0, {"type": "boundary_wanted", "round": 7})
        assert rank.wait() == 0, rank.output
    assert daemon.of_type("boundary") == []
    assert storage.complete_steps(tmp_path / "c") == [1]


def test_a_stop_without_a_directory_parks_all_the_same(daemon: FakeDaemon) -> None:
    with alone(step_until_told, None, 100_000, **env(daemon)) as rank:
        eventually(lambda: len(daemon.of_type("step")) > 1, 60, "steps")
        daemon.tell(0, {"type": "boundary_wanted", "round": 7})
        eventually(lambda: len(daemon.of_type("boundary")) == 1, 60, "boundary")
        assert daemon.of_type("commit") == []
        daemon.close()
        assert rank.wait() == EXIT_PARKED


def test_a_refused_commit_fences_the_worker(tmp_path: Path) -> None:
    refusing = FakeDaemon(tmp_path / "socket", commit_reason="a newer round stands")
    with refusing, alone(save_now_and_then, tmp_path / "c", **env(refusing)) as rank:
        assert rank.wait() == 1
        assert f"{Fenced.__name__}: checkpoint refused: a newer round stands" in rank.output


def save_now_and_then(directory: Path) -> None:
    """Run by a rank: until it is stopped."""
    with Session(checkpoint_dir=directory, save_every_steps=2) as session:
        trainee(session)
        for step in session.steps():
            with step:
                time.sleep(0.005)


def test_training_goes_on_when_the_daemon_is_lost(daemon: FakeDaemon, tmp_path: Path) -> None:
    with alone(step_until_told, tmp_path / "c", 300, **env(daemon)) as rank:
        eventually(lambda: len(daemon.of_type("step")) > 1, 60, "steps")
        daemon.close()
        assert rank.wait() == 0, rank.output
        assert "the connection to the daemon is lost" in rank.output
        assert "ended at 300" in rank.output


def test_training_starts_without_a_daemon_at_the_socket(tmp_path: Path) -> None:
    with alone(step_until_told, None, 3, ELASTICD_SOCKET=str(tmp_path / "nobody")) as rank:
        assert rank.wait() == 0, rank.output
        assert "training goes on without it" in rank.output


def test_a_daemon_that_does_not_read_holds_nothing_up(tmp_path: Path) -> None:
    """It accepts, and reads nothing: the socket's buffer fills, steps are folded, training ends in its own time."""
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deaf.bind(str(tmp_path / "socket"))
        deaf.listen()
        with alone(report_much, ELASTICD_SOCKET=str(tmp_path / "socket")) as rank:
            assert rank.wait() == 0, rank.output


def report_much() -> None:
    """Run by a rank: reports of 30 kB each, many more than a socket holds."""
    many = {f"figure_{number:04}": 1.0 for number in range(1500)}
    with Session() as session:
        started = time.monotonic()
        for step in session.steps(until=400):
            with step:
                step.report(**many)
                time.sleep(0.003)
        assert session.step == 400
        assert time.monotonic() - started < 30


@pytest.mark.parametrize("nonsense", [b"hello?\n", b"[1]\n", b'{"type": 3}\n', b"x" * 400_000])
def test_a_daemon_that_talks_nonsense_is_left(daemon: FakeDaemon, nonsense: bytes, tmp_path: Path) -> None:
    with alone(step_until_told, None, 150, **env(daemon)) as rank:
        eventually(lambda: len(daemon.of_type("step")) > 0, 60, "steps")
        daemon.send_raw(0, nonsense)
        assert rank.wait() == 0, rank.output
        assert "training goes on" in rank.output


def pause_between_steps() -> None:
    """Run by a rank: a long step, and then a long time between two steps."""
    link.PAUSE_REPORT_S, link.MAX_REPORTS_PER_S = 0.05, 5.0
    with Session() as session:
        for step in session.steps(until=4):
            with step:
                time.sleep(0.5 if step.index == 1 else 0.001)
            if session.step == 3:
                time.sleep(0.5)


def test_a_long_time_between_steps_is_no_stuck_step(daemon: FakeDaemon) -> None:
    """A checkpoint or an evaluation of minutes: the daemon hears of it, and of a long step it hears nothing."""
    with alone(pause_between_steps, **env(daemon)) as rank:
        assert rank.wait() == 0, rank.output
    eventually(daemon.heard_out)
    kinds = [message["type"] if message["type"] != "step" else message["step"] for message in daemon.messages]
    assert "pause" not in kinds[kinds.index(1) : kinds.index(2)]
    assert kinds[kinds.index(3) : kinds.index(4)].count("pause") > 2
    assert {message["round"] for message in daemon.of_type("pause")} == {7}


# --- reports that are folded ---

reports = st.builds(
    StepReport,
    step=st.integers(1, 9999),
    seconds=st.floats(0, 100),
    wait_seconds=st.floats(0, 100),
    samples=st.integers(0, 999),
    metrics=st.dictionaries(st.sampled_from("abc"), st.floats(-9, 9)),
)


@settings(max_examples=50)
@given(st.lists(reports, min_size=1, max_size=20))
def test_folded_reports_lose_nothing(many: list[StepReport]) -> None:
    folded = Folded()
    for report in many:
        folded.add(report)
    message = folded.message(3)
    assert (message["type"], message["round"], message["steps"]) == ("step", 3, len(many))
    assert (message["step"], message["metrics"]) == (many[-1].step, many[-1].metrics)
    assert message["samples"] == sum(report.samples for report in many)
    assert message["seconds"] * len(many) == pytest.approx(sum(report.seconds for report in many))
    assert message["wait_seconds"] * len(many) == pytest.approx(sum(report.wait_seconds for report in many))


def test_reports_come_at_a_bounded_rate(daemon: FakeDaemon) -> None:
    with alone(step_until_told, None, 400, 0.001, **env(daemon)) as rank:
        assert rank.wait() == 0, rank.output
    eventually(daemon.heard_out)
    assert sum(message["steps"] for message in daemon.of_type("step")) == 400
    times = [message["t"] for message in daemon.of_type("step")]
    took_s = times[-1] - times[0]
    assert len(times) <= took_s * MAX_REPORTS_PER_S + 2
    assert all(later >= earlier for earlier, later in pairwise(times))
