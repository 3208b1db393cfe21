"""A copy of the training state that stands still while the training goes on: what the step waits for.

The buffers are kept from one save to the next (page faults cost more than the copy itself), pinned where the state is
on a GPU. Own code rather than torch's DefaultStager: that one keys its buffers by the identity of storages, so that a
state dict that is gathered anew for each save gets new ones each time, and its stream and pinning need CUDA.

Not here: who writes the copy (save.py), and that nobody does any more when the next one is made (background.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ATOMIC = (type(None), bool, int, float, complex, str, bytes)

Path = tuple[object, ...]


def wait_for_device() -> None:
    """What this thread has queued on its GPU is done: another thread's work would not wait for it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.current_stream().synchronize()


class Staging:
    """Holds as many bytes of host memory as the state that it copied last.

    Pinned, a buffer is rounded up to a power of two by torch, which also keeps what is given back for later ones.
    """

    def __init__(self) -> None:
        self._buffers: dict[Path, torch.Tensor] = {}

    @property
    def size_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same state on the CPU, valid until the next call. Returns once nothing of the original is needed.

        Dicts, lists and tuples are made anew, tensors copied into buffers, everything else deeply copied.
        """
        work = _Copy(self._buffers)
        copied: dict[str, Any] = work.of(state, ())
        self._buffers = work.used  # those of tensors that are gone are given back
        for device in work.devices:
            torch.cuda.current_stream(device).synchronize()
        return copied


class _Copy:
    """One walk through a state."""

    def __init__(self, buffers: dict[Path, torch.Tensor]) -> None:
        self._buffers = buffers
        self.used: dict[Path, torch.Tensor] = {}
        self.devices: set[torch.device] = set()

    def of(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return self._tensor(value, path)
        if kind is DTensor:
            # from_local would move it back to the mesh's device; torch's own stager fills the slots by hand.
            local = self._tensor(value.to_local(), path)
            return DTensor(local, value._spec, requires_grad=False)  # type: ignore[no-untyped-call]  # noqa: SLF001
        if isinstance(value, dict):
            return {key: self.of(item, (*path, key)) for key, item in value.items()}
        if kind in (list, tuple):
            return kind(self.of(item, (*path, index)) for index, item in enumerate(value))
        return value if kind in _ATOMIC else copy.deepcopy(value)

    def _tensor(self, value: torch.Tensor, path: Path) -> torch.Tensor:
        source = value.detach()
        on_gpu = source.device.type == "cuda"
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.dtype, buffer.shape, buffer.is_pinned()) != (source.dtype, source.shape, on_gpu):
            buffer = torch.empty_like(source, device="cpu", pin_memory=on_gpu)
        buffer.copy_(source, non_blocking=on_gpu)
        self.used[path] = buffer
        if on_gpu:
            self.devices.add(source.device)
        return buffer
