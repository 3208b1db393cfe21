"""Restoring: the newest checkpoint that verifies, the same one on every rank, resharded onto the world at hand.

Rank 0 proposes one, by step and checksum of the manifest; all check that they see the same one and its sizes, each
reads a part of its files and compares checksums, and it is taken when every part is as it was written; otherwise rank 0
proposes the next older one. Only then is anything unpickled. Loading needs no collective: each rank reads what its own
shards need.

Not here: the form of the state (worker/state.py). A checkpoint without a manifest is passed over: one of plain torch is
taken when it is named (foreign.py).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from elasticd.checkpoint import storage
from elasticd.checkpoint.manifest import METADATA_NAME, FileEntry, Manifest, checksum, complete_name
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
    for found in _candidates(directory, passed_over):
        try:
            storage.check_contents(found.path, _data_files(found.manifest))
        except CheckpointInvalid as error:
            passed_over.append(PassedOver(step=found.manifest.step, reason=str(error)))
        else:
            return found, passed_over
    return None, passed_over


def agree_on_newest(
    directory: Path, group: dist.ProcessGroup | None, passed_over: list[PassedOver] | None = None
) -> Found | None:
    """Collective over ``group`` (None: a world of one). The newest that verifies, or None where nothing does.

    What is passed over is logged by rank 0, and added there to ``passed_over``.

    ConfigError on a rank that sees another directory than rank 0 does.
    """
    if group is not None and dist.get_rank(group) != 0:
        return _follow(directory, group)
    not_taken: list[PassedOver] = [] if passed_over is None else passed_over
    if group is None:
        found, over = find_newest(directory)
        not_taken += over
    else:
        found = _propose(directory, group, not_taken)
    for one in not_taken:
        log.warning("elasticd: checkpoint of step %d passed over: %s", one.step, one.reason)
    return found


def _propose(directory: Path, group: dist.ProcessGroup, passed_over: list[PassedOver]) -> Found | None:
    """Rank 0's part."""
    for found in _candidates(directory, passed_over):
        step = found.manifest.step
        _broadcast([step, checksum(found.manifest)], group)
        failed_rank = _check_together(found.path, found.manifest, group)
        if failed_rank is None:
            return found
        passed_over.append(PassedOver(step=step, reason=f"rank {failed_rank} found its part damaged"))
    _broadcast([_NONE, 0], group)
    return None


def _follow(directory: Path, group: dist.ProcessGroup) -> Found | None:
    """The other ranks' part."""
    while True:
        step, seal = _broadcast([_NONE, 0], group)
        if step == _NONE:
            return None
        path = directory / complete_name(step)
        try:
            manifest = _recognise(path, seal)
        except CheckpointInvalid as error:
            _check_together(path, None, group)
            raise ConfigError(
                f"rank 0 found a checkpoint of step {step} in {directory}, rank {dist.get_rank(group)} does not "
                f"({error}): all ranks must see the same directory"
            ) from error
        if _check_together(path, manifest, group) is None:
            return Found(path=path, manifest=manifest)


def _check_together(path: Path, manifest: Manifest | None, group: dist.ProcessGroup) -> int | None:
    """Read this rank's part of the files (none without a manifest). The lowest rank whose part is damaged, or None."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    failed = size
    try:
        # By name, in turn: in a world of the same size each rank reads the file that it will load.
        data = sorted(_data_files(manifest), key=lambda entry: entry.name) if manifest else []
        storage.check_contents(path, tuple(data[rank::size]))
    except CheckpointInvalid as error:
        log.warning("elasticd: rank %d: %s: %s", rank, path.name, error)
        failed = rank
    lowest = torch.tensor([failed], dtype=torch.int64)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    return None if lowest.item() == size else int(lowest.item())


def _broadcast(numbers: list[int], group: dist.ProcessGroup) -> list[int]:
    """What rank 0 says. Over a group of all ranks, whose rank 0 is everyone's."""
    said = torch.tensor(numbers, dtype=torch.int64)
    dist.broadcast(said, src=0, group=group)
    heard: list[int] = said.tolist()
    return heard


def _candidates(directory: Path, passed_over: list[PassedOver]) -> Iterator[Found]:
    """Those whose manifest, sizes and metadata are right, newest first; the others are noted as passed over."""
    for step in storage.complete_steps(directory):
        path = directory / complete_name(step)
        try:
            manifest = storage.read_manifest(path)
            _check_outline(path, manifest)
        except CheckpointInvalid as error:
            passed_over.append(PassedOver(step=step, reason=str(error)))
        else:
            yield Found(path=path, manifest=manifest)


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
    _check_outline(path, manifest)
    return manifest


def _check_outline(path: Path, manifest: Manifest) -> None:
    """All sizes, and the contents of the small file that every rank unpickles."""
    storage.check_sizes(path, manifest)
    storage.check_contents(path, tuple(entry for entry in manifest.files if entry.name == METADATA_NAME))


def _data_files(manifest: Manifest) -> tuple[FileEntry, ...]:
    return tuple(entry for entry in manifest.files if entry.name != METADATA_NAME)
