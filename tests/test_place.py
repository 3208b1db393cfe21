"""Where a process stands: torchrun's environment, elasticd's additions to it, and the device that follows."""

from __future__ import annotations

import pytest
import torch

from elasticd.errors import ConfigError
from elasticd.worker.world import Place, choose_device

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_is_half_there_names_what_is_missing(missing: str) -> None:
    for half in ({**WHOLE, missing: ""}, {name: value for name, value in WHOLE.items() if name != missing}):
        with pytest.raises(ConfigError, match=f"{missing} must be set too"):
            Place.from_environment(half)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("RANK", "x", "RANK is 'x', not a number"), ("RANK", "2", "no such rank"), ("RANK", "-1", "no such rank"),
     ("WORLD_SIZE", "0", "no such rank"), ("LOCAL_RANK", "1.5", "LOCAL_RANK is '1.5'"),
     ("ELASTICD_ROUND", "one", "ELASTICD_ROUND is 'one'")],
)  # fmt: skip
def test_an_environment_that_is_wrong_names_the_variable(name: str, value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Place.from_environment({**WHOLE, name: value})


def test_the_place_is_torchruns_and_elasticds_add_to_it() -> None:
    assert Place.from_environment({"MASTER_ADDR": "left over"}) == Place()
    place = Place.from_environment(WHOLE | {"TORCHELASTIC_RUN_ID": "t", "TORCHELASTIC_RESTART_COUNT": "3"})
    assert (place.rank, place.world_size, place.job_id, place.round_number, place.launched) == (1, 2, "t", 3, True)
    place = Place.from_environment(WHOLE | {"TORCHELASTIC_RUN_ID": "t", "ELASTICD_JOB_ID": "e", "ELASTICD_ROUND": "8"})
    assert (place.job_id, place.round_number) == ("e", 8)


def test_one_worker_of_a_node_leads_it_under_virtual_local_ranks_too() -> None:
    assert Place().leads_node
    assert not Place.from_environment(WHOLE).leads_node  # under torchrun
    virtual = WHOLE | {"LOCAL_RANK": "0"}
    led = [Place.from_environment(virtual | {"ELASTICD_LOCAL_RANK": own}).leads_node for own in ("0", "1", "2")]
    assert led == [True, False, False]


def test_a_node_whose_driver_is_broken_does_not_train_on_the_cpu_unless_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # NVML sees them
    with pytest.raises(ConfigError, match="this node has 8 GPUs, and CUDA does not work"):
        choose_device(Place(), None)
    assert choose_device(Place(), "cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a node without a GPU says")
def test_a_device_that_is_not_there() -> None:
    for wanted in (None, "cpu", "cpu:0"):  # as tensors have it
        assert choose_device(Place(), wanted) == torch.ones(1).device
    for wanted in ("cuda", "cuda:3"):
        with pytest.raises(ConfigError, match="this node has 0; lower --nproc-per-node"):
            choose_device(Place(), wanted)
    with pytest.raises(ConfigError, match="device 'gpu' is none that torch knows"):
        choose_device(Place(), "gpu")
