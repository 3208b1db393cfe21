"""Session under a scripted daemon: what it reports, and the boundary protocol; a daemon that is lost holds nothing up."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from test_session import BATCH, SIZE, trainee
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from worker_runs import FakeDaemon, alone, run_world, world

from elasticd import Session
from elasticd.checkpoint import storage
from elasticd.errors import Fenced
from elasticd.worker import link
from elasticd.worker.link import MAX_REPORTS_PER_S, Folded, StepReport
from elasticd.worker.session import EXIT_PARKED


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
