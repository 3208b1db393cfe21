"""Defects of torch that would hang or lose a worker, and what keeps them away. For supervisor/ and worker/ alike.

*A process group that dies under the GIL.* ProcessGroupGloo's destructor joins its threads; one of them may just be
freeing the tensors of the last collective, which takes the GIL. If the last reference to the group is dropped by
Python (DistributedDataParallel's reducer holds one, so this is the ``return`` of a main() that has called
``destroy_process_group()``), both wait for each other for ever. Seen with torch 2.13 on 2 cores: 1 in 10 jobs of three
ranks did not end (native stacks: ``Reducer -> ~ProcessGroupGloo -> thread::join`` against ``runLoop ->
~AsyncAllreduceWork -> decref_pyobject -> gil_scoped_acquire``). So destroyed groups are kept for a while: by the time
they go, their threads have long been idle. Bounded, since a script may make and destroy many.
"""

from __future__ import annotations

from collections import deque
from typing import Any

KEPT_GROUPS = 16
_kept: deque[Any] = deque(maxlen=KEPT_GROUPS)


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
