"""When a GPU is so sick that its node should not compute: what it answered in, a line for people out.

Uncorrectable ECC errors, a row that could not be remapped, an XID of the hardware, a GPU that does not answer any more,
and a driver that hangs when it is asked (nobody can tell then which of its GPUs is the sick one). Heat is no trouble of
its own: it makes the node slow, and that is seen (core/stragglers.py). Not here: how it is read (gpu.py, gpu_xid.py),
what is done about it (core/).
"""

from __future__ import annotations

from collections.abc import Sequence

from elasticd.metrics.gpu import GpuSample

#: Of those that NVIDIA lists ("XID errors"), the ones that are not a program's fault and do not pass by themselves.
HARDWARE_XIDS = {
    48: "double-bit ECC error",
    62: "internal micro-controller halted",
    64: "row remapping failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained ECC error",
    119: "GSP timeout",
    120: "GSP error",
}
#: A GPU that gave no answer so many times in a row is lost.
SILENT_SAMPLES = 3
#: One question that takes the driver longer than this will not be answered. Without persistence mode it takes seconds.
HUNG_S = 30.0


class GpuHealth:
    """Errors that were counted before the first sample are of an earlier time: only what comes after them counts."""

    def __init__(self) -> None:
        self._ecc: dict[int, int] = {}
        self._silent: dict[int, int] = {}
        self._hung = 0

    def judge(self, samples: Sequence[GpuSample], silent_s: float = 0.0) -> str:
        """The first trouble that is found; "" when there is none. ``silent_s``: since a question without an answer.

        A driver is taken to hang when it is seen so several times in a row: once may be this process's own pause.
        """
        self._hung = self._hung + 1 if silent_s > HUNG_S else 0
        if self._hung >= SILENT_SAMPLES:
            return "the driver hangs, it does not answer NVML"
        troubles = [(sample.gpu, self._trouble(sample)) for sample in samples]
        return next((f"GPU {gpu.index} ({gpu.uuid}): {trouble}" for gpu, trouble in troubles if trouble), "")

    def _trouble(self, sample: GpuSample) -> str:
        index = sample.gpu.index
        self._silent[index] = 0 if sample.up else self._silent.get(index, 0) + 1
        if self._silent[index] >= SILENT_SAMPLES:
            return "lost, it does not answer NVML"
        found = next((xid for xid in sample.xids if xid in HARDWARE_XIDS), None)
        if found is not None:
            return f"XID {found}, {HARDWARE_XIDS[found]}"
        if sample.remap_failed:
            return "row remapping has failed"
        if sample.ecc_uncorrected is None:
            return ""
        self._ecc[index] = min(sample.ecc_uncorrected, self._ecc.get(index, sample.ecc_uncorrected))
        new = sample.ecc_uncorrected - self._ecc[index]
        return f"{new} uncorrectable ECC errors since the daemon started" if new > 0 else ""
