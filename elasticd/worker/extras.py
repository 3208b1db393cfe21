"""What a script has registered beside model and optimizers, as it is taken from a checkpoint: all that was saved of it.

DCP fills what it is asked for, and is silent about the rest. A fresh object may not have what it will have later: an
average of the weights that begins with the first step, a sampler that remembers. So what a checkpoint holds beyond a
fresh object's own state is asked for as well, and ``load_state_dict`` gets what ``state_dict`` gave.

Such a tensor comes whole, and on the CPU: nothing says yet where it is wanted. One that several ranks have saved a part
of each would not fit there. Then it is named, and the object begins afresh rather than with half a state: one that is
to get such a tensor back makes it before it is registered.

DCP makes text of a dict's keys. Where the fresh object has another key of the same text, that is meant.

Not here: model and optimizers (state.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

Path = tuple[str | int, ...]


class Holdings(Protocol):
    """A checkpoint, by DCP's names."""

    @property
    def paths(self) -> Mapping[str, Path]:
        """Where each value lies in the nested state that was saved."""
        ...

    @property
    def sizes(self) -> Mapping[str, torch.Size]:
        """Of tensors alone."""
        ...

    def is_split(self, name: str) -> bool:
        """Whether several ranks have saved a part of this tensor each."""
        ...

    def blank(self, name: str) -> torch.Tensor | None:
        """To be filled; None for what is no tensor."""
        ...


def asked_of(state: Mapping[str, Any], held: Holdings) -> tuple[dict[str, Any], list[str]]:
    """What to fill: the extras' own states, by name, with whatever else is held of them. And what is left out of it.

    Tensors are the objects' own, dicts and lists are not. An object that could not be filled whole is not among them.
    """
    asked, sizes = {name: _copied(each) for name, each in state.items()}, held.sizes
    beyond = {
        name: path
        for name, path in held.paths.items()
        if path[0] == "extra" and len(path) > 1 and not _takes(_find(asked, path[1:]), sizes.get(name))
    }
    left = [name for name, path in beyond.items() if path[1] not in asked or held.is_split(name)]
    for name in left:
        asked.pop(str(held.paths[name][1]), None)
    for name, path in beyond.items():
        if path[1] in asked:
            _put(asked, path[1:], held.blank(name))
    return asked, left


def merged(value: Any) -> Any:
    """What was filled, where DCP has put text beside the keys that it was made of."""
    if isinstance(value, dict):
        of_text = {str(key): key for key in value if not isinstance(key, str)}
        for key in of_text.keys() & value.keys():
            value[of_text[key]] = value.pop(key)
        for each in value.values():
            merged(each)
    elif type(value) is list:
        for each in value:
            merged(each)
    return value


_NOTHING = object()


def _copied(value: Any) -> Any:
    """Dicts, of their own types, and lists: what DCP goes into."""
    if isinstance(value, dict):
        made = copy.copy(value)
        for key, each in value.items():
            made[key] = _copied(each)
        return made
    return [_copied(each) for each in value] if type(value) is list else value


def _takes(own: object, size: torch.Size | None) -> bool:
    """Whether a tensor of this size can be filled into what the object has; None: whether something else can."""
    if size is None:
        return own is not _NOTHING and not isinstance(own, dict | list)
    return isinstance(own, torch.Tensor) and own.shape == size


def _find(value: Any, path: Iterable[str | int]) -> Any:
    for key in path:
        if isinstance(value, dict):
            value = value.get(_own_key(value, key), _NOTHING)
        elif isinstance(value, list) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return _NOTHING
    return value


def _own_key(value: dict[Any, Any], key: str | int) -> Any:
    """The key of this text."""
    others = (each for each in value if not isinstance(each, str) and str(each) == key)
    return key if key in value else next(others, key)


def _put(inside: Any, path: Path, blank: torch.Tensor | None) -> None:
    """In place of whatever stands in the way: a None where there will be a dict."""
    for key, following in zip(path, (*path[1:], None), strict=True):
        place: Any = _own_key(inside, key) if isinstance(inside, dict) else key
        if isinstance(inside, dict):
            inside.setdefault(place, None)
        else:
            inside.extend([None] * (place + 1 - len(inside)))
        if following is None:
            inside[place] = blank
        elif not isinstance(inside[place], wanted := dict if isinstance(following, str) else list):
            inside[place] = wanted()
        inside = inside[place]
