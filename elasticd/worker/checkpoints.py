"""A session's checkpoints, on disk and in RAM: what they hold, how they are begun, and which one is taken up.

With session.py it is the composition root of the training process, and joins worker/ to checkpoint/. Not here: when to
save and when to stop (session.py), the session's own state (position.py), what the daemon is told (reports.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from elasticd.checkpoint import storage
from elasticd.checkpoint.background import BackgroundSaver, Counts, Stall
from elasticd.checkpoint.foreign import agree_on_foreign, held_in, load_foreign
from elasticd.checkpoint.held import Held
from elasticd.checkpoint.memory import MemoryTier
from elasticd.checkpoint.memory_save import Copied, MemoryCounts, Ranks
from elasticd.checkpoint.objects import Location, locate
from elasticd.checkpoint.restore import PassedOver, Restored, restore_newest
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saved, Saver
from elasticd.checkpoint.staging import wait_for_device
from elasticd.errors import ConfigError, SaveFailed, StateLost
from elasticd.worker.fence import RoundFence
from elasticd.worker.link import DaemonLink
from elasticd.worker.memory_host import MemoryHost
from elasticd.worker.position import Position
from elasticd.worker.reports import Reports
from elasticd.worker.state import Registered, drop_state
from elasticd.worker.world import Place, make_side_group

log = logging.getLogger(__name__)


def open_directory(wanted: str | os.PathLike[str] | None) -> Location | None:
    """Where checkpoints go, ready to be written to; None where none are wanted. ConfigError when it cannot be."""
    if wanted is None:
        return None
    directory = locate(wanted)
    storage.open_directory(directory)
    return directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the script asked for. ``directory``: None saves nothing on disk. ``memory_every_steps``: 0 copies nothing
    to RAM."""

    directory: Location | None
    keep: Keep
    memory_every_steps: int
    timeout_s: float


class Checkpoints:
    """Collective to make and, but for counts and checks, to use: all ranks call the same methods in the same order.

    ``group`` is of all ranks, and used in the training thread alone; None in a world of one.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        place: Place,
        group: dist.ProcessGroup | None,
        link: DaemonLink | None,
        reports: Reports,
        position: Position,
    ) -> None:
        self._policy, self._place, self._group = policy, place, group
        self._directory = policy.directory
        self._link, self._reports, self._position = link, reports, position
        self._registered: Registered | None = None
        self._restored = False
        self._saved_step = -1  # the same on every rank: after a copy in RAM it is for rank 0 to say what is on disk
        self._saver = self._make_saver()
        self._memory = self._make_memory()

    def _make_saver(self) -> BackgroundSaver | None:
        if self._directory is None:
            return None
        timeout_s = self._policy.timeout_s
        saver = Saver(
            self._directory,
            group=make_side_group(timeout_s),
            job_id=self._place.job_id,
            round_number=self._place.round_number,
            keep=self._policy.keep,
            fence=RoundFence(self._link, timeout_s / 2) if self._link is not None else None,
        )
        return BackgroundSaver(saver, self._save_ended)

    def _make_memory(self) -> MemoryTier | None:
        """Collective where copies in RAM are asked for."""
        every_steps, timeout_s = self._policy.memory_every_steps, self._policy.timeout_s
        if not every_steps:
            return None
        place = self._place
        ranks = Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            leads_node=place.leads_node,
            job_id=place.job_id,
            round_number=place.round_number,
            group=make_side_group(timeout_s),
        )
        host = MemoryHost(self._link, place.node_id, timeout_s=timeout_s) if self._link is not None else None
        return MemoryTier(host, ranks, every_steps=every_steps, told=self._copied)

    # What they hold.

    @property
    def settled(self) -> bool:
        """Whether it is too late to say what they hold."""
        return self._registered is not None or self._restored

    def hold(self, registered: Registered) -> None:
        self._registered = registered

    def _known(self) -> Registered:
        if self._registered is None:
            raise RuntimeError("a checkpoint would hold nothing: call session.register(model=..., optimizer=...) first")
        return self._registered

    def _state(self) -> dict[str, Any]:
        return self._known().capture() | self._position.to_save()

    def _wanted(self, held: Held) -> dict[str, Any]:
        return self._known().wanted(held) | self._position.to_fill(held.world_size)

    # Taking one up.

    def restore(self, start_from: str | os.PathLike[str] | None) -> bool:
        """The newest that verifies, in RAM or on disk; else what is in ``start_from``; else nothing. See Session.

        Whether a checkpoint was taken up, so that all that is registered is as it was after one step.
        """
        registered = self._known()
        self._restored = True
        wait_for_device()  # for how the model was made; threads fill it
        if self._saver is not None:
            self._saver.wait()  # where training goes back: the newest may be under way
        if self._memory is None:
            return self._restore_from_disk(registered, start_from)
        steps = storage.complete_steps(self._directory) if self._directory is not None else []
        if self._restore_from_memory(self._memory, registered, at_least=steps[0] if steps else 0):
            return True
        found, lost = False, None
        try:
            found = self._restore_from_disk(registered, start_from)
        except StateLost as error:  # on every rank
            lost = error
        # What is newest on disk may have been damaged: then a copy in RAM may be the newest after all.
        if self._restore_from_memory(self._memory, registered, at_least=self._position.completed + 1):
            return True
        self._memory.settle()
        if lost is not None:
            raise lost
        return found

    def _restore_from_memory(self, memory: MemoryTier, registered: Registered, *, at_least: int) -> bool:
        """Whether training goes on from a copy of so many steps or more."""
        fresh = registered.fresh_optimizers
        restored = memory.restore(self._wanted, at_least=at_least)
        if restored is None:
            drop_state(fresh)
            return False
        self._take_up(registered, restored.state, restored.step)
        self._reports.restored(
            restored.source, step=restored.step, seconds=restored.seconds, size_bytes=restored.size_bytes
        )
        if self._position.rank == 0:
            log.warning("elasticd: step %d is taken up from RAM (%s)", restored.step, restored.source)
        return True

    def _restore_from_disk(self, registered: Registered, start_from: str | os.PathLike[str] | None) -> bool:
        """Whether a checkpoint was taken up."""
        started = time.monotonic()
        fresh = registered.fresh_optimizers
        found = self._restore_newest()
        if found is None:
            drop_state(fresh)
            if start_from is not None:
                self._start_from(registered, locate(start_from))
            return False
        manifest = found.manifest
        self._take_up(registered, found.state, manifest.step)
        self._saved_step = manifest.step
        seconds = time.monotonic() - started
        self._reports.restored("disk", step=manifest.step, seconds=seconds, size_bytes=manifest.size_bytes)
        return True

    def _restore_newest(self) -> Restored | None:
        if self._directory is None:
            return None
        passed_over: list[PassedOver] = []
        try:
            return restore_newest(self._directory, self._group, self._wanted, passed_over)
        finally:
            if passed_over:
                self._reports.passed_over(len(passed_over))

    def _take_up(self, registered: Registered, state: dict[str, Any], step: int) -> None:
        self._fill(registered, state)
        self._position.take_up(state, step, self._directory)

    def _start_from(self, registered: Registered, path: Location) -> None:
        parts = agree_on_foreign(path, self._group)
        wanted = registered.only(parts)  # to ask for an optimizer's state may make one
        state = wanted.wanted(held_in(path))
        load_foreign(state, path, parts)
        self._fill(wanted, state)

    def _fill(self, registered: Registered, state: dict[str, Any]) -> None:
        registered.apply(state)
        if self._position.rank == 0:
            for remark in registered.remarks:
                log.warning("elasticd: %s", remark)

    # Making them.

    def begin_training(self) -> None:
        """Steps come now. ConfigError when they would not follow on the checkpoints that are there."""
        if self._saver is None or self._directory is None:
            return
        self._known()
        if not self._restored and storage.complete_steps(self._directory):
            raise ConfigError(
                f"{self._directory} holds checkpoints of an earlier run: call session.restore() or name another one"
            )
        self._saver.began_at(self._position.completed)

    def step_completed(self) -> None:
        """After each step, before it counts: a copy in RAM may be due."""
        if self._memory is not None:
            self._memory.step_completed(self._position.completed, self._state)

    def save(self) -> Saved | None:
        """Returns once it is durable; None without a directory, or when this step is saved already.

        SaveFailed when the storage refused.
        """
        if self._saver is None:
            return None
        self._known()
        self._saver.wait()
        if self._saved_step == self._position.completed:
            return None
        return self._saver.save(self._state(), self._position.completed)

    def save_or_warn(self) -> None:
        """As ``save``; that the storage refused has been logged."""
        with contextlib.suppress(SaveFailed):
            self.save()

    def begin_save(self) -> None:
        """Returns once the state is copied: it is written behind the steps to come."""
        if self._saver is not None:
            self._saver.start(self._state(), self._position.completed)

    def save_before_stop(self, need: int) -> None:
        """In RAM first, which is quick; on disk too where the memory that holds it may be gone after the stop."""
        if self._memory is None or not self._memory.save(self._state, self._position.completed, need):
            self.save_or_warn()

    def _save_ended(self, step: int, end: Saved | SaveFailed, stall: Stall) -> None:
        """In the saver's thread. A disk that is full must not end the training: the checkpoint before still stands."""
        saved = end if isinstance(end, Saved) else None
        if saved is not None:
            self._saved_step = step
            self._reports.committed(step, saved.path, seconds=saved.seconds)
        elif self._position.rank == 0:
            log.warning("elasticd: %s", end)
        self._reports.save_ended(
            saved=saved is not None,
            size_bytes=0 if saved is None else saved.size_bytes,
            seconds=0.0 if saved is None else saved.seconds,
            stall_s=stall.seconds,
            waited=stall.waited,
        )

    def _copied(self, copied: Copied) -> None:
        """In the thread that copies."""
        self._reports.copied(
            copied.step,
            committed=copied.committed,
            at_buddies=copied.at_buddies,
            size_bytes=copied.size_bytes,
            seconds=copied.seconds,
            stall_s=copied.stall_s,
        )

    # How they fare.

    @property
    def save_counts(self) -> Counts | None:
        return None if self._saver is None else self._saver.counts

    @property
    def memory_counts(self) -> MemoryCounts | None:
        return None if self._memory is None else self._memory.counts

    def check_saves(self) -> None:
        """Raise what broke a save. Costs nothing: call it each step."""
        if self._saver is not None:
            self._saver.check()

    def check_copies(self) -> None:
        """Raise what broke a copy in RAM. Costs nothing: call it each step."""
        if self._memory is not None:
            self._memory.check()

    def wait(self, timeout_s: float | None) -> None:
        """Until nothing is under way, or the time is over, for either. Copies end here. Raises what broke a save."""
        if self._memory is not None:
            self._memory.close(timeout_s)
        if self._saver is not None:
            self._saver.wait(timeout_s)

    @property
    def in_flight(self) -> bool:
        """Whether a save or a copy is under way, over process groups: do not take them away."""
        copying = self._memory is not None and not self._memory.close(0.0)
        return copying or (self._saver is not None and self._saver.in_flight)
