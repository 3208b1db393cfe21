"""Saving: every rank writes its shards through torch.distributed.checkpoint, rank 0 publishes them all at once.

The order is: the files, the manifest, the question whether the round still stands (the fence), the name, and then the
commit record. A member of an old round is refused by the fence; were it frozen for longer than ``FENCE_VALID_S``
between the answer and the rename, it asks again. What is left is a freeze between the last look at the clock and the
rename itself, which ends before the newer round begins a save: that sweeps what older rounds have not yet renamed. Then
a late checkpoint becomes visible, whose commit is refused. lineage.py tells it from those that count; it is restored
only where there is nothing else, and the round that stands sets it aside when it saves.

In an object store there is no rename: the manifest is put where the name would be given (object_storage.py).

The checkpoint is published inside DCP's last collective, so that every rank learns from that one exchange whether the
checkpoint stands, and why not. DCP's writer is not trusted with durability or with reporting its errors (TORCH.md,
defects 5 to 8): one writer thread, every item accounted for, flushes and checksums of our own, never an existing
directory. DCP exchanges its plans among the ranks of the job as pickles over the job's own process group.

Not here: what the state is (worker/state.py), when to save (worker/session.py), the commit record (the daemon).
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystem,
    FileSystemWriter,
    _StorageWriterTransforms,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config as serialization

from elasticd.checkpoint import storage
from elasticd.checkpoint.disk import DISK, Disk, SealedFile, new_file
from elasticd.checkpoint.lineage import is_late
from elasticd.checkpoint.manifest import UNKNOWN_STEP, FileEntry, Manifest
from elasticd.checkpoint.objects import Location
from elasticd.checkpoint.retention import Keep
from elasticd.errors import CheckpointInvalid, SaveFailed, StoreUnavailable

log = logging.getLogger(__name__)

#: How a rank's file entries travel to rank 0 among DCP's own results; no tensor can have this name.
_ENTRY_KEY = "\0elasticd.file"

#: An answer of the fence is acted upon within so many seconds of the question, or asked for again, so often.
FENCE_VALID_S = 1.0
FENCE_QUESTIONS = 3

#: Smaller tensors are loaded by torch.load: their bytes cannot be told by their number from torch.save's own.
TENSOR_FROM_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that stands. ``fresh`` is False when one of this step that verifies was there already.

    ``size_bytes`` is what this rank wrote of it.
    """

    step: int
    path: Location
    seconds: float
    fresh: bool
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Who saves: the job, its round, and the completed steps from which that round went on."""

    job_id: str
    round_number: int
    began_at_step: int = UNKNOWN_STEP


class Fence(Protocol):
    """Returns when the round stands, at some moment after the call. ``patient``: wait for one who can tell.

    Fenced when it is over; StoreUnavailable when nobody can tell.
    """

    def __call__(self, step: int, *, patient: bool) -> None: ...


class _AlreadyThereError(Exception):
    """A checkpoint of this step stands already, and verifies."""


class Saver:
    """Saves into one directory for one round. All ranks call ``save`` together, one save at a time."""

    def __init__(
        self,
        directory: Location,
        *,
        group: dist.ProcessGroup | None,
        job_id: str,
        round_number: int,
        keep: Keep,
        disk: Disk | None = None,
        fence: Fence | None = None,
    ) -> None:
        self._directory, self._group, self._keep, self._fence = directory, group, keep, fence
        self._disk = disk or storage.disk_of(directory)
        self._origin = Origin(job_id=job_id, round_number=round_number)
        # torch.distributed is not disabled in a world of one: the save just needs none. Not suppressed around the call,
        # which runs in a thread, and catch_warnings is for the whole process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

    def began_at(self, step: int) -> None:
        """So many steps were completed when this round took up training."""
        self._origin = replace(self._origin, began_at_step=step)

    def save(
        self, state: dict[str, Any], step: int, *, problem: Exception | None = None, patient: bool = False
    ) -> Saved:
        """Collective. Returns once the checkpoint is durable and visible.

        ``problem``: why this rank has no state to save; then the save fails on every rank, instead of hanging.
        ``patient``: wait for a store that is away, rather than give this checkpoint up.

        SaveFailed when the storage refused (on every rank alike: the next save may work). Errors of the process group
        (a rank died, or was silent for longer than the group's time-out) come through as torch raises them.
        """
        started = time.monotonic()
        temporary = storage.path_while_saved(self._directory, step, self._origin.round_number)
        writer = _Writer(
            temporary, step=step, origin=self._origin, disk=self._disk, problem=problem, confirm=self._fence_of(patient)
        )
        fresh = True
        try:
            # Checksums of torch.save's own zip records, which nobody reads, would cost a third of the time.
            with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # of this thread alone
                dcp_save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        except CheckpointException as error:
            fresh = not _already_there(error)
            if fresh:
                self._clear(writer, temporary)
                raise _as_raised(step, error) from error
        if fresh and writer.is_coordinator:
            self._prune(step)
        return Saved(
            step=step,
            path=self._path_of(step, fresh=fresh),
            seconds=time.monotonic() - started,
            fresh=fresh,
            size_bytes=writer.size_bytes,
        )

    def _path_of(self, step: int, *, fresh: bool) -> Location:
        """Ours, or the one that was there already."""
        there = [] if fresh else storage.of_step(self._directory, step)
        return next(iter(there), storage.final_path(self._directory, step, self._origin.round_number))

    def _fence_of(self, patient: bool) -> Callable[[int], None] | None:  # noqa: FBT001
        fence = self._fence
        return None if fence is None else lambda step: fence(step, patient=patient)

    def _prune(self, newest: int) -> None:
        """The checkpoint stands: that an old one could not be removed is no reason to fail."""
        try:
            set_late_ones_aside(self._directory, newest, self._disk)
            number = self._origin.round_number
            storage.prune(self._directory, newest=newest, keep=self._keep, round_number=number, disk=self._disk)
        except (OSError, StoreUnavailable) as error:
            log.warning("elasticd: old checkpoints were not removed: %s", error)

    def _clear(self, writer: _Writer, temporary: Location) -> None:
        if writer.began:  # otherwise, in an object store, what has that name may be a checkpoint that stands
            storage.give_up(temporary, self._disk)


class _Files(FileSystem):
    """How DCP's writer reaches the disk: every file is new, sealed when it is closed, and noted."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.entries: list[FileEntry] = []

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", mode
        with new_file(self._disk, path, indexed=path.name.endswith(DEFAULT_SUFFIX)) as file:
            yield file
        self.entries.append(file.entry)

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rename(self, path: Any, new_path: Any) -> None:
        self._disk.rename(path, new_path)
        old, new = path.name, new_path.name
        self.entries = [replace(entry, name=new) if entry.name == old else entry for entry in self.entries]


class _Items(_StorageWriterTransforms):
    """Tells the file where each item begins, and which of its bytes are a tensor's elements.

    DCP asks its transforms for the stream of each item; the stream stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensor_bytes: dict[MetadataIndex, int] = {}

    def transform_save_stream(self, write_item: WriteItem, raw_stream: io.IOBase) -> Any:
        assert isinstance(raw_stream, SealedFile)
        raw_stream.begin_item(self.tensor_bytes.get(write_item.index, 0))
        return super().transform_save_stream(write_item, raw_stream)


class _RowMajor:
    """DCP's planner as its writer sees it, with tensors in row-major order: then their bytes need no unpickling."""

    def __init__(self, planner: SavePlanner, items: _Items) -> None:
        self._planner, self._items = planner, items

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data: Any = self._planner.resolve_data(write_item)
        if type(data) not in (torch.Tensor, torch.nn.Parameter) or data.layout != torch.strided:
            return cast("torch.Tensor | io.BytesIO", data)  # what a subclass holds is its own affair
        plain: torch.Tensor = data.detach().resolve_conj().resolve_neg().contiguous()
        if plain.nbytes >= TENSOR_FROM_BYTES:
            self._items.tensor_bytes[write_item.index] = plain.nbytes
        return plain


class _Writer(FileSystemWriter):
    """DCP's writer, made durable. Rank 0 alone makes the directory, and gives it its final name."""

    def __init__(
        self,
        path: Location,
        *,
        step: int,
        origin: Origin,
        disk: Disk,
        problem: Exception | None,
        confirm: Callable[[int], None] | None,
    ) -> None:
        # No copying ahead: where there is CUDA, DCP would copy without waiting, and then wait for the stream of the
        # calling thread's device. That is GPU 0 in a new thread, whichever the state is on: bytes of nothing are saved.
        super().__init__(str(path), thread_count=1, per_thread_copy_ahead=0, sync_files=False, overwrite=False)
        self.path: Any = path  # DCP reaches it through _Files alone
        self._files = _Files(disk)
        self.fs = self._files
        self.transforms = self._items = _Items()
        self._disk, self._problem, self._confirm = disk, problem, confirm
        self.is_coordinator = False
        #: Whether what is at the path is this save's to remove.
        self.began = False
        self._temporary, self._step, self._origin = path, step, origin
        self._world_size = 0

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._files.entries)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001 (DCP's)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self.is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Only rank 0 touches the directory here; the others write after DCP's first collective, so after this."""
        if self._problem is not None:
            raise self._problem
        if self.is_coordinator:
            _make_way(self._temporary.parent, self._step, self._origin, self._disk)
            self.began = True
            storage.begin(self._temporary.parent, self._step, self._origin.round_number, self._disk)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._world_size = len(plans)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        row_major: Any = _RowMajor(planner, self._items)
        results = super().write_data(plan, row_major).wait()
        if len(results) != len(plan.items):
            raise OSError(f"only {len(results)} of {len(plan.items)} items were written")
        done: Future[list[WriteResult]] = Future()
        done.set_result(results + [_as_result(entry) for entry in self._files.entries])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written: the metadata, the manifest, and the final name."""
        files = [result.storage_data for part in results for result in part if _is_entry(result)]
        super().finish(metadata, [[result for result in part if not _is_entry(result)] for part in results])
        files.append(self._files.entries[-1])
        manifest = Manifest(
            step=self._step,
            world_size=self._world_size,
            job_id=self._origin.job_id,
            round_number=self._origin.round_number,
            torch_version=torch.__version__,
            saved_at_unix_s=time.time(),
            files=tuple(files),
            began_at_step=self._origin.began_at_step,
        )
        storage.seal(self._temporary, manifest, self._disk)
        self._publish(manifest)

    def _publish(self, manifest: Manifest) -> None:
        self._ask_fence()
        try:
            storage.publish(self._temporary, manifest, self._disk)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Somebody else has published this step since this save began: a late one is not in our way.
            _make_way(self._temporary.parent, self._step, self._origin, self._disk)
            self._ask_fence()
            storage.publish(self._temporary, manifest, self._disk)

    def _ask_fence(self) -> None:
        if self._confirm is None:
            return
        for _ in range(FENCE_QUESTIONS):
            asked_at = time.monotonic()
            self._confirm(self._step)
            if time.monotonic() - asked_at < FENCE_VALID_S:
                return
        raise StoreUnavailable(f"the store took longer than {FENCE_VALID_S:g} s to say whether the round stands")


def _make_way(directory: Location, step: int, origin: Origin, disk: Disk) -> None:
    """A step that is already there stays when it verifies; a damaged or late one gives up its name."""
    there, ours = storage.of_step(directory, step), storage.final_path(directory, step, origin.round_number)
    if ours not in there and storage.is_there(ours):  # a listing may be stale
        there.insert(0, ours)
    for final in there:
        _look_at(final, origin, disk)


def _look_at(final: Location, origin: Origin, disk: Disk) -> None:
    try:
        found = storage.verify(final)
    except CheckpointInvalid:
        storage.set_aside(final, "invalid", disk)
        return
    ours = replace(found, round_number=origin.round_number, job_id=origin.job_id, began_at_step=origin.began_at_step)
    if is_late(found, ours):
        storage.set_aside(final, "late", disk)
        return
    storage.confirm(final, disk)
    raise _AlreadyThereError(str(final))


def set_late_ones_aside(directory: Location, step: int, disk: Disk = DISK) -> None:
    """Those that the checkpoint of this step shows to be late. OSError when the storage refuses."""
    found = storage.manifests(directory)
    for ours in [one for one in found if one.step == step]:
        for one in found:
            if is_late(one, ours):
                log.warning(
                    "elasticd: the checkpoint of step %d was published by round %d when round %d stood: set aside",
                    *(one.step, one.round_number, ours.round_number),
                )
                storage.set_aside(storage.final_path(directory, one.step, one.round_number), "late", disk)


def _as_result(entry: FileEntry) -> WriteResult:
    index = MetadataIndex(_ENTRY_KEY, index=None)
    return WriteResult(index=index, size_in_bytes=entry.size_bytes, storage_data=entry)


def _is_entry(result: WriteResult) -> bool:
    return result.index.fqn == _ENTRY_KEY


def _already_there(error: CheckpointException) -> bool:
    return any(isinstance(cause, _AlreadyThereError) for cause, _ in error.failures.values())


def _as_raised(step: int, error: CheckpointException) -> BaseException:
    """DCP wraps whatever was raised; an interrupt or an exit is no failure of the storage, and stays what it was."""
    for cause, _ in error.failures.values():
        if not isinstance(cause, Exception):
            return cause
    rank, (cause, _) = min(error.failures.items())
    return SaveFailed(f"checkpoint of step {step} was not saved: rank {rank}: {cause}")
