"""Which machine the figures are from: they mean nothing without it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from elasticd import __version__
from elasticd.cluster.embedded import etcd_version, find_etcd


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineName:
    """``load_1min``: the load average before the first experiment; on a busy machine the figures are worse."""

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    torch: str
    etcd: str
    elasticd: str
    date: str
    load_1min: float

    def to_plain(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> list[str]:
        gib = self.memory_bytes / 2**30
        return [
            f"{self.cpu}, {self.cores} cores, {gib:.0f} GiB, Linux {self.kernel}, load {self.load_1min:.2f}",
            f"elasticd {self.elasticd}, torch {self.torch}, etcd {self.etcd}, Python {self.python}, {self.date}",
        ]


def describe_machine() -> MachineName:
    return MachineName(
        cpu=cpu_model(Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else platform.processor(),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        kernel=platform.release(),
        python=platform.python_version(),
        torch=version("torch"),
        etcd=".".join(str(part) for part in etcd_version(find_etcd())),
        elasticd=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        load_1min=os.getloadavg()[0],
    )


def cpu_model(cpuinfo: str) -> str:
    """The first model name in the text of /proc/cpuinfo; the architecture where there is none (arm64)."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
