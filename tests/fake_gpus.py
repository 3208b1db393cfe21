"""Fake GPUs for unmodified nvidia-ml-py: a library built from fake_nvml.c, and a file for each GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")
HEALTHY = {"name": "Fake H100", "util": 87, "mem_used": 5 << 30, "temp": 61, "power_mw": 350_000}
ECC = {"ecc_corrected": 3, "ecc_uncorrected": 0}


def why_not_fake_gpus() -> str:
    return "" if shutil.which("gcc") else "gcc not found: apt install gcc"


class FakeGpus:
    """``environment`` is for a process that is still to be started: the loader reads it then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "gpus"
        self.folder.mkdir(parents=True)
        library = folder / "lib"
        library.mkdir()
        command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library / "libnvidia-ml.so.1"), str(SOURCE)]
        subprocess.run(command, check=True)
        self.environment = {"LD_LIBRARY_PATH": str(library), "FAKE_NVML_DIR": str(self.folder)}

    def set(self, index: int, node: str = "", **state: object) -> None:
        """``node``: of a cluster whose nodes have folders of their own (``environment_by_node``)."""
        (self.folder / node).mkdir(exist_ok=True)
        (self.folder / node / f"gpu{index}").write_text("".join(f"{key}={value}\n" for key, value in state.items()))

    @property
    def environment_by_node(self) -> dict[str, str]:
        """For a ClusterSpec."""
        return {**self.environment, "FAKE_NVML_DIR": f"{self.folder}/{{node}}"}
