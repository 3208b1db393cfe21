"""Taking up what plain torch.distributed.checkpoint.save wrote: it has no checksums, so nothing can verify it.

The bytes are unpickled as they are: name only directories that you trust. Not here: our own checkpoints (restore.py).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from elasticd.checkpoint import storage
from elasticd.checkpoint.held import Held, held_by
from elasticd.checkpoint.manifest import MANIFEST_NAME, METADATA_NAME
from elasticd.checkpoint.objects import Location
from elasticd.checkpoint.reader import plain_reader
from elasticd.checkpoint.restore import load_into
from elasticd.errors import ConfigError

log = logging.getLogger(__name__)


def agree_on_foreign(path: Location, group: dist.ProcessGroup | None) -> set[str]:
    """Collective. The first parts of its names: "model", "optimizer", ...

    ConfigError on every rank when the ranks do not see the same checkpoint.
    """
    _agree(path, group)
    names = plain_reader(path).read_metadata().state_dict_metadata
    return {name.partition(".")[0] for name in names}


def held_in(path: Location) -> Held:
    """What such a checkpoint holds. Who saved it, it does not say."""
    return held_by(plain_reader(path).read_metadata(), world_size=1)


def load_foreign(state: dict[str, Any], path: Location, parts: set[str]) -> None:
    """Fill ``state`` from a checkpoint with these parts. One without any of ours is taken for a model's state alone.

    ConfigError when it does not fit.
    """
    log.warning("elasticd: %s is taken up unverified: it has no %s", path, MANIFEST_NAME)
    ours = {part: value for part, value in state.items() if part in parts}
    load_into(ours or state["model"], path)


def _agree(path: Location, group: dist.ProcessGroup | None) -> None:
    """All ranks see the same metadata, or all raise."""
    try:
        seal = storage.describe_file(path / METADATA_NAME).crc32
    except OSError:
        seal = -1
    said = torch.tensor([seal, -seal], dtype=torch.int64)
    if group is not None:
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=group)
    most, least = said[0].item(), -said[1].item()
    if most == -1:
        raise ConfigError(f"{path} is no checkpoint of torch.distributed.checkpoint: it has no {METADATA_NAME}")
    if most != least:
        raise ConfigError(f"the ranks do not see the same checkpoint in {path}: they must see the same directory")
