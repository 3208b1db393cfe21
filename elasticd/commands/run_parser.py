"""torchrun's own parser, extended; run as a program of its own, since it imports torch and the daemon must not.

``python -m elasticd.commands.run_parser FD ARGUMENTS...`` writes what was asked for to FD as one JSON object, or
``{"error": ...}``. ``--help`` and unknown flags end it as argparse does. Not here: the command lines that need no torch
(run_flags.py), what is done with it (run.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.distributed.run import determine_local_world_size, get_args_parser, parse_min_max_nnodes

from elasticd.commands.run_flags import add_own_flags, check
from elasticd.errors import ConfigError

_EPILOG = (
    "torchrun's flags, with these differences: --rdzv-endpoint is etcd's (several: comma-separated; without one, an "
    "etcd is started for this machine); workers start from a preloaded fork server (--start-method spawn for plain "
    "processes); --max-restarts counts failures of the script for the whole job: lost nodes and joins cost nothing."
)


def make_parser() -> argparse.ArgumentParser:
    """torchrun's parser with our flags before the script."""
    parser: argparse.ArgumentParser = get_args_parser()
    parser.prog, parser.description, parser.epilog = "elasticd run", "Run one job on this node.", _EPILOG
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to change an option
        if action.dest == "start_method":
            action.choices, action.help = ["warm", "spawn", "fork", "forkserver"], "How workers start (default: warm)."
    if "PET_START_METHOD" not in os.environ:
        parser.set_defaults(start_method="warm")
    add_own_flags(parser)
    return parser


def parse(arguments: list[str]) -> dict[str, Any]:
    """The arguments as plain values, checked. ConfigError names the flag."""
    plain = vars(make_parser().parse_args(arguments))
    try:
        plain["min_nodes"], plain["max_nodes"] = parse_min_max_nnodes(plain["nnodes"])
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--nnodes {plain['nnodes']!r} is neither N nor MIN:MAX") from error
    try:
        plain["nproc"] = determine_local_world_size(plain["nproc_per_node"])
    except ValueError as error:
        raise ConfigError(f"--nproc-per-node {plain['nproc_per_node']}: {error}") from error
    _check_streams(plain)
    check(plain)
    _check_script(plain)
    return plain


def _check_streams(plain: dict[str, Any]) -> None:
    from torch.distributed.elastic.events.handlers import _log_handlers as known_event_handlers
    from torch.distributed.elastic.multiprocessing.api import Std

    for flag in ("redirects", "tee"):
        try:
            Std.from_str(plain[flag])
        except ValueError as error:
            raise ConfigError(f"--{flag}: {error}") from error
    if plain["event_log_handler"] not in known_event_handlers:
        raise ConfigError(f"--event-log-handler {plain['event_log_handler']!r} is not registered with torch elastic")
    ranks = plain["local_ranks_filter"]
    if ranks and not all(part.strip().isdigit() for part in ranks.split(",")):
        raise ConfigError(f"--local-ranks-filter {ranks!r}: numbers with commas between them")


def _check_script(plain: dict[str, Any]) -> None:
    """A script that is not there is the operator's mistake, and no failure of a worker."""
    script = plain["training_script"]
    if plain["module"]:
        if plain["no_python"]:
            raise ConfigError("--module and --no-python exclude each other")
        sys.path.insert(0, str(Path.cwd()))
        try:
            found = importlib.util.find_spec(script) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError(f"there is no module {script!r} to run")
    elif not plain["no_python"] and not Path(script).is_file():
        raise ConfigError(f"there is no script {script!r} in {Path.cwd()}")


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w") as out:
        try:
            answer = parse(sys.argv[2:])
        except ConfigError as error:
            answer = {"error": str(error)}
        json.dump(answer, out)


if __name__ == "__main__":
    main()
