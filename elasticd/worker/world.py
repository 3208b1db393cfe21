"""Where this process stands in the job, on what device, in what process groups.

The environment is torchrun's; without it the world is one. The variables of elasticd (ELASTICD_*) are extra: the same
script runs under torchrun and under plain python. Not here: what is said over the groups (control.py, checkpoint/).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from elasticd.errors import ConfigError

#: torch's own for NCCL alone; of both backends together it would make gloo's half an hour.
NCCL_TIMEOUT = timedelta(minutes=10)
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This process among the workers of its round."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    job_id: str = ""
    node_id: str = ""
    round_number: int = 0
    socket_path: str = ""
    launched: bool = False
    #: Whether this is the first worker of its node. With --virtual-local-rank all of them are told local rank 0.
    leads_node: bool = True

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Place:
        """ConfigError when a number is not one, or only some of torchrun's variables are set."""
        env = os.environ if environment is None else environment
        launched = bool(env.get("RANK") or env.get("WORLD_SIZE"))
        if launched and (missing := [name for name in _TORCHRUN if not env.get(name)]):
            raise ConfigError(
                f"of torchrun's environment variables {', '.join(missing)} must be set too: start it with elasticd run"
            )
        rank, world_size = _number(env, "RANK", 0), _number(env, "WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            raise ConfigError(f"environment variable RANK is {rank}, and WORLD_SIZE is {world_size}: no such rank")
        local_rank = _number(env, "LOCAL_RANK", 0)
        return cls(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=_number(env, "LOCAL_WORLD_SIZE", 1),
            job_id=env.get("ELASTICD_JOB_ID") or env.get("TORCHELASTIC_RUN_ID", ""),
            node_id=env.get("ELASTICD_NODE_ID", ""),
            round_number=_number(env, "ELASTICD_ROUND", _number(env, "TORCHELASTIC_RESTART_COUNT", 0)),
            socket_path=env.get("ELASTICD_SOCKET", ""),
            launched=launched,
            leads_node=_number(env, "ELASTICD_LOCAL_RANK", local_rank) == 0,
        )


def choose_device(place: Place, wanted: str | None) -> torch.device:
    """The GPU of this local rank where there is CUDA, otherwise the CPU.

    ConfigError when there are too few GPUs, or CUDA cannot use those that NVML sees: nobody means to train on the CPU
    there without having said so.
    """
    if wanted is None and not torch.cuda.is_available() and (count := torch.cuda.device_count()):
        raise ConfigError(
            f"this node has {count} GPUs, and CUDA does not work: python3 -c 'import torch; torch.cuda.init()' says "
            "why. Say device='cpu' to train without them"
        )
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device {wanted!r} is none that torch knows; say 'cpu' or 'cuda'") from error
    if device.type == "cuda":
        device = torch.device("cuda", place.local_rank if device.index is None else device.index)
        count = torch.cuda.device_count()
        if device.index >= count:
            raise ConfigError(
                f"local rank {place.local_rank} has no GPU: this node has {count}; lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
    return device if device.type != "cpu" else torch.device("cpu")  # as tensors say it: without an index


def join_world(place: Place, device: torch.device) -> bool:
    """Make the default process group, unless the script has made it. Whether it was made here."""
    if dist.is_initialized():
        return False
    # On CUDA the CPU backend comes along: checkpoints and control talk over it.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = NCCL_TIMEOUT if device.type == "cuda" else None
    if place.launched:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=HashStore(), rank=0, world_size=1)
    return True


def make_side_group(timeout_s: float | None = None) -> dist.ProcessGroup | None:
    """A gloo group of all ranks, apart from the script's own; None in a world of one, which needs none. Collective."""
    if dist.get_world_size() == 1:
        return None
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"environment variable {name} is {text!r}, not a number") from error
