"""Defects of torch that would hang or lose a worker, and what keeps them away. For supervisor/ and worker/ alike.

*A process group that dies under the GIL.* ProcessGroupGloo's destructor joins its threads; one of them may just be
freeing the tensors of the last collective, which takes the GIL. If the last reference to the group is dropped by
Python (DistributedDataParallel's reducer holds one, so this is the ``return`` of a main() that has called
``destroy_process_group()``), both wait for each other for ever. Seen with torch 2.13 on 2 cores: 1 in 10 jobs of three
ranks did not end (native stacks: ``Reducer -> ~ProcessGroupGloo -> thread::join`` against ``runLoop ->
~AsyncAllreduceWork -> decref_pyobject -> gil_scoped_acquire``). So destroyed groups are kept for a while: by the time
they go, their threads have long been idle. Bounded, since a script may make and destroy many.

*The first random operation on a DTensor*, on CUDA, sends rank 0's random state to all ranks of the default group, and
sets it there. But a session has set it for each replica's own micro-batch, and a pipeline's stages need not all have
such an operation: then those that have it wait for ever. And it takes GPU rank % count for this rank's, which it is not
where a node has more GPUs than ranks. From torch 2.13's source (distributed/tensor/_random.py); not seen, for want of
GPUs.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

KEPT_GROUPS = 16
_kept: deque[Any] = deque(maxlen=KEPT_GROUPS)


def draw_without_broadcast(mesh: DeviceMesh, device: torch.device) -> None:
    """Random operations on DTensors leave other ranks' random states alone. For CUDA; the CPU has no such tracker."""
    from torch.distributed.tensor import _random

    tracker = _random.OffsetBasedRNGTracker(mesh, run_state_sync=False)
    tracker._device = device  # noqa: SLF001
    _random._rng_tracker = tracker  # noqa: SLF001


def keep_destroyed_groups() -> None:
    """``torch.distributed.destroy_process_group`` keeps for a while what it destroys, from now on. Callable twice."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    destroy = distributed_c10d.destroy_process_group
    if getattr(destroy, "keeps_groups", False):
        return

    def destroy_process_group(group: Any = None) -> None:
        doomed = list(distributed_c10d._world.pg_map) if group is None else [group]  # noqa: SLF001
        _kept.extend(doomed)
        destroy(group)

    destroy_process_group.__doc__ = destroy.__doc__
    destroy_process_group.keeps_groups = True  # type: ignore[attr-defined]
    distributed_c10d.destroy_process_group = destroy_process_group
    dist.destroy_process_group = destroy_process_group
