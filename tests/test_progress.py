"""``session.progress``: lines in a file, a bar in a terminal, from rank 0 alone, and never the end of the job."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worker_runs import run_world

from elasticd import Session
from elasticd.worker.progress import Standing

pytestmark = pytest.mark.usefixtures("in_plain_python")


def train(session: Session, *, until: int, **how: Any) -> list[int]:
    """The steps that came."""
    model = DistributedDataParallel(nn.Linear(1, 1))
    session.register(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    session.restore()
    came = []
    for step in session.progress(session.steps(until=until), **how):
        with step:
            for batch in step.micro_batches([torch.ones(1)] * 40, size=2):
                step.backward(model(batch).mean())
            step.report(loss=2.5)
        came.append(step.index)
    return came


@contextmanager
def terminal() -> Iterator[tuple[TextIO, list[str]]]:
    """One end of it, and what arrives at the other, complete once the block has been left."""
    ours, theirs = pty.openpty()
    arrived: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # what Linux says when the other end is closed
            while chunk := os.read(ours, 65536):
                arrived.append(chunk.decode())

    reader = threading.Thread(target=read)
    with os.fdopen(theirs, "w") as file:
        reader.start()
        yield file, arrived
        with contextlib.suppress(ValueError):
            file.flush()
    reader.join()
    os.close(ours)


# --- what is shown ---


@pytest.mark.parametrize(
    ("standing", "line"),
    [
        (
            {"until": 100, "loss": 0.123456, "samples_per_s": 1234.5, "shares": (1, 2, 5)},
            "step 10/100  loss 0.1235  1,234 samples/s  0:00:45 left  world 3  shares 1:2:5",
        ),
        ({"until": None, "loss": None, "samples_per_s": 0.0}, "step 10  2 steps/s  world 3"),
        ({"until": 100, "loss": float("nan"), "samples_per_s": 8.0, "steps_per_s": 0.0}, "step 10/100  loss nan  8 samples/s  world 3"),
    ],
)  # fmt: skip
def test_a_line(standing: dict[str, Any], line: str) -> None:
    assert str(Standing(**{"step": 10, "steps_per_s": 2.0, "world_size": 3} | standing)) == line


def test_lines_in_a_file_go_on_at_the_restored_step(tmp_path: Path) -> None:
    for until, begins in ((3, 1), (6, 4)):
        file = io.StringIO()
        with Session(micro_batches=4, seed=1, checkpoint_dir=tmp_path) as session:
            assert train(session, until=until, every_s=0, file=file) == list(range(begins - 1, until))
        lines = file.getvalue().splitlines()
        assert [line.split()[1] for line in lines] == [f"{number}/{until}" for number in range(begins, until + 1)]
        assert all(re.search(r"  loss 2.5  [\d,]+ samples/s  0:00:0\d left  world 1$", line) for line in lines), lines


def test_a_line_now_and_then_is_the_first_step_and_the_last() -> None:
    file = io.StringIO()
    with Session(micro_batches=4, seed=1) as session:
        train(session, until=30, every_s=3600, file=file)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/30", "30/30"]


def test_a_bar_in_a_terminal() -> None:
    with terminal() as (file, arrived), Session(micro_batches=4, seed=1) as session:
        train(session, until=5, file=file)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "".join(arrived))
    assert "━━━" in text
    assert "step 1/5  loss 2.5" in text
    assert text.rstrip().splitlines()[-1].lstrip("━ ╸").startswith("step 5/5  loss 2.5")
    assert "".join(arrived).rfind("\x1b[?25h") > "".join(arrived).rfind("\x1b[?25l")  # the cursor is there again


def test_a_script_that_fails_gives_the_terminal_back() -> None:
    def fail(session: Session, file: TextIO) -> None:
        for step in session.progress(session.steps(until=5), file=file):
            with step:
                if step.index == 1:
                    raise ArithmeticError

    with terminal() as (file, _):
        with pytest.raises(ArithmeticError), Session() as session:
            fail(session, file)
        file.write("TRACEBACK\n")  # by now nothing is drawn below it


# --- and never the end of the job ---


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def gone() -> TextIO:
    """A pipe whose reader has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def closed() -> TextIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("make", [Full, gone, closed])
def test_where_it_cannot_be_written_the_steps_go_on(make: Any) -> None:
    file = make()
    with Session(micro_batches=4, seed=1) as session:
        assert train(session, until=4, every_s=0, file=file) == [0, 1, 2, 3]
    with contextlib.suppress(OSError):
        file.close()


def test_a_terminal_that_goes_away_in_mid_run() -> None:
    ours, theirs = pty.openpty()
    file = os.fdopen(theirs, "w")
    with Session(micro_batches=4, seed=1) as session:
        came = []
        for step in session.progress(session.steps(until=3), file=file):
            with step:
                if step.index == 1:
                    os.close(ours)
            came.append(step.index)
    assert came == [0, 1, 2]
    with contextlib.suppress(OSError):
        file.close()


# --- more than one rank ---


def two_ranks() -> None:
    """Run by a rank."""
    with Session(micro_batches=4, seed=1, balance=(1, 3)) as session:
        train(session, until=3, every_s=0)


def test_rank_0_alone_shows_it_with_unequal_shares() -> None:
    first, second = run_world(2, two_ranks)
    lines = [line for line in first.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(line.endswith("world 2  shares 1:3") for line in lines)
    assert "step 1/3" not in second
