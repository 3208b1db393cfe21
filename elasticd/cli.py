"""The command line: ``elasticd serve | run | submit | status | cancel | drain | undrain | checkpoints |
demo``.

Each command is a thin layer over a package that does the work, imported when the command runs. An operator's mistake is
one line on stderr and exit status 2 (systemd's RestartPreventExitStatus), never a traceback. Not here: any behaviour.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from elasticd import __version__
from elasticd.errors import OperatorError, StoreUnavailable

F = TypeVar("F", bound=Callable[..., Any])

EXIT_OPERATOR = 2
EXIT_INTERRUPTED = 130
DEFAULT_CONFIG = "/etc/elasticd/elasticd.toml"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="elasticd")
def cli() -> None:
    """Keeps a PyTorch training job stepping, whatever happens to the nodes."""


@cli.command()
@click.option("--config", default=DEFAULT_CONFIG, show_default=True, help="This node's TOML file.")
@click.option("--log-level", default="", help="DEBUG, INFO, WARNING or ERROR (default INFO, or $ELASTICD_LOG_LEVEL).")
@click.option("--log-json", is_flag=True, help="One JSON object a line, for log collectors.")
def serve(config: str, log_level: str, log_json: bool) -> int:  # noqa: FBT001
    """Be a node of the cluster: run the jobs that it has for this one, until SIGTERM."""
    from elasticd.config import load_daemon
    from elasticd.daemon.main import configure_logging
    from elasticd.daemon.main import serve as serve_node

    configure_logging(log_level, as_json=log_json)
    return serve_node(load_daemon(config))


#: Nothing of a run's line is click's, not even a ``--`` among the script's own arguments.
_RUN = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}


@cli.command(context_settings=_RUN, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> int:
    """Run one job on this node: torchrun's command line, and more (elasticd run --help)."""
    from elasticd.commands.run import run_command

    return run_command(arguments)


def _cluster(command: F) -> F:
    """How a command finds the cluster: --endpoints, or the [etcd] of a configuration file."""
    command = click.option(
        "--config", default="", help=f"Take [etcd] from this TOML file (default {DEFAULT_CONFIG}, if it is there)."
    )(command)
    return click.option(
        "--endpoints", envvar="ELASTICD_ENDPOINTS", default="", help="etcd, as HOST:PORT[,HOST:PORT...]."
    )(command)


@cli.command()
@click.argument("job_file")
@_cluster
def submit(job_file: str, endpoints: str, config: str) -> int:
    """Put a job (a TOML file) into the cluster; idle nodes take it."""
    from elasticd.commands.operate import submit_file

    return submit_file(job_file, endpoints, config)


@cli.command()
@click.argument("job_id", metavar="JOB")
@_cluster
def cancel(job_id: str, endpoints: str, config: str) -> int:
    """Stop a job on all of its nodes."""
    from elasticd.commands.operate import cancel_job_id

    return cancel_job_id(job_id, endpoints, config)


@cli.command()
@click.argument("node_id", metavar="NODE")
@_cluster
def drain(node_id: str, endpoints: str, config: str) -> int:
    """Let a node leave its job at a step boundary, and take no other."""
    from elasticd.commands.operate import drain_node_id

    return drain_node_id(node_id, endpoints, config)


@cli.command()
@click.argument("node_id", metavar="NODE")
@_cluster
def undrain(node_id: str, endpoints: str, config: str) -> int:
    """Let a node that is drained, or in quarantine, take jobs again."""
    from elasticd.commands.operate import undrain_node_id

    return undrain_node_id(node_id, endpoints, config)


@cli.command()
@click.option("--watch", is_flag=True, help="Show it until Ctrl-C, as it changes.")
@click.option("--json", "as_json", is_flag=True, help="As JSON: one document, or with --watch one a line.")
@_cluster
def status(watch: bool, as_json: bool, endpoints: str, config: str) -> int:  # noqa: FBT001
    """Show nodes and jobs."""
    from elasticd.commands.status import show_status

    return show_status(endpoints, config, watch=watch, as_json=as_json)


@cli.group()
def checkpoints() -> None:
    """Look at, verify, pin, prune and export the checkpoints in a directory, or at a URL for fsspec."""


def _directory(command: F) -> F:
    return click.argument("directory")(command)


_json = click.option("--json", "as_json", is_flag=True, help="One JSON document.")


@checkpoints.command()
@_directory
@_json
def ls(directory: str, as_json: bool) -> int:  # noqa: FBT001
    """List them, newest first. Looks at manifests and sizes; reads no data."""
    from elasticd.commands.checkpoints import list_checkpoints

    return list_checkpoints(directory, as_json=as_json)


@checkpoints.command()
@_directory
@click.argument("steps", nargs=-1, type=int)
@click.option("--rate", default=0.0, help="At most so many MB/s (default: as fast as it goes).")
@click.option("--metrics-file", default="", help="Leave the result here too, as Prometheus' text format.")
@_json
def verify(directory: str, steps: tuple[int, ...], rate: float, metrics_file: str, as_json: bool) -> int:  # noqa: FBT001
    """Read every byte from the disk and compare checksums. Exit status 1 when a checkpoint is damaged.

    To scrub old checkpoints, run it from a timer with a --rate that the disk can spare: systemd/elasticd-scrub@.timer.
    """
    from elasticd.commands.checkpoints import verify_checkpoints

    return verify_checkpoints(directory, steps, rate_mb_s=rate, as_json=as_json, metrics_file=metrics_file)


@checkpoints.command()
@_directory
@click.argument("step", type=int)
@_json
def inspect(directory: str, step: int, as_json: bool) -> int:  # noqa: FBT001
    """Show the manifest, the files and the tensors of one."""
    from elasticd.commands.checkpoints import inspect_checkpoint

    return inspect_checkpoint(directory, step, as_json=as_json)


@checkpoints.command()
@_directory
@click.option("--keep", default=3, show_default=True, help="The newest so many stay.")
@click.option("--each-steps", default=0, help="And the first of every so many steps.")
@click.option("--each-hours", default=0.0, help="And the first of every so many hours.")
@click.option("--temporary", is_flag=True, help="And what was never completed: only while no job saves there.")
@click.option("--dry-run", is_flag=True, help="Only say which would go.")
@_json
def prune(
    directory: str,
    keep: int,
    each_steps: int,
    each_hours: float,
    temporary: bool,  # noqa: FBT001
    dry_run: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
) -> int:
    """Remove old ones. Pinned and damaged ones, and those being written, are left alone."""
    from elasticd.checkpoint.retention import Keep
    from elasticd.commands.checkpoints import prune_checkpoints

    wanted = Keep(last=keep, each_steps=each_steps, each_hours=each_hours)
    return prune_checkpoints(directory, wanted, temporary=temporary, dry_run=dry_run, as_json=as_json)


@checkpoints.command()
@_directory
@click.argument("step", type=int)
@click.option("--off", is_flag=True, help="Pin it no longer.")
def pin(directory: str, step: int, off: bool) -> int:  # noqa: FBT001
    """Keep one whatever retention says."""
    from elasticd.commands.checkpoints import pin_checkpoint

    return pin_checkpoint(directory, step, pinned=not off)


@checkpoints.command()
@_directory
@click.argument("step", type=int)
@click.argument("target")
def export(directory: str, step: int, target: str) -> int:
    """Write the model of one as safetensors into the new directory TARGET, after it has verified."""
    from elasticd.commands.checkpoints import export_checkpoint

    return export_checkpoint(directory, step, target)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object on the last line.")
@click.option("--plain", is_flag=True, help="Plain lines even on a terminal.")
@click.option("--steps", default=0, help="Steps to train (default: enough for the whole story).")
@click.option("--seed", default=1, show_default=True)
@click.option("--keep", default="", help="Folder in which logs, histories and checkpoints stay.")
def demo(as_json: bool, plain: bool, steps: int, seed: int, keep: str) -> int:  # noqa: FBT001
    """Train a byte-level GPT on three nodes of this machine, kill nodes, and check that nothing is lost."""
    from elasticd.demo import DemoOptions, run_demo

    return run_demo(DemoOptions(as_json=as_json, plain=plain, steps=steps, seed=seed, keep=keep))


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: exits with the command's status."""
    sys.exit(run_cli(arguments))


def run_cli(arguments: Sequence[str] | None = None) -> int:
    """The exit status; what an operator must know is on stderr."""
    try:
        return int(cli.main(args=None if arguments is None else list(arguments), standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return EXIT_OPERATOR
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except (OperatorError, StoreUnavailable) as error:
        click.echo(f"elasticd: error: {error}", err=True)
        return EXIT_OPERATOR
    except BrokenPipeError:  # the reader has seen enough; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    main()
