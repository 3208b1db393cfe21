"""``elasticd run``: torchrun's command line, for one job on this node.

Not here: the flags (run_parser.py, in a process of its own), the node (daemon/).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from elasticd.cluster.embedded import EmbeddedEtcd
from elasticd.commands.run_flags import parse_plain
from elasticd.config import DaemonConfig, LaunchOptions, config_for_run, load_daemon
from elasticd.core.model import JobId, JobSpec, Topology
from elasticd.daemon.main import configure_logging, run_job
from elasticd.errors import ConfigError, OperatorError
from elasticd.toml_form import NAME_PATTERN

DEFAULT_STOP_TIMEOUT_S = 5.0


def run_command(arguments: Sequence[str]) -> int:
    """The exit status: the job's (0 or 1), or the parser's own."""
    status, asked = parse(arguments)
    if asked is None:
        return status
    configure_logging(asked["log_level"] or os.environ.get("ELASTICD_LOG_LEVEL", "WARNING"), world_changes=True)
    spec = make_spec(asked)
    _limit_threads(asked["nproc"])
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = asked["signals_to_handle"]  # as torchrun passes it on
    folder = Path(tempfile.mkdtemp(prefix="elasticd-"))
    try:
        with _endpoints(asked, folder / "etcd") as endpoints:
            return run_job(_config(asked, endpoints, folder), spec, _launch(asked))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parse(arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """As ``parse_apart``, and at once where that can be."""
    asked = parse_plain(arguments, os.environ)
    return parse_apart(arguments) if asked is None else (0, asked)


def parse_apart(arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """(exit status, what was asked for); None after --help and after a mistake that argparse has told.

    ConfigError for a mistake that it has not.
    """
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "elasticd.commands.run_parser", str(writer), *arguments]
    try:
        process = subprocess.Popen(command, pass_fds=[writer])
    finally:
        os.close(writer)
    with os.fdopen(reader) as answers:
        text = answers.read()
    status = process.wait()
    if status != 0 or not text:
        return status, None
    asked: dict[str, Any] = json.loads(text)
    if "error" in asked:
        raise ConfigError(asked["error"])
    return 0, asked


def make_spec(asked: dict[str, Any]) -> JobSpec:
    """The job as this node would have it; ConfigError names the flag."""
    job_id = asked["rdzv_id"]
    if not NAME_PATTERN.fullmatch(job_id):
        raise ConfigError(f"--rdzv-id {job_id!r}: letters, digits, '.', '_' and '-' only, 63 at most")
    if job_id == "none" and asked["max_nodes"] == 1:  # nobody else is to find it by this name
        job_id = f"none-{uuid.uuid4().hex[:8]}"
    return JobSpec(
        job_id=JobId(job_id),
        min_nodes=asked["min_nodes"],
        max_nodes=asked["max_nodes"],
        command=(asked["training_script"], *asked["training_script_args"]),
        nproc_per_node=str(asked["nproc"]),
        is_module=bool(asked["module"]),
        no_python=bool(asked["no_python"]) and not asked["run_path"],
        max_restarts=asked["max_restarts"],
        stop_timeout_s=_stop_timeout_s(asked),
        boundary_timeout_s=asked["boundary_timeout"],
        spares=asked["spares"],
        ranks_per_replica=asked["ranks_per_replica"],
        by_run=True,
    )


def _stop_timeout_s(asked: dict[str, Any]) -> float:
    """torchrun's own flag and variable; its default of 30 s is what holds a restart up (TORCH.md)."""
    told = asked["shutdown_timeout"]
    if told is None:
        told = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or DEFAULT_STOP_TIMEOUT_S
    return float(told)


def _limit_threads(nproc: int) -> None:
    """As torchrun does: several workers on a node must not each take all of its cores."""
    if nproc > 1 and "OMP_NUM_THREADS" not in os.environ:
        click.echo("elasticd: OMP_NUM_THREADS is not set; using 1 for each of the workers", err=True)
        os.environ["OMP_NUM_THREADS"] = "1"


@contextlib.contextmanager
def _endpoints(asked: dict[str, Any], data_dir: Path) -> Iterator[tuple[str, ...]]:
    """Where etcd is; one of our own when nobody named any. Empty: the configuration file names them."""
    backend, endpoint = asked["rdzv_backend"], asked["rdzv_endpoint"]
    if asked["standalone"]:
        endpoint = ""
    elif backend not in ("static", "elasticd"):
        click.echo(
            f"elasticd: --rdzv-backend {backend}: elasticd's own rendezvous is used, and --rdzv-endpoint is etcd's",
            err=True,
        )
    if endpoint or (asked["config"] and not asked["standalone"]):
        yield tuple(filter(None, endpoint.split(",")))
        return
    with EmbeddedEtcd(data_dir) as etcd:
        address = etcd.endpoint.removeprefix("http://")
        hint = f"; others on this machine join with --rdzv-endpoint {address}" if asked["max_nodes"] > 1 else ""
        click.echo(f"elasticd: no --rdzv-endpoint given: started an etcd for this machine at {address}{hint}", err=True)
        yield (address,)


def _config(asked: dict[str, Any], endpoints: tuple[str, ...], folder: Path) -> DaemonConfig:
    topology = Topology(zone=asked["zone"], rack=asked["rack"], switch=asked["switch"])
    base = None
    if asked["config"]:
        environment = {**os.environ, "ELASTICD_ENDPOINTS": ",".join(endpoints)} if endpoints else os.environ
        base = load_daemon(asked["config"], environment)
    config = config_for_run(
        endpoints,
        run_dir=str(folder),
        address=asked["local_addr"] or "",
        node_id=asked["node_id"],
        base=base,
        memory_bytes=asked["memory_bytes"],
    )
    if topology != Topology():
        config = replace(config, topology=topology)
    if not config.links.tls and not config.is_on_loopback:
        logging.getLogger(__name__).warning(
            "links to other nodes are plain text, as torchrun's are; --config FILE with [links] encrypts them"
        )
    if config.is_on_loopback and asked["max_nodes"] > 1 and asked["rdzv_endpoint"]:
        click.echo(
            f"elasticd: the others know this node as {config.address}, which only this machine reaches; for nodes on "
            "other machines name etcd by its own address, or give --local-addr",
            err=True,
        )
    return replace(config, python=os.environ.get("PYTHON_EXEC", ""))


def _launch(asked: dict[str, Any]) -> LaunchOptions:
    method = asked["start_method"]
    if asked["numa_binding"] is not None:
        raise OperatorError("--numa-binding is not supported: bind in the script, or start it through numactl")
    if asked["logs_specs"] is not None:
        raise OperatorError("--logs-specs is not supported: logs go to <log-dir>/<job>/round_<n>/rank_<r>")
    return LaunchOptions(
        role=asked["role"],
        redirects=asked["redirects"],
        tee=asked["tee"],
        log_dir=asked["log_dir"] or "",
        local_ranks_filter=asked["local_ranks_filter"],
        log_line_prefix_template=os.environ.get("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", ""),
        start_method="spawn" if method == "spawn" else "warm",
        virtual_local_rank=bool(asked["virtual_local_rank"]),
        duplicate_stdout_filters=tuple(asked["duplicate_stdout_filters"]),
        duplicate_stderr_filters=tuple(asked["duplicate_stderr_filters"]),
        event_log_handler=asked["event_log_handler"],
    )
