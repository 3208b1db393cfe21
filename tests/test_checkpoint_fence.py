"""A member of an old round publishes nothing; and what it publishes all the same, frozen at the worst moment, is late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import eventually
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoints import restored, state_of
from test_checkpoint_faults import Recorder
from test_node_loop import hosts, job
from torch import nn
from worker_runs import FakeDaemon, alone

from elasticd import Session
from elasticd.checkpoint import save as save_module
from elasticd.checkpoint import storage
from elasticd.checkpoint.disk import Disk
from elasticd.checkpoint.lineage import in_order, is_late, late_ones
from elasticd.checkpoint.manifest import UNKNOWN_STEP, FileEntry, Manifest
from elasticd.checkpoint.restore import restore_newest
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Fence, Saver
from elasticd.cluster.embedded import EmbeddedEtcd
from elasticd.errors import Fenced, SaveFailed, StoreUnavailable


def manifest(step: int, round_number: int, began: int, job_id: str = "j") -> Manifest:
    return Manifest(
        step=step, world_size=1, job_id=job_id, round_number=round_number, torch_version="", saved_at_unix_s=0.0,
        files=(FileEntry(name=".metadata", size_bytes=1, crc32=1),), began_at_step=began,
    )  # fmt: skip


# --- which ones are late ---

CASES: list[tuple[str, list[tuple[int, int, int]], list[int]]] = [
    # (step, round, began) of each; the steps that are late
    ("rounds that follow one another", [(10, 1, 0), (20, 2, 10), (30, 3, 20)], []),
    ("several of one round", [(10, 1, 0), (20, 1, 0), (30, 1, 0)], []),
    ("the old round went on after the new one began", [(10, 1, 0), (20, 2, 10), (30, 1, 0)], [30]),
    ("below the newest too", [(10, 1, 0), (15, 1, 0), (20, 2, 10)], [15]),
    ("nothing of the new round stands yet", [(10, 1, 0), (30, 1, 0)], []),
    ("submitted again, rounds from the start", [(800, 40, 700), (900, 1, 800), (950, 1, 800), (960, 2, 950)], []),
    ("an old manifest says nothing", [(10, 1, UNKNOWN_STEP), (20, 2, 10), (30, 1, UNKNOWN_STEP)], []),
    ("the new one is an old manifest", [(20, 2, UNKNOWN_STEP), (30, 1, 0)], []),
    ("went back to an older one than the newest", [(10, 1, 0), (20, 1, 0), (15, 2, 10)], [20]),
]


@pytest.mark.parametrize(("found", "late"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_was_published_when_its_round_was_over(found: list, late: list) -> None:
    manifests = [manifest(*one) for one in found]
    assert [one.step for one in late_ones(manifests)] == late
    order = [one.step for one in in_order(manifests)]
    counted = sorted((one.step for one in manifests if one.step not in late), reverse=True)
    assert order == counted + sorted(late, reverse=True)


def test_another_jobs_rounds_say_nothing() -> None:
    assert not is_late(manifest(30, 1, 0), manifest(20, 2, 10, "other"))


@given(st.data())
def test_no_checkpoint_of_a_history_is_late_unless_its_round_was_over(data: st.DataObject) -> None:
    """Rounds that each take up some checkpoint that is there and save more; each may have a late twin."""
    standing, late = [manifest(0, 1, 0)], []
    for number in range(2, data.draw(st.integers(3, 6))):
        taken = standing[-1].step
        zombie_step = taken + data.draw(st.integers(1, 30))
        for step in range(taken + 10, taken + 10 * data.draw(st.integers(2, 4)), 10):
            standing.append(manifest(step, number, taken))
        if data.draw(st.booleans()) and zombie_step not in {one.step for one in standing}:
            late.append(manifest(zombie_step, number - 1, standing[0].step if number == 2 else _began(standing, number - 1)))
    assert {one.step for one in late_ones(standing + late)} == {one.step for one in late}
    assert in_order(standing + late)[0] == standing[-1]


def _began(standing: list[Manifest], number: int) -> int:
    return next(one.began_at_step for one in standing if one.round_number == number)


# --- the order of a save ---


class Says:
    """A fence that does something, and lets through."""

    def __init__(self, *acts: object) -> None:
        self.acts, self.asked = list(acts), 0

    def __call__(self, step: int, *, patient: bool) -> None:
        self.asked += 1
        if self.acts and (act := self.acts.pop(0)) is not None:
            if isinstance(act, Exception):
                raise act
            act()


def saver(directory: Path, number: int, began: int, fence: Fence | None = None, disk: Disk | None = None) -> Saver:
    made = Saver(
        directory, group=None, job_id="j", round_number=number, keep=Keep(last=9), disk=disk or Disk(), fence=fence
    )
    made.began_at(began)
    return made


def round_of(path: Path) -> int:
    return storage.verify(path).round_number


def test_the_fence_is_asked_when_all_is_durable_and_nothing_is_visible(tmp_path: Path) -> None:
    recorder, seen = Recorder(), []
    fence = Says(lambda: seen.append((len(recorder.done), sorted(path.name for path in tmp_path.iterdir()))))
    saver(tmp_path, 3, 0, fence, recorder).save(state_of(1.0), 10)
    ((before, names),) = seen
    assert names == ["step-10.r3.tmp"]
    assert recorder.done[before - 1] == ("sync directory", tmp_path / "step-10.r3.tmp")
    assert recorder.done[before][0] == "rename"
    assert storage.verify(tmp_path / "step-10").began_at_step == 0


@pytest.mark.parametrize("error", [Fenced("a newer round stands"), StoreUnavailable("etcd gives no answer")])
def test_a_fence_that_does_not_say_yes_fails_the_save_and_nothing_is_visible(tmp_path: Path, error: Exception) -> None:
    ours = saver(tmp_path, 1, 0, Says(error))
    with pytest.raises(SaveFailed, match=str(error)):
        ours.save(state_of(1.0), 10)
    assert list(tmp_path.iterdir()) == []
    assert ours.save(state_of(1.0), 20).fresh


def test_an_answer_that_took_long_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was frozen with the answer in hand cannot know whether it still holds."""
    monkeypatch.setattr(save_module, "FENCE_VALID_S", 0.2)
    fence = Says(lambda: time.sleep(0.25))
    saver(tmp_path, 1, 0, fence).save(state_of(1.0), 10)
    assert fence.asked == 2
    with pytest.raises(SaveFailed, match=r"longer than 0\.2 s"):
        saver(tmp_path, 1, 0, Says(*[lambda: time.sleep(0.25)] * 9)).save(state_of(1.0), 20)


# --- frozen between the answer and the rename ---


def test_the_newer_round_stands_whoever_is_first(tmp_path: Path) -> None:
    """Both save step 20: while one is between its answer and its rename, the other does all of its save."""
    for name, first, second in (("old", 1, 2), ("new", 2, 1)):
        directory = tmp_path / name
        directory.mkdir()
        saver(directory, 1, 0).save(state_of(10.0), 10)
        began = {1: 0, 2: 10}
        other = saver(directory, second, began[second])
        fence = Says(lambda other=other: other.save(state_of(float(other._origin.round_number)), 20))
        try:
            end = saver(directory, first, began[first], fence).save(state_of(float(first)), 20)
        except SaveFailed:
            end = None
        assert round_of(directory / "step-20") == 2
        found, _ = restored(directory)
        assert torch.equal(found.state["model"]["bias"], torch.full((7,), -2.0))
        assert (end is not None and end.fresh) == (first == 2)
        assert [path.name for path in directory.glob("*.late-*")] == (["step-20.late-1"] if first == 2 else [])
        assert not list(directory.glob("*.tmp"))


def test_a_late_one_of_a_later_step_is_passed_over_and_set_aside(tmp_path: Path) -> None:
    saver(tmp_path, 1, 0).save(state_of(10.0), 10)
    saver(tmp_path, 2, 10).save(state_of(12.0), 12)
    assert saver(tmp_path, 1, 0).save(state_of(30.0), 30).fresh  # let through by no fence: the worst moment of all
    found, passed_over = restored(tmp_path)
    assert found.manifest.step == 12
    assert [(one.step, one.reason) for one in passed_over] == [(30, "round 1 was over when it was published")]
    saver(tmp_path, 2, 10).save(state_of(14.0), 14)
    assert storage.complete_steps(tmp_path) == [14, 12, 10]
    assert (tmp_path / "step-30.late-1").is_dir()


def test_what_a_frozen_one_has_written_is_swept_by_the_save_of_a_newer_round(tmp_path: Path) -> None:
    """So the worst moment is short: it ends with the first save that the newer round begins."""
    saver(tmp_path, 1, 0).save(state_of(10.0), 10)
    old = saver(tmp_path, 1, 0, Says(lambda: saver(tmp_path, 2, 10).save(state_of(12.0), 12)))
    with pytest.raises(SaveFailed, match="No such file"):
        old.save(state_of(30.0), 30)
    assert storage.complete_steps(tmp_path) == [12, 10]


def test_a_late_one_is_taken_where_there_is_nothing_else(tmp_path: Path) -> None:
    saver(tmp_path, 2, 10).save(state_of(12.0), 12)
    saver(tmp_path, 1, 0).save(state_of(30.0), 30)
    (tmp_path / "step-12" / ".metadata").unlink()
    found, _ = restored(tmp_path)
    assert found.manifest.step == 30


# --- a worker and its daemon ---


def save_often(directory: Path, until: int | None, pause_s: float = 0.0) -> None:
    """Run by a rank: a step, a save, and so on."""
    with Session(checkpoint_dir=directory, save_every_steps=1, keep=1000) as session:
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session.register(model=model, optimizer=optimizer)
        print("began at", session.restore(), flush=True)
        for step in session.steps(until=until):
            with step:
                time.sleep(pause_s)
                optimizer.zero_grad()
                model(torch.ones(1, 3)).sum().backward()
                optimizer.step()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "socket") as made:
        yield made


def env(path: str, number: int = 7, job_id: str = "j") -> dict[str, str]:
    return {"ELASTICD_SOCKET": path, "ELASTICD_JOB_ID": job_id, "ELASTICD_ROUND": str(number)}


def test_while_nobody_can_tell_saves_fail_and_training_goes_on_and_the_last_one_waits(
    tmp_path: Path, daemon: FakeDaemon
) -> None:
    daemon.fence_answers = [True, None, None, None, True]  # steps 1, 2, 3, and 4 is the last one: it asks twice
    with alone(save_often, tmp_path / "c", 4, **env(daemon.path)) as rank:
        assert rank.wait() == 0, rank.output
    assert storage.complete_steps(tmp_path / "c") == [4, 1]
    assert rank_said(daemon, "commit") == [1, 4]
    assert [message["result"] for message in daemon.of_type("checkpoint")] == ["saved", "failed", "failed", "saved"]


def rank_said(daemon: FakeDaemon, kind: str) -> list[int]:
    return [message["step"] for message in daemon.of_type(kind)]


def test_a_refused_fence_ends_the_worker_and_nothing_became_visible(tmp_path: Path, daemon: FakeDaemon) -> None:
    daemon.fence_answers = [True, False]
    with alone(save_often, tmp_path / "c", None, 0.05, **env(daemon.path)) as rank:
        assert rank.wait() == 1
        assert f"{Fenced.__name__}: checkpoint refused" in rank.output
    assert storage.complete_steps(tmp_path / "c") == [1]
    assert rank_said(daemon, "commit") == [1]


def test_a_daemon_that_dies_during_a_save_leaves_what_was_published(tmp_path: Path, daemon: FakeDaemon) -> None:
    """Its answer never comes. Training goes on, nothing more becomes visible, and the last save does not wait for it."""
    daemon.fence_answers = [True, None]
    with alone(save_often, tmp_path / "c", 40, 0.02, **env(daemon.path)) as rank:
        eventually(lambda: len(daemon.of_type("fence")) >= 2, 30, "a question without an answer")
        daemon.close()
        assert rank.wait(30) == 0, rank.output
        assert "the connection to the daemon is lost" in rank.output
    assert storage.complete_steps(tmp_path / "c") == [1]
    found = restore_newest(tmp_path / "c", None, lambda _: {"session": ""})
    assert found.manifest.step == 1


# --- two real rounds ---


def test_two_real_rounds_race_and_only_the_newer_one_publishes(tmp_path: Path) -> None:
    """Real etcd, real daemons, real training processes; nobody stops the old round's worker.

    It hears only from the fence that its round is over. The new round's worker takes up what is there, and both save the
    same steps into the same directory from then on.
    """
    checkpoints = tmp_path / "c"

    def rounds() -> list[int]:
        return [one.round_number for one in storage.manifests(checkpoints)] if checkpoints.is_dir() else []

    async def scenario(endpoint: str) -> None:
        async with hosts(endpoint, tmp_path, "ab", job("raced")) as (a, b):
            await until(lambda: sorted(a.seats()) == ["a", "b"])
            number = a.agent.rounds[-1][1]["number"]
            socket = str(a.setup.socket_path)
            with alone(save_often, checkpoints, None, 0.01, **env(socket, number, "raced")) as old:
                await until(lambda: len(rounds()) > 5)
                await b.loop.close()
                await until(lambda: a.seats() == ["a"])
                newer = a.agent.rounds[-1][1]["number"]
                with alone(save_often, checkpoints, None, 0.01, **env(socket, newer, "raced")) as new:
                    await until(lambda: rounds().count(newer) > 10)
                    await until(lambda: not old.running)
                    began = int(new.output.split("began at")[1].split()[0])
                assert f"{Fenced.__name__}: checkpoint refused" in old.output
            manifests = storage.manifests(checkpoints)
            assert {one.round_number for one in manifests if one.step > began} == {newer}
            assert {one.round_number for one in manifests if one.step <= began} == {number}
            steps = [one.step for one in reversed(manifests)]
            assert all(after == before + 1 for before, after in pairwise(steps))

    with EmbeddedEtcd(tmp_path / "etcd") as etcd:
        asyncio.run(scenario(etcd.endpoint))


async def until(condition: object, timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
