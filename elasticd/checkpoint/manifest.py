"""The manifest of a checkpoint: what files belong to it, how long they are, and their checksums. Pure.

A checkpoint is a directory ``step-<N>`` in torch.distributed.checkpoint's own format plus ``manifest.json``, which is
written last: a directory without one that verifies is not a checkpoint. While it is being written its name is
``step-<N>.r<round>.tmp``, so that two rounds never write into one directory. In an object store, where nothing can be
renamed, it is ``step-<N>.r<round>`` for good (object_storage.py).

Not here: reading and writing files (storage.py), choosing one to restore (restore.py).
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from typing import Any

from elasticd.core.records import from_plain, to_plain
from elasticd.errors import CheckpointInvalid, ProtocolError

#: Version of manifest.json. A higher one comes from a newer elasticd, and is not guessed at.
FORMAT = 2
#: From this version on data files end in an index of their blocks.
FORMAT_WITH_BLOCKS = 2
MANIFEST_NAME = "manifest.json"
#: Where a round began, in manifests of elasticd that did not write it down.
UNKNOWN_STEP = -1
#: DCP's own index of the tensors, a pickle: it must be among the files, so that it is checked before it is read.
METADATA_NAME = ".metadata"

_COMPLETE = re.compile(r"step-(\d+)")
_OBJECTS = re.compile(r"step-(\d+)\.r(\d+)")
_TEMPORARY = re.compile(r"step-(\d+)\.r(\d+)\.tmp")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint. CRC32 (zlib's): it is there to find rot and torn writes, not malice.

    The last ``index_bytes`` of a data file are the index of its blocks (blocks.py); 0: it has none.
    """

    name: str
    size_bytes: int
    crc32: int
    index_bytes: int = 0
    index_crc32: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a restore must know before it opens a file of the checkpoint.

    ``began_at_step``: the completed steps from which the round that wrote it went on (lineage.py says what for).
    """

    format: int = FORMAT
    step: int
    world_size: int
    job_id: str
    round_number: int
    torch_version: str
    saved_at_unix_s: float
    files: tuple[FileEntry, ...]
    began_at_step: int = UNKNOWN_STEP

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)

    @property
    def metadata(self) -> FileEntry:
        """The small file that every rank unpickles: a manifest that was read names it."""
        return next(entry for entry in self.files if entry.name == METADATA_NAME)

    @property
    def data_files(self) -> tuple[FileEntry, ...]:
        return tuple(entry for entry in self.files if entry.name != METADATA_NAME)


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON that carries its own checksum: a flipped digit in a size or a step must not pass for another value."""
    body = to_plain(manifest)
    sealed = {"crc32": zlib.crc32(_canonical(body)), "manifest": body}
    return (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode()


def decode_manifest(content: bytes) -> Manifest:
    """CheckpointInvalid, with the reason, when the content is not a manifest of a version that we know."""
    try:
        sealed: Any = json.loads(content)
        body = sealed["manifest"]
        version = body["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointInvalid(f"{MANIFEST_NAME} is damaged") from error
    if not isinstance(version, int) or version > FORMAT:
        raise CheckpointInvalid(f"{MANIFEST_NAME} has format {version!r}, this elasticd knows {FORMAT}")
    try:
        manifest = from_plain(Manifest, body)
    except ProtocolError as error:
        raise CheckpointInvalid(f"{MANIFEST_NAME} is damaged: {error}") from error
    if zlib.crc32(_canonical(body)) != sealed.get("crc32"):  # of what it says, not of what this version makes of it
        raise CheckpointInvalid(f"{MANIFEST_NAME} does not match its own checksum")
    if METADATA_NAME not in (entry.name for entry in manifest.files):
        raise CheckpointInvalid(f"{MANIFEST_NAME} says nothing of {METADATA_NAME}")
    return manifest


def checksum(manifest: Manifest) -> int:
    """What tells two manifests apart: CRC32 of the canonical JSON."""
    return zlib.crc32(_canonical(to_plain(manifest)))


def _canonical(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":"), sort_keys=True).encode()


def complete_name(step: int) -> str:
    return f"step-{step}"


def temporary_name(step: int, round_number: int) -> str:
    return f"step-{step}.r{round_number}.tmp"


def step_of(name: str) -> int | None:
    """The step of a complete checkpoint's directory name; None for any other name."""
    found = _COMPLETE.fullmatch(name)
    return int(found[1]) if found else None


def round_of_temporary(name: str) -> int | None:
    """The round that was writing a temporary directory; None for any other name."""
    found = _TEMPORARY.fullmatch(name)
    return int(found[2]) if found else None


def object_name(step: int, round_number: int) -> str:
    return f"step-{step}.r{round_number}"


def step_and_round_of(name: str) -> tuple[int, int] | None:
    """Of a checkpoint in an object store; None for any other name."""
    found = _OBJECTS.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None
