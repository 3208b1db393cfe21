"""Where training stands, and how a checkpoint says so: the session's own part of the state.

Steps, the place in the order of samples, the seed, what a step is, and each rank's random state. Not here: the state
of what the script registered (state.py), where all of it is kept (checkpoints.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch

from elasticd.errors import ConfigError
from elasticd.worker.data import Cursor
from elasticd.worker.planned import PlannedSteps
from elasticd.worker.state import apply_random, capture_random, derive_seed, seed_random


@dataclass(slots=True, kw_only=True)
class Position:
    """The session moves it on with each step. ``seed``: 0 where the session was given none."""

    seed: int
    device: torch.device
    rank: int
    #: Whose random state this rank takes up: of one rank for each replica, whose ranks must draw the same.
    random_of: int
    planned: PlannedSteps | None
    #: How many steps are completed.
    completed: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    #: 0 until a step has said it.
    dataset_size: int = 0

    def advance(self, completed: int, cursor: Cursor, dataset_size: int) -> None:
        """A step is completed."""
        self.completed, self.cursor, self.dataset_size = completed, cursor, dataset_size

    def to_save(self) -> dict[str, Any]:
        return self._state(random_of=self.rank)

    def to_fill(self, world_size: int) -> dict[str, Any]:
        """What this rank wants of a checkpoint that a world of this size has saved."""
        return self._state(random_of=self.random_of if self.random_of < world_size else None)

    def take_up(self, state: dict[str, Any], step: int, directory: object) -> None:
        """Go on from what was restored. ConfigError, which names the directory, when it was made with another seed."""
        own = json.loads(state["session"])
        if own["seed"] != self.seed:
            raise ConfigError(
                f"the checkpoint of step {step} in {directory} was made with seed {own['seed']}, not "
                f"{self.seed}: samples would be skipped and repeated; use that seed, or another directory"
            )
        self.completed = step
        self.cursor, self.dataset_size = Cursor(**own["cursor"]), own["dataset_size"]
        if self.planned is not None:
            self.planned.resume(own)
        if "random" in state:
            apply_random(state["random"][str(self.random_of)], self.device)
        else:
            seed_random(derive_seed(self.seed, step, self.random_of))

    def alike(self) -> dict[str, int]:
        """Of the data, what the ranks must have in common between two steps, by name.

        Without planned steps nothing: which ranks ask for ``batch_indices`` is then the script's business.
        """
        if self.planned is None:
            return {}
        return {
            "the size of the data set": self.dataset_size,
            "the epoch": self.cursor.epoch,
            "how many samples steps have had of this epoch, and so the size of micro-batches,": self.cursor.index,
        }

    def _state(self, *, random_of: int | None) -> dict[str, Any]:
        cursor = {"epoch": self.cursor.epoch, "index": self.cursor.index}
        data = {"cursor": cursor, "seed": self.seed, "dataset_size": self.dataset_size}
        planned = {} if self.planned is None else self.planned.state(self.completed)
        state: dict[str, Any] = {"session": json.dumps({"step": self.completed, **data, **planned})}
        if random_of is not None:
            state["random"] = {str(random_of): capture_random(self.device)}
        return state
