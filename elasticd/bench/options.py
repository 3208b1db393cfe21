"""What the command line asks of every experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

QUICK_OURS = 2
QUICK_THEIRS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """``repeat`` 0: each experiment's own number of times. ``checkpoint_gb``: of state, in the checkpoint experiment;
    0 for all of its sizes.
    ``say`` tells of progress."""

    repeat: int = 0
    quick: bool = False
    checkpoint_gb: int = 0
    say: Callable[[str], None] = lambda _: None

    def ours(self, usual: int) -> int:
        """How often to measure elasticd."""
        return self.repeat or (min(usual, QUICK_OURS) if self.quick else usual)

    def theirs(self, usual: int) -> int:
        """How often to measure torchrun, which takes longer each time: never more often than usual."""
        return min(usual, QUICK_THEIRS) if self.quick else min(usual, self.repeat or usual)
