"""What a data set draws at random: the same on any world, under any shares, with workers or without, after a restart."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worker_runs import ledger, run_world

from elasticd import Session
from elasticd.worker.draws import MICRO_BATCH, Draws, seed_global

SEED, COUNT, SIZE, STEPS = 3, 8, 2, 6
pytestmark = pytest.mark.usefixtures("in_plain_python")

#: By (step, first sample of a micro-batch): what was drawn for it, and what its model drew.
Drawn = dict[tuple[int, int], list[list[float]]]


def draw() -> list[float]:
    """In double precision: two that are equal are no coincidence."""
    of_torch = torch.rand(2, dtype=torch.float64).tolist()
    return [*of_torch, random.random(), random.gauss(), float(np.random.randn())]


class Drawing:
    """Each sample is its id and what it drew."""

    def __len__(self) -> int:
        return 48  # three steps an epoch

    def __getitem__(self, index: int) -> list[float]:
        return [float(index), *draw()]


def drawing_too(samples: list[list[float]]) -> torch.Tensor:
    """A collate function that draws."""
    return torch.tensor([*samples, [0.0, *draw()]], dtype=torch.float64)


def train(
    path: Path, directory: Path, caps: list[int], until: int, workers: int, seed: int | None, fault: bool
) -> None:
    """Run by a rank: a line for each completed step. With a fault, step 2 is done again after two micro-batches."""
    mine = caps[int(os.environ["RANK"])]
    settings = {"micro_batches": COUNT, "max_micro_batches": mine, "seed": seed, "checkpoint_dir": directory}
    with Session(**settings) as session, path.open("a") as file:
        model = DistributedDataParallel(nn.Linear(1, 1))
        session.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
        session.restore()
        data = Drawing()
        for step in session.steps(until=until):
            drawn, script = [], [random.random(), float(np.random.rand())]
            try:
                with step:
                    for batch in step.micro_batches(data, size=SIZE, workers=workers, collate=drawing_too):
                        drawn.append([*batch.tolist(), torch.rand(3, dtype=torch.float64).tolist()])
                        step.backward(model(batch[:, :1].float()).mean())
                        if fault and step.index == 2 and len(drawn) == 2:
                            fault = False
                            raise ArithmeticError
            except ArithmeticError:
                continue
            file.write(json.dumps({"step": session.step, "drawn": drawn, "script": script}) + "\n")


def drawn_by(
    folder: Path, caps: list[int], *, until: int = STEPS, workers: int = 0, seed: int | None = SEED, fault: bool = False
) -> tuple[Drawn, set[str]]:
    """What all ranks drew, and what scripts drew in each step by themselves."""
    path = folder / f"{len(list(folder.iterdir()))}.jsonl"
    run_world(len(caps), train, path, folder / "checkpoints", caps, until, workers, seed, fault)
    found: Drawn = {}
    script = set[str]()
    for line in ledger(path):
        script.add(f"{line['step']}: {line['script']}")
        for rows in line["drawn"]:
            key = line["step"], int(rows[0][0])
            assert key not in found
            found[key] = rows
    return found, script


def folder(tmp_path: Path, name: str) -> Path:
    made = tmp_path / name
    made.mkdir()
    return made


def test_a_micro_batch_draws_the_same_on_any_world_with_workers_or_without_and_after_a_restart(tmp_path: Path) -> None:
    whole, script = drawn_by(folder(tmp_path, "whole"), [COUNT])
    assert (len(whole), len(script)) == (STEPS * COUNT, STEPS)
    numbers = [number for rows in whole.values() for row in rows for number in row[1:]]
    assert len(set(numbers)) == len(numbers), "something is drawn twice"
    for number, (caps, workers, fault) in enumerate([([1, 2, 5], 2, False), ([3, 5], 0, True)]):
        drawn, said = drawn_by(folder(tmp_path, str(number)), caps, workers=workers, fault=fault)
        assert drawn == whole, (caps, workers)
        assert said == script or fault
    restarted = folder(tmp_path, "restarted")
    first, _ = drawn_by(restarted, [5, 3], until=2, workers=1)  # in the middle of an epoch
    then, _ = drawn_by(restarted, [2, 5, 1])
    assert first | then == whole


def test_without_a_seed_what_workers_draw_is_unlike_on_each_rank_and_in_each_run(tmp_path: Path) -> None:
    runs = [drawn_by(folder(tmp_path, name), [4, 4], until=1, workers=1, seed=None)[0] for name in "ab"]
    assert [len(run) for run in runs] == [COUNT, COUNT]
    rows = [row for run in runs for rows in run.values() for row in rows[:-1]]  # without the model's
    numbers = list(itertools.chain.from_iterable(row[1:] for row in rows))
    assert len(set(numbers)) == len(numbers)


def test_without_a_seed_and_without_workers_a_data_set_draws_from_the_scripts_own_states() -> None:
    found = []
    for _ in range(2):
        with Session(micro_batches=1) as session:
            model = nn.Linear(1, 1)
            session.register(model=model)
            seed_global(7)
            with next(session.steps()) as step:
                for batch in step.micro_batches(Drawing(), size=1, collate=drawing_too):
                    found.append(batch[0, 1:].tolist())
                    step.backward(model(batch[:, :1].float()).mean())
    seed_global(7)
    assert found[0] == found[1] == draw()


def break_off(draws: Draws, drawn: list[float]) -> None:
    with draws.aside():
        draws.seed_here(1, 2, MICRO_BATCH)
        drawn += draw()
        raise ArithmeticError


def test_the_scripts_own_states_are_put_back_whatever_happens() -> None:
    seed_global(1)
    expected = [torch.rand(()).item(), random.random(), np.random.rand()]
    seed_global(1)
    draws = Draws(seed=5, given=True)
    inside = []
    with pytest.raises(ArithmeticError):
        break_off(draws, inside)
    assert [torch.rand(()).item(), random.random(), np.random.rand()] == expected
    with draws.aside():
        draws.seed_here(1, 2, MICRO_BATCH)
        assert draw() == inside
