"""Checkpoint directories on a file system: made durable before they are visible, checked before they are used.

Every rank must see the same directory (one host, or a shared file system). Where a directory is a prefix in an object
store, object_storage.py has its own way, and this module is the door to it: whoever saves, restores or keeps house need
not know which it is. Reads of an object store may raise StoreUnavailable beside what is said here.

Not here: what is inside the data files (torch.distributed.checkpoint's format) and who decides to save or restore
(save.py, restore.py).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from elasticd.checkpoint import object_storage
from elasticd.checkpoint.disk import DISK, Disk, new_file
from elasticd.checkpoint.manifest import (
    MANIFEST_NAME,
    UNKNOWN_STEP,
    FileEntry,
    Manifest,
    complete_name,
    decode_manifest,
    encode_manifest,
    object_name,
    round_of_temporary,
    step_and_round_of,
    step_of,
    temporary_name,
)
from elasticd.checkpoint.object_disk import ObjectDisk
from elasticd.checkpoint.objects import Location, ObjectPath
from elasticd.checkpoint.pace import Pace
from elasticd.checkpoint.retention import Keep, Standing, choose_doomed
from elasticd.errors import CheckpointInvalid, ConfigError, StoreUnavailable

#: An empty file in a checkpoint that retention leaves alone. The manifest knows nothing of it: it may come and go.
PIN_NAME = "pinned"

_CHUNK_BYTES = 4 * 1024 * 1024


def open_directory(directory: Location) -> None:
    """Make the checkpoint directory and try to write there. ConfigError when that does not work."""
    if isinstance(directory, ObjectPath):
        object_storage.open_prefix(directory)
        return
    try:
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        for path in missing:
            DISK.sync_directory(path.parent)  # a checkpoint is only as durable as the names on the way to it
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"cannot write checkpoints to {directory}: {why}; name a writable directory") from error


def disk_of(directory: Location) -> Disk:
    return ObjectDisk() if isinstance(directory, ObjectPath) else DISK


def complete(directory: Location) -> list[Location]:
    """The checkpoints that have their final name, newest first. Says nothing about whether they verify.

    In an object store there may be several of one step: the newest round's comes first.
    """
    if isinstance(directory, ObjectPath):
        return [*object_storage.complete(directory)]
    steps = (step_of(path.name) for path in directory.iterdir())
    return [directory / complete_name(step) for step in sorted((one for one in steps if one is not None), reverse=True)]


def step_at(checkpoint: Location) -> int:
    """The step of one that ``complete`` names."""
    if isinstance(checkpoint, ObjectPath):
        return (step_and_round_of(checkpoint.name) or (UNKNOWN_STEP, 0))[0]
    step = step_of(checkpoint.name)
    return UNKNOWN_STEP if step is None else step


def complete_steps(directory: Location) -> list[int]:
    """The steps of which there is one, newest first."""
    return list(dict.fromkeys(step_at(path) for path in complete(directory)))


def of_step(directory: Location, step: int) -> list[Location]:
    """The checkpoints of a step, the one that counts first."""
    if isinstance(directory, ObjectPath):
        return [path for path in complete(directory) if step_at(path) == step]
    path = directory / complete_name(step)
    return [path] if path.exists() else []


def is_there(checkpoint: Location) -> bool:
    """Whether it still counts: it may have been removed meanwhile."""
    return (checkpoint / MANIFEST_NAME).exists() if isinstance(checkpoint, ObjectPath) else checkpoint.exists()


def final_path(directory: Location, step: int, round_number: int) -> Location:
    """Where the checkpoint of a round is to be found."""
    name = object_name(step, round_number) if isinstance(directory, ObjectPath) else complete_name(step)
    return directory / name


def path_while_saved(directory: Location, step: int, round_number: int) -> Location:
    """Where its files are written."""
    if isinstance(directory, ObjectPath):
        return directory / object_name(step, round_number)
    return directory / temporary_name(step, round_number)


def describe_file(path: Location, pace: Pace | None = None) -> FileEntry:
    """Size and checksum of a file, read in bounded pieces.

    With a ``pace`` it is read at that rate, from the disk and not from the page cache, and is not left in there.
    """
    if isinstance(path, ObjectPath):
        return object_storage.describe(path, pace)
    checksum, size_bytes = 0, 0
    with path.open("rb", buffering=0) as file:
        if pace is not None:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for chunk in _read_ahead(file):
            checksum = zlib.crc32(chunk, checksum)
            size_bytes += len(chunk)
            if pace is not None:
                pace.read(len(chunk))
                os.posix_fadvise(file.fileno(), 0, size_bytes, os.POSIX_FADV_DONTNEED)
    return FileEntry(name=path.name, size_bytes=size_bytes, crc32=checksum)


def _read_ahead(file: io.FileIO) -> Iterator[memoryview]:
    """The file in pieces, each valid until the next one is asked for; a large file is read ahead in a second thread.

    Into two buffers that are used again: fresh memory for each piece costs more than its checksum.
    """
    if os.fstat(file.fileno()).st_size <= _CHUNK_BYTES:
        while whole := file.read(_CHUNK_BYTES):
            yield memoryview(whole)
        return
    buffers = [memoryview(bytearray(_CHUNK_BYTES)) for _ in range(2)]
    with ThreadPoolExecutor(1, thread_name_prefix="elasticd-read") as beside:
        reading = beside.submit(file.readinto, buffers[0])
        while size_bytes := reading.result():
            full = buffers[0][:size_bytes]
            buffers.reverse()
            reading = beside.submit(file.readinto, buffers[0])
            yield full


def begin(directory: Location, step: int, round_number: int, disk: Disk = DISK) -> Location:
    """An empty temporary directory for this step. Sweeps what this round or an older one left behind.

    An older round can no longer commit, and of our own round no other save is in flight. A temporary directory of a
    newer round is left alone: it is us who are late.
    """
    if isinstance(directory, ObjectPath):
        return object_storage.begin(directory, step, round_number)
    for path in directory.iterdir():
        owner = round_of_temporary(path.name)
        if owner is not None and owner <= round_number:
            disk.remove_tree(path)
    temporary = directory / temporary_name(step, round_number)
    disk.make_directory(temporary)
    return temporary


def seal(temporary: Location, manifest: Manifest, disk: Disk = DISK) -> None:
    """Write the manifest, and flush everything: the checkpoint is durable, and not yet visible.

    In an object store all is durable but the manifest, which would make it visible.
    """
    if isinstance(temporary, ObjectPath):
        return
    with new_file(disk, temporary / MANIFEST_NAME) as file:
        file.write(encode_manifest(manifest))
    disk.sync_directory(temporary)


def give_up(temporary: Location, disk: Disk = DISK) -> None:
    """Remove what a save that failed has written, as far as that works."""
    if isinstance(temporary, ObjectPath):
        # Its manifest too: one whose put failed may be there after all.
        with contextlib.suppress(OSError, StoreUnavailable):
            object_storage.remove(temporary)
    else:
        disk.remove_tree(temporary)


def publish(temporary: Location, manifest: Manifest, disk: Disk = DISK) -> Location:
    """Give a sealed directory its final name.

    OSError when a checkpoint of this step is already there: rename never replaces a directory that is not empty.
    """
    if isinstance(temporary, ObjectPath):
        object_storage.publish(temporary, manifest)
        return temporary
    final = temporary.parent / complete_name(manifest.step)
    disk.rename(temporary, final)
    disk.sync_directory(temporary.parent)
    return final


def confirm(final: Location, disk: Disk = DISK) -> None:
    """Make a name durable: whoever gave it may have died before that."""
    if isinstance(final, Path):
        disk.sync_directory(final.parent)


def read_manifest(path: Location) -> Manifest:
    """The manifest of a checkpoint directory. CheckpointInvalid when it is missing, damaged or of another step."""
    if isinstance(path, ObjectPath):
        return object_storage.read_manifest(path)
    try:
        content = (path / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise CheckpointInvalid(f"no {MANIFEST_NAME}: {error.strerror}") from error
    manifest = decode_manifest(content)
    if manifest.step != step_of(path.name):
        raise CheckpointInvalid(f"{MANIFEST_NAME} is of step {manifest.step}")
    return manifest


def check_sizes(path: Location, manifest: Manifest) -> None:
    """CheckpointInvalid when a file is missing or of another length. Costs no reading."""
    if isinstance(path, ObjectPath):
        object_storage.check_sizes(path, manifest)
        return
    for entry in manifest.files:
        try:
            size_bytes = (path / entry.name).stat().st_size
        except OSError as error:
            raise CheckpointInvalid(f"{entry.name}: {error.strerror}") from error
        if size_bytes != entry.size_bytes:
            raise CheckpointInvalid(f"{entry.name} has {size_bytes} bytes instead of {entry.size_bytes}")


def check_contents(path: Location, entries: tuple[FileEntry, ...], pace: Pace | None = None) -> None:
    """CheckpointInvalid when the bytes of a file are not those that were written."""
    for entry in entries:
        try:
            found = describe_file(path / entry.name, pace)
        except OSError as error:
            raise CheckpointInvalid(f"{entry.name}: {error.strerror}") from error
        if (found.size_bytes, found.crc32) != (entry.size_bytes, entry.crc32):
            raise CheckpointInvalid(f"{entry.name} does not match its checksum")


def verify(path: Location, pace: Pace | None = None) -> Manifest:
    """The manifest of a checkpoint whose every byte is as it was written; CheckpointInvalid otherwise."""
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    check_contents(path, manifest.files, pace)
    return manifest


def set_aside(path: Location, why: Literal["invalid", "late"], disk: Disk = DISK) -> None:
    """Give up the name of a checkpoint that does not count, but keep its bytes for a person to look at."""
    if isinstance(path, ObjectPath):
        object_storage.set_aside(path, why)
        return
    number = 1
    while (target := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    disk.rename(path, target)


def manifests(directory: Location) -> list[Manifest]:
    """Those that can be read, newest first."""
    found = []
    for path in complete(directory):
        with contextlib.suppress(CheckpointInvalid):
            found.append(read_manifest(path))
    return found


def standing(directory: Location, *, newest: int | None = None) -> list[Standing]:
    """The checkpoints, up to step ``newest``, whose files are all there. Costs no reading of data.

    What is torn, or was written by a newer elasticd, is not among them: it is for a person to judge.
    """
    found: dict[int, Standing] = {}
    for path in (paths := complete(directory)):
        step = step_at(path)
        if (newest is not None and step > newest) or step in found:
            continue
        try:
            manifest = read_manifest(path)
            check_sizes(path, manifest)
        except CheckpointInvalid:
            continue
        pinned = any(is_pinned(one) for one in paths if step_at(one) == step)
        found[step] = Standing(step=step, saved_at_unix_s=manifest.saved_at_unix_s, pinned=pinned)
    return list(found.values())


def prune(
    directory: Location, *, newest: int | None, keep: Keep, round_number: int, disk: Disk = DISK, only_say: bool = False
) -> list[int]:
    """Remove the checkpoints up to step ``newest`` that ``keep`` does not keep; their steps, oldest first.

    OSError when the storage refuses.
    """
    doomed = choose_doomed(standing(directory, newest=newest), keep)
    for path in [] if only_say else reversed(complete(directory)):
        if step_at(path) in doomed:
            _remove(path, directory / temporary_name(step_at(path), round_number), disk)
    return doomed


def _remove(checkpoint: Location, temporary: Location, disk: Disk) -> None:
    if isinstance(checkpoint, Path) and isinstance(temporary, Path):
        # Renamed first: a directory that is half removed must never pass for a checkpoint.
        disk.rename(checkpoint, temporary)
        disk.remove_tree(temporary)
    elif isinstance(checkpoint, ObjectPath):
        object_storage.remove(checkpoint)


def temporaries(directory: Location) -> list[Location]:
    """Directories that are being written, or that a round which is over has left behind."""
    if isinstance(directory, ObjectPath):
        return [*object_storage.unfinished(directory)]
    return [*sorted(path for path in directory.iterdir() if round_of_temporary(path.name) is not None)]


def remove_temporary(path: Location) -> None:
    """OSError when the storage refuses."""
    if isinstance(path, ObjectPath):
        object_storage.remove(path)
    else:
        shutil.rmtree(path)


def is_pinned(path: Location) -> bool:
    return (path / PIN_NAME).exists()


def pin(path: Location, *, pinned: bool) -> None:
    """Keep a checkpoint whatever retention says, or no longer. OSError when the storage refuses."""
    if isinstance(path, ObjectPath):
        object_storage.pin(path / PIN_NAME, pinned=pinned)
        return
    if pinned:
        (path / PIN_NAME).touch()
    else:
        (path / PIN_NAME).unlink(missing_ok=True)
    DISK.sync_directory(path)
