"""GPUs as NVML sees them, read in a thread of their own: a GPU that is lost or hangs must not stop anything.

Without nvidia-ml-py, a driver or a GPU there are none, and that is no error. Not here: what a sick GPU means
(gpu_health.py).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.metrics_core import Metric

from elasticd.core.model import Gpu
from elasticd.metrics import definitions
from elasticd.metrics.gpu_xid import XidEvents

FIRST_TIMEOUT_S = 10.0
FRESH_TIMEOUT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """What one GPU answered; None where it said nothing (not supported, or the GPU is lost)."""

    gpu: Gpu
    up: bool = False
    utilization: float | None = None
    memory_used_bytes: int | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    remap_failed: bool | None = None
    xids: tuple[int, ...] = ()


class Gpus:
    """Asks NVML when somebody asks for samples; keeps the last answer while NVML hangs."""

    def __init__(self) -> None:
        self._wanted, self._fresh = threading.Event(), threading.Event()
        self._samples: tuple[GpuSample, ...] = ()
        self._sampled_at = time.monotonic()
        #: When the question was put that NVML has not answered yet: to begin with, whether it is there.
        self._asked_at: float | None = time.monotonic()
        self._closing = False
        self._wanted.set()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._thread.start()
        self._fresh.wait(FIRST_TIMEOUT_S)

    @property
    def found(self) -> tuple[Gpu, ...]:
        return tuple(sample.gpu for sample in self._samples)

    def samples(self) -> tuple[GpuSample, ...]:
        """Blocks for half a second at most; then the last answer has to do."""
        if self._thread.is_alive():
            self._fresh.clear()
            self._wanted.set()
            self._fresh.wait(FRESH_TIMEOUT_S)
        return self._samples

    @property
    def watched(self) -> bool:
        """Whether there is something to ask: False without a driver. It may still be busy with the first question."""
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """For how long NVML has been busy with one question; 0 when nothing is asked."""
        asked_at = self._asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def close(self) -> None:
        """The thread is not waited for: NVML may hang."""
        self._closing = True
        self._wanted.set()

    def collect(self) -> Iterator[Metric]:
        """For a registry."""
        samples = self.samples()
        if samples:
            yield from _families(samples)
            yield definitions.GPU_AGE.of(time.monotonic() - self._sampled_at)

    def _run(self) -> None:
        nvml = _open_nvml()
        self._asked_at = None
        known: dict[int, Gpu] = {}
        events = XidEvents(nvml) if nvml is not None else None
        while nvml is not None and not self._closing:
            self._wanted.wait()
            self._wanted.clear()
            assert events is not None
            self._asked_at = time.monotonic()
            events.collect()
            self._samples = tuple(_sample(nvml, index, known, events) for index in range(_count(nvml, known)))
            self._sampled_at, self._asked_at = time.monotonic(), None
            self._fresh.set()
        self._fresh.set()  # nothing more will come: nobody need wait


def _open_nvml() -> Any:
    """The module, ready for use; None where there is nothing to read."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _count(nvml: Any, known: dict[int, Gpu]) -> int:
    """A GPU that was there once is lost, not gone."""
    with contextlib.suppress(nvml.NVMLError):
        return max(int(nvml.nvmlDeviceGetCount()), len(known))
    return len(known)


def _sample(nvml: Any, index: int, known: dict[int, Gpu], events: XidEvents) -> GpuSample:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = _memory(nvml, handle)
        if index not in known:
            name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
            total_bytes = 0 if memory is None else int(memory.total)
            known[index] = Gpu(index=index, name=str(name), uuid=str(uuid), memory_bytes=total_bytes)
    except nvml.NVMLError:
        unknown = Gpu(index=index, name="", uuid="", memory_bytes=0)
        return GpuSample(gpu=known.get(index, unknown), xids=events.seen(index))
    events.watch(index, handle)

    def ask(read: Callable[[], float]) -> float | None:
        with contextlib.suppress(nvml.NVMLError):
            return read()
        return None

    def ecc(kind: int) -> int | None:
        count = ask(lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC))
        return None if count is None else int(count)

    remap_failed = ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle)[3])
    return GpuSample(
        gpu=known[index],
        up=True,
        utilization=ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        memory_used_bytes=None if memory is None else int(memory.used),
        temperature_celsius=ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power_watts=ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        ecc_corrected=ecc(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
        ecc_uncorrected=ecc(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        remap_failed=None if remap_failed is None else bool(remap_failed),
        xids=events.seen(index),
    )


def _memory(nvml: Any, handle: Any) -> Any:
    """None of a GPU that shares its memory with the processor, or is cut in parts that we have no right to (MIG)."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
        return None


def _families(samples: tuple[GpuSample, ...]) -> Iterator[Metric]:
    info, ecc = definitions.GPU_INFO.family(), definitions.GPU_ECC.family()
    for sample in samples:
        gpu = str(sample.gpu.index)
        info.add_metric([gpu, sample.gpu.name, sample.gpu.uuid], 1)
        for kind, count in (("corrected", sample.ecc_corrected), ("uncorrected", sample.ecc_uncorrected)):
            if count is not None:
                ecc.add_metric([gpu, kind], count)
    yield from (info, ecc)
    readings: tuple[tuple[definitions.GaugeDefinition, Callable[[GpuSample], float | None]], ...] = (
        (definitions.GPU_UP, lambda sample: sample.up),
        (definitions.GPU_BUSY, lambda sample: sample.utilization),
        (definitions.GPU_MEMORY, lambda sample: sample.gpu.memory_bytes),
        (definitions.GPU_MEMORY_USED, lambda sample: sample.memory_used_bytes),
        (definitions.GPU_TEMPERATURE, lambda sample: sample.temperature_celsius),
        (definitions.GPU_POWER, lambda sample: sample.power_watts),
    )
    for definition, read in readings:
        family = definition.family()
        for sample in samples:
            value = read(sample)
            if value is not None:
                family.add_metric([str(sample.gpu.index)], float(value))
        yield family
