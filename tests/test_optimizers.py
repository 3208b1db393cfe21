"""What is registered comes back whole: several optimizers, state that begins late, extras that grow.

Forked ranks over real gloo; a run that was restarted must end with the bits of one that was not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_nodes import MemoryNodes
from small_checkpoints import data_file, flip
from test_memory import join_node
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainees import Points
from worker_runs import run_world

from elasticd import Layout, Session
from elasticd.errors import ConfigError
from elasticd.worker.extras import asked_of, merged

SEED = 3
#: Bits are compared: shares that followed the speed of a busy machine would add up in another order.
SETTINGS: dict[str, Any] = {"micro_batches": 4, "seed": SEED, "balance": "off"}
pytestmark = pytest.mark.usefixtures("in_plain_python")


class Both(nn.Module):
    """Two models that are trained at once; the second one's last layer may be left out of the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.second = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    return fully_shard(model) if kind == "fsdp2" else DistributedDataParallel(model)


def inner(model: nn.Module) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def weights(model: nn.Module) -> list[float]:
    parts = [each.full_tensor() if isinstance(each, DTensor) else each for each in model.parameters()]
    return torch.cat([part.detach().flatten() for part in parts]).tolist()


def train(until: int, kind: str, directory: Path | None, late: int = 0) -> None:
    """Run by a rank: Adam for one part of the model, SGD with momentum for the other, which begins at step ``late``."""
    with Session(**SETTINGS, checkpoint_dir=directory, save_every_steps=1) as session:
        model = wrapped(kind, Both())
        adam = torch.optim.Adam(inner(model).first.parameters(), lr=0.01)
        sgd = torch.optim.SGD(inner(model).second.parameters(), lr=0.05, momentum=0.9)
        session.register(model=model, optimizer=[adam, sgd])
        session.restore()
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    step.backward((model(inputs) - targets).square().mean())
                adam.step()
                if step.index >= late:
                    sgd.step()
        print(json.dumps(weights(model)))


def ended(size: int, *arguments: object, run: Any = train) -> list[float]:
    first, *others = (json.loads(output.splitlines()[-1]) for output in run_world(size, run, *arguments))
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_optimizers_go_on_as_if_there_had_been_no_restart(tmp_path: Path, kind: str) -> None:
    whole = ended(2, 9, kind, None)
    ended(2, 5, kind, tmp_path)
    assert ended(2, 9, kind, tmp_path) == whole


def test_an_optimizer_that_has_not_begun_has_no_state_after_a_restart_either(tmp_path: Path) -> None:
    """As the generator's in a warm-up of the discriminator; and checkpoints in between do not count as its first step."""
    whole = ended(2, 9, "ddp", None, 6)
    ended(2, 3, "ddp", tmp_path, 6)
    ended(2, 8, "ddp", tmp_path, 6)
    assert ended(2, 9, "ddp", tmp_path, 6) == whole


def train_adam_late(until: int, directory: Path | None, late: int) -> None:
    """Run by a rank: gradients are cleared before the boundary, as in a loop that ends with zero_grad()."""
    with Session(**SETTINGS, checkpoint_dir=directory, save_every_steps=1) as session:
        model = wrapped("ddp", Both())
        sgd = torch.optim.SGD(inner(model).first.parameters(), lr=0.05)
        adam = torch.optim.Adam(inner(model).second.parameters(), lr=0.01)
        session.register(model=model, optimizer=(sgd, adam))
        session.restore()
        for step in session.steps(until=until):
            with step:
                for inputs, targets in step.micro_batches(Points(), size=2):
                    step.backward((model(inputs) - targets).square().mean())
                sgd.step()
                if step.index >= late:
                    adam.step()
                model.zero_grad()
        print(json.dumps(weights(model)))


def test_a_checkpoint_does_not_count_as_an_optimizers_first_step(tmp_path: Path) -> None:
    """torch makes the state that it is asked for by a step of rate 0: bias correction would begin with the second."""
    whole = ended(1, 6, None, 4, run=train_adam_late)
    ended(1, 3, tmp_path, 4, run=train_adam_late)
    assert ended(1, 6, tmp_path, 4, run=train_adam_late) == whole


class Stage(nn.Module):
    """One of two, whose names are those in the whole model."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.ModuleDict({f"layer{number}": nn.Linear(6, 1 + 5 * (1 - number))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self.layers.values()
        return layer(x)


def train_stages(until: int, directory: Path | None, momentum: float) -> None:
    """Run by a rank: a pipeline of two, with two optimizers on each stage."""
    from elasticd.worker.pipeline import Pipeline

    with Session(**SETTINGS, layout=Layout(pipeline=2), checkpoint_dir=directory) as session:
        model = Stage(session.mesh["pp"].get_local_rank())
        (layer,) = model.layers.values()
        optimizers = [torch.optim.SGD([layer.weight], lr=0.1), torch.optim.SGD([layer.bias], lr=0.1, momentum=momentum)]
        session.register(model=model, optimizer=optimizers)
        session.restore()
        pipeline = Pipeline(model, nn.functional.mse_loss, mesh=session.mesh["pp"])
        for step in session.steps(until=until):
            with step:
                step.run_pipeline(pipeline, Points(), size=2)
                for optimizer in optimizers:
                    optimizer.step()
        print(json.dumps(weights(model)))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimizers_of_a_pipelines_stages_go_on(tmp_path: Path, momentum: float) -> None:
    """A checkpoint's groups name the parameters of all stages: torch must not take them for this stage's own."""
    whole = [output.splitlines()[-1] for output in run_world(2, train_stages, 5, None, momentum)]
    run_world(2, train_stages, 3, tmp_path, momentum)
    assert [output.splitlines()[-1] for output in run_world(2, train_stages, 5, tmp_path, momentum)] == whole
    assert whole[0] != whole[1]


def once(
    session: Session,
    model: nn.Module,
    *optimizers: torch.optim.Optimizer,
    until: int = 1,
    after: Callable[[], object] = int,
) -> None:
    """As it is meant."""
    for step in session.steps(until=until):
        with step:
            for inputs, targets in step.micro_batches(Points(), size=2):
                step.backward((model(inputs) - targets).square().mean())
            for optimizer in optimizers:
                optimizer.step()
            after()


def test_the_checkpoint_of_one_optimizer_is_that_of_a_list_of_it(tmp_path: Path) -> None:
    names = []
    for form in ("alone", "in a list"):
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path / form) as session:
            model = Both()
            adam = torch.optim.Adam(model.parameters())
            session.register(model=model, optimizer=adam if form == "alone" else [adam])
            once(session, model, adam)
        names.append(FileSystemReader(tmp_path / form / "step-1").read_metadata().state_dict_metadata)
    assert names[0] == names[1]
    assert {"optimizer.state.first.0.weight.exp_avg", "optimizer.param_groups.0.lr"} <= names[0].keys()
    with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path / "alone") as session:
        model = Both()
        adam = torch.optim.Adam(model.parameters())
        session.register(model=model, optimizer=[adam])
        assert session.restore() == 1
        assert {state["step"].item() for state in adam.state.values()} == {1.0}


def test_plain_sgd_twice_has_no_state_and_goes_on(tmp_path: Path) -> None:
    """Of a state without any parameter torch takes all groups for each optimizer's own."""
    for until in (1, 2):
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path) as session:
            model = Both()
            rate = 0.1 if until == 1 else 0.7
            optimizers = [torch.optim.SGD(part.parameters(), lr=rate) for part in (model.first, model.second)]
            session.register(model=model, optimizer=optimizers)
            assert session.restore() == until - 1
            assert [each.param_groups[0]["lr"] for each in optimizers] == [0.1, 0.1]
            once(session, model, *optimizers, until=until)


def test_gradients_of_what_no_optimizer_has_do_not_add_up() -> None:
    found = []
    with Session(micro_batches=2) as session:
        model = Both()
        sgd = torch.optim.SGD(model.first.parameters(), lr=0.0)
        session.register(model=model, optimizer=sgd)
        for step in session.steps(until=2):
            with step:
                for x in step.micro_batches([torch.ones(6)] * 4, size=2):
                    step.backward(model(x).mean())
                sgd.step()
            found.append(model.second[2].bias.grad.item())
    assert found == [1.0, 1.0]


def test_a_parameter_without_any_gradient_does_not_keep_a_checkpoint_from_being_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torch asks for state of all parameters, and saves that of those that were in a step."""
    caplog.set_level("INFO", "elasticd")
    for until in (1, 2):
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path) as session:
            model = Both()
            model.unused = nn.Parameter(torch.ones(2))
            adam = torch.optim.Adam(model.parameters())
            session.register(model=model, optimizer=adam)
            assert session.restore() == until - 1
            assert model.unused not in adam.state
            once(session, model, adam, until=until)
    assert "no optimizer's state of unused (1 in all)" in caplog.text


def test_a_backward_pass_before_the_restore_costs_no_state(tmp_path: Path) -> None:
    """Where there are gradients, torch makes no state to be filled."""
    for until in (1, 2):
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path) as session:
            model = Both()
            adam = torch.optim.Adam(model.parameters())
            session.register(model=model, optimizer=adam)
            model(torch.ones(1, 6)).sum().backward()  # a warm-up
            session.restore()
            once(session, model, adam, until=until)
            assert {state["step"].item() for state in adam.state.values()} == {float(until)}


def test_where_nothing_could_be_restored_no_step_has_been_counted(tmp_path: Path) -> None:
    """What is to be filled is made before a damaged checkpoint is found out."""
    for damaged in (False, True):
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path) as session:
            model = nn.Linear(6, 1)
            adam = torch.optim.Adam(model.parameters())
            session.register(model=model, optimizer=adam)
            assert session.restore() == 0
            assert not adam.state
            if not damaged:
                once(session, model, adam)
                flip(data_file(tmp_path / "step-1"))


def test_another_kind_of_optimizer_is_refused(tmp_path: Path) -> None:
    for kind in (torch.optim.SGD, torch.optim.Adam):
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path) as session:
            model = Both()
            session.register(model=model, optimizer=kind(model.parameters(), lr=0.1))
            if kind is torch.optim.SGD:
                once(session, model)
            else:
                with pytest.raises(ConfigError, match="does not fit what was registered"):
                    session.restore()


# --- extras ---


class Average:
    """Of a model's weights, as people write it: nothing is there until the first step."""

    def __init__(self, shadow: Any) -> None:
        self.shadow = shadow

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]

    def update(self, model: nn.Module) -> None:
        if not self.shadow:
            weights = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
            self.shadow = {"weights": weights, "decays": [torch.tensor([0.9, 0.99]), {"steps": 0}]}
        for name, each in model.named_parameters():
            self.shadow["weights"][name].lerp_(each.detach(), 0.1)
        self.shadow["decays"][1]["steps"] += 1


@pytest.mark.parametrize("nothing", [None, {}])
def test_an_extra_that_begins_late_gets_back_what_it_gave(tmp_path: Path, nothing: Any) -> None:
    def run_to(until: int, directory: Path) -> Any:
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=directory) as session:
            model, average = Both(), Average(nothing)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            session.register(model=model, optimizer=sgd, extra={"a.b": average})
            session.restore()
            once(session, model, sgd, until=until, after=lambda: average.update(model))
            return average.shadow

    whole = run_to(5, tmp_path / "whole")
    run_to(2, tmp_path / "restarted")
    shadow = run_to(5, tmp_path / "restarted")
    assert shadow["decays"][0].tolist() == whole["decays"][0].tolist()
    assert shadow["decays"][1] == whole["decays"][1] == {"steps": 5}
    assert shadow["weights"].keys() == whole["weights"].keys()
    assert all(torch.equal(shadow["weights"][name], each) for name, each in whole["weights"].items())


def remember(until: int) -> None:
    """Run by a rank: copies in RAM alone."""
    join_node(1)
    with Session(**SETTINGS, memory_every_steps=1) as session:
        model, average = Both(), Average(None)
        late = torch.optim.Adam(model.second.parameters(), lr=0.01)
        sgd = torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.9)
        session.register(model=model, optimizer=[late, sgd], extra={"average": average})
        began = session.restore()
        assert bool(sgd.state) == (began > 0)
        assert not late.state
        once(session, model, sgd, until=until, after=lambda: average.update(model))
        print(json.dumps([began, average.shadow["decays"][1]["steps"]]))


def test_copies_in_ram_give_back_as_much() -> None:
    with MemoryNodes("") as nodes:
        found = []
        for round_number, until in ((1, 2), (2, 5)):
            nodes.enter_round()
            (output,) = run_world(1, remember, until, **nodes.environment(round_number))
            found.append(json.loads(output.splitlines()[-1]))
        assert found == [[0, 2], [2, 5]]


def test_a_schedule_with_numbers_for_keys_comes_back_and_is_saved_again(tmp_path: Path) -> None:
    """DCP makes text of keys: MultiStepLR's milestones would have each twice, which DCP then refuses to save."""
    rates = []
    for until in (2, 4, 6):
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path) as session:
            model = Both()
            sgd = torch.optim.SGD(model.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, milestones=[1, 3, 5])
            session.register(model=model, optimizer=sgd, extra={"schedule": schedule})
            assert session.restore() == until - 2
            once(session, model, sgd, until=until, after=schedule.step)
            assert schedule.milestones == Counter([1, 3, 5])
            assert isinstance(schedule.milestones, Counter)
            rates.append(schedule.get_last_lr()[0])
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_what_no_extra_takes_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for extra in ({"average": Average({"weights": torch.ones(2)})}, {}):
        with Session(micro_batches=2, seed=SEED, checkpoint_dir=tmp_path) as session:
            model = Both()
            session.register(model=model, extra=extra)
            session.restore()
            once(session, model)
    assert "extra.average.shadow.weights (1 in all) of the checkpoint has no place in what is registered" in caplog.text


def train_sharded_average(until: int, directory: Path) -> None:
    """Run by a rank: an average of what FSDP2 has split, which begins with the first step."""
    with Session(micro_batches=2, seed=SEED, checkpoint_dir=directory) as session:
        model, average = fully_shard(Both()), Average(None)
        session.register(model=model, extra={"average": average})
        session.restore()
        once(session, model, until=until, after=lambda: average.update(model))
        print("steps", average.shadow["decays"][1]["steps"])


def test_a_split_tensor_that_has_no_place_yet_is_named(tmp_path: Path) -> None:
    run_world(2, train_sharded_average, 1, tmp_path)
    outputs = run_world(2, train_sharded_average, 2, tmp_path)
    assert "extra.average.shadow.weights.first.0.bias" in outputs[0]
    assert "must make its tensors before session.register()" in outputs[0]
    assert outputs[0].splitlines()[-1] == "steps 1"  # it began afresh


class Saved:
    """A checkpoint that holds a state, as ``Held`` says it."""

    def __init__(self, state: dict[str, Any], split: tuple[str, ...] = ()) -> None:
        flat, self.paths = flatten_state_dict(state)
        self._split = split
        self.sizes = {name: each.shape for name, each in flat.items() if isinstance(each, torch.Tensor)}

    def is_split(self, name: str) -> bool:
        return name in self._split

    def blank(self, name: str) -> torch.Tensor | None:
        return torch.empty(self.sizes[name]) if name in self.sizes else None


def shapes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shapes(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shapes(each) for each in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


TENSOR = torch.ones(3)


@pytest.mark.parametrize(
    ("fresh", "saved", "asked"),
    [
        ({"a": TENSOR}, {"a": TENSOR}, {"a": (3,)}),
        ({"a": None}, {"a": TENSOR}, {"a": (3,)}),
        ({"a": TENSOR}, {"a": torch.ones(4)}, {"a": (4,)}),
        ({"a": None}, {"a": {"b": {"c": TENSOR}}}, {"a": {"b": {"c": (3,)}}}),
        ({"a": {}}, {"a": [TENSOR, {"b": 1}]}, {"a": [(3,), {"b": None}]}),
        ({"a": [TENSOR]}, {"a": [TENSOR, TENSOR]}, {"a": [(3,), (3,)]}),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, {"a": None}),
        ({"a": (1, 2)}, {"a": (1, 2, 3)}, {"a": (1, 2)}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({}, {"x": {"y": 5}, "z": TENSOR}, {"x": {"y": None}, "z": (3,)}),
        ({"a": {7: 1}}, {"a": {7: 2, "b": 3}}, {"a": {7: 1, "b": None}}),
        ({"a": {7: None}}, {"a": {7: {"b": TENSOR}}}, {"a": {7: {"b": (3,)}}}),
        ({"own": 1}, {}, {"own": 1}),
    ],
)
def test_what_is_asked_for_is_all_that_was_saved(fresh: Any, saved: Any, asked: Any) -> None:
    before = shapes(fresh)
    found, left = asked_of({"it": fresh}, Saved({"extra": {"it": saved}, "model": {"w": TENSOR}}))
    assert shapes(found["it"]) == asked
    assert left == []
    assert shapes(fresh) == before
    if "a" in fresh and isinstance(fresh["a"], torch.Tensor) and fresh["a"].shape == saved["a"].shape:
        assert found["it"]["a"] is fresh["a"]  # it is filled in place


def test_split_tensors_are_asked_for_where_there_is_one_to_fill() -> None:
    it = {"a": TENSOR, "b": TENSOR, "c": 1}
    held = Saved({"extra": {"it": it, "gone": 1}}, split=("extra.it.a", "extra.it.b"))
    assert asked_of({"it": {"a": TENSOR}}, held) == ({}, ["extra.it.b", "extra.gone"])  # not a, c: half a state
    found, left = asked_of({"it": {"a": TENSOR, "b": TENSOR}}, held)
    assert found["it"] == {"a": TENSOR, "b": TENSOR, "c": None}
    assert left == ["extra.gone"]


def test_keys_that_were_made_text_are_what_they_were() -> None:
    filled = {"a": {1: "old", "1": "new", "2": 3}, "b": [{(0, 1): 0, "(0, 1)": 1}]}
    assert merged(filled) == {"a": {1: "new", "2": 3}, "b": [{(0, 1): 1}]}
