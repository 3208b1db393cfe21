"""Small checkpoints for tests: made, read back and damaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from elasticd.checkpoint import storage
from elasticd.checkpoint.manifest import MANIFEST_NAME, decode_manifest, encode_manifest
from elasticd.checkpoint.objects import Location
from elasticd.checkpoint.restore import PassedOver, Restored, load_into, restore_newest
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saver

#: Enough for their bytes to be read as they are, and not by torch.load.
WEIGHTS = 3000


def state_of(value: float) -> dict:
    return {"model": {"weight": torch.full((WEIGHTS,), value), "bias": torch.full((7,), -value)}, "note": f"of {value}"}


def saver(directory: Location, *, keep: int = 3, **more: object) -> Saver:
    return Saver(directory, **{"group": None, "job_id": "j", "round_number": 1, "keep": Keep(last=keep), **more})


def save(directory: Location, *steps: int, **more: object) -> None:
    for step in steps:
        saver(directory, **more).save(state_of(float(step)), step)


def loaded(path: Location) -> dict:
    state = state_of(0.0)
    load_into(state, path)
    return state


def restored(directory: Location) -> tuple[Restored | None, list[PassedOver]]:
    """The newest that verifies is loaded into a new state; what was passed over."""
    passed_over: list[PassedOver] = []
    return restore_newest(directory, None, lambda _: state_of(0.0), passed_over), passed_over


def newest_step(directory: Location) -> int | None:
    found, _ = restored(directory)
    if found is not None:
        assert storage.verify(found.path) == found.manifest
    return found.manifest.step if found else None


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def flip(path: Path, *, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


def data_file(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.distcp"))


def rewrite_manifest(checkpoint: Path, **changes: object) -> None:
    manifest = decode_manifest((checkpoint / MANIFEST_NAME).read_bytes())
    (checkpoint / MANIFEST_NAME).write_bytes(encode_manifest(dataclasses.replace(manifest, **changes)))
