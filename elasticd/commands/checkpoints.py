"""``elasticd checkpoints ls | verify | inspect | prune | pin | export``: a directory of checkpoints or a URL of
one, without a cluster.

Verifying old checkpoints at a bounded rate is a command and not the daemon's: it needs nothing that the daemon knows, a
shared file system should be read by one node and not by all, and a timer says when better than we could
(systemd/elasticd-scrub@.timer). A checkpoint that retention removes meanwhile is not damaged.

Temporary directories are removed here only on demand: whether the round that owns one still lives is known to the saver
of a later round, which sweeps it, and to a person. Only ``inspect`` and ``export`` import torch.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from elasticd.checkpoint import storage
from elasticd.checkpoint.manifest import Manifest
from elasticd.checkpoint.objects import Location, locate
from elasticd.checkpoint.pace import Pace
from elasticd.checkpoint.retention import Keep
from elasticd.core.records import to_plain
from elasticd.errors import CheckpointInvalid, ConfigError, OperatorError

EXIT_DAMAGED = 1
#: A round that no job has: its temporary names are nobody's, and are swept by every later save.
NO_ROUND = 0


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What a file system refuses is for the operator to mend: one line."""
    try:
        yield
    except BrokenPipeError:  # nobody reads on, which cli.py knows
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise OperatorError(f"{where}{error.strerror or error}") from error


@_refusals()
def list_checkpoints(directory: str, *, as_json: bool) -> int:
    path = _existing(directory)
    found = [describe(one) for one in storage.complete(path)]
    temporary = [one.name for one in storage.temporaries(path)]
    if as_json:
        _print_json({"directory": str(path), "checkpoints": found, "temporary": temporary})
        return 0
    table = Table("step", "size", "ranks", "round", "saved", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for one in found:
        table.add_row(*_row(one))
    Console(highlight=False).print(table if found else f"no checkpoint in {path}", markup=False)
    for name in temporary:
        click.echo(f"{name}: being written, or left behind by a round that is over")
    return 0


def describe(path: Location) -> dict[str, Any]:
    """What is known of a checkpoint without reading its data; ``problem`` is None when its files are all there."""
    step, pinned = storage.step_at(path), storage.is_pinned(path)
    plain: dict[str, Any] = {"step": step, "path": str(path), "pinned": pinned, "problem": None}
    try:
        manifest = storage.read_manifest(path)
        plain |= _summary(manifest)
        storage.check_sizes(path, manifest)
    except CheckpointInvalid as error:
        plain["problem"] = str(error)
    return plain


@_refusals()
def verify_checkpoints(
    directory: str, steps: Sequence[int], *, rate_mb_s: float, as_json: bool, metrics_file: str = ""
) -> int:
    path = _existing(directory)
    if rate_mb_s < 0:
        raise ConfigError("--rate must not be negative")
    if metrics_file and steps:
        raise ConfigError("--metrics-file tells of a whole directory: name no steps with it")
    pace, results = Pace(1e6 * rate_mb_s), []
    for checkpoint in [_known(path, step) for step in steps] or storage.complete(path):
        if (result := _verify(checkpoint, pace)) is None:
            continue
        results.append(result)
        if not as_json:
            click.echo(_verdict(result))
    if as_json:
        _print_json({"directory": str(path), "checkpoints": results})
    elif not results:
        click.echo(f"no checkpoint in {path}")
    if metrics_file:
        _write_metrics(path, results, Path(metrics_file))
    return EXIT_DAMAGED if any(one["problem"] for one in results) else 0


@_refusals()
def inspect_checkpoint(directory: str, step: int, *, as_json: bool) -> int:
    path = _existing(directory)
    checkpoint = _known(path, step)
    manifest = _checked(lambda: storage.read_manifest(checkpoint), step)
    _checked(lambda: storage.check_contents(checkpoint, (manifest.metadata,)), step)  # before it is unpickled
    from elasticd.checkpoint.contents import describe_tensors

    tensors = describe_tensors(checkpoint)
    if as_json:
        _print_json({"manifest": to_plain(manifest), "pinned": storage.is_pinned(checkpoint), "tensors": tensors})
        return 0
    for name, value in _summary(manifest).items():
        click.echo(f"{name.replace('_', ' ')}: {value}")
    for entry in manifest.files:
        click.echo(f"file {entry.name}: {entry.size_bytes} bytes, CRC32 {entry.crc32:08x}")
    for tensor in tensors:
        click.echo(f"tensor {tensor['name']}: {tensor['dtype']} {tuple(tensor['shape'])} in {tensor['chunks']} pieces")
    return 0


@_refusals()
def prune_checkpoints(directory: str, keep: Keep, *, temporary: bool, dry_run: bool, as_json: bool) -> int:
    path = _existing(directory)
    swept = storage.temporaries(path) if temporary else []
    removed = storage.prune(path, newest=None, keep=keep, round_number=NO_ROUND, only_say=dry_run)
    for one in [] if dry_run else swept:
        storage.remove_temporary(one)
    if as_json:
        names = [one.name for one in swept]
        _print_json({"directory": str(path), "removed": removed, "temporary": names, "dry_run": dry_run})
        return 0
    for name in [f"step {step}" for step in removed] + [one.name for one in swept]:
        click.echo(f"{name}: {'would be removed' if dry_run else 'removed'}")
    if not removed and not swept:
        click.echo("nothing to remove")
    return 0


@_refusals()
def pin_checkpoint(directory: str, step: int, *, pinned: bool) -> int:
    storage.pin(_known(_existing(directory), step), pinned=pinned)
    click.echo(f"step {step} is {'pinned' if pinned else 'not pinned any more'}")
    return 0


@_refusals()
def export_checkpoint(directory: str, step: int, target: str) -> int:
    path = _existing(directory)
    checkpoint, out = _known(path, step), Path(target)
    if out.exists():
        raise ConfigError(f"{out} exists already: name a directory that does not")
    _checked(lambda: storage.verify(checkpoint), step)
    from elasticd.checkpoint.contents import export_model

    count = export_model(checkpoint, out)
    click.echo(f"{count} tensors of step {step} exported to {out}")
    return 0


def _existing(directory: str) -> Location:
    path = locate(directory)
    if isinstance(path, Path) and not path.is_dir():
        raise ConfigError(f"there is no directory {path}")
    return path


def _known(directory: Location, step: int) -> Location:
    found = storage.of_step(directory, step)
    if not found:
        steps = storage.complete_steps(directory)
        there = f"; there are {', '.join(str(one) for one in steps[:10])}" if steps else ""
        raise ConfigError(f"no checkpoint of step {step} in {directory}{there}")
    return found[0]


def _checked(check: Any, step: int) -> Any:
    try:
        return check()
    except CheckpointInvalid as error:
        raise OperatorError(f"the checkpoint of step {step} does not verify: {error}") from error


def _verify(checkpoint: Location, pace: Pace) -> dict[str, Any] | None:
    """None: it is gone."""
    started, problem, size_bytes = time.monotonic(), None, 0
    try:
        size_bytes = storage.verify(checkpoint, pace).size_bytes
    except CheckpointInvalid as error:
        problem = str(error)
        if not storage.is_there(checkpoint):
            return None
    step = storage.step_at(checkpoint)
    return {"step": step, "size_bytes": size_bytes, "seconds": time.monotonic() - started, "problem": problem}


def _write_metrics(directory: Location, results: Sequence[Mapping[str, Any]], file: Path) -> None:
    from elasticd.metrics.scrubbing import Scrubbed, write_metrics

    scrubbed = Scrubbed(
        directory=str(directory),
        checkpoints=len(results),
        damaged=sum(one["problem"] is not None for one in results),
        size_bytes=sum(one["size_bytes"] for one in results),
        seconds=sum(one["seconds"] for one in results),
    )
    write_metrics(scrubbed, file)


def _verdict(result: Mapping[str, Any]) -> str:
    if result["problem"]:
        return f"step {result['step']}: DAMAGED: {result['problem']}"
    speed = result["size_bytes"] / 1e6 / max(result["seconds"], 1e-9)
    return f"step {result['step']}: whole, {_size(result['size_bytes'])} at {speed:.0f} MB/s"


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "size_bytes": manifest.size_bytes,
        "world_size": manifest.world_size,
        "job_id": manifest.job_id,
        "round_number": manifest.round_number,
        "torch_version": manifest.torch_version,
        "saved_at_unix_s": manifest.saved_at_unix_s,
    }


def _row(one: Mapping[str, Any]) -> list[str]:
    remark = one["problem"] or ("pinned" if one["pinned"] else "")
    if "size_bytes" not in one:
        return [str(one["step"]), "", "", "", "", remark]
    saved = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(one["saved_at_unix_s"]))
    return [str(one["step"]), _size(one["size_bytes"]), str(one["world_size"]), str(one["round_number"]), saved, remark]


def _size(size_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.3g} {unit}" if unit != "GB" else f"{size_bytes:.1f} GB"


def _print_json(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2))
