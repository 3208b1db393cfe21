"""What a checkpoint holds, in the form that torch.distributed.checkpoint shards, saves and reshards.

Model and optimizers go through torch's state-dict API, so that DDP, FSDP2 and DTensor states are named and split alike,
and the state of several optimizers lies together, by the names of the parameters, as that of one would.
Random states are per rank; a rank that the saved world did not have gets a state derived from the step, so that a
restart onto that world is repeatable.

Not here: files (checkpoint/), what else the script keeps (extras.py), and the data order, which needs no random state
(data.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from elasticd.worker.extras import Holdings, asked_of, merged

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What may be registered as extra: a learning-rate scheduler, for one."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


class Carried(Protocol):
    """What is saved beside the script's objects, whatever world it was saved by."""

    def state(self) -> dict[str, Any]:
        """The live tensors, by name, in dicts."""
        ...

    def wanted(self, held: Mapping[str, torch.Size]) -> dict[str, Any]:
        """What to fill from a checkpoint with tensors of these sizes: empty, if it holds nothing of this."""
        ...

    def take(self, filled: Mapping[str, Any]) -> None:
        """Go on from what ``wanted`` gave, now filled."""
        ...


@dataclass(slots=True, kw_only=True)
class Registered:
    """The script's objects whose state belongs in a checkpoint."""

    model: torch.nn.Module | None = None
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    extra: Mapping[str, Stateful] = field(default_factory=dict)
    #: Of the compression of gradients, one for each of the model's DDP.
    compression: list[Carried] = field(default_factory=list)
    #: Collective: of the names in each of the optimizers' groups, where this rank has only a stage of the model, those
    #: on all stages.
    unite: Callable[[list[list[str]]], list[list[str]]] | None = None
    #: Of the checkpoint that was asked about last: what does not go into what is registered, in words.
    remarks: list[str] = field(default_factory=list)
    _united: tuple[list[list[str]], list[list[str]]] = field(default=([], []), repr=False)

    def capture(self) -> dict[str, Any]:
        """The live state, not a copy. That of an optimizer begins with its first step."""
        state = self._capture_own(to_fill=False)
        if self.compression:
            state |= {f"compression{number}": each.state() for number, each in enumerate(self.compression)}
        return state

    def wanted(self, held: Holdings) -> dict[str, Any]:
        """What to fill from this checkpoint, for ``apply``.

        Filling the tensors in place fills the model.
        """
        self.remarks = []
        state = self._capture_own(to_fill=True)
        if "optimizer" in state:
            self._leave_out_unheld(state["optimizer"]["state"], held)
        extra, left = asked_of(state.pop("extra", {}), held)
        state |= {"extra": extra} if extra else {}
        if left:
            self.remarks.append(
                f"{', '.join(sorted(left)[:3])} ({len(left)} in all) of the checkpoint has no place in what is "
                "registered, and is not taken; an extra that ranks have a part of each must make its tensors before "
                "session.register(), and begins afresh otherwise"
            )
        sizes = held.sizes
        for number, each in enumerate(self.compression):
            name = f"compression{number}."
            under = {key.removeprefix(name): size for key, size in sizes.items() if key.startswith(name)}
            state |= {name[:-1]: part} if (part := each.wanted(under)) else {}
        return state

    def _capture_own(self, *, to_fill: bool) -> dict[str, Any]:
        """``to_fill``: with the state that the optimizers have not made yet."""
        state: dict[str, Any] = {}
        if self.model is not None:
            state["model"] = get_model_state_dict(self.model)
            if self.optimizers:
                state["optimizer"] = self._capture_optimizers(self.model, to_fill=to_fill)
                self._unite_groups(state["optimizer"]["param_groups"])
        if self.extra:
            state["extra"] = {name: thing.state_dict() for name, thing in self.extra.items()}
        return state

    def _capture_optimizers(self, model: torch.nn.Module, *, to_fill: bool) -> Any:
        fresh = self.fresh_optimizers
        if to_fill:
            for optimizer in fresh:  # where there are gradients, torch makes no state
                optimizer.zero_grad()
        found: Any = get_optimizer_state_dict(model, self.optimizers)
        if fresh and not to_fill:
            groups = iter(found["param_groups"])
            for optimizer in self.optimizers:
                names = {name for _ in optimizer.param_groups for name in next(groups)["params"]}
                if optimizer in fresh:
                    found["state"] = {name: each for name, each in found["state"].items() if name not in names}
            drop_state(fresh)
        return found

    def _leave_out_unheld(self, state: dict[str, Any], held: Holdings) -> None:
        """A parameter that had been in no step when the checkpoint was made has no state in there: nothing is lost.

        Where none is known by its name, the state is somebody's plain ``optimizer.state_dict()``: it will be refused.
        """
        known = {path[2] for path in held.paths.values() if path[:2] == ("optimizer", "state") and len(path) > 2}
        if known and known.isdisjoint(state):
            return
        unheld = [name for name in state if name not in known] if held.paths else []
        for name in unheld:
            del state[name]
        if unheld:
            log.info(
                "elasticd: the checkpoint has no optimizer's state of %s (%d in all): it begins afresh",
                unheld[0],
                len(unheld),
            )

    def _unite_groups(self, groups: list[dict[str, Any]]) -> None:
        """A checkpoint holds one list of groups, whichever rank writes it: so they must be those of the whole model."""
        if self.unite is None:
            return
        own = [group["params"] for group in groups]
        if own != self._united[0]:  # seldom: it is the same for as long as the script adds no group, on all stages
            self._united = own, self.unite(own)
        for group, names in zip(groups, self._united[1], strict=True):
            group["params"] = names

    def only(self, parts: set[str]) -> Registered:
        """Without the optimizers and the extras that are not among these parts of a state. The model stays."""
        return Registered(
            model=self.model,
            optimizers=self.optimizers if "optimizer" in parts else (),
            extra=self.extra if "extra" in parts else {},
            unite=self.unite,
        )

    @property
    def fresh_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those without any state."""
        return [each for each in self.optimizers if not each.state]

    def apply(self, state: dict[str, Any]) -> None:
        if self.model is not None:
            set_model_state_dict(self.model, state["model"])
            if self.optimizers:
                self._apply_optimizers(self.model, state["optimizer"])
        for name, filled in state.get("extra", {}).items():
            self.extra[name].load_state_dict(merged(filled))
        for number, each in enumerate(self.compression):
            each.take(state.get(f"compression{number}", {}))

    def _apply_optimizers(self, model: torch.nn.Module, saved: Mapping[str, Any]) -> None:
        # Of a state without any parameter torch takes all groups for each optimizer's own.
        state = saved["state"] or {"": {}}
        allow_none = StateDictOptions(strict=False)  # for a parameter; groups that do not fit have been refused
        set_optimizer_state_dict(model, self.optimizers, {**saved, "state": state}, options=allow_none)


def drop_state(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """torch makes an optimizer's state by a step of rate 0, which counts as one: as if it had not been."""
    for optimizer in optimizers:
        optimizer.state.clear()


def as_optimizers(given: Optimizers | None) -> tuple[torch.optim.Optimizer, ...]:
    """ValueError when there is something else among them."""
    if given is None:
        return ()
    several = (given,) if isinstance(given, torch.optim.Optimizer) else tuple(given)
    for each in several:
        if not isinstance(each, torch.optim.Optimizer):
            raise ValueError(f"an optimizer is a {type(each).__name__}, and not a torch.optim.Optimizer")
    return several


def check_fit(registered: Registered) -> None:
    """ValueError when the optimizers' state could not be saved under the names of the model's parameters."""
    model = registered.model
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}, and not a torch.nn.Module")
    for name, thing in registered.extra.items():
        if isinstance(thing, torch.optim.Optimizer):
            raise ValueError(f"extra[{name!r}] is an optimizer: give all of them together, optimizer=[a, b]")
    if registered.optimizers and model is None:
        raise ValueError("an optimizer is saved by the names of its model's parameters: register the model too")
    if model is None:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = set[int]()
    for optimizer in registered.optimizers:
        own = {id(each) for group in optimizer.param_groups for each in group["params"]}
        if own - names.keys():
            raise ValueError(
                "the optimizer holds parameters that are not the model's: wrap the model first, then make the "
                "optimizer from model.parameters()"
            )
        if twice := own & taken:
            raise ValueError(
                f"parameter {names[twice.pop()]} is in two optimizers: its state has one place in a checkpoint"
            )
        taken |= own


def capture_random(device: torch.device) -> str:
    """The random states of this process, as text: torch, Python, and CUDA and NumPy where they are in use."""
    states: dict[str, Any] = {"torch": _pack(torch.get_rng_state()), "python": random.getstate()}
    if device.type == "cuda":
        states["cuda"] = _pack(torch.cuda.get_rng_state(device))
    if (numpy := sys.modules.get("numpy")) is not None:
        state = numpy.random.get_state()
        if isinstance(state, tuple):  # a generator that the script has put in place of NumPy's own is left to it
            kind, keys, *rest = state
            states["numpy"] = [kind, keys.tolist(), *rest]
    return json.dumps(states)


def apply_random(text: str, device: torch.device) -> None:
    """The inverse. A state that this version of torch cannot take is left out, with a warning."""
    states = json.loads(text)
    try:
        torch.set_rng_state(_unpack(states["torch"]))
        version, internal, gauss = states["python"]
        random.setstate((version, tuple(internal), gauss))
        if "cuda" in states and device.type == "cuda":
            torch.cuda.set_rng_state(_unpack(states["cuda"]), device)
        if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.set_state(tuple(states["numpy"]))
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        log.warning("elasticd: random states were not restored: %s", error)


def derive_seed(*parts: int) -> int:
    """A seed of 63 bits, the same for the same parts in every process and version of Python, which hash() is not."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def seed_random(seed: int) -> None:
    """Torch (all devices), Python, and NumPy where it is in use."""
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed & 0xFFFFFFFF)


def _pack(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
