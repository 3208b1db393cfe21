"""GPUs as NVML tells of them, a fake driver and a real one, and which of them are sick."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually, need
from fake_gpus import ECC, HEALTHY, FakeGpus, why_not_fake_gpus

from elasticd.core.model import Gpu
from elasticd.metrics import gpu as module
from elasticd.metrics.gpu import Gpus, GpuSample
from elasticd.metrics.gpu_health import GpuHealth

READ_GPUS = """
import json, os, sys
from dataclasses import asdict
from elasticd.metrics.gpu import Gpus
gpus = Gpus()
for line in sys.stdin:
    samples = [asdict(sample) for sample in gpus.samples()]
    print(json.dumps([samples, gpus.silent_s]), flush=True)
"""


@pytest.fixture
def fake_gpus(tmp_path: Path) -> FakeGpus:
    need(why_not_fake_gpus())
    return FakeGpus(tmp_path)


def test_gpus_are_read_and_a_lost_one_stops_nothing(fake_gpus: FakeGpus) -> None:
    fake_gpus.set(0, **HEALTHY, **ECC)
    fake_gpus.set(1, **HEALTHY)  # no ECC
    reader = subprocess.Popen(
        [sys.executable, "-c", READ_GPUS], env=fake_gpus.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip

    def read() -> tuple[list[dict[str, Any]], float]:
        assert reader.stdin is not None
        assert reader.stdout is not None
        print(file=reader.stdin, flush=True)
        gpus, silent_s = json.loads(reader.stdout.readline())
        return gpus, silent_s

    def samples() -> list[dict[str, Any]]:
        gpus, silent_s = read()
        assert silent_s == 0
        return gpus

    try:
        first, second = samples()
        assert first["gpu"] == {"index": 0, "name": "Fake H100", "uuid": "GPU-fake-0", "memory_bytes": 80 << 30}
        assert first["up"]
        assert (first["utilization"], first["power_watts"], first["temperature_celsius"]) == (0.87, 350.0, 61)
        assert (first["ecc_corrected"], first["ecc_uncorrected"]) == (3, 0)
        assert (second["memory_used_bytes"], second["ecc_corrected"]) == (5 << 30, None)
        for xid in (13, 79):  # a program's fault, and the hardware's
            fake_gpus.set(1, **HEALTHY, xid=xid)
            samples()
        fake_gpus.set(0, util=12)  # no memory of its own, as some have none
        shared = samples()[0]
        assert (shared["up"], shared["utilization"], shared["memory_used_bytes"]) == (True, 0.12, None)
        assert [each["xids"] for each in samples()] == [[], [13, 79]]
        fake_gpus.set(1, lost=1)
        first, second = samples()
        assert first["up"]
        assert not second["up"]
        assert second["gpu"]["uuid"] == "GPU-fake-1"
        fake_gpus.set(0, hang=1)
        last, silent_s = read()
        assert last == [first, second]  # the last answer has to do
        assert 0 < silent_s < read()[1]  # and people can tell that it is one
    finally:
        reader.kill()
        reader.communicate()


def sample(index: int = 0, **answered: object) -> GpuSample:
    gpu = Gpu(index=index, name="Fake H100", uuid=f"GPU-{index}", memory_bytes=1)
    return GpuSample(gpu=gpu, **{"up": True, "ecc_uncorrected": 2, "remap_failed": False, **answered})


@pytest.mark.parametrize(
    ("later", "trouble"),
    [
        ({}, ""),
        ({"ecc_uncorrected": 3}, "GPU 1 (GPU-1): 1 uncorrectable ECC errors since the daemon started"),
        ({"ecc_uncorrected": 0}, ""),  # the driver was loaded anew
        ({"ecc_uncorrected": None, "remap_failed": None}, ""),  # not supported
        ({"remap_failed": True}, "GPU 1 (GPU-1): row remapping has failed"),
        ({"temperature_celsius": 95.0}, ""),
        ({"xids": (13, 31, 79)}, "GPU 1 (GPU-1): XID 79, GPU has fallen off the bus"),
        ({"xids": (13, 31)}, ""),
    ],
)
def test_what_makes_a_gpu_sick(later: dict[str, object], trouble: str) -> None:
    health = GpuHealth()
    assert health.judge([sample(0), sample(1)]) == ""
    assert health.judge([sample(0), sample(1, **later)]) == trouble


def test_a_gpu_is_lost_when_it_is_silent_for_a_while_and_no_longer_when_it_answers() -> None:
    health = GpuHealth()
    told = [health.judge([sample(up=up)]) for up in (True, False, False, True, False, False, False, False, True)]
    assert [bool(trouble) for trouble in told] == [False] * 6 + [True, True, False]
    assert "lost" in told[6]


def test_a_driver_hangs_when_a_question_stays_without_an_answer() -> None:
    health = GpuHealth()
    silences_s = (0.0, 31.0, 0.0, 31.0, 33.0, 29.0, 31.0, 33.0, 35.0, 37.0, 0.0)
    told = [health.judge([sample()], silent_s) for silent_s in silences_s]
    assert [bool(trouble) for trouble in told] == [False] * 8 + [True, True, False]
    assert "hangs" in told[8]


def test_a_driver_may_hang_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    there = threading.Event()
    monkeypatch.setattr(module, "_open_nvml", lambda: there.wait(30) and None)
    monkeypatch.setattr(module, "FIRST_TIMEOUT_S", 0.01)
    gpus = Gpus()
    try:
        assert gpus.watched
        assert 0 < gpus.silent_s < gpus.silent_s
    finally:
        there.set()
    eventually(lambda: not gpus.watched)
    assert gpus.silent_s == 0


HAS_DRIVER = Path("/dev/nvidiactl").exists()


@pytest.mark.skipif(HAS_DRIVER, reason="this machine has a driver")
def test_without_a_driver_there_are_no_gpus(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_GPUS], env={"LD_LIBRARY_PATH": str(tmp_path)}, input="\n", capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[[], 0.0]\n"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_DRIVER, reason="no NVIDIA driver")
def test_real_gpus() -> None:
    gpus = Gpus()
    assert len(gpus.found) == len(list(Path("/dev").glob("nvidia[0-9]*")))
    assert all(sample.up and sample.gpu.memory_bytes > 0 for sample in gpus.samples())
    gpus.close()
