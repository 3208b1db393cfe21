"""Checkpoints in object stores: the manifest makes one visible, a store that fails is told of, nothing is mixed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flaky_store import Flaky, fail_on, heal
from fsspec.spec import AbstractBufferedFile
from small_checkpoints import WEIGHTS, restored, save, saver, state_of
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from elasticd.checkpoint import storage
from elasticd.checkpoint.disk import new_file
from elasticd.checkpoint.foreign import agree_on_foreign, load_foreign
from elasticd.checkpoint.manifest import MANIFEST_NAME, METADATA_NAME
from elasticd.checkpoint.object_disk import ObjectDisk
from elasticd.checkpoint.objects import ObjectPath, locate
from elasticd.checkpoint.retention import Keep
from elasticd.commands import checkpoints
from elasticd.errors import ConfigError, Fenced, SaveFailed, StoreUnavailable

DATA = "__0_0.distcp"


@pytest.fixture
def bucket() -> Iterator[ObjectPath]:
    yield locate("flaky://bucket/run")
    Flaky.store.clear()
    heal()


def newest(directory: ObjectPath) -> tuple[int, int] | None:
    """Step and round of what is restored; its state is that step's, whole."""
    found, _ = restored(directory)
    if found is None:
        return None
    step = found.manifest.step
    assert torch.equal(found.state["model"]["weight"], torch.full((WEIGHTS,), float(step)))
    assert found.state["note"] == f"of {float(step)}"
    assert storage.verify(found.path) == found.manifest
    return step, found.manifest.round_number


def names(directory: ObjectPath) -> set[str]:
    return set(directory.below())


# --- what is written ---


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_saved_is_restored_and_opens_with_plain_dcp(bucket: ObjectPath) -> None:
    saved = saver(bucket, round_number=7).save(state_of(10.0), 10)
    assert str(saved.path) == "flaky://bucket/run/step-10.r7"
    assert names(saved.path) == {DATA, METADATA_NAME, MANIFEST_NAME}
    assert newest(bucket) == (10, 7)
    state = {"model": {"weight": torch.zeros(WEIGHTS)}}
    dcp_load(state, storage_reader=FsspecReader(str(saved.path)), no_dist=True)
    assert torch.equal(state["model"]["weight"], torch.full((WEIGHTS,), 10.0))


def test_the_fence_is_asked_when_all_but_the_manifest_is_there(bucket: ObjectPath) -> None:
    seen: list[set[str]] = []
    saver(bucket, fence=lambda _step, patient: seen.append(names(bucket))).save(state_of(1.0), 1)
    assert seen == [{f"step-1.r1/{DATA}", f"step-1.r1/{METADATA_NAME}"}]

    def refuse(_step: int, *, patient: bool) -> None:
        raise Fenced("a newer round stands")

    with pytest.raises(SaveFailed, match="newer round"):
        saver(bucket, fence=refuse).save(state_of(2.0), 2)
    assert newest(bucket) == (1, 1)


def test_a_step_that_stands_is_not_saved_again_and_a_damaged_one_is(bucket: ObjectPath) -> None:
    save(bucket, 5)
    again = saver(bucket, round_number=2).save(state_of(5.0), 5)
    assert (again.fresh, again.path.name) == (False, "step-5.r1")
    Flaky.store["/bucket/run/step-5.r1/" + DATA].getbuffer()[100] ^= 1
    assert saver(bucket, round_number=2).save(state_of(5.0), 5).fresh
    assert newest(bucket) == (5, 2)
    assert f"step-5.r1/{MANIFEST_NAME}.invalid-1" in names(bucket)


def test_a_second_save_of_a_step_that_fails_leaves_the_first_one_alone(bucket: ObjectPath) -> None:
    """Both have one name, and a save that fails removes what it has written."""
    save(bucket, 5)
    with pytest.raises(SaveFailed, match="no memory"):
        saver(bucket).save(state_of(5.0), 5, problem=MemoryError("no memory"))
    for fault in (("list", "run"), ("get", MANIFEST_NAME), ("get", DATA)):
        fail_on(*fault)
        with pytest.raises(SaveFailed):
            save(bucket, 5)
    heal()
    Flaky.hidden = staticmethod(lambda _key: True)
    assert not saver(bucket).save(state_of(5.0), 5).fresh
    Flaky.hidden = staticmethod(lambda _key: False)
    assert newest(bucket) == (5, 1)


def test_of_two_rounds_of_one_step_the_newer_counts(bucket: ObjectPath) -> None:
    """Round 1 was frozen behind its fence, and put its manifest after round 2 had saved the step."""
    late = saver(bucket, round_number=1)

    def meanwhile(_step: int, *, patient: bool) -> None:
        hide = {key: Flaky.store.pop(key) for key in list(Flaky.store)}  # round 2 sweeps what it sees of round 1
        newer = saver(bucket, round_number=2)
        newer.began_at(4)
        newer.save(state_of(8.0), 8)
        Flaky.store.update(hide)

    late._fence = meanwhile
    late.began_at(4)
    late.save(state_of(8.0), 8)
    assert [path.name for path in storage.complete(bucket)] == ["step-8.r2"]  # it saw itself that it was late
    aside = bucket / "step-8.r1" / f"{MANIFEST_NAME}.late-1"
    (bucket / "step-8.r1" / MANIFEST_NAME).write_bytes(aside.read_bytes())  # as if it had died before it saw that
    assert [path.name for path in storage.complete(bucket)] == ["step-8.r2", "step-8.r1"]
    assert newest(bucket) == (8, 2)
    Flaky.store["/bucket/run/step-8.r2/" + DATA].getbuffer()[100] ^= 1
    assert newest(bucket) == (8, 1)  # late, and all that there is


def test_what_an_older_round_left_is_swept_and_a_late_manifest_over_it_is_no_checkpoint(bucket: ObjectPath) -> None:
    save(bucket, 3)
    manifest = (bucket / "step-3.r1" / MANIFEST_NAME).read_bytes()
    (bucket / "step-3.r1" / MANIFEST_NAME).remove()
    (bucket / "step-9.r5" / DATA).write_bytes(b"of a newer round")
    save(bucket, 2, round_number=2)
    assert {name.partition("/")[0] for name in names(bucket)} == {"step-2.r2", "step-9.r5"}
    (bucket / "step-3.r1" / MANIFEST_NAME).write_bytes(manifest)
    found, passed_over = restored(bucket)
    assert found is not None
    assert found.manifest.step == 2
    assert [one.step for one in passed_over] == [3]


# --- a store that fails ---


@pytest.mark.parametrize(
    ("verb", "ending"),
    [
        ("list", "run"),
        ("put", DATA),
        ("write", DATA),
        ("complete", DATA),
        ("put", METADATA_NAME + ".tmp"),
        ("complete", METADATA_NAME + ".tmp"),
        ("put", MANIFEST_NAME),
        ("answer", MANIFEST_NAME),
    ],
)
def test_a_call_that_fails_fails_the_save_and_the_next_one_works(bucket: ObjectPath, verb: str, ending: str) -> None:
    save(bucket, 1)
    called = fail_on(verb, ending)
    with pytest.raises(SaveFailed, match=r"the store (says no|refuses)"):
        save(bucket, 2)
    assert any(one.startswith(verb) and one.endswith(ending) for one in called)
    heal()
    assert newest(bucket) == (1, 1)
    save(bucket, 2)
    assert newest(bucket) == (2, 1)


@pytest.mark.parametrize("ending", [DATA, METADATA_NAME + ".tmp", MANIFEST_NAME])
def test_a_put_that_is_cut_short_without_a_word_fails_the_save(bucket: ObjectPath, ending: str) -> None:
    save(bucket, 1)
    Flaky.cut = staticmethod(lambda key: 50 if key.endswith(ending) else None)
    with pytest.raises(SaveFailed):
        save(bucket, 2)
    heal()
    assert newest(bucket) == (1, 1)
    assert not [name for name in names(bucket) if name.startswith("step-2")]


def test_after_any_call_that_is_the_last_one_the_newest_whole_one_is_restored(bucket: ObjectPath) -> None:
    """The process dies at every call of a save in turn; what is restored is the old step or the new one, whole."""
    save(bucket, 1)
    calls = fail_on("nothing", "")
    save(bucket, 2)
    before = {key: one.getvalue() for key, one in Flaky.store.items() if "/step-1." in key}
    ends = set()
    for last in range(len(calls)):
        heal()
        Flaky.store.clear()
        for key, content in before.items():
            bucket.fs.pipe_file(key, content)
        left = [last]

        def before_call(_verb: str, _key: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt  # nothing cleans up after it

        Flaky.before = staticmethod(before_call)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            save(bucket, 2)
        heal()
        ends.add(newest(bucket))
    assert ends == {(1, 1), (2, 1)}


def test_an_outage_while_reading_is_no_reason_to_take_an_older_one(bucket: ObjectPath) -> None:
    save(bucket, 1, 2)
    for ending in (MANIFEST_NAME, METADATA_NAME, DATA):
        fail_on("get", f"step-2.r1/{ending}", OSError("timed out"))
        with pytest.raises(StoreUnavailable, match="timed out"):
            restored(bucket)
    fail_on("list", "run")
    with pytest.raises(StoreUnavailable):
        restored(bucket)
    heal()
    assert newest(bucket) == (2, 1)


@pytest.mark.parametrize("name", [DATA, METADATA_NAME])
def test_an_object_that_vanishes_or_rots_is_passed_over_with_a_reason(bucket: ObjectPath, name: str) -> None:
    save(bucket, 1, 2, 3)
    key = f"/bucket/run/step-3.r1/{name}"
    content = bytearray(Flaky.store[key].getvalue())
    content[len(content) // 2] ^= 4
    bucket.fs.pipe_file(key, bytes(content))
    del Flaky.store[f"/bucket/run/step-2.r1/{name}"]
    found, passed_over = restored(bucket)
    assert found is not None
    assert found.manifest.step == 1
    assert [one.step for one in passed_over] == [3, 2]
    assert "checksum" in passed_over[0].reason
    assert "no such object" in passed_over[1].reason


def test_a_stale_listing_costs_a_step_at_most_and_never_a_checkpoint(bucket: ObjectPath) -> None:
    save(bucket, 1, 2)
    Flaky.ghosts = {f"/bucket/run/step-3.r1/{MANIFEST_NAME}": 10, f"/bucket/run/step-3.r1/{DATA}": 10}
    found, passed_over = restored(bucket)
    assert found is not None
    assert (found.manifest.step, [one.step for one in passed_over]) == (2, [3])
    Flaky.ghosts = {}
    Flaky.hidden = staticmethod(lambda key: "step-2.r1/" in key and not key.endswith(DATA))
    save(bucket, 4, round_number=2)  # the sweep asks for the manifest that it is not shown
    Flaky.hidden = staticmethod(lambda key: key.endswith(DATA))
    assert newest(bucket) == (4, 2)  # what a listing does not show is asked for
    Flaky.hidden = staticmethod(lambda _key: False)
    assert storage.complete_steps(bucket) == [4, 2, 1]
    assert storage.verify(bucket / "step-2.r1").step == 2


class _Uploading(AbstractBufferedFile):
    """An object that is uploaded in parts, as s3fs and gcsfs do it."""

    ended: list[bool]

    def _upload_chunk(self, final: bool = False) -> bool:
        self.ended.append(final)
        return True

    def _initiate_upload(self) -> None:
        self.ended = []

    def discard(self) -> None:
        self.ended.append(False)


def test_an_upload_that_is_given_up_is_never_completed(bucket: ObjectPath, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _Uploading(bucket.fs, "/bucket/run/x", mode="wb", block_size=1000)
    monkeypatch.setattr(Flaky, "_open", lambda *_, **__: file)

    def fail() -> None:
        with new_file(ObjectDisk(), bucket / "x") as sealed:
            sealed.write(bytes(5000))
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    ended = file.ended
    file.close()  # as its __del__ does
    assert ended
    assert not any(ended)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_plain_dcp_put_there_is_taken_up(bucket: ObjectPath) -> None:
    dcp_save({"model": state_of(6.0)["model"]}, storage_writer=FsspecWriter(str(bucket / "plain")), no_dist=True)
    where, state = locate(f"{bucket}/plain"), {"model": state_of(0.0)["model"]}
    assert agree_on_foreign(where, None) == {"model"}
    load_foreign(state, where, {"model"})
    assert torch.equal(state["model"]["weight"], torch.full((WEIGHTS,), 6.0))
    with pytest.raises(ConfigError, match="no checkpoint"):
        agree_on_foreign(bucket, None)


# --- keeping house ---


def test_retention_keeps_the_newest_and_the_pinned(bucket: ObjectPath) -> None:
    save(bucket, 1, keep=2)
    storage.pin(bucket / "step-1.r1", pinned=True)
    save(bucket, 2, 3, 4, keep=2)
    assert storage.complete_steps(bucket) == [4, 3, 1]
    storage.pin(bucket / "step-1.r1", pinned=False)
    save(bucket, 5, keep=2)
    assert {name.partition("/")[0] for name in names(bucket)} == {"step-5.r1", "step-4.r1"}


def test_a_checkpoint_whose_removal_fails_half_way_is_none_any_more(bucket: ObjectPath) -> None:
    save(bucket, 1)
    fail_on("remove", DATA)
    save(bucket, 2, keep=1)  # to save is what counts
    heal()
    assert storage.complete_steps(bucket) == [2]
    assert [path.name for path in storage.temporaries(bucket)] == ["step-1.r1"]


def test_the_commands_take_urls(bucket: ObjectPath, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save(bucket, 1, 2, 3)
    Flaky.store["/bucket/run/step-2.r1/" + DATA].getbuffer()[100] ^= 1
    (bucket / "step-4.r1" / DATA).write_bytes(b"left behind")
    url = str(bucket)

    def said() -> Any:
        return json.loads(capsys.readouterr().out)

    assert checkpoints.list_checkpoints(url, as_json=True) == 0
    listed = said()
    assert [one["step"] for one in listed["checkpoints"]] == [3, 2, 1]
    assert listed["temporary"] == ["step-4.r1"]
    assert checkpoints.verify_checkpoints(url, (), rate_mb_s=0, as_json=True) == 1
    assert [bool(one["problem"]) for one in said()["checkpoints"]] == [False, True, False]
    assert checkpoints.inspect_checkpoint(url, 3, as_json=True) == 0
    assert {"name": "model.weight", "dtype": "float32", "shape": [WEIGHTS], "chunks": 1} in said()["tensors"]
    assert checkpoints.pin_checkpoint(url, 1, pinned=True) == 0
    assert checkpoints.export_checkpoint(url, 3, str(tmp_path / "out")) == 0
    capsys.readouterr()
    assert checkpoints.prune_checkpoints(url, Keep(last=1), temporary=True, dry_run=False, as_json=True) == 0
    assert said() == {"directory": url, "removed": [2], "temporary": ["step-4.r1"], "dry_run": False}
    assert {name.partition("/")[0] for name in names(bucket)} == {"step-1.r1", "step-3.r1"}
    with pytest.raises(ConfigError, match="no checkpoint of step 9"):
        checkpoints.inspect_checkpoint(url, 9, as_json=True)


def test_a_prefix_that_cannot_be_written_is_an_operators_error(bucket: ObjectPath) -> None:
    fail_on("put", ".probe", PermissionError("Access Denied"))
    with pytest.raises(ConfigError, match="Access Denied"):
        storage.open_directory(bucket)
