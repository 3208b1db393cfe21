"""Which checkpoints stay. Pure. Not here: removing the others (storage.prune)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from elasticd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The newest ``last``; beside them the first of every ``each_steps`` steps and of every ``each_hours`` hours.

    0 turns a period off. Pinned checkpoints stay whatever this says, and do not count.
    """

    last: int = 3
    each_steps: int = 0
    each_hours: float = 0.0

    def __post_init__(self) -> None:
        if self.last < 1 or self.each_steps < 0 or self.each_hours < 0:
            raise ConfigError("of checkpoints keep at least the last one, and periods that are not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A checkpoint as far as retention goes."""

    step: int
    saved_at_unix_s: float
    pinned: bool


def choose_doomed(standing: Iterable[Standing], keep: Keep) -> list[int]:
    """The steps to remove, oldest first. To apply it again removes nothing more: the first of a period stays first."""
    ours = sorted((one for one in standing if not one.pinned), key=lambda one: one.step)
    stay = {one.step for one in ours[-keep.last :]}
    stay |= _first_of_each([(one.step // keep.each_steps, one.step) for one in ours] if keep.each_steps else [])
    period_s = 3600 * keep.each_hours
    stay |= _first_of_each([(int(one.saved_at_unix_s // period_s), one.step) for one in ours] if period_s else [])
    return [one.step for one in ours if one.step not in stay]


def _first_of_each(numbered: Sequence[tuple[int, int]]) -> set[int]:
    first: dict[int, int] = {}
    for period, step in numbered:
        first.setdefault(period, step)
    return set(first.values())
