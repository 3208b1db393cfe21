"""One training run that must not depend on what happens to it: the shipped byte GPT on a cluster, and its judgement.

The same job is run once in a plain process, without elasticd's daemons: that is the reference. Whatever nodes a cluster
runs it on, in whatever layout, under whatever shares, and whatever is killed on the way, it must show the same loss
curve (in exact mode: end in the same bits) and use the samples of each committed step exactly once, by the ledger that
the workers write.

Not here: which faults strike (campaign.py, the chaos tests).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from elasticd.core.model import Phase
from elasticd.errors import ElasticdError
from elasticd.testing import validators
from elasticd.testing.cluster import Cluster
from elasticd.testing.history import Trained, events_of, read_trained
from elasticd.testing.validators import Pause, Violation

MODULE = "elasticd.examples.byte_gpt"
STEPS = 200
BATCH = 16
#: In exact mode nothing depends on the world; in float mode the order of additions does. That makes a gradient wrong by
#: some 1e-7 of itself, and so AdamW's step by 1e-7 of the learning rate: less than a loss, a float32, can show in 200
#: steps. Runs in all layouts were off by 1.6e-7 at most, its last bits. One micro-batch of one step skipped or doubled
#: moves the losses after it by 4e-5 to 4e-4 (tests/chaos/test_layout_curves.py). This lies between.
RELATIVE = 1e-5
_REFERENCE_TIMEOUT_S = 120.0
_WEIGHTS = re.compile(r"^weights ([0-9a-f]{64})$", re.MULTILINE)
_TINY = ("--length", "16", "--width", "16", "--steps", str(STEPS), "--batch", str(BATCH))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is computed, wherever and by however many: two runs of one task have the same curve."""

    exact: bool = False
    layers: int = 4
    micro_batches: int = 8

    @property
    def arguments(self) -> list[str]:
        """Of the byte GPT."""
        size = ["--layers", str(self.layers), "--micro-batches", str(self.micro_batches)]
        return [*_TINY, *size, *(["--exact"] if self.exact else [])]


FLOAT, EXACT = Task(), Task(exact=True)
#: Where a step's cost is that of every single layer and micro-batch: under FSDP2 and tensor parallel on small machines.
SMALL = Task(layers=1, micro_batches=4)
#: What a job file says, so that a layout's replicas are whole on every node.
RANKS: dict[str, dict[str, object]] = {
    "ddp": {},
    "fsdp2": {},
    "hsdp": {"nproc_per_node": 2},
    "tp": {"nproc_per_node": 2, "ranks_per_replica": 2},
    "tp-ddp": {"nproc_per_node": 2, "ranks_per_replica": 2},
    "pp": {"nproc_per_node": 2, "ranks_per_replica": 2},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a run must be like. ``weights``: the SHA-256 of the last ones in exact mode, "" otherwise."""

    task: Task
    trained: tuple[Trained, ...]
    weights: str


def run_reference(folder: Path, task: Task) -> Reference:
    """In a plain process: a world of one. ElasticdError when it fails."""
    ledger = folder / f"reference-{'exact' if task.exact else 'float'}-{task.layers}-{task.micro_batches}.jsonl"
    env = {name: value for name, value in os.environ.items() if not name.startswith("ELASTICD_")}
    done = subprocess.run(
        [sys.executable, "-m", MODULE, *task.arguments, "--ledger", str(ledger)],
        check=False,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=_REFERENCE_TIMEOUT_S,
    )
    trained = read_trained(ledger)
    if done.returncode != 0 or [line.step for line in trained] != list(range(1, STEPS + 1)):
        raise ElasticdError(f"the reference run failed: {done.stderr[-2000:]}")
    return Reference(task=task, trained=tuple(trained), weights=_weights_in(done.stdout))


class CurveRun:
    """One run of the job on a cluster, from its submission to its judgement."""

    def __init__(self, cluster: Cluster, job: str, task: Task) -> None:
        self.cluster, self.job, self.task = cluster, job, task
        self.ledger = cluster.folder / "steps" / f"{job}.jsonl"
        self.pauses: list[Pause] = []
        self.started_at = time.monotonic()

    def submit(
        self, *, balance: str = "auto", step_seconds: float = 0.0, parallel: str = "ddp", **fields: object
    ) -> None:
        """``parallel``: one of RANKS. ``fields``: further keys of the job file."""
        self.ledger.parent.mkdir(exist_ok=True)
        how = ["--parallel", parallel, "--balance", balance, "--step-seconds", str(step_seconds)]
        where = ["--ledger", str(self.ledger), "--checkpoint-dir", str(self.cluster.folder / f"{self.job}-checkpoints")]
        self.started_at = time.monotonic()
        command = [MODULE, *self.task.arguments, *how, *where]
        self.cluster.submit(self.job, command, **{"module": True, **RANKS[parallel], **fields})

    @property
    def trained(self) -> list[Trained]:
        return read_trained(self.ledger)

    def wait_step(self, step: int, *, world: int = 0, timeout_s: float = 40.0) -> None:
        """Until a step from that one on was completed (by a world of that size, if one is given)."""

        def reached() -> bool:
            return any(line.step >= step and world in (0, line.world) for line in self.trained[-64:])

        self.cluster.wait_until(reached, timeout_s, f"step {step} of {self.job} in a world of {world or 'any size'}")

    def wait_over(self, timeout_s: float = 60.0) -> None:
        """Until every daemon that runs has heard how the job ended. ElasticdError when it did not succeed."""
        self.cluster.wait_until(self._over_everywhere, timeout_s, f"the end of {self.job}")
        phases = {event.details["phase"] for event in events_of(self.cluster.history(), "job_over", job=self.job)}
        if phases != {Phase.SUCCEEDED.value}:
            raise ElasticdError(f"job {self.job} {' and '.join(sorted(phases))}\n{self.cluster.last_words()}")

    def _over_everywhere(self) -> bool:
        history = self.cluster.history()
        lives = {event.node: event.boot for event in history if event.name == "started"}
        running = {lives[node.name] for node in self.cluster.nodes if node.running and node.name in lives}
        took = {event.boot for event in events_of(history, "job_taken", job=self.job)}
        over = {event.boot for event in events_of(history, "job_over", job=self.job)}
        return bool(over) and running & took <= over

    @cached_property
    def weights(self) -> str:
        """As rank 0 printed them at the end."""
        logs = (node.folder / "log" / self.job for node in self.cluster.nodes)
        texts = (file.read_text(errors="replace") for log in logs for file in log.rglob("stdout.log"))
        return next(filter(None, map(_weights_in, texts)), "")

    def judge(self, reference: Reference) -> list[Violation]:
        """What was not as it must be; empty when all was."""
        trained = self.trained
        found = judge_curve(trained, reference)
        if self.weights != reference.weights:
            what = f"the weights end as {self.weights[:12] or 'nothing'}, not as {reference.weights[:12]}"
            found.append(Violation(rule="same_bits", t=0.0, node="", what=what))
        history = [event for event in self.cluster.history() if event.t >= self.started_at]
        found += validators.validate(history, self.pauses)
        return found + validators.workers_train_one_world(trained, history, self.job)


def judge_curve(trained: Sequence[Trained], reference: Reference) -> list[Violation]:
    """The ledger against the reference's: the same losses, and each sample of each step exactly once."""
    relative = 0.0 if reference.task.exact else RELATIVE
    found = validators.samples_count_once(trained, STEPS, BATCH)
    return found + validators.same_as(reference.trained, trained, relative)


def _weights_in(text: str) -> str:
    found = _WEIGHTS.search(text)
    return found[1] if found else ""
