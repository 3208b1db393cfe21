"""A TOML file as a form: known keys of the right types, and errors that name the file and the field.

Not here: which forms there are (config.py, job_file.py).
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from elasticd.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
#: Names of nodes and jobs: they are parts of keys in etcd and of file names.
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def read_form(form: type[M], path: str) -> M:
    """ConfigError when the file cannot be read, or is no such form."""
    try:
        return form.model_validate(_read(path))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(path, one) for one in error.errors())) from error


def checked_name(value: str) -> str:
    """ValueError when this is no name for a node or a job."""
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError(f"{value!r}: letters, digits, '.', '_' and '-' only, a letter or digit first, 63 at most")
    return value


def _read(path: str) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def _explain(path: str, error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{path}: {where}: unknown key"
    if error["type"] == "value_error":
        return f"{path}: {where}: {error['ctx']['error']}"
    return f"{path}: {where}: {error['msg'][0].lower()}{error['msg'][1:]}"
