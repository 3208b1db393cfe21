"""What a checkpoint holds, in the form that torch.distributed.checkpoint shards, saves and reshards.

Model and optimizer go through torch's state-dict API, so that DDP, FSDP2 and DTensor states are named and split alike.
Random states are per rank; a rank that the saved world did not have gets a state derived from the step, so that a
restart onto that world is repeatable.

Not here: files (checkpoint/), and the data order, which needs no random state (data.py).
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What may be registered as extra: a learning-rate scheduler, for one."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


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
    optimizer: torch.optim.Optimizer | None = None
    extra: Mapping[str, Stateful] = field(default_factory=dict)
    #: Of the compression of gradients, one for each of the model's DDP.
    compression: list[Carried] = field(default_factory=list)
    #: Collective: of the names in each of the optimizer's groups, where this rank has only a stage of the model, those
    #: on all stages.
    unite: Callable[[list[list[str]]], list[list[str]]] | None = None
    _united: tuple[list[list[str]], list[list[str]]] = field(default=([], []), repr=False)

    def capture(self) -> dict[str, Any]:
        """The live state, not a copy."""
        state = self._capture_own()
        if self.compression:
            state |= {f"compression{number}": each.state() for number, each in enumerate(self.compression)}
        return state

    def wanted(self, held: Mapping[str, torch.Size]) -> dict[str, Any]:
        """What to fill from a checkpoint with tensors of these sizes, for ``apply``.

        Filling the tensors in place fills the model.
        """
        state = self._capture_own()
        for number, each in enumerate(self.compression):
            name = f"compression{number}."
            under = {key.removeprefix(name): size for key, size in held.items() if key.startswith(name)}
            state |= {name[:-1]: part} if (part := each.wanted(under)) else {}
        return state

    def _capture_own(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self.model is not None:
            state["model"] = get_model_state_dict(self.model)
            if self.optimizer is not None:
                state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer)
                self._unite_groups(state["optimizer"]["param_groups"])
        if self.extra:
            state["extra"] = {name: thing.state_dict() for name, thing in self.extra.items()}
        return state

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
        """Without the optimizer and the extras that are not among these parts of a state. The model stays."""
        return Registered(
            model=self.model,
            optimizer=self.optimizer if "optimizer" in parts else None,
            extra=self.extra if "extra" in parts else {},
            unite=self.unite,
        )

    @property
    def has_optimizer_state(self) -> bool:
        return self.optimizer is not None and bool(self.optimizer.state)

    def drop_optimizer_state(self) -> None:
        """``capture`` makes an optimizer's state by a step of rate 0, which counts as one: as if it had not been."""
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def apply(self, state: dict[str, Any]) -> None:
        if self.model is not None:
            set_model_state_dict(self.model, state["model"])
            if self.optimizer is not None:
                set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        for name, thing in self.extra.items():
            thing.load_state_dict(state["extra"][name])
        for number, each in enumerate(self.compression):
            each.take(state.get(f"compression{number}", {}))


def check_fit(model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None) -> None:
    """ValueError when the optimizer's state could not be saved under the names of the model's parameters."""
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}, and not a torch.nn.Module")
    if model is None or optimizer is None:
        return
    known = {id(parameter) for parameter in model.parameters()}
    if any(id(each) not in known for group in optimizer.param_groups for each in group["params"]):
        raise ValueError(
            "the optimizer holds parameters that are not the model's: wrap the model first, then make the optimizer "
            "from model.parameters()"
        )


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
