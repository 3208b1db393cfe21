"""Restoring: the newest checkpoint that verifies, the same one on every rank, resharded onto the world at hand.

Rank 0 proposes one, by step and checksum of the manifest. Each rank checks that it sees the same one, and its sizes,
and loads what its own shards need, checking each byte as it arrives, and a share of what nobody may need; nothing is
unpickled before its checksum has matched. The checkpoint is taken when every rank's part was as it was written.
Otherwise rank 0 proposes the next older one, which overwrites every tensor of those that the first one may have filled
already: to read everything before, only to be sure, would double the time of every restore for the sake of one in a
thousand. Where no older one is whole either, the restore fails, and says so: it never returns a mix.

Not here: reading (reader.py), the form of the state (worker/state.py). A checkpoint without a manifest is passed over:
one of plain torch is taken when it is named (foreign.py).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from elasticd.checkpoint import storage
from elasticd.checkpoint.held import Held, held_by
from elasticd.checkpoint.lineage import in_order, late_ones
from elasticd.checkpoint.manifest import FORMAT_WITH_BLOCKS, Manifest, checksum
from elasticd.checkpoint.objects import Location
from elasticd.checkpoint.reader import CheckedReader, plain_reader
from elasticd.errors import CheckpointInvalid, ConfigError, ElasticdError, StateLost, StoreUnavailable

log = logging.getLogger(__name__)

_NONE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A checkpoint that was not taken, and why."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint whose manifest and metadata are right, and whose files are all there."""

    path: Location
    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The checkpoint that was taken, and the state that was filled from it."""

    path: Location
    manifest: Manifest
    state: dict[str, Any]


#: What a rank wants of a checkpoint: a state to fill, whose tensors are those that are trained.
MakeState = Callable[[Held], dict[str, Any]]


def restore_newest(
    directory: Location,
    group: dist.ProcessGroup | None,
    make_state: MakeState,
    passed_over: list[PassedOver] | None = None,
) -> Restored | None:
    """Collective over ``group`` (None: a world of one). Take the newest that verifies; None where nothing does.

    ``make_state`` is called for each one that is tried. What is passed over is logged by rank 0, and added there to
    ``passed_over``.

    ConfigError when the checkpoint holds another model or optimizer than the state asks for, or on a rank that sees
    another directory than rank 0 does. StoreUnavailable when an object store refuses to say: that a checkpoint cannot
    be read now is no reason to take an older one. StateLost when nothing could be restored and tensors were overwritten
    already.
    """
    trial = _Trial(group, make_state)
    if group is not None and dist.get_rank(group) != 0:
        return _follow(directory, trial)
    not_taken: list[PassedOver] = [] if passed_over is None else passed_over
    try:
        return _propose(directory, trial, not_taken)
    finally:
        for one in not_taken:
            log.warning("elasticd: checkpoint of step %d passed over: %s", one.step, one.reason)


class _Trial:
    """This rank's part in trying one checkpoint after the other."""

    def __init__(self, group: dist.ProcessGroup | None, make_state: MakeState) -> None:
        self.group, self._make_state = group, make_state
        self._rank, self._size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._filled = False

    def load(self, found: Found | ElasticdError) -> Restored | str:
        """Load this rank's part, or say why it cannot. What was loaded, or why the checkpoint is not taken.

        Collective, with the same end on all ranks, but for the words. What else goes wrong on one is raised by all.
        """
        problem = self._agree(lambda: self._check_before(found))
        if problem is None:
            assert isinstance(found, Found)
            state: dict[str, Any] = {}
            problem = self._agree(lambda: self._fill(state, found))
            if problem is None:
                return Restored(path=found.path, manifest=found.manifest, state=state)
        return problem

    def _check_before(self, found: Found | ElasticdError) -> None:
        if isinstance(found, ElasticdError):
            raise found
        if found.manifest.format < FORMAT_WITH_BLOCKS:
            # All ranks read all files first, each a part of them; by name, in turn: in a world of the same size each
            # rank reads the file that it will load.
            data = sorted(found.manifest.data_files, key=lambda entry: entry.name)
            storage.check_contents(found.path, tuple(data[self._rank :: self._size]))

    def _fill(self, state: dict[str, Any], found: Found) -> None:
        reader = _open_reader(found, rank=self._rank, size=self._size)
        state.update(self._make_state(held_by(reader.read_metadata(), found.manifest.world_size)))
        try:
            fill(state, reader)
        finally:
            self._filled |= reader.filling if isinstance(reader, CheckedReader) else True

    def _agree(self, work: Callable[[], None]) -> str | None:
        """Do this rank's part. None: all ranks succeeded; a text: one found damage. Other errors are raised."""
        error: Exception | None = None
        try:
            work()
        except Exception as caught:  # noqa: BLE001 - the others wait: raised once they know
            error = caught
        damaged = isinstance(error, CheckpointInvalid)
        damaged_rank, failed_rank, filled_rank = self._lowest(damaged, error is not None, self._filled)
        self._filled = filled_rank is not None
        if damaged_rank is not None:
            if damaged_rank == self._rank:
                return str(error)
            if damaged:
                log.warning("elasticd: rank %d: %s", self._rank, error)
            return f"rank {damaged_rank} found its part damaged"
        if error is not None:
            raise error
        if failed_rank is not None:
            raise ConfigError(f"rank {failed_rank} could not take up the checkpoint: its own message says why")
        return None

    def check_not_lost(self) -> None:
        """Nothing is left to try."""
        if self._filled:
            raise StateLost(
                "no checkpoint is whole, and the model holds parts of a damaged one: "
                "to start afresh, move the damaged ones away or name another directory"
            )

    def _lowest(self, *true_here: bool) -> list[int | None]:
        """For each question, the lowest rank that says yes."""
        said = torch.tensor([self._rank if one else self._size for one in true_here], dtype=torch.int64)
        if self.group is not None:
            dist.all_reduce(said, op=dist.ReduceOp.MIN, group=self.group)
        return [None if one == self._size else int(one) for one in said.tolist()]


def _propose(directory: Location, trial: _Trial, passed_over: list[PassedOver]) -> Restored | None:
    """Rank 0's part."""
    for found in _candidates(directory, passed_over):
        step = found.manifest.step
        _broadcast([step, checksum(found.manifest), found.manifest.round_number], trial.group)
        end = trial.load(found)
        if isinstance(end, Restored):
            return end
        passed_over.append(PassedOver(step=step, reason=end))
    _broadcast([_NONE, 0, 0], trial.group)
    trial.check_not_lost()
    return None


def _follow(directory: Location, trial: _Trial) -> Restored | None:
    """The other ranks' part."""
    while True:
        step, seal, round_number = _broadcast([_NONE, 0, 0], trial.group)
        if step == _NONE:
            trial.check_not_lost()
            return None
        end = trial.load(_recognise(storage.final_path(directory, step, round_number), seal))
        if isinstance(end, Restored):
            return end


def _broadcast(numbers: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """What rank 0 says. Over a group of all ranks, whose rank 0 is everyone's."""
    if group is None:
        return numbers
    said = torch.tensor(numbers, dtype=torch.int64)
    dist.broadcast(said, src=0, group=group)
    heard: list[int] = said.tolist()
    return heard


def _candidates(directory: Location, passed_over: list[PassedOver]) -> Iterator[Found]:
    """Those whose manifest, sizes and metadata are right, newest first; the others are noted as passed over.

    Late ones (lineage.py) come last.
    """
    manifests = []
    for path in storage.complete(directory):
        try:
            manifests.append(storage.read_manifest(path))
        except CheckpointInvalid as error:
            passed_over.append(PassedOver(step=storage.step_at(path), reason=str(error)))
    passed_over += [
        PassedOver(step=one.step, reason=f"round {one.round_number} was over when it was published")
        for one in late_ones(manifests)
    ]
    for manifest in in_order(manifests):
        path = storage.final_path(directory, manifest.step, manifest.round_number)
        try:
            _check_outline(path, manifest)
        except CheckpointInvalid as error:
            passed_over.append(PassedOver(step=manifest.step, reason=str(error)))
        else:
            yield Found(path=path, manifest=manifest)


def _open_reader(found: Found, *, rank: int, size: int) -> FileSystemReader:
    """For ``fill``: one that checks every byte that it takes, where the checkpoint has an index of blocks, and more
    bytes, so that all ranks together check them all.

    One of an older format is read as it is: verify it before. CheckpointInvalid when its metadata does not match.
    """
    if found.manifest.format < FORMAT_WITH_BLOCKS:
        return plain_reader(found.path)
    return CheckedReader(found.path, found.manifest, rank=rank, size=size)


def load_into(state: dict[str, Any], path: Location) -> None:
    """Fill ``state`` (tensors in place, the rest replaced) from a checkpoint that is trusted or has been verified.

    ConfigError when the checkpoint holds another model or optimizer than the state asks for, CheckpointInvalid when it
    could not be read after all.
    """
    fill(state, plain_reader(path))


def fill(state: dict[str, Any], reader: FileSystemReader) -> None:
    """As ``load_into``, from what the reader reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "torch.distributed is disabled": it is not, the load just needs none
            dcp_load(state, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, CheckpointInvalid | StoreUnavailable):
            raise cause from error
        if isinstance(cause, OSError):
            raise CheckpointInvalid(f"checkpoint {reader.path} could not be read: {cause}") from error
        raise ConfigError(f"checkpoint {reader.path} does not fit what was registered: {cause}") from error


def _recognise(path: Location, seal: int) -> Found | ElasticdError:
    """The checkpoint that rank 0 means, when what this rank sees of it fits."""
    try:
        manifest = storage.read_manifest(path)
        if checksum(manifest) != seal:
            raise CheckpointInvalid("it is another checkpoint of the same step")
        _check_outline(path, manifest)
    except CheckpointInvalid as error:
        return ConfigError(f"rank 0 found {path}, this rank does not ({error}): all ranks must see the same directory")
    except StoreUnavailable as error:
        return error
    return Found(path=path, manifest=manifest)


def _check_outline(path: Location, manifest: Manifest) -> None:
    """All sizes, and the contents of the small file that every rank unpickles."""
    storage.check_sizes(path, manifest)
    storage.check_contents(path, (manifest.metadata,))
