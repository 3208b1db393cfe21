"""What FSDP2 keeps of gradients between two micro-batches, and shows nowhere: it is looked at and dropped here.

torch has names of its own for it, which no release promises to keep (torch 2.11 to 2.13 are known). Not here: when
ranks talk (gradients.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.distributed.fsdp import FSDPModule


def forget_half_done(modules: Iterable[FSDPModule]) -> None:
    """Of a step that was given up: it would count in the next one. An optimizer's zero_grad does not reach it."""
    for module in modules:
        if hasattr(module, "reset_iter_state") and _state_of(module)._is_root:  # noqa: SLF001 (torch 2.13)
            module.reset_iter_state()
    for group in _groups_of(modules):
        group._partial_reduce_output = None  # noqa: SLF001
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # since its first forward pass
                parameter._unsharded_param.grad = None  # noqa: SLF001


def holds_back(modules: Iterable[FSDPModule]) -> bool:
    """Whether gradients wait to be averaged over "replicate" (HSDP): it would be with the next step's."""
    return any(group._partial_reduce_output is not None for group in _groups_of(modules))  # noqa: SLF001


def _groups_of(modules: Iterable[FSDPModule]) -> Iterator[Any]:
    for module in modules:
        state = _state_of(module)
        if hasattr(state, "_fsdp_param_groups"):
            yield from state._fsdp_param_groups  # noqa: SLF001
        elif state._fsdp_param_group is not None:  # noqa: SLF001 (before torch 2.12)
            yield state._fsdp_param_group  # noqa: SLF001


def _state_of(module: FSDPModule) -> Any:
    return module._get_fsdp_state()  # noqa: SLF001
