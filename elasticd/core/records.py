"""Between the frozen values and the versioned JSON that is written to etcd. Pure.

Unknown fields are ignored (a newer minor version may add some); a missing or ill-typed one is a ProtocolError.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from elasticd.errors import ProtocolError

T = TypeVar("T")


def to_json(value: Any) -> str:
    """A frozen dataclass as compact JSON with sorted keys."""
    return json.dumps(to_plain(value), separators=(",", ":"), sort_keys=True)


def to_plain(value: Any) -> Any:
    """Dataclasses become dicts, tuples lists, enums their values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value


def from_json(kind: type[T], text: str) -> T:
    """The inverse of to_json. ProtocolError when the text is not a record of that kind."""
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"{kind.__name__}: not JSON") from error
    return from_plain(kind, plain)


def from_plain(kind: type[T], plain: Any) -> T:
    """A frozen dataclass from plain JSON data."""
    return typing.cast("T", _parse(kind, plain, kind.__name__))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _parse(kind: Any, plain: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is types.UnionType or origin is typing.Union:
        return _parse_optional(kind, plain, where)
    if origin is tuple:
        return _parse_tuple(kind, plain, where)
    if isinstance(kind, typing.NewType):
        return _parse(kind.__supertype__, plain, where)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, plain, where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(plain)
        except ValueError as error:
            raise ProtocolError(f"{where}: {plain!r} is not a {kind.__name__}") from error
    return _parse_scalar(kind, plain, where)


def _parse_scalar(kind: type, plain: Any, where: str) -> Any:
    if kind is float and type(plain) is int:
        return float(plain)
    if type(plain) is not kind:
        raise ProtocolError(f"{where}: expected {kind.__name__}, found {type(plain).__name__}")
    return plain


def _parse_optional(kind: Any, plain: Any, where: str) -> Any:
    if plain is None:
        return None
    (inner,) = (option for option in typing.get_args(kind) if option is not type(None))
    return _parse(inner, plain, where)


def _parse_tuple(kind: Any, plain: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(plain, list):
        raise ProtocolError(f"{where}: expected a list, found {type(plain).__name__}")
    inner = typing.get_args(kind)
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_parse(inner[0], item, f"{where}[{i}]") for i, item in enumerate(plain))
    if len(plain) != len(inner):
        raise ProtocolError(f"{where}: expected {len(inner)} items, found {len(plain)}")
    return tuple(_parse(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(inner, plain, strict=True)))


def _parse_dataclass(kind: Any, plain: Any, where: str) -> Any:
    if not isinstance(plain, dict):
        raise ProtocolError(f"{where}: expected an object, found {type(plain).__name__}")
    hints = _hints(kind)
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in plain:
            values[f.name] = _parse(hints[f.name], plain[f.name], f"{where}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ProtocolError(f"{where}.{f.name} is missing")
    return kind(**values)
