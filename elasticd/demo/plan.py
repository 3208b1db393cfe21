"""What the demo does, and when: options in, a list of cues out. Pure.

Not here: how a cue is carried out (driver.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from elasticd.errors import ConfigError

JOB = "byte-gpt"
NODES = 3
CHECKPOINTS, LEDGER = "checkpoints", "ledger.jsonl"
BATCH, LENGTH, WIDTH = 24, 64, 96
SAVE_EVERY = 10
DEFAULT_STEPS = 800
#: Below it, a joiner that imports torch on a busy machine would come after the end.
LEAST_STEPS = 120
#: On a fast machine the steps are stretched to last this long in all: a joiner needs seconds to import torch.
LEAST_TRAINING_S = 36.0


class Act(StrEnum):
    """What the demo does to the cluster."""

    KILL = "kill"
    JOIN = "join"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """``steps`` 0: enough for the whole story. ``keep``: a folder for all that was written; without one, none stays."""

    as_json: bool = False
    steps: int = 0
    seed: int = 1
    keep: str = ""
    plain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cue:
    """Act when a world of ``world`` ranks has completed ``steady`` steps, and ``from_step`` steps are done in all."""

    act: Act
    world: int
    from_step: int
    steady: int
    hosts_store: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    steps: int
    seed: int
    cues: tuple[Cue, ...]

    @property
    def step_seconds(self) -> float:
        """The least length of a step."""
        return LEAST_TRAINING_S / self.steps

    def command(self, folder: Path) -> list[str]:
        """The training script (a module) and its arguments: it writes below ``folder``."""
        arguments = {
            "--steps": self.steps,
            "--step-seconds": self.step_seconds,
            "--seed": self.seed,
            "--batch": BATCH,
            "--length": LENGTH,
            "--width": WIDTH,
            "--save-every": SAVE_EVERY,
            "--checkpoint-dir": folder / CHECKPOINTS,
            "--ledger": folder / LEDGER,
        }
        return ["elasticd.examples.byte_gpt", *(str(part) for pair in arguments.items() for part in pair)]


def make_plan(options: DemoOptions) -> Plan:
    """A node dies, one joins, the one with the store dies, one joins. ConfigError when there is no room for it."""
    steps = options.steps or DEFAULT_STEPS
    if steps < LEAST_STEPS:
        raise ConfigError(f"--steps {options.steps}: the story needs at least {LEAST_STEPS}")
    first, second = steps * 15 // 100, steps * 45 // 100
    cues = (
        Cue(act=Act.KILL, world=NODES, from_step=first, steady=SAVE_EVERY),
        Cue(act=Act.JOIN, world=NODES - 1, from_step=first, steady=SAVE_EVERY),
        Cue(act=Act.KILL, world=NODES, from_step=second, steady=2 * SAVE_EVERY, hosts_store=True),
        Cue(act=Act.JOIN, world=NODES - 1, from_step=second, steady=SAVE_EVERY),
    )
    return Plan(steps=steps, seed=options.seed, cues=cues)


def is_due(cue: Cue, *, world: int, step: int, steps_in_round: int) -> bool:
    """A kill waits for the middle between two checkpoints: so that steps are lost, and are seen to be done again."""
    midway = cue.act is Act.JOIN or step % SAVE_EVERY >= SAVE_EVERY // 2
    return world == cue.world and step >= cue.from_step and steps_in_round >= cue.steady and midway
