"""Saving behind the steps: copies in buffers that are kept, one save in flight, and errors that surface."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import eventually
from torch import nn
from worker_runs import FakeDaemon, alone, run_world, world

from elasticd import Session
from elasticd.checkpoint import storage
from elasticd.checkpoint.background import BackgroundSaver, Stall
from elasticd.checkpoint.disk import Disk
from elasticd.checkpoint.restore import load_into
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saved, Saver
from elasticd.checkpoint.staging import Staging
from elasticd.errors import ConfigError, SaveFailed
from elasticd.metrics.saving import SaveReport


class Gate(Disk):
    """A disk that takes no data until it is opened."""

    def __init__(self) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()

    def write(self, descriptor: int, data: memoryview) -> int:
        self.reached.set()
        assert self.opened.wait(30)
        return super().write(descriptor, data)


class Full(Disk):
    """ENOSPC after so many bytes, as a real one: it takes what fits first."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes

    def write(self, descriptor: int, data: memoryview) -> int:
        if not self.room_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = super().write(descriptor, data[: self.room_bytes])
        self.room_bytes -= taken
        return taken


class Ends:
    """Keeps how saves ended."""

    def __init__(self) -> None:
        self.all: list[tuple[int, Saved | SaveFailed]] = []

    def __call__(self, step: int, end: Saved | SaveFailed, stall: Stall) -> None:
        assert stall.seconds >= 0
        self.all.append((step, end))


def background(directory: Path, disk: Disk | None = None, group: dist.ProcessGroup | None = None) -> BackgroundSaver:
    saver = Saver(directory, group=group, job_id="j", round_number=1, keep=Keep(last=9), disk=disk or Disk())
    return BackgroundSaver(saver, Ends())


def weight_of(path: Path) -> torch.Tensor:
    state = {"model": {"weight": torch.zeros(300_000)}}
    load_into(state, path)
    return state["model"]["weight"]


def state_of(weight: torch.Tensor) -> dict:
    return {"model": {"weight": weight}, "session": "text"}


# --- the copy ---


def test_a_copy_stands_still_and_its_buffers_are_used_again() -> None:
    weight, nested = torch.ones(4, 5), {"a": [torch.zeros(3), (torch.ones(()), 7)], "b": {1, 2}}
    state = {"weight": weight, "view": weight[:, 1:3], "nested": nested, "text": "x", "none": None}
    staging = Staging()
    first = staging.copy(state)
    assert staging.size_bytes == 4 * (20 + 8 + 3 + 1)
    weight.fill_(9.0)
    nested["b"].add(3)
    nested["a"].append("more")
    assert torch.equal(first["weight"], torch.ones(4, 5))
    assert torch.equal(first["view"], torch.ones(4, 2))
    assert first["nested"]["b"] == {1, 2}
    assert len(first["nested"]["a"]) == 2
    assert first["nested"]["a"][1][1] == 7
    again = staging.copy(state)
    for name in ("weight", "view"):
        assert again[name].data_ptr() == first[name].data_ptr(), name
    assert torch.equal(again["weight"], torch.full((4, 5), 9.0))


def test_buffers_follow_tensors_that_change_their_form_or_go() -> None:
    staging = Staging()
    staging.copy({"a": torch.ones(10), "b": torch.ones(10)})
    copied = staging.copy({"a": torch.ones(10, dtype=torch.float64), "c": torch.ones(2, 3).t()})
    assert (copied["a"].dtype, copied["c"].shape) == (torch.float64, (3, 2))
    assert staging.size_bytes == 8 * 10 + 4 * 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_copy_out_of_a_gpu_is_into_pinned_memory_and_waits_for_the_kernels() -> None:
    weight = torch.ones(1 << 24, device="cuda")
    staging = Staging()
    for value in (2.0, 3.0):
        weight.fill_(0.0)
        for _ in range(50):
            weight.add_(value)
        copied = staging.copy({"weight": weight})
        weight.fill_(-1.0)
        assert copied["weight"].is_pinned()
        assert torch.equal(copied["weight"], torch.full((1 << 24,), 50 * value))


# --- one save at a time ---


def test_a_thread_that_saves_never_copies_ahead_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP would where there is CUDA, by the stream of the wrong device; here it would fail, since there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    saver = background(tmp_path)
    saver.start(state_of(torch.ones(300_000)), 1)
    assert saver.wait(30)
    saver.save(state_of(torch.full((300_000,), 2.0)), 2)
    assert [weight_of(storage.final_path(tmp_path, step, 1))[0].item() for step in (1, 2)] == [1.0, 2.0]


def test_the_step_goes_on_while_it_is_written_and_what_is_written_is_the_copy(tmp_path: Path) -> None:
    gate = Gate()
    saver = background(tmp_path, gate)
    weight = torch.ones(300_000)
    saver.start(state_of(weight), 1)
    assert gate.reached.wait(30)
    weight.fill_(2.0)  # the next step
    assert saver.in_flight
    assert storage.complete_steps(tmp_path) == []
    assert not saver.wait(0.01)
    gate.opened.set()
    assert saver.wait()
    assert torch.equal(weight_of(tmp_path / "step-1"), torch.ones(300_000))
    assert (saver.counts.saved, saver.counts.failed, saver.counts.waited) == (1, 0, 0)
    assert saver.counts.written_bytes == storage.verify(tmp_path / "step-1").size_bytes


def test_a_save_that_is_due_waits_for_the_one_under_way(tmp_path: Path) -> None:
    gate = Gate()
    saver = background(tmp_path, gate)
    saver.start(state_of(torch.ones(300_000)), 1)
    assert gate.reached.wait(30)
    second = threading.Thread(target=saver.start, args=(state_of(torch.full((300_000,), 2.0)), 2))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.opened.set()
    second.join(30)
    saver.wait()
    assert saver.counts.waited == 1
    assert saver.counts.stall_s >= 0.1
    for step in (1, 2):  # neither was mixed with the other
        assert torch.equal(weight_of(tmp_path / f"step-{step}"), torch.full((300_000,), float(step)))


def test_a_failure_is_told_and_counted_and_the_next_save_works(tmp_path: Path) -> None:
    saver = background(tmp_path, Full(1_000_000))
    saver.start(state_of(torch.ones(300_000)), 1)
    saver.wait()
    [(step, end)] = saver._told.all
    assert step == 1
    assert isinstance(end, SaveFailed)
    assert "No space left on device" in str(end)
    saver._saver._disk = Disk()
    saver.start(state_of(torch.ones(300_000)), 2)
    saver.wait()
    assert (saver.counts.saved, saver.counts.failed) == (1, 1)
    assert storage.complete_steps(tmp_path) == [2]


def test_a_bug_in_the_thread_is_raised_in_the_training_thread(tmp_path: Path) -> None:
    class Broken(Saver):
        def save(self, *_: object, **__: object) -> Saved:
            raise ArithmeticError("a bug")

    saver = BackgroundSaver(Broken(tmp_path, group=None, job_id="j", round_number=1, keep=Keep()), Ends())
    saver.start({}, 1)
    eventually(lambda: not saver.in_flight)
    for call in (saver.check, saver.wait, lambda: saver.start({}, 2), lambda: saver.save({}, 2)):
        with pytest.raises(ArithmeticError, match="a bug"):
            call()


class NoMemory:
    def __deepcopy__(self, memo: object) -> None:
        raise MemoryError("no room for a copy")


def test_no_memory_for_the_copy_fails_the_save_and_not_the_training(tmp_path: Path) -> None:
    saver = background(tmp_path)
    saver.start({"thing": NoMemory()}, 1)
    saver.wait()
    assert "no room for a copy" in str(saver._told.all[0][1])
    assert list(tmp_path.iterdir()) == []


# --- in a session ---


def train(session: Session, until: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in session.steps(until=until):
        with step:
            ids = step.batch_indices(dataset_size=60, global_batch=6)
            optimizer.zero_grad()
            (model(torch.tensor(ids).float().unsqueeze(1)).square().mean() * step.loss_scale).backward()
            optimizer.step()


def session_on_a_slow_disk(directory: Path) -> None:
    """Run by a rank: the steps are much faster than the saves, and the last save stands when the loop is over."""
    with Session(checkpoint_dir=directory, save_every_steps=2, keep=99) as session:
        slow = Disk()
        slow.sync = lambda descriptor: (time.sleep(0.05), os.fsync(descriptor))
        session._checkpoints._saver._saver._disk = slow
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.register(model=model, optimizer=optimizer)
        train(session, 9, model, optimizer)
        assert storage.complete_steps(directory) == [9, 8, 6, 4, 2]
        counts = session.save_counts
        assert (counts.saved, counts.failed) == (5, 0)
        assert counts.waited >= 1


def test_sessions_on_a_slow_disk_leave_no_checkpoint_out(tmp_path: Path) -> None:
    run_world(2, session_on_a_slow_disk, tmp_path)


def session_on_a_full_disk(directory: Path) -> None:
    with Session(checkpoint_dir=directory, save_every_steps=2) as session:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.register(model=model, optimizer=optimizer)
        session._checkpoints._saver._saver._disk = Full(100)
        train(session, 7, model, optimizer)
        assert (session.step, session.save_counts.failed) == (7, 4)


def test_training_goes_on_over_a_full_disk_with_one_warning_for_each_save(tmp_path: Path) -> None:
    with alone(session_on_a_full_disk, tmp_path) as rank:
        assert rank.wait() == 0, rank.output
        assert rank.output.count("No space left on device") == 4


# --- dead ranks ---


def save_until_killed(directory: Path, dies_after_writes: int) -> None:
    """Run by a rank: rank 1 dies by SIGKILL in the middle of its writes; rank 0 must hear of it by itself."""
    from datetime import timedelta

    class Dying(Disk):
        left = dies_after_writes

        def write(self, descriptor: int, data: memoryview) -> int:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(descriptor, data)

    dist.init_process_group("gloo")
    group = dist.new_group(timeout=timedelta(seconds=50))
    saver = background(directory, Dying() if dist.get_rank() == 1 else None, group)
    started = time.monotonic()
    saver.start({"model": {f"w{n}": torch.full((1000,), float(n)) for n in range(8)}}, 1)
    try:
        saver.wait()
    except RuntimeError as error:
        print("heard of it:", type(error).__name__)
    assert time.monotonic() - started < 20


def test_a_rank_that_dies_in_a_save_fails_it_in_seconds_and_nothing_becomes_visible(tmp_path: Path) -> None:
    with world(2, save_until_killed, tmp_path, 3) as ranks:
        assert ranks[1].wait() == -signal.SIGKILL, ranks[1].output
        assert ranks[0].wait() == 0, ranks[0].output
        assert "heard of it" in ranks[0].output
    assert storage.complete_steps(tmp_path) == []


def save_with_no_memory_on_one_rank(directory: Path) -> None:
    dist.init_process_group("gloo")
    saver = background(directory, None, dist.group.WORLD)
    saver.start({"thing": NoMemory()} if dist.get_rank() == 1 else {"weight": torch.ones(3)}, 1)
    saver.wait()
    print(saver._told.all[0][1])
    saver.start({"weight": torch.ones(3)}, 2)
    saver.wait()
    assert saver.counts.saved == 1


def test_no_memory_on_one_rank_fails_the_save_on_all_and_hangs_none(tmp_path: Path) -> None:
    for output in run_world(2, save_with_no_memory_on_one_rank, tmp_path):
        assert "rank 1: no room for a copy" in output
    assert storage.complete_steps(tmp_path) == [2]


# --- what plain torch wrote ---


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize("form", ["model and optimizer", "a model alone"])
def test_what_plain_dcp_saved_is_taken_up_and_said_to_be_unverified(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    trained = nn.Linear(3, 2)
    moments = torch.optim.AdamW(trained.parameters())
    trained(torch.ones(3)).sum().backward()
    moments.step()
    model_state, optimizer_state = get_state_dict(trained, moments)
    whole = {"model": model_state, "optimizer": optimizer_state}
    dcp_save(whole if form == "model and optimizer" else model_state, checkpoint_id=tmp_path / "plain", no_dist=True)

    def start() -> tuple[int, nn.Linear, torch.optim.Optimizer]:
        with Session(checkpoint_dir=tmp_path / "ours", save_every_steps=1) as session:
            model = nn.Linear(3, 2)
            optimizer = torch.optim.AdamW(model.parameters())
            session.register(model=model, optimizer=optimizer)
            before = session.restore(start_from=tmp_path / "plain")
            taken = {name: value.clone() for name, value in model.state_dict().items()}
            for step in session.steps(until=before + 1):
                with step:
                    model(torch.ones(3)).sum().backward()
                    optimizer.step()
            return before, taken, optimizer

    before, taken, optimizer = start()
    assert before == 0
    assert all(torch.equal(taken[name], value) for name, value in model_state.items())
    assert "is taken up unverified: it has no manifest.json" in caplog.text
    steps = {state["step"].item() for state in optimizer.state.values()}
    assert steps == ({2.0} if form == "model and optimizer" else {1.0})
    assert start()[0] == 1  # from then on our own is newer


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_an_optimizers_state_without_names_is_refused(tmp_path: Path) -> None:
    """As ``optimizer.state_dict()`` has it: by number. Nothing says which parameter that is."""
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    trained = nn.Linear(3, 2)
    moments = torch.optim.AdamW(trained.parameters())
    trained(torch.ones(3)).sum().backward()
    moments.step()
    state = {"model": trained.state_dict(), "optimizer": moments.state_dict()}
    dcp_save(state, checkpoint_id=tmp_path / "plain", no_dist=True)
    with Session(checkpoint_dir=tmp_path / "ours") as session:
        model = nn.Linear(3, 2)
        session.register(model=model, optimizer=torch.optim.AdamW(model.parameters()))
        with pytest.raises(ConfigError):
            session.restore(start_from=tmp_path / "plain")


def test_a_directory_that_is_no_checkpoint_is_the_operators_error(tmp_path: Path) -> None:
    with Session(checkpoint_dir=tmp_path / "ours") as session:
        session.register(model=nn.Linear(3, 2))
        with pytest.raises(ConfigError, match=r"it has no \.metadata"):
            session.restore(start_from=tmp_path)


# --- what the daemon hears ---


def test_the_daemon_hears_of_saves_failures_and_what_was_passed_over(tmp_path: Path) -> None:
    (tmp_path / "c" / "step-99").mkdir(parents=True)
    with FakeDaemon(tmp_path / "socket") as daemon:
        env = {"ELASTICD_SOCKET": daemon.path, "ELASTICD_JOB_ID": "j", "ELASTICD_ROUND": "7"}
        with alone(save_and_fail, tmp_path / "c", **env) as rank:
            assert rank.wait() == 0, rank.output
        eventually(daemon.heard_out)
        assert [message["count"] for message in daemon.of_type("passed_over")] == [1]
        results = [SaveReport.from_message(message) for message in daemon.of_type("checkpoint")]
        assert [report.result for report in results] == ["saved", "saved", "failed", "saved"]
        assert [message["step"] for message in daemon.of_type("commit")] == [1, 2, 4]
        assert all(report.size_bytes > 0 and report.seconds > 0 for report in results if report.result == "saved")
        assert results[-1].stall_seconds >= results[-1].seconds  # the last one is waited for


def save_and_fail(directory: Path) -> None:
    with Session(checkpoint_dir=directory, save_every_steps=1) as session:
        session.register(model=nn.Linear(3, 3))
        session.restore()
        for step in session.steps(until=4):
            with step:
                session._checkpoints._saver.wait()
                session._checkpoints._saver._saver._disk = Full(100) if step.index == 2 else Disk()
