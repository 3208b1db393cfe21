"""A job file: TOML in, a spec out. Not here: the command line of ``elasticd run`` (commands/run_parser.py)."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from elasticd.core.model import JobId, JobSpec
from elasticd.errors import ConfigError
from elasticd.toml_form import Form, checked_name, read_form

_NODES = re.compile(r"[0-9]+(:[0-9]+)?")
_ENV_NAME = re.compile(r"[^=\0]+")


def _node_range(value: str) -> str:
    if not _NODES.fullmatch(value):
        raise ValueError(f"{value!r} is not of the form MIN:MAX, or one number")
    return value


def _nproc(value: Any) -> str:
    known = value in ("auto", "gpu", "cpu") or (type(value) is int and value >= 1)
    if not known:
        raise ValueError(f"{value!r} is neither a number above 0 nor 'auto', 'gpu' or 'cpu'")
    return str(value)


def _variables(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not _ENV_NAME.fullmatch(name) or "\0" in text:
            raise ValueError(f"{name!r} cannot be an environment variable")
    return value


class _JobForm(Form):
    id: Annotated[str, AfterValidator(checked_name)]
    nodes: Annotated[str, AfterValidator(_node_range)] = ""
    min_nodes: int = Field(default=1, ge=1)
    max_nodes: int | None = Field(default=None, ge=1)
    nproc_per_node: Annotated[Any, AfterValidator(_nproc)] = 1
    command: list[str] = Field(min_length=1)
    module: bool = False
    no_python: bool = False
    max_restarts: int = Field(default=3, ge=0)
    working_dir: str = ""
    env: Annotated[dict[str, str], AfterValidator(_variables)] = Field(default_factory=dict)
    user: str = ""
    log_dir: str = ""
    warm: bool = True
    stop_timeout_s: float = Field(default=5.0, ge=0, le=3600)
    boundary_timeout_s: float = Field(default=30.0, ge=0, le=3600)
    spares: int = Field(default=1, ge=0)
    ranks_per_replica: int = Field(default=1, ge=1)
    stragglers: bool = True
    straggler_factor: float = Field(default=1.5, gt=1, allow_inf_nan=False)
    straggler_after_s: float = Field(default=60.0, ge=0, allow_inf_nan=False)


def load_job(path: str) -> JobSpec:
    """A job file as a spec. ConfigError names the field that is wrong."""
    form = read_form(_JobForm, path)
    low, high = _nodes(path, form)
    if isinstance(form.nproc_per_node, int):
        check_replicas(f"{path}: ranks_per_replica: ", form.ranks_per_replica, form.nproc_per_node, low, high)
    return JobSpec(
        job_id=JobId(form.id),
        min_nodes=low,
        max_nodes=high,
        command=tuple(form.command),
        nproc_per_node=str(form.nproc_per_node),
        is_module=form.module,
        no_python=form.no_python,
        max_restarts=form.max_restarts,
        working_dir=form.working_dir,
        env=tuple(sorted(form.env.items())),
        user=form.user,
        log_dir=form.log_dir,
        warm=form.warm,
        stop_timeout_s=form.stop_timeout_s,
        boundary_timeout_s=form.boundary_timeout_s,
        spares=form.spares,
        ranks_per_replica=form.ranks_per_replica,
        straggler_factor=form.straggler_factor if form.stragglers else 0.0,
        straggler_after_s=form.straggler_after_s,
    )


def check_replicas(where: str, per_replica: int, nproc: int, low: int, high: int) -> None:
    """ConfigError when no number of nodes from ``low`` to ``high``, with ``nproc`` ranks each, makes whole replicas."""
    if not any(nodes * nproc % per_replica == 0 for nodes in range(low, min(high, low + per_replica - 1) + 1)):
        nodes = f"{low}" if low == high else f"{low} to {high}"
        raise ConfigError(
            f"{where}{nodes} nodes with {nproc} ranks each never make whole replicas of {per_replica} ranks"
        )


def _nodes(path: str, form: _JobForm) -> tuple[int, int]:
    """(minimum, maximum), said in one of two ways."""
    if not form.nodes:
        low, high = form.min_nodes, form.max_nodes or form.min_nodes
        if low > high:
            raise ConfigError(f"{path}: min_nodes: {low} is above max_nodes, which is {high}")
        return low, high
    if form.model_fields_set & {"min_nodes", "max_nodes"}:
        raise ConfigError(f"{path}: nodes: says the same as min_nodes and max_nodes; leave one of them out")
    first, _, last = form.nodes.partition(":")
    low, high = int(first), int(last or first)
    if not 1 <= low <= high:
        raise ConfigError(f"{path}: nodes: the minimum {low} is above the maximum {high}, or below 1")
    return low, high
