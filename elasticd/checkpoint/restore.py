"""Restoring: the newest checkpoint that verifies, the same one on every rank, resharded onto the world at hand.

Rank 0 chooses (it reads every byte and compares checksums) and says which one, by step and checksum of the manifest;
the others take that one, after they have checked that they see the same manifest, its sizes and the checksum of the
metadata. Only then is anything unpickled. Loading needs no collective: each rank reads what its own shards need.

Not here: the form of the state (worker/state.py). A checkpoint without a manifest is passed over, for now.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from elasticd.checkpoint import storage
from elasticd.checkpoint.manifest import METADATA_NAME, Manifest, checksum, complete_name
from elasticd.errors import CheckpointInvalid, ConfigError

log = logging.getLogger(__name__)

_NONE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A checkpoint that was not taken, and why."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint that verifies."""

    path: Path
    manifest: Manifest


def find_newest(directory: Path) -> tuple[Found | None, list[PassedOver]]:
    """The newest checkpoint whose every byte verifies, and the newer ones that do not."""
    passed_over: list[PassedOver] = []
    for step in storage.complete_steps(directory):
        path = directory / complete_name(step)
        try:
            return Found(path=path, manifest=storage.verify(path)), passed_over
        except CheckpointInvalid as error:
            passed_over.append(PassedOver(step=step, reason=str(error)))
    return None, passed_over


def agree_on_newest(directory: Path, group: dist.ProcessGroup | None) -> Found | None:
    """Collective over ``group`` (None: a world of one). What rank 0 found, or None where there is nothing to restore.

    ConfigError on a rank that sees another directory than rank 0 does.
    """
    if group is None:
        return _choose(directory)
    found = _choose(directory) if dist.get_rank(group) == 0 else None
    choice = torch.tensor([_NONE, 0], dtype=torch.int64)
    if found is not None:
        choice = torch.tensor([found.manifest.step, checksum(found.manifest)], dtype=torch.int64)
    dist.broadcast(choice, src=0, group=group)
    step, seal = choice.tolist()
    if found is not None or step == _NONE:
        return found
    path = directory / complete_name(step)
    try:
        return Found(path=path, manifest=_recognise(path, seal))
    except CheckpointInvalid as error:
        raise ConfigError(
            f"rank 0 found a checkpoint of step {step} in {directory}, rank {dist.get_rank(group)} does not ({error}): "
            "all ranks must see the same directory"
        ) from error


def load_into(state: dict[str, Any], path: Path) -> None:
    """Fill ``state`` (tensors in place, the rest replaced) from a checkpoint that has been verified.

    ConfigError when the checkpoint holds another model or optimizer than the state asks for, CheckpointInvalid when it
    could not be read after all.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is disabled": it is not, the load just needs none
            dcp_load(state, storage_reader=FileSystemReader(path), no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise CheckpointInvalid(f"checkpoint {path} could not be read: {cause}") from error
        raise ConfigError(f"checkpoint {path} does not fit what was registered: {cause}") from error


def _recognise(path: Path, seal: int) -> Manifest:
    """The manifest that rank 0 means, when what this rank sees of the checkpoint fits it."""
    manifest = storage.read_manifest(path)
    if checksum(manifest) != seal:
        raise CheckpointInvalid("it is another checkpoint of the same step")
    storage.check_sizes(path, manifest)
    storage.check_contents(path, tuple(entry for entry in manifest.files if entry.name == METADATA_NAME))
    return manifest


def _choose(directory: Path) -> Found | None:
    found, passed_over = find_newest(directory)
    for one in passed_over:
        log.warning("elasticd: checkpoint of step %d passed over: %s", one.step, one.reason)
    return found
