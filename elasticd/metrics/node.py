"""What psutil says of this machine and of the daemon itself: its capacity, and its metrics at a scrape.

Not here: GPUs (gpu.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
from prometheus_client.metrics_core import Metric

from elasticd.core.model import Capacity, Gpu
from elasticd.metrics import definitions

_MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_capacity(gpus: tuple[Gpu, ...]) -> Capacity:
    return Capacity(cpu_count=usable_cpus(), memory_bytes=int(psutil.virtual_memory().total), gpus=gpus)


class NodeCollector:
    """For a registry. ``address`` is this node's: the interface that carries it is shown, and the machine's own are,
    but not those of containers, which come and go. ``paths``: whose file systems are shown."""

    def __init__(self, address: str, paths: tuple[str, ...]) -> None:
        self._address, self._paths = address, paths
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        for section in (self._daemon, self._machine, self._disks, self._network):
            with contextlib.suppress(OSError, RuntimeError, psutil.Error):  # what a container hides is left out
                yield from section()

    def _daemon(self) -> Iterator[Metric]:
        times = self._process.cpu_times()
        yield definitions.PROCESS_CPU.of(times.user + times.system)
        yield definitions.PROCESS_MEMORY.of(self._process.memory_info().rss)
        yield definitions.PROCESS_START.of(self._process.create_time())

    def _machine(self) -> Iterator[Metric]:
        memory, times = psutil.virtual_memory(), psutil.cpu_times()
        yield definitions.CPUS.of(usable_cpus())
        yield definitions.MEMORY.of(memory.total)
        yield definitions.MEMORY_FREE.of(memory.available)
        cpu, load = definitions.CPU.family(), definitions.LOAD.family()
        for mode in _MODES:
            if hasattr(times, mode):
                cpu.add_metric([mode], getattr(times, mode))
        for window, value in zip(("1m", "5m", "15m"), psutil.getloadavg(), strict=True):
            load.add_metric([window], value)
        yield from (cpu, load)

    def _disks(self) -> Iterator[Metric]:
        counters = psutil.disk_io_counters()
        if counters is not None:
            yield definitions.DISK_READ.of(counters.read_bytes)
            yield definitions.DISK_WRITTEN.of(counters.write_bytes)
        size, free = definitions.FILES.family(), definitions.FILES_FREE.family()
        for path in self._paths:
            try:
                usage = psutil.disk_usage(str(_existing(Path(path))))
            except OSError:
                continue
            size.add_metric([path], usage.total)
            free.add_metric([path], usage.free)
        yield from (size, free)

    def _network(self) -> Iterator[Metric]:
        received, sent = definitions.RECEIVED.family(), definitions.SENT.family()
        errors = definitions.NETWORK_ERRORS.family()
        counters = psutil.net_io_counters(pernic=True)
        for name in sorted(self._interfaces() & counters.keys()):
            seen = counters[name]
            received.add_metric([name], seen.bytes_recv)
            sent.add_metric([name], seen.bytes_sent)
            errors.add_metric([name], seen.errin + seen.errout + seen.dropin + seen.dropout)
        yield from (received, sent, errors)

    def _interfaces(self) -> set[str]:
        found = {
            name for name, held in psutil.net_if_addrs().items() if any(one.address == self._address for one in held)
        }
        return found | {path.parent.name for path in Path("/sys/class/net").glob("*/device")}


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    return next((one for one in (path, *path.parents) if one.exists()), Path("/"))
