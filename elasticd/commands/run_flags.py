"""The command line of ``elasticd run``: our own flags, what must hold, and how to read the usual ones without torch.

torchrun's parser comes with torch, and importing that takes 2 to 4 s before anything begins (run_parser.py). Its usual
flags with plain values mean the same here, and are read at once. Everything else is left to it: an abbreviation, a flag
that is not named here, a PET_ variable, ``auto`` workers, --help, and most mistakes, which are told in its words.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

from elasticd.errors import ConfigError
from elasticd.job_file import check_replicas

#: torchrun 2.13's flags that are read here, and their defaults. It takes each with underscores, too.
_TEXTS = {
    "--nnodes": "1:1",
    "--nproc-per-node": "1",
    "--rdzv-backend": "static",
    "--rdzv-endpoint": "",
    "--rdzv-id": "none",
    "--rdzv-conf": "",
    "--role": "default",
    "--log-dir": None,
    "--redirects": "0",
    "--tee": "0",
    "--local-ranks-filter": "",
    "--master-addr": "127.0.0.1",
    "--local-addr": None,
}
_WHOLE_NUMBERS = {"--max-restarts": 0, "--node-rank": 0, "--master-port": None, "--shutdown-timeout": None}
_SWITCHES = ("--standalone", "--module", "--no-python", "--run-path", "--virtual-local-rank")
_SHORT = {"--redirects": "-r", "--tee": "-t", "--module": "-m"}
#: Of the flags that are not taken here.
_DEFAULTS: dict[str, Any] = {
    "event_log_handler": "null",
    "duplicate_stdout_filters": [],
    "duplicate_stderr_filters": [],
    "logs_specs": None,
    "numa_binding": None,
    "signals_to_handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
}
_NODES = re.compile(r"(\d+)(?::(\d+))?")
_STREAMS = re.compile(r"[0-3]|\d+:[0-3](,\d+:[0-3])*")
_RANKS = re.compile(r"(\d+(,\d+)*)?")


class _NotPlainError(Exception):
    """torchrun's own parser must read it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _NotPlainError(message)


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("elasticd")
    own.add_argument("--config", default="", help="TOML file for [etcd], [links], [metrics], [detection]")
    own.add_argument("--node-id", default="", help="this node's name in the cluster (default: host name and a suffix)")
    for level in ("zone", "rack", "switch"):
        own.add_argument(f"--{level}", default="", help=f"the {level} this node is in, for the order of ranks")
    own.add_argument("--spares", type=int, default=1, help="nodes above the maximum that are kept warm (default 1)")
    own.add_argument(
        "--ranks-per-replica", type=int, default=1, help="the world is a multiple of this; the other nodes are spares"
    )
    own.add_argument("--boundary-timeout", type=float, default=30.0, help="seconds to wait for a step boundary")
    own.add_argument(
        "--memory-bytes",
        type=int,
        default=None,
        help="how much memory copies of the workers' state may take here (default: a quarter of it; 0: none)",
    )
    own.add_argument("--log-level", default="", help="DEBUG, INFO, WARNING (default) or ERROR")


def parse_plain(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any] | None:
    """As run_parser.parse has it; None where that has to read it. ConfigError names the flag."""
    if any(name.startswith("PET_") for name in environment):
        return None
    try:
        asked = _DEFAULTS | vars(_make_parser().parse_args(list(arguments)))
    except _NotPlainError:
        return None
    nodes = _NODES.fullmatch(asked["nnodes"])
    streams = all(_STREAMS.fullmatch(asked[flag]) for flag in ("redirects", "tee"))
    ranks = _RANKS.fullmatch(asked["local_ranks_filter"])
    if not (nodes and streams and ranks and asked["nproc_per_node"].isdecimal()):
        return None
    asked["min_nodes"], asked["max_nodes"] = int(nodes[1]), int(nodes[2] or nodes[1])
    asked["nproc"] = int(asked["nproc_per_node"])
    check(asked)
    return asked if _is_there(asked) else None


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for flag, text in _TEXTS.items():
        parser.add_argument(*_spellings(flag), default=text)
    for flag, number in _WHOLE_NUMBERS.items():
        parser.add_argument(*_spellings(flag), type=int, default=number)
    parser.add_argument(*_spellings("--monitor-interval"), type=float, default=0.1)
    parser.add_argument(*_spellings("--start-method"), default="warm", choices=["warm", "spawn", "fork", "forkserver"])
    for flag in _SWITCHES:
        parser.add_argument(*_spellings(flag), action="store_true")
    parser.add_argument("training_script")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER)
    add_own_flags(parser)
    return parser


def _spellings(flag: str) -> list[str]:
    both = [flag] if flag.count("-") == 2 else [flag, "--" + flag[2:].replace("-", "_")]
    return [_SHORT[flag], *both] if flag in _SHORT else both


def check(asked: Mapping[str, Any]) -> None:
    """What was asked for, whoever has read it. ConfigError names the flag."""
    if not 1 <= asked["min_nodes"] <= asked["max_nodes"]:
        raise ConfigError(f"--nnodes {asked['nnodes']}: the minimum is above the maximum, or below 1")
    if asked["memory_bytes"] is not None and asked["memory_bytes"] < 0:
        raise ConfigError("--memory-bytes must not be negative")
    if asked["max_restarts"] < 0:
        raise ConfigError("--max-restarts must not be negative")
    if asked["nproc"] < 1:
        raise ConfigError(f"--nproc-per-node {asked['nproc_per_node']}: at least one worker is needed")
    if asked["ranks_per_replica"] < 1:
        raise ConfigError("--ranks-per-replica must be at least 1")
    if asked["max_nodes"] == 1:  # of others nothing is known here: they may have other numbers of ranks
        check_replicas("--ranks-per-replica: ", asked["ranks_per_replica"], asked["nproc"], 1, 1)


def _is_there(asked: Mapping[str, Any]) -> bool:
    """Whether there is such a script or module, as far as is seen without running any code of it: not in here."""
    script = asked["training_script"]
    if not asked["module"]:
        return asked["no_python"] or Path(script).is_file()
    first, *rest = script.split(".")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.util.find_spec(first)
        for name in rest:
            above = found.submodule_search_locations if found is not None else None
            found = PathFinder.find_spec(f"{found.name}.{name}", above) if found is not None and above else None
    except (ImportError, ValueError):
        return False
    finally:
        sys.path.pop(0)
    return found is not None and not asked["no_python"]
