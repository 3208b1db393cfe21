"""The examples that ship, under a real ``elasticd run``: each learns, and goes on from its checkpoint when a worker is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from conftest import eventually
from worker_runs import environment, ledger, run

import elasticd.examples

ELASTICD = [sys.executable, "-m", "elasticd.cli", "run", "--nproc-per-node", "2"]
PLAIN_DDP = Path(elasticd.examples.__file__).with_name("plain_ddp.py")
PATIENCE_S = 60.0
#: The other two's default as well.
SAVE_EVERY = 20


#: The name, its flags, and the beginning of its last line.
EXAMPLES = {
    "mlp_digits": (
        ["--save-every", str(SAVE_EVERY), "--progress-seconds", "0.3", "--step-seconds", "0.05", "--checkpoint-dir"],
        "accuracy",
    ),
    "hf_trainer": (["--steps", "100", "--output-dir"], "done at step 100"),
    "lightning_ddp": (["--steps", "600", "--checkpoint-dir"], "accuracy"),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each example wrote, of which rank 1 was killed in mid-run. All at once: most of it is waiting for imports."""
    folder = tmp_path_factory.mktemp("examples")
    files = {name: folder / f"{name}.log" for name in EXAMPLES}
    with ThreadPoolExecutor(len(EXAMPLES)) as pool:
        done = [pool.submit(train_with_a_kill, name, file) for name, file in files.items()]
    for each in done:
        each.result()
    return files


def train_with_a_kill(example: str, log: Path) -> None:
    """Returns once it has ended well."""
    command = [*ELASTICD, "--max-restarts", "1", "-m", f"elasticd.examples.{example}", *EXAMPLES[example][0]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(log.with_suffix(""))], env=environment(), stdout=output, stderr=output
        )
    try:
        eventually(lambda: has_saved(log), PATIENCE_S, f"a checkpoint beside {log}, and steps after it")
        below = workers(process.pid)
        assert len(below) == 2, f"no two workers: {log.read_text()}"
        os.kill(below[1], signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        process.terminate()
        process.wait(20)


def has_saved(log: Path) -> bool:
    """Whether there is a whole checkpoint to go on from, and a later step. What each of the three writes last.

    Beside step-20.r1.tmp, which is still being flushed and is no checkpoint yet.
    """
    last = ("step-*[0-9]/manifest.json", "checkpoint-*/trainer_state.json", "last.ckpt")
    saved = any(any(log.with_suffix("").glob(pattern)) for pattern in last)
    return saved and max(said(log, r"^step (\d+).* world 2"), default=0) > SAVE_EVERY


def workers(daemon: int) -> list[int]:
    """What the warm server of this daemon forked, after the agent: in the order of ranks. None when it has ended."""
    forks: list[psutil.Process] = []
    for process in psutil.Process(daemon).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie too
            if "elasticd.supervisor.warm" in process.cmdline():
                forks = sorted(process.children(), key=lambda child: (child.create_time(), child.pid))
    return [process.pid for process in forks[1:]]


def said(log: Path, pattern: str) -> list[int]:
    """The numbers in these lines of rank 0, in order."""
    return [int(number) for number in re.findall(pattern, log.read_text(errors="replace"), re.MULTILINE)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_killed_worker_resumes_and_the_example_ends_well(example: str, logs: dict[str, Path]) -> None:
    log, ending = logs[example], EXAMPLES[example][1]
    begun = said(log, r"^begins at step (\d+) world 2")
    assert len(begun) == 2, log.read_text()
    assert begun[0] == 0 < begun[1]
    assert begun[1] % SAVE_EVERY == 0
    assert f"\n{ending}" in log.read_text()
    if ending == "accuracy":
        assert 95 <= said(log, r"^accuracy (\d+)")[0] <= 100


def test_a_trainers_checkpoint_that_a_kill_cut_off_is_passed_over(tmp_path: Path) -> None:
    """Rank 0 had come to its end, and rank 1, which was killed, not: its file is empty, or has no end."""
    newest_checkpoint = runpy.run_module("elasticd.examples.hf_trainer", run_name="imported")["newest_checkpoint"]
    for step in (20, 40, 60, 80):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for rank in (0, 1):
            torch.save({"cpu": torch.get_rng_state()}, folder / f"rng_state_{rank}.pth")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-80/trainer_state.json").write_text('{"glob')
    (tmp_path / "checkpoint-60/rng_state_1.pth").write_bytes(b"")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-40")
    cut = tmp_path / "checkpoint-40/rng_state_1.pth"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


def test_the_same_file_under_torchrun_and_under_elasticd_computes_the_same(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    files = {"torchrun": tmp_path / "torchrun.jsonl", "elasticd": tmp_path / "elasticd.jsonl"}
    commands = [
        [*command, str(PLAIN_DDP), "--steps", "30", "--ledger", str(file)]
        for command, file in zip((torchrun, ELASTICD), files.values(), strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        for status, output in pool.map(run, commands):
            assert status == 0, output
    curves = [{(line["step"], line["rank"]): line["loss"] for line in ledger(file)} for file in files.values()]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2 * 30


@pytest.mark.parametrize(
    ("example", "module", "option"),
    [
        ("mlp_digits", "sklearn", ""),
        ("hf_trainer", "transformers", "--output-dir"),
        ("lightning_ddp", "lightning", "--checkpoint-dir"),
    ],
)
@pytest.mark.usefixtures("in_plain_python")
def test_what_is_not_installed_is_said_in_one_line(
    example: str, module: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as Python itself marks what must not be imported
    monkeypatch.setattr(sys, "argv", [example, *([option, str(tmp_path)] if option else [])])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"elasticd.examples.{example}", run_name="__main__")
    assert re.fullmatch(r".* not installed: pip install 'elasticd\[examples\]'", str(ended.value.code))
