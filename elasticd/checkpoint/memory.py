"""The RAM tier as a session sees it: copies go out behind the steps, and the newest one comes back.

Not here: how (memory_save.py, memory_restore.py), the session's own state, and the daemon that holds the bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from elasticd.checkpoint.exchange import share
from elasticd.checkpoint.memory_restore import MakeState, MemoryRestore, Restored, RestoringHost
from elasticd.checkpoint.memory_save import Copied, MemoryCopies, MemoryCounts, Ranks, SavingHost
from elasticd.core.memory import Need

log = logging.getLogger(__name__)


class Host(SavingHost, RestoringHost, Protocol):
    """The daemon."""


class MemoryTier:
    """Collective to make and to use: all ranks call the same methods in the same order.

    ``host`` is None without a daemon.
    """

    def __init__(self, host: Host | None, ranks: Ranks, *, every_steps: int, told: Callable[[Copied], None]) -> None:
        self._ranks = ranks
        self._restore = MemoryRestore(host, ranks.group)
        self._host = host
        self._copies: MemoryCopies | None = None
        if all(share(host is not None, ranks.group)):
            assert host is not None
            self._copies = MemoryCopies(host, ranks, every_steps=every_steps, told=told)
        elif ranks.rank == 0:
            log.warning("elasticd: no copies in RAM: they need elasticd's daemon on every node")

    @property
    def counts(self) -> MemoryCounts:
        return self._copies.counts if self._copies is not None else MemoryCounts()

    def step_completed(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """After each step, before it counts."""
        if self._copies is not None:
            self._copies.step_completed(step, state)

    def save(self, state: Callable[[], dict[str, Any]], step: int, need: int) -> bool:
        """Before a stop: a copy of this very step, if there can be one. Whether it is enough for that kind of stop."""
        copied = self._copies.save(state, step) if self._copies is not None else None
        if copied is None or not copied.committed or copied.step != step:
            return False
        return need <= Need.COPY or (need <= Need.BUDDY and copied.at_buddies)

    def restore(self, make_state: MakeState, *, at_least: int) -> Restored | None:
        """The newest copy of so many steps or more that can be had, loaded; None when there is none.

        ``at_least`` is rank 0's. Where training goes back, a copy may be under way, over the same group: it ends first.
        """
        if self._copies is not None:
            self._copies.wait()
        return self._restore.restore(make_state, at_least=share(at_least, self._ranks.group)[0])

    def settle(self) -> None:
        """Training goes on from elsewhere: what is in RAM is void."""
        if self._host is not None:
            self._host.restored(None)

    def check(self) -> None:
        """Raise what broke a copy. Costs nothing: call it each step."""
        if self._copies is not None:
            self._copies.check()

    def close(self, timeout_s: float | None = None) -> bool:
        """Wait for a copy under way; whether none is."""
        return self._copies is None or self._copies.close(timeout_s)
