"""Checkpoints that do not verify are passed over, with a reason, and nothing of theirs is unpickled."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_checkpoints import WEIGHTS, data_file, flip, loaded, newest_step, restored, rewrite_manifest, save

from elasticd.checkpoint import storage
from elasticd.checkpoint.manifest import FORMAT, MANIFEST_NAME, METADATA_NAME, decode_manifest
from elasticd.checkpoint.restore import load_into
from elasticd.errors import CheckpointInvalid, ConfigError

# --- what is passed over ---


def forge_manifest_without_metadata(checkpoint: Path) -> None:
    manifest = decode_manifest((checkpoint / MANIFEST_NAME).read_bytes())
    rewrite_manifest(checkpoint, files=tuple(e for e in manifest.files if e.name != METADATA_NAME))


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a bit of the data", lambda at: flip(data_file(at), position=2000), "does not match its checksum"),
    ("a bit of the metadata", lambda at: flip(at / METADATA_NAME, position=100), "does not match its checksum"),
    ("data cut short", lambda at: os.truncate(data_file(at), 1000), "has 1000 bytes instead of"),
    ("data missing", lambda at: data_file(at).unlink(), "No such file"),
    ("metadata missing", lambda at: (at / METADATA_NAME).unlink(), "No such file"),
    ("manifest missing", lambda at: (at / MANIFEST_NAME).unlink(), "no manifest.json"),
    ("manifest empty", lambda at: (at / MANIFEST_NAME).write_bytes(b""), "is damaged"),
    ("manifest cut short", lambda at: os.truncate(at / MANIFEST_NAME, 200), "is damaged"),
    ("manifest of another shape", lambda at: (at / MANIFEST_NAME).write_text("[1]"), "is damaged"),
    ("manifest not JSON", lambda at: (at / MANIFEST_NAME).write_bytes(b"\xff\xfe{"), "is damaged"),
    ("manifest of another step", lambda at: rewrite_manifest(at, step=19), "is of step 19"),
    ("manifest from the future", lambda at: rewrite_manifest(at, format=FORMAT + 1), "has format 3"),
    ("manifest without metadata", forge_manifest_without_metadata, "says nothing of .metadata"),
    ("a directory in place of a file", lambda at: (data_file(at).unlink(), (at / "__0_0.distcp").mkdir()), ""),
]


@pytest.mark.parametrize(("damage", "why"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_what_does_not_verify_is_passed_over_with_a_reason(tmp_path: Path, damage: Callable, why: str) -> None:
    save(tmp_path, 10, 20)
    damage(tmp_path / "step-20")
    found, passed_over = restored(tmp_path)
    assert found is not None
    assert found.manifest.step == 10
    assert [one.step for one in passed_over] == [20]
    assert why in passed_over[0].reason


def test_no_flip_of_a_bit_passes_unseen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    draw = random.Random(5)
    whole = {path: path.read_bytes() for path in (tmp_path / "step-1").iterdir()}
    manifest = decode_manifest(whole[tmp_path / "step-1" / MANIFEST_NAME])
    for _ in range(400):
        path = draw.choice(list(whole))
        content = bytearray(whole[path])
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            assert storage.verify(tmp_path / "step-1") == manifest  # a blank became another blank
            assert path.name == MANIFEST_NAME
        except CheckpointInvalid:
            pass
        path.write_bytes(whole[path])
    assert newest_step(tmp_path) == 1


def test_several_bad_ones_and_none_that_is_good(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    for step in (1, 2, 3):
        flip(data_file(tmp_path / f"step-{step}"))
    found, passed_over = restored(tmp_path)
    assert found is None
    assert [one.step for one in passed_over] == [3, 2, 1]


def test_the_newest_is_by_number_and_other_names_are_ignored(tmp_path: Path) -> None:
    save(tmp_path, 9, 100, 20)
    for name in ("step-x", "step-7.r3.tmp", "step-500.invalid-1", "lost+found"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("step-900")
    assert storage.complete_steps(tmp_path) == [100, 20, 9]
    assert newest_step(tmp_path) == 100


class Poison:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", [METADATA_NAME, "__0_0.distcp"])
def test_nothing_is_unpickled_before_its_checksum_matched(tmp_path: Path, name: str) -> None:
    directory, mark = tmp_path / "checkpoints", tmp_path / "mark"
    directory.mkdir()
    save(directory, 1, 2)
    poison = pickle.dumps(Poison(mark))
    padded = poison + bytes(max(0, (directory / "step-2" / name).stat().st_size - len(poison)))
    (directory / "step-2" / name).write_bytes(padded)
    assert newest_step(directory) == 1
    assert not mark.exists()
    pickle.loads(padded)
    assert mark.exists()  # the poison works


def test_a_checkpoint_of_another_model_is_the_operators_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for other in ({"model": {"other": torch.zeros(3)}}, {"model": {"weight": torch.zeros(WEIGHTS - 1)}}):
        with pytest.raises(ConfigError, match="does not fit what was registered"):
            load_into(other, tmp_path / "step-1")


def test_what_cannot_be_read_after_all_is_not_blamed_on_the_model(tmp_path: Path) -> None:
    save(tmp_path, 1)
    data_file(tmp_path / "step-1").unlink()
    with pytest.raises(CheckpointInvalid, match="could not be read"):
        loaded(tmp_path / "step-1")
