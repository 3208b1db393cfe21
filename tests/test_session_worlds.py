"""Session in worlds of forked ranks over real gloo: curves, kills and restarts, random states, full disks, torchrun."""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import eventually
from test_session import draw, flat, trainee
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worker_runs import byte_gpt, ledger, run, run_world, world

from elasticd import Session
from elasticd.checkpoint import storage
from elasticd.worker.data import Cursor, sample_ids


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
