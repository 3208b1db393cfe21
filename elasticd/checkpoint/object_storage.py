"""Checkpoints in an object store, where nothing can be renamed: the manifest is put last, and makes one visible.

    <prefix>/step-100.r7/__0_0.distcp, .metadata, ...   of round 7, whose names no other round uses
    <prefix>/step-100.r7/manifest.json                  put last: now it is a checkpoint
    <prefix>/step-100.r7/pinned                         retention leaves it alone
    <prefix>/step-100.r7/manifest.json.late-1           instead of manifest.json: set aside

An old round can never mix its files with a newer one's, and whatever is removed loses its manifest first. A listing may
be stale: what is taken, removed or trusted is asked for by its own name. storage.py is the door to all of this.
"""

from __future__ import annotations

import contextlib
import uuid
import zlib
from typing import Literal

from elasticd.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    decode_manifest,
    encode_manifest,
    object_name,
    step_and_round_of,
)
from elasticd.checkpoint.objects import ObjectPath, remove_below
from elasticd.checkpoint.pace import Pace
from elasticd.errors import CheckpointInvalid, ConfigError

_CHUNK_BYTES = 16 * 1024 * 1024


def open_prefix(directory: ObjectPath) -> None:
    """Put an object there and remove it. ConfigError when that does not work."""
    probe = directory / f"elasticd-{uuid.uuid4().hex}.probe"
    try:
        probe.write_bytes(b"elasticd")
        probe.remove()
    except OSError as error:
        raise ConfigError(
            f"cannot write checkpoints to {directory}: {error.__cause__ or error.strerror}; "
            "name a bucket that is there, and a prefix that may be written"
        ) from error


def complete(directory: ObjectPath) -> list[ObjectPath]:
    """Those that have a manifest, the newest step first, and of one step the newest round first."""
    return [directory / name for name, objects in _by_name(directory).items() if MANIFEST_NAME in objects]


def unfinished(directory: ObjectPath) -> list[ObjectPath]:
    """Those being written, or left behind: neither a manifest nor one that was set aside."""
    found = [
        directory / name
        for name, objects in _by_name(directory).items()
        if not any(one.startswith(MANIFEST_NAME) for one in objects)
    ]
    return [path for path in found if not (path / MANIFEST_NAME).exists()]  # the listing may be older than it


def _by_name(directory: ObjectPath) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in directory.below():
        top, _, rest = name.partition("/")
        if rest and step_and_round_of(top) is not None:
            found.setdefault(top, set()).add(rest)
    return {top: found[top] for top in sorted(found, key=lambda top: step_and_round_of(top) or (), reverse=True)}


def begin(directory: ObjectPath, step: int, round_number: int) -> ObjectPath:
    """Room for this step of this round. Sweeps what this round or an older one left behind, as storage.begin does."""
    ours = directory / object_name(step, round_number)
    for path in unfinished(directory):
        _, owner = step_and_round_of(path.name) or (0, 0)
        if owner <= round_number:
            remove_below(path)
    remove_below(ours)  # one of an earlier job may have been set aside under this very name
    return ours


def publish(checkpoint: ObjectPath, manifest: Manifest) -> None:
    """Make it visible. OSError when the store refuses."""
    (checkpoint / MANIFEST_NAME).write_bytes(encode_manifest(manifest))


def read_manifest(checkpoint: ObjectPath) -> Manifest:
    try:
        content = (checkpoint / MANIFEST_NAME).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointInvalid(f"no {MANIFEST_NAME}: {error.strerror}") from error
    manifest = decode_manifest(content)
    if (manifest.step, manifest.round_number) != step_and_round_of(checkpoint.name):
        raise CheckpointInvalid(f"{MANIFEST_NAME} is of step {manifest.step} and round {manifest.round_number}")
    return manifest


def check_sizes(checkpoint: ObjectPath, manifest: Manifest) -> None:
    listed = checkpoint.below()
    for entry in manifest.files:
        size_bytes = listed.get(entry.name)
        if size_bytes != entry.size_bytes:
            size_bytes = _size_of(checkpoint, entry)
        if size_bytes != entry.size_bytes:
            raise CheckpointInvalid(f"{entry.name} has {size_bytes} bytes instead of {entry.size_bytes}")


def _size_of(checkpoint: ObjectPath, entry: FileEntry) -> int:
    try:
        return (checkpoint / entry.name).size_bytes()
    except FileNotFoundError as error:
        raise CheckpointInvalid(f"{entry.name}: {error.strerror}") from error


def describe(path: ObjectPath, pace: Pace | None = None) -> FileEntry:
    """Size and checksum of an object, read in bounded ranges. FileNotFoundError when it is not there."""
    checksum, offset, size_bytes = 0, 0, path.size_bytes()
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, size_bytes)))
    while offset < size_bytes:
        taken = path.read_at(buffer[: size_bytes - offset], offset)
        if not taken:
            break
        checksum, offset = zlib.crc32(buffer[:taken], checksum), offset + taken
        if pace is not None:
            pace.read(taken)
    return FileEntry(name=path.name, size_bytes=offset, crc32=checksum)


def set_aside(checkpoint: ObjectPath, why: Literal["invalid", "late"]) -> None:
    """It does not count any more; its bytes stay, and its manifest under another name."""
    manifest = checkpoint / MANIFEST_NAME
    with contextlib.suppress(FileNotFoundError):
        content, there = manifest.read_bytes(), checkpoint.below()
        number = 1
        while (target := f"{MANIFEST_NAME}.{why}-{number}") in there:
            number += 1
        (checkpoint / target).write_bytes(content)
        manifest.remove()


def pin(mark: ObjectPath, *, pinned: bool) -> None:
    if pinned:
        mark.write_bytes(b"pinned\n")
    else:
        mark.remove()


def remove(checkpoint: ObjectPath) -> None:
    """The manifest first: what is half removed must never pass for a checkpoint. OSError when one object stays."""
    (checkpoint / MANIFEST_NAME).remove()
    remove_below(checkpoint)
