"""DDP's averaging in two levels: within the node, then across nodes, then within the node again. For gloo.

    session = Session(layout=Layout(shard="node"), ...)  # "shard": the ranks of a node, "replicate": across nodes
    model = DistributedDataParallel(model)
    average_in_two_levels(model, session.mesh)

gloo's all-reduce is one ring of all ranks: 2 (n - 1) / n times the gradients leave each node, for n ranks. Here the
ranks of a node add up first, each for a part of the gradients (reduce-scatter); each part is all-reduced with the same
part of other nodes; and the node's ranks collect the parts (all-gather): 2 (N - 1) / N times the gradients leave each
of N nodes. With two nodes of eight ranks that is 1 instead of 1.875, with many nodes nearly the same. FSDP2 over the
same mesh (HSDP) does so by itself, and so does NCCL, whose trees know the nodes.

Not here: the averaging's weight (gradients.py); sums that do not depend on the order (exact.py has its own all-reduce).
"""

# Without the import of annotations from __future__: torch looks at those of a communication hook.
import queue
import threading
import weakref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from elasticd.errors import ConfigError

Future = torch.futures.Future[torch.Tensor]
Job = tuple[torch.Tensor, Future]
# torch 2.13 renamed both, and warns of the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def average_in_two_levels(model: DistributedDataParallel, mesh: DeviceMesh) -> None:
    """``mesh`` has the dimensions "replicate" and "shard", and holds the ranks that ``model`` averages over.

    ConfigError when it does not, and on CUDA. RuntimeError, from torch, when the model has another communication hook.
    """
    names = mesh.mesh_dim_names or ()
    if not {"replicate", "shard"} <= set(names):
        raise ConfigError(f'averaging in two levels needs "replicate" and "shard" in the mesh, which has {names}')
    if mesh.device_type != "cpu":
        raise ConfigError("averaging in two levels is for gloo: NCCL chooses a tree over nodes by itself")
    inside, across = mesh.get_group("shard"), mesh.get_group("replicate")
    if inside.size() * across.size() != model.process_group.size():
        raise ConfigError(
            f"the mesh has {across.size()} x {inside.size()} data-parallel ranks, and the model averages over "
            f"{model.process_group.size()}"
        )
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=_serve, args=(jobs, inside, across), name="elasticd-average", daemon=True).start()
    weakref.finalize(model, jobs.put, None)
    model.register_comm_hook(jobs, _hand_over)


def is_in_two_levels(model: DistributedDataParallel) -> bool:
    return any(hook is _hand_over for hook, _ in model._comm_hooks)  # noqa: SLF001 (there is no public way to ask)


def _hand_over(jobs: queue.SimpleQueue[Job | None], bucket: dist.GradBucket) -> Future:  # type: ignore[name-defined]
    """Called in the backward pass, which goes on."""
    done: Future = torch.futures.Future()
    jobs.put((bucket.buffer(), done))
    return done


def _serve(jobs: queue.SimpleQueue[Job | None], inside: dist.ProcessGroup, across: dist.ProcessGroup) -> None:
    """One bucket after the other, in the order of the backward pass: the same on all ranks."""
    while (job := jobs.get()) is not None:
        gradients, done = job
        try:
            _average(gradients, inside, across)
        except Exception as error:  # noqa: BLE001 - it is the training thread's, which waits for it
            done.set_exception(error)  # type: ignore[arg-type]
        else:
            done.set_result(gradients)
        del job, gradients, done


def _average(gradients: torch.Tensor, inside: dist.ProcessGroup, across: dist.ProcessGroup) -> None:
    """In place, over all ranks of both groups."""
    count, parts = len(gradients), inside.size()
    gradients /= parts * across.size()
    whole = pad(gradients, (0, -count % parts)) if count % parts else gradients
    own = whole.new_empty(len(whole) // parts)
    _reduce_scatter(own, whole, group=inside)
    dist.all_reduce(own, group=across)
    _all_gather(whole, own, group=inside)
    if whole is not gradients:
        gradients.copy_(whole[:count])
