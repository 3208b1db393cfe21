"""``elasticd checkpoints``: what it shows, what it refuses in one line, and what it never touches. And retention."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from conftest import need
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from small_checkpoints import WEIGHTS, data_file, flip, names, save, state_of

from elasticd.checkpoint import storage
from elasticd.checkpoint.pace import Pace
from elasticd.checkpoint.retention import Keep, Standing, choose_doomed
from elasticd.cli import run_cli
from elasticd.commands import checkpoints
from elasticd.errors import ConfigError

# --- retention, pure ---


def standing(*steps: int, every_s: float = 60.0, pinned: tuple[int, ...] = ()) -> list[Standing]:
    return [Standing(step=step, saved_at_unix_s=step * every_s, pinned=step in pinned) for step in steps]


TABLE = [
    (Keep(last=2), (1, 2, 3, 4), (), [1, 2]),
    (Keep(last=9), (1, 2, 3, 4), (), []),
    (Keep(last=1), (), (), []),
    (Keep(last=2), (1, 2, 3, 4), (2, 4), []),  # pinned ones do not count
    (Keep(last=1), (1, 2, 3, 4), (2,), [1, 3]),
    (Keep(last=1, each_steps=10), (5, 10, 15, 20, 25, 30), (), [15, 25]),
    (Keep(last=1, each_steps=10), (7, 12, 19, 23, 24), (), [19]),
    (Keep(last=1, each_hours=1), (10, 59, 60, 61, 130), (), [59, 61]),
    (Keep(last=1, each_hours=1, each_steps=50), (10, 59, 60, 61, 130), (), [61]),
]


@pytest.mark.parametrize(("keep", "steps", "pinned", "doomed"), TABLE)
def test_what_goes(keep: Keep, steps: tuple[int, ...], pinned: tuple[int, ...], doomed: list[int]) -> None:
    assert choose_doomed(standing(*steps, pinned=pinned), keep) == doomed


keeps = st.builds(
    Keep, last=st.integers(1, 4), each_steps=st.sampled_from([0, 3, 10]), each_hours=st.sampled_from([0.0, 0.2])
)


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)), keeps)
def test_retention_is_stable_and_keeps_the_newest_and_the_pinned(steps: set[int], pins: set[int], keep: Keep) -> None:
    there = standing(*steps, pinned=tuple(pins))
    doomed = choose_doomed(there, keep)
    left = [one for one in there if one.step not in doomed]
    assert choose_doomed(left, keep) == []
    assert not pins & set(doomed)
    assert not steps or max(steps) not in doomed
    # To prune after each save leaves what pruning once at the end leaves, but for what was the newest in between.
    gradual: list[Standing] = []
    for one in sorted(there, key=lambda one: one.step):
        gradual.append(one)
        gone = choose_doomed(gradual, keep)
        gradual = [kept for kept in gradual if kept.step not in gone]
    assert {one.step for one in gradual} == {one.step for one in left}


@pytest.mark.parametrize("wrong", [{"last": 0}, {"each_steps": -1}, {"each_hours": -0.5}])
def test_retention_that_makes_no_sense(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Keep(**wrong)


def test_a_pace_is_kept_and_time_that_was_not_used_is_not_saved_up() -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(1000.0, clock=lambda: now[0], sleep=sleep)
    for _ in range(4):
        pace.read(500)
    assert now[0] == pytest.approx(102.0)
    now[0] += 50
    pace.read(500)
    pace.read(500)
    assert now[0] == pytest.approx(153.0)


@pytest.mark.parametrize("size_bytes", [0, 1, 4 << 20, (4 << 20) + 1, (12 << 20) + 5])
def test_a_file_is_described_whatever_its_size(tmp_path: Path, size_bytes: int) -> None:
    content = random.Random(1).randbytes(size_bytes)
    (tmp_path / "file").write_bytes(content)
    for pace in (None, Pace(0)):
        entry = storage.describe_file(tmp_path / "file", pace)
        assert (entry.size_bytes, entry.crc32) == (size_bytes, zlib.crc32(content))


# --- the commands ---


def run(*arguments: object) -> int:
    return run_cli(["checkpoints", *[str(argument) for argument in arguments]])


def document(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> dict:
    assert run(*arguments, "--json") == status
    return json.loads(capsys.readouterr().out)


def test_ls_shows_what_is_there_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 5, 10, 20)
    data_file(tmp_path / "step-10").unlink()
    (tmp_path / "step-30.r7.tmp").mkdir()
    assert run("pin", tmp_path, 5) == 0
    capsys.readouterr()
    found = document(capsys, "ls", tmp_path)
    assert [(one["step"], one["pinned"], bool(one["problem"])) for one in found["checkpoints"]] == [
        (20, False, False), (10, False, True), (5, True, False)]  # fmt: skip
    assert found["temporary"] == ["step-30.r7.tmp"]
    assert found["checkpoints"][0]["size_bytes"] == storage.verify(tmp_path / "step-20").size_bytes
    assert run("ls", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "pinned" in shown
    assert "No such file" in shown
    assert "step-30.r7.tmp: being written, or left behind" in shown


def test_ls_of_an_empty_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls", tmp_path) == 0
    assert capsys.readouterr().out.replace("\n", "") == f"no checkpoint in {tmp_path}"


def test_verify_finds_a_flipped_bit_that_ls_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2, 3)
    assert run("verify", tmp_path) == 0
    flip(data_file(tmp_path / "step-2"), position=2000)
    capsys.readouterr()
    found = document(capsys, "verify", tmp_path, status=1)
    assert [(one["step"], one["problem"] is None) for one in found["checkpoints"]] == [(3, True), (2, False), (1, True)]
    assert run("verify", tmp_path, 3, 1) == 0
    assert run("verify", tmp_path, 2) == 1
    assert "step 2: DAMAGED: __0_0.distcp does not match its checksum" in capsys.readouterr().out


def test_verify_keeps_to_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    slept: list[float] = []
    monkeypatch.setattr(checkpoints, "Pace", lambda rate: Pace(rate, sleep=slept.append))
    assert run("verify", tmp_path, "--rate", 0.001) == 0
    size_bytes = storage.verify(tmp_path / "step-1").size_bytes
    assert max(slept) == pytest.approx(size_bytes / 1000, rel=0.1)


def test_a_scrub_leaves_its_figures_for_prometheus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, file = tmp_path / "c", tmp_path / "scrub.prom"
    directory.mkdir()
    save(directory, 1, 2, 3)
    flip(data_file(directory / "step-2"), position=2000)
    size_bytes = sum(storage.verify(directory / f"step-{step}").size_bytes for step in (1, 3))
    assert run("verify", directory, "--metrics-file", file) == 1
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(file.read_text())
        for sample in family.samples
        if sample.labels == {"directory": str(directory)}
    }
    assert time.time() - found.pop("elasticd_scrub_last_timestamp_seconds") < 60
    assert found.pop("elasticd_scrub_duration_seconds") > 0
    assert found == {
        "elasticd_scrub_checkpoints": 3, "elasticd_scrub_damaged_checkpoints": 1, "elasticd_scrub_read_bytes": size_bytes
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".prom"] == ["c"]
    capsys.readouterr()
    assert run("verify", directory, 1, "--metrics-file", file) == 2
    assert run("verify", directory, "--metrics-file", tmp_path / "no" / "file") == 2


def test_a_checkpoint_that_retention_removes_during_a_scrub_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1, 2)
    real = storage.verify

    def verify(path: Path, pace: Pace) -> object:
        shutil.rmtree(tmp_path / "step-1", ignore_errors=True)
        return real(path, pace)

    monkeypatch.setattr(storage, "verify", verify)
    found = document(capsys, "verify", tmp_path)
    assert [one["step"] for one in found["checkpoints"]] == [2]


def test_inspect_names_files_and_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 4)
    found = document(capsys, "inspect", tmp_path, 4)
    assert found["manifest"]["step"] == 4
    assert found["tensors"] == [
        {"name": "model.bias", "dtype": "float32", "shape": [7], "chunks": 1},
        {"name": "model.weight", "dtype": "float32", "shape": [WEIGHTS], "chunks": 1},
    ]
    assert run("inspect", tmp_path, 4) == 0
    assert f"tensor model.weight: float32 ({WEIGHTS},) in 1 pieces" in capsys.readouterr().out


def test_inspect_unpickles_nothing_that_does_not_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 4)
    flip(tmp_path / "step-4" / ".metadata", position=100)
    assert run("inspect", tmp_path, 4) == 2
    assert "does not verify: .metadata does not match its checksum" in capsys.readouterr().err


def test_prune_removes_what_it_said_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep=9)
    data_file(tmp_path / "step-3").unlink()
    (tmp_path / "step-9.r7.tmp").mkdir()
    assert run("pin", tmp_path, 1) == 0
    capsys.readouterr()
    said = document(capsys, "prune", tmp_path, "--keep", 1, "--dry-run")
    assert said["removed"] == [2, 4]
    assert len(names(tmp_path)) == 6
    assert document(capsys, "prune", tmp_path, "--keep", 1)["removed"] == [2, 4]
    assert names(tmp_path) == ["step-1", "step-3", "step-5", "step-9.r7.tmp"]
    assert run("pin", tmp_path, 1, "--off") == 0
    assert run("prune", tmp_path, "--keep", 1) == 0
    assert names(tmp_path) == ["step-3", "step-5", "step-9.r7.tmp"]
    assert run("prune", tmp_path, "--temporary", "--dry-run") == 0
    assert names(tmp_path) == ["step-3", "step-5", "step-9.r7.tmp"]
    assert run("prune", tmp_path, "--temporary") == 0
    assert names(tmp_path) == ["step-3", "step-5"]


def test_a_pin_is_no_damage_and_is_kept_by_saving(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert run("pin", tmp_path, 1) == 0
    assert storage.verify(tmp_path / "step-1").step == 1
    save(tmp_path, 2, 3, keep=1)
    assert names(tmp_path) == ["step-1", "step-3"]


@pytest.mark.filterwarnings("ignore")
def test_export_opens_with_safetensors_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("" if importlib.util.find_spec("safetensors") else "safetensors is not installed")
    from safetensors.torch import load_file

    save(tmp_path, 6)
    assert run("export", tmp_path, 6, tmp_path / "out") == 0
    assert "2 tensors of step 6 exported" in capsys.readouterr().out
    [file] = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    expected = state_of(6.0)["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    flip(data_file(tmp_path / "step-6"), position=2000)
    assert run("export", tmp_path, 6, tmp_path / "other") == 2
    assert not (tmp_path / "other").exists()


def test_export_without_the_package_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 6)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert run("export", tmp_path, 6, tmp_path / "out") == 2
    assert "pip install 'elasticd[export]'" in capsys.readouterr().err


MISTAKES = [
    (["ls", "DIR/gone"], "there is no directory"),
    (["verify", "DIR", "7"], "no checkpoint of step 7 in"),
    (["verify", "DIR", "--rate", "-1"], "--rate must not be negative"),
    (["inspect", "DIR", "7"], "there are 1"),
    (["pin", "DIR", "7"], "no checkpoint of step 7"),
    (["export", "DIR", "1", "DIR"], "exists already"),
    (["prune", "DIR", "--keep", "0"], "keep at least the last one"),
    # What the file system refuses. LONG is a name that none takes: permissions do not bind root.
    (["ls", "DIR/LONG"], "LONG: File name too long"),
    (["verify", "DIR", "--metrics-file", "DIR/LONG"], "File name too long"),
    (["export", "DIR", "1", "DIR/LONG"], "LONG: File name too long"),
    (["export", "DIR", "1", "DIR/step-1/manifest.json/out"], "manifest.json/out: Not a directory"),
]
LONG = 300 * "x"


@pytest.mark.parametrize(("arguments", "why"), MISTAKES)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    save(tmp_path, 1)
    assert run(*[argument.replace("DIR", str(tmp_path)).replace("LONG", LONG) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert why.replace("LONG", LONG) in error
    assert error.count("\n") == 1


def test_looking_needs_no_torch(tmp_path: Path) -> None:
    """ls and verify answer at once."""
    save(tmp_path, 1)
    code = "import sys; from elasticd.cli import run_cli; run_cli(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for command in ("ls", "verify"):
        done = subprocess.run([sys.executable, "-c", code, "checkpoints", command, str(tmp_path)], check=False)
        assert done.returncode == 0
