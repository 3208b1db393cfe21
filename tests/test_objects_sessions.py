"""Sessions whose checkpoints are in an object store, and how a directory or a URL is told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.dirfs import DirFileSystem
from worker_runs import alone, run_world

from elasticd import Session
from elasticd.checkpoint import storage
from elasticd.checkpoint.objects import ObjectPath, locate
from elasticd.errors import ConfigError

DATA = "__0_0.distcp"


class Shared(DirFileSystem):
    """Objects of several processes: files in a directory that the URL names."""

    protocol = "shared"

    def __init__(self, **more: Any) -> None:
        super().__init__(path="/", fs=fsspec.filesystem("file", auto_mkdir=True), **more)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("shared://").strip("/")


fsspec.register_implementation("shared", Shared, clobber=True)


# --- which store ---


def test_where_a_checkpoint_directory_is() -> None:
    assert locate("/a/b") == locate(Path("/a/b")) == locate("file:///a/b") == Path("/a/b")
    assert locate("a/b") == Path("a/b").absolute()
    where = locate("memory://bucket/run/")
    assert isinstance(where, ObjectPath)
    assert (str(where), (where / "step-1.r2").name, (where / "x").parent) == ("memory://bucket/run", "step-1.r2", where)


def test_a_url_that_was_made_a_path_is_told_of() -> None:
    with pytest.raises(ConfigError, match="give it as a text"):
        locate(Path("s3://bucket/run"))


@pytest.mark.parametrize("url", ["nonsense://bucket/run", "dropbox://bucket/run", "memory://"])
def test_a_store_that_cannot_be_had_is_one_clear_line(url: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot keep checkpoints at {url}: ") as raised:
        locate(url)
    assert "\n" not in str(raised.value)


# --- sessions ---


def trained(directory: str, until: int) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with Session(checkpoint_dir=directory, save_every_steps=2, seed=3) as session:
        session.register(model=model, optimizer=optimizer)
        first = session.restore()
        for step in session.steps(until=until):
            with step:
                optimizer.zero_grad()
                model(torch.randn(3, 4)).square().mean().backward()
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                optimizer.step()
        assert first in (0, 2, until // 2)
    return [parameter.detach() for parameter in model.parameters()]


def _train_and_go_on() -> None:
    whole = trained("memory://a/run", 8)
    trained("memory://b/run", 4)
    for one, other in zip(whole, trained("memory://b/run", 8), strict=True):
        assert torch.equal(one, other)


def test_a_session_goes_on_from_an_object_store() -> None:
    with alone(_train_and_go_on) as rank:
        assert rank.wait() == 0, rank.output


def _train_on_two(url: str, until: int) -> None:
    trained(url, until)


def test_two_ranks_save_and_one_goes_on(tmp_path: Path) -> None:
    url = f"shared:/{tmp_path}/run"
    run_world(2, _train_on_two, url, 4)
    where = locate(url)
    (newest_one, *_) = storage.complete(where)
    assert storage.verify(newest_one).world_size == 2
    (where / newest_one.name / DATA).write_bytes(b"torn")  # both ranks take the one before
    run_world(2, _train_on_two, url, 4)
    run_world(1, _train_on_two, url, 8)
    assert storage.complete_steps(where)[0] == 8
