"""What a training script imports: ``elasticd.Session``.

    session = elasticd.Session(micro_batches=16, checkpoint_dir="checkpoints", save_every_steps=100, seed=1)
    model = DistributedDataParallel(Net().to(session.device))
    optimizer = torch.optim.AdamW(model.parameters())
    session.register(model=model, optimizer=optimizer)
    session.restore()
    for step in session.progress(session.steps(until=10_000)):
        with step:
            for inputs, targets in step.micro_batches(dataset, size=4):
                step.backward(loss_of(model(inputs), targets))  # the mean over the micro-batch
            optimizer.step()
            step.report(loss=step.mean_loss())

What happens inside ``with step:`` belongs to that step alone, and takes its samples and its weight from ``step``: so
the library may yield the same step again, when it could not be completed. A step is completed when the block ends.
Between two steps the job stops for a change of its world, and checkpoints are begun: the next step waits while the
state is copied, and the copy is written behind the steps that follow. The last checkpoint, and one before a stop, stand
before the loop ends.

A step is 16 micro-batches here, whatever the world; how many of them a rank computes follows its speed. A script that
would rather divide its batch itself asks ``step.batch_indices`` for sample ids, and multiplies its loss by
``step.loss_scale``.

It runs under elasticd, under plain torchrun, and under plain python as a world of one; without a daemon everything
works but reports and stops. This module is the composition root of the training process: it alone joins worker/ and
checkpoint/. Not here: recovery inside the process (to come).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from elasticd.checkpoint import storage
from elasticd.checkpoint.background import BackgroundSaver, Counts, Stall
from elasticd.checkpoint.foreign import agree_on_foreign, load_foreign
from elasticd.checkpoint.held import Held
from elasticd.checkpoint.manifest import complete_name
from elasticd.checkpoint.memory import MemoryTier
from elasticd.checkpoint.memory_save import Copied, MemoryCounts, Ranks
from elasticd.checkpoint.restore import PassedOver, Restored, restore_newest
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saved, Saver
from elasticd.errors import ChannelClosed, ConfigError, Fenced, OperatorError, SaveFailed, StateLost
from elasticd.torch_defects import keep_destroyed_groups
from elasticd.worker.compress import Compression, check_compression, compress_gradients
from elasticd.worker.control import Control
from elasticd.worker.data import Cursor
from elasticd.worker.fence import RoundFence
from elasticd.worker.layout import Layout, arrange
from elasticd.worker.link import DaemonLink, StepReport
from elasticd.worker.memory_host import MemoryHost
from elasticd.worker.planned import PlannedSteps
from elasticd.worker.powersgd import PowerSGD
from elasticd.worker.progress import Progress, choose_display
from elasticd.worker.shares import Balance, as_told, make_work
from elasticd.worker.speeds import BusySteps, SpeedReports
from elasticd.worker.state import (
    Registered,
    Stateful,
    apply_random,
    capture_random,
    check_fit,
    derive_seed,
    seed_random,
)
from elasticd.worker.step import Step
from elasticd.worker.traffic import Traffic
from elasticd.worker.waiting import GradientWait
from elasticd.worker.world import Place, choose_device, join_world, make_side_group

log = logging.getLogger(__name__)

#: How long a script that failed waits for a save under way, before it leaves the process groups to the system.
CLOSE_AFTER_ERROR_S = 5.0
#: The exit status of a worker that parked at a boundary and then lost its daemon: not a success, not a crash.
EXIT_PARKED = 75  # EX_TEMPFAIL


class Session:
    """One training process's part in the job. Made by all ranks together (it makes process groups).

    ``checkpoint_dir`` must be the same directory for all ranks (one host, or a shared file system); without it nothing
    is saved. ``save_every_steps``: 0 saves only at stops and at the end. ``keep``: how many checkpoints stay, or more
    finely which (``checkpoint.retention.Keep``). ``seed`` seeds the random states and the order of samples. ``device``
    overrides the choice of the GPU of this local rank. ``save_timeout_s``: for how long a save waits for a rank that is
    silent (one that died fails it at once). It must be longer than the slowest rank takes to write its part: a save
    that times out ends the process. Saving keeps a copy of this rank's state in host memory.

    ``memory_every_steps``: of completed steps fewer than so many are lost when workers or a node die: the state is
    copied into memory that the daemon owns, and to a node in another failure domain, behind the steps (the copies are
    begun half as far apart; with 1 each step waits for its own). 0: none. It needs elasticd's daemon, and a restart
    takes up whichever is newer, the copy in RAM or the checkpoint on disk.

    ``micro_batches``: how many a step has, on all ranks together and for the whole job, for ``step.micro_batches``.
    ``max_micro_batches``: no more than so many in a step for this rank. ``balance``: "on" gives faster ranks more of
    them, "off" divides them equally, "auto" is on where each rank holds the whole model, numbers divide them in that
    proportion: (1, 2, 5) gives rank 2 five times as many as rank 0. ``exact``: gradients are
    summed in fixed point, the same bits on any world (worker/exact.py says what that costs, and does not cover).

    ``layout``: how ranks share one model (tensor parallel, pipeline stages, HSDP), where each does not compute samples
    of its own (worker/layout.py). "Rank" above is then a replica; ``max_micro_batches`` is the least of its ranks'.

    ``compress``: "bf16" or "fp16": gradients are averaged over ranks in that type, in half of the bytes; for DDP
    (worker/compress.py). "powersgd", or PowerSGD(rank=...): as matrices of low rank, in far fewer (worker/powersgd.py).

    ConfigError when the directory is not writable, the environment is not whole, or the world cannot hold the layout.
    """

    def __init__(
        self,
        *,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        save_every_steps: int = 0,
        memory_every_steps: int = 0,
        keep: int | Keep = 3,
        seed: int | None = None,
        device: str | None = None,
        save_timeout_s: float = 300.0,
        micro_batches: int | None = None,
        max_micro_batches: int | None = None,
        balance: Balance = "auto",
        exact: bool = False,
        layout: Layout | None = None,
        compress: Compression | PowerSGD | None = None,
    ) -> None:
        _show_operator_errors_as_one_line()
        if save_every_steps < 0 or (isinstance(keep, int) and keep < 1):
            raise ConfigError("save_every_steps must not be negative, and keep must be at least 1")
        if memory_every_steps < 0:
            raise ConfigError("memory_every_steps must not be negative")
        if seed is not None and type(seed) is not int:
            raise ConfigError(f"seed is {seed!r}: say a whole number")
        work = make_work(micro_batches, at_most=max_micro_batches, balance=balance, exact=exact)
        self._place = Place.from_environment()
        self.device = choose_device(self._place, device)
        self._directory = Path(checkpoint_dir).absolute() if checkpoint_dir is not None else None
        if self._directory is not None:
            storage.open_directory(self._directory)
        self._made_world = join_world(self._place, self.device)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._control = Control()
        check_compression(compress, exact=exact, group=self._control.group)
        self._compress = compress
        self.arranged = arrange(layout, self._place, self._control.group)
        self._traffic = Traffic(self.arranged, exact=exact)
        self._mesh = self.arranged.make_mesh(self.device) if layout is not None else None
        self._save_every_steps, self._seed = save_every_steps, seed or 0
        self._link = _connect(self._place)
        self._saver = self._make_saver(Keep(last=keep) if isinstance(keep, int) else keep, save_timeout_s)
        self._memory = self._make_memory(memory_every_steps, save_timeout_s)
        self.planned: PlannedSteps | None = None
        if work is not None:
            self.planned = PlannedSteps(
                work,
                group=self._control.group,
                arranged=self.arranged,
                device=self.device,
                seed=seed,
                tell=self._tell_shares,
            )
        self._registered: Registered | None = None
        self._waiting = GradientWait()
        self._busy, self._speeds = BusySteps(self.device), SpeedReports()
        self._restored = self._in_step = self._closed = False
        self._completed = 0
        self._until: int | None = None
        self._progress: Progress | None = None
        self._saved_step = -1
        self.cursor = Cursor()
        self.dataset_size = 0
        if seed is not None:
            seed_random(seed)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @property
    def mesh(self) -> DeviceMesh:
        """How the layout arranges the ranks: "dp" (or "replicate" and "shard"), then "pp" and "tp" as it has them.

        Collective at its first use in a session without a layout, where all ranks are "dp".
        """
        if self._mesh is None:
            self._mesh = self.arranged.make_mesh(self.device)
        return self._mesh

    @property
    def replicas(self) -> int:
        """How many groups of ranks compute micro-batches of their own: all ranks, without a layout."""
        return self.arranged.replicas

    @property
    def leads_replica(self) -> bool:
        """True on one rank of each replica: for what must be counted or written once, such as sample ids."""
        return self.arranged.leads

    @property
    def local_rank(self) -> int:
        """Of this process among those of its node, from 0: the GPU that it has, unless ``device`` says another."""
        return self._place.local_rank

    @property
    def round_number(self) -> int:
        """The round of the world under elasticd; torchrun's restart count under torchrun."""
        return self._place.round_number

    @property
    def seed(self) -> int:
        """What the session was given; 0 without one, for the order of samples alone."""
        return self._seed

    @property
    def step(self) -> int:
        """How many steps are completed: also the index of the step to come."""
        return self._completed

    @property
    def save_counts(self) -> Counts | None:
        """What saving has done and cost so far on this rank; None without a directory."""
        return None if self._saver is None else self._saver.counts

    @property
    def sent_bytes(self) -> int:
        """By this rank, for gradients, in the steps that are completed (worker/traffic.py says what is counted)."""
        return self._traffic.sent_bytes

    @property
    def memory_counts(self) -> MemoryCounts | None:
        """What copies in RAM have done and cost so far on this rank; None without them."""
        return None if self._memory is None else self._memory.counts

    def register(
        self,
        *,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        extra: Mapping[str, Stateful] | None = None,
    ) -> None:
        """Name what a checkpoint must hold. Once, before ``restore``; wrap the model (DDP, FSDP2) first.

        ``extra``: whatever else has ``state_dict`` and ``load_state_dict``, by name: a scheduler, for one.

        RuntimeError a second time, or too late; ValueError when the optimizer's parameters are not the model's;
        ConfigError when gradients could not be averaged as asked for.
        """
        if self._registered is not None or self._restored:
            raise RuntimeError("call session.register() once, with everything, before session.restore()")
        if optimizer is not None and model is None:
            raise ValueError("an optimizer is saved by the names of its model's parameters: register the model too")
        check_fit(model, optimizer)
        self._registered = Registered(model=model, optimizer=optimizer, extra=dict(extra or {}))
        if self.arranged.layout.pipeline > 1:
            self._registered.unite = self._unite_stages
        if model is not None and optimizer is not None and self.device.type == "cpu":
            self._waiting.attach(model.parameters() if self.planned is None else (), optimizer)
        self._traffic.use(self._registered)
        if model is not None and self._compress is not None:
            compress_gradients(
                self._registered,
                self._compress,
                world_size=self.world_size,
                step=lambda: self._completed,
                sent=self._traffic.all_reduced,
            )
        if model is not None and self.planned is not None:
            self.planned.use(self._registered, on_gradients=self._waiting.gradients_came)

    def restore(self, *, start_from: str | os.PathLike[str] | None = None) -> int:
        """Collective. Take up the newest checkpoint that verifies; the number of completed steps (0: a fresh start).

        ``start_from``: where there is none yet, fill what is registered from this directory, which plain
        torch.distributed.checkpoint.save wrote ("model", "optimizer" and "extra", or a model's state alone). It has no
        checksums, so it is taken unverified, with a warning, and unpickled; steps are counted from 0.

        ConfigError when the checkpoint is not of the model and optimizer that are registered, was made with another
        seed, or is not there for every rank. StateLost when what was registered has been overwritten by a checkpoint
        that proved damaged, and no other one is whole.
        """
        registered = self._known()
        self._restored = True
        if self._memory is None:
            return self._restore_from_disk(registered, start_from)
        steps = storage.complete_steps(self._directory) if self._directory is not None else []
        if self._restore_from_memory(self._memory, registered, at_least=steps[0] if steps else 0):
            return self._completed
        lost: StateLost | None = None
        try:
            self._restore_from_disk(registered, start_from)
        except StateLost as error:  # on every rank
            lost = error
        # What is newest on disk may have been damaged: then a copy in RAM may be the newest after all.
        if not self._restore_from_memory(self._memory, registered, at_least=self._completed + 1):
            self._memory.settle()
            if lost is not None:
                raise lost
        return self._completed

    def _restore_from_memory(self, memory: MemoryTier, registered: Registered, *, at_least: int) -> bool:
        """Whether training goes on from a copy of so many steps or more."""

        def make_state(held: Held) -> dict[str, Any]:
            known = self._random_of < held.world_size
            return registered.wanted(held.sizes) | self._own_state(random_of=self._random_of if known else None)

        had_state = registered.has_optimizer_state
        restored = memory.restore(make_state, at_least=at_least)
        if restored is None:
            if not had_state:
                registered.drop_optimizer_state()
            return False
        registered.apply(restored.state)
        self._take_own_state(restored.state, restored.step)
        if self._directory is None or not (self._directory / complete_name(restored.step)).exists():
            self._saved_step = -1
        self._tell_restored(restored.source, restored.seconds, restored.size_bytes)
        if self.rank == 0:
            log.warning("elasticd: step %d is taken up from RAM (%s)", restored.step, restored.source)
        return True

    def _restore_from_disk(self, registered: Registered, start_from: str | os.PathLike[str] | None) -> int:
        started = time.monotonic()
        found = self._restore_newest(registered)
        if found is None:
            if start_from is not None:
                self._start_from(registered, Path(start_from))
            return self._completed
        registered.apply(found.state)
        self._take_own_state(found.state, found.manifest.step)
        self._tell_restored("disk", time.monotonic() - started, found.manifest.size_bytes)
        return self._completed

    def steps(self, until: int | None = None) -> Iterator[Step]:
        """The steps to come, up to ``until`` completed ones in all. Each is to be used as ``with step:``.

        A step whose block raised is not counted: if the script goes on all the same, on every rank, it is yielded
        again. Saves, stops and the final checkpoint (at ``until``; call ``save`` when you leave earlier) happen in
        between. StepsDiverged when the ranks are not in the same step. Fenced when a newer round stands without this
        process; SystemExit after a stop, when the daemon is gone.
        """
        self._check_ready()
        if self._saver is not None:
            self._saver.began_at(self._completed)
        self._until = until
        while until is None or self._completed < until:
            step = Step(self, self._completed)
            yield step
            if not step.entered:
                raise RuntimeError("a step of session.steps() was not used: write 'with step:' in the loop")
            if not step.completed:
                continue
            if step.stop_agreed and self._completed != until:
                self._save_before_stop()
                self._park()
            elif self._completed == until:
                self._save_or_warn()
            elif self._saves_at(self._completed):
                self.begin_save()

    def progress(self, steps: Iterator[Step], *, every_s: float = 10.0, file: TextIO | None = None) -> Iterator[Step]:
        """The same steps, while rank 0 shows how far they are.

            for step in session.progress(session.steps(until=10_000)):

        Step, loss (where the script reports it), samples a second of all ranks, time left, world size, and shares when
        they are unequal: as a bar in a terminal, as a line every ``every_s`` seconds otherwise. ``file``: where, by
        default standard error. That it cannot be written to is no error.
        """
        if not isinstance(steps, Iterator):
            raise TypeError("write 'for step in session.progress(session.steps(...))'")
        if self.rank != 0:
            return steps
        self._progress = Progress(choose_display(file, every_s), self._standing)
        return self._progress.follow(steps)

    def _standing(self) -> dict[str, Any]:
        shares = self.planned.shares if self.planned is not None else ()
        unequal = shares if len(set(shares)) > 1 else ()
        return {"until": self._until, "world_size": self.world_size, "shares": unequal}

    def save(self) -> Saved | None:
        """Collective, between two steps. Save now, and return once it is durable; None without a directory, or when
        this step is saved already.

        SaveFailed when the storage refused.
        """
        saver = self._ready_to_save()
        if saver is None:
            return None
        saver.wait()
        if self._saved_step == self._completed:
            return None
        return saver.save(self._state(), self._completed)

    def begin_save(self) -> None:
        """Collective, between two steps. Returns once the state is copied: it is written behind the steps to come.

        It waits for a save that is still under way. That the storage refused is logged, and counted in ``save_counts``.
        """
        saver = self._ready_to_save()
        if saver is not None:
            saver.start(self._state(), self._completed)

    def close(self) -> None:
        """Wait for a save under way, send the last reports, and leave the process groups that were made here."""
        self._close(None)

    def _close(self, wait_s: float | None) -> None:
        self._closed = True
        if self._progress is not None:  # before a traceback is printed, if there is one
            self._progress.close()
        if self.planned is not None:
            self.planned.close()
        try:
            if self._memory is not None:
                self._memory.close(wait_s)
            if self._saver is not None:
                self._saver.wait(wait_s)
        finally:
            if self._link is not None:
                self._link.close()
            still_saving = self._saver is not None and self._saver.in_flight  # over a group: do not take it away
            still_saving |= self._memory is not None and not self._memory.close(0.0)
            if self._made_world and dist.is_initialized() and not still_saving:
                keep_destroyed_groups()
                dist.destroy_process_group()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # what broke the save, most likely by the same cause as the error
            self._close(CLOSE_AFTER_ERROR_S)

    # What Step needs of its session.

    def begin(self) -> None:
        if self._in_step or self._closed:
            raise RuntimeError("the session is closed" if self._closed else "a step is under way: end its block first")
        if self._link is not None and self._link.refusal:
            raise Fenced(f"checkpoint refused: {self._link.refusal}")
        if self._saver is not None:
            self._saver.check()
        self._set_in_step(True)
        self._waiting.take()
        if self._memory is not None:
            self._memory.check()
        wanted = self._link.stop_need if self._link is not None else 0
        due = self._saves_at(self._completed + 1)
        own = self.planned.measure if self.planned is not None else lambda: as_told(self._busy.take())
        self._control.start(self._completed, stop_wanted=wanted, due=due, own=own)

    def abandon(self) -> None:
        self._set_in_step(False)

    def complete(self, step: Step) -> None:
        step.stop_agreed, blocked_s = self._control.finish(step.index)
        self._set_in_step(False)
        seconds = time.monotonic() - step.started_at
        self._completed = step.index + 1
        self.cursor, self.dataset_size = step.next_cursor, step.dataset_size
        if self.planned is not None:
            self.planned.decide(self._completed, self._control.told)
        if self._memory is not None:
            self._memory.step_completed(self._completed, self._state)
        waited_s = self._waiting.take() + blocked_s
        sent_bytes = self._traffic.take()
        self._busy.add(seconds - waited_s)
        if self._control.told and self._place.local_rank == 0:
            self._report_speeds(self._link, self._control.told)
        if self._link is not None:
            self._link.report(
                StepReport(
                    step=self._completed,
                    seconds=seconds,
                    wait_seconds=waited_s,
                    samples=step.samples,
                    sent_bytes=sent_bytes,
                    metrics=step.metrics,
                )
            )

    def _report_speeds(self, link: DaemonLink | None, told: list[int]) -> None:
        self._speeds.add(told)
        message = self._speeds.take()
        if link is None or message is None:
            return
        planned = self.planned
        shares = {"shares": planned.shares, "balanced": planned.balanced} if planned is not None else {}
        link.post(message | shares)

    def _tell_shares(self, event: Mapping[str, Any]) -> None:
        """All ranks have decided the same: one of them says so."""
        if self.rank == 0:
            log.info("elasticd: shares %s from step %d on: %s", event["shares"], event["step"], event["reason"])
            if self._link is not None:
                self._link.post(dict(event))

    def _saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due once so many steps are completed."""
        return step == self._until or (self._save_every_steps > 0 and step % self._save_every_steps == 0)

    def _set_in_step(self, value: bool) -> None:  # noqa: FBT001
        self._in_step = value
        if self._link is not None:
            self._link.in_step = value

    def _unite_stages(self, own: list[list[str]]) -> list[list[str]]:
        from elasticd.worker.pipeline import names_of_all_stages

        return names_of_all_stages(own, self.mesh.get_group("pp"))

    @property
    def _random_of(self) -> int:
        """Whose random state this rank takes up: of one rank for each replica, whose ranks must draw the same."""
        return self.arranged.first_rank

    def _own_state(self, *, random_of: int | None) -> dict[str, Any]:
        cursor = {"epoch": self.cursor.epoch, "index": self.cursor.index}
        data = {"cursor": cursor, "seed": self._seed, "dataset_size": self.dataset_size}
        planned = {} if self.planned is None else self.planned.state(self._completed)
        state: dict[str, Any] = {"session": json.dumps({"step": self._completed, **data, **planned})}
        if random_of is not None:
            state["random"] = {str(random_of): capture_random(self.device)}
        return state

    def _restore_newest(self, registered: Registered) -> Restored | None:
        if self._directory is None:
            return None

        def make_state(held: Held) -> dict[str, Any]:
            known = self._random_of < held.world_size
            return registered.wanted(held.sizes) | self._own_state(random_of=self._random_of if known else None)

        passed_over: list[PassedOver] = []
        try:
            return restore_newest(self._directory, self._control.group, make_state, passed_over)
        finally:
            if passed_over and self._link is not None:
                self._link.post({"type": "passed_over", "count": len(passed_over)})

    def _start_from(self, registered: Registered, path: Path) -> None:
        parts = agree_on_foreign(path, self._control.group)
        wanted = registered.only(parts)  # to capture an optimizer's state may make one
        state = wanted.capture()
        load_foreign(state, path, parts)
        wanted.apply(state)

    def _take_own_state(self, state: dict[str, Any], step: int) -> None:
        own = json.loads(state["session"])
        if own["seed"] != self._seed:
            raise ConfigError(
                f"the checkpoint of step {step} in {self._directory} was made with seed {own['seed']}, not "
                f"{self._seed}: samples would be skipped and repeated; use that seed, or another directory"
            )
        self._completed = self._saved_step = step
        self.cursor, self.dataset_size = Cursor(**own["cursor"]), own["dataset_size"]
        if self.planned is not None:
            self.planned.resume(own)
        if "random" in state:
            apply_random(state["random"][str(self._random_of)], self.device)
        else:
            seed_random(derive_seed(self._seed, step, self._random_of))

    def _state(self) -> dict[str, Any]:
        return self._known().capture() | self._own_state(random_of=self.rank)

    def _make_saver(self, keep: Keep, timeout_s: float) -> BackgroundSaver | None:
        if self._directory is None:
            return None
        place = self._place
        saver = Saver(
            self._directory,
            group=make_side_group(timeout_s),
            job_id=place.job_id,
            round_number=place.round_number,
            keep=keep,
            fence=RoundFence(self._link, timeout_s / 2) if self._link is not None else None,
        )
        return BackgroundSaver(saver, self._save_ended)

    def _make_memory(self, every_steps: int, timeout_s: float) -> MemoryTier | None:
        """Collective where copies in RAM are asked for."""
        if not every_steps:
            return None
        place = self._place
        ranks = Ranks(
            rank=self.rank,
            world_size=self.world_size,
            leads_node=place.local_rank == 0,
            job_id=place.job_id,
            round_number=place.round_number,
            group=make_side_group(timeout_s),
        )
        host = MemoryHost(self._link, place.node_id, timeout_s=timeout_s) if self._link is not None else None
        return MemoryTier(host, ranks, every_steps=every_steps, told=self._tell_copied)

    def _tell_copied(self, copied: Copied) -> None:
        """In the thread that copies."""
        if self._link is not None:
            self._link.post(
                {
                    "type": "memory_copied",
                    "step": copied.step,
                    "result": "committed" if copied.committed else "void",
                    "at_buddies": copied.at_buddies,
                    "size_bytes": copied.size_bytes,
                    "seconds": copied.seconds,
                    "stall_seconds": copied.stall_s,
                }
            )

    def _tell_restored(self, source: str, seconds: float, size_bytes: int) -> None:
        if self._link is not None:
            self._link.post(
                {
                    "type": "restored",
                    "source": source,
                    "step": self._completed,
                    "seconds": seconds,
                    "size_bytes": size_bytes,
                }
            )

    def _ready_to_save(self) -> BackgroundSaver | None:
        if self._in_step:
            raise RuntimeError("save between two steps: a half-done step cannot be taken up again")
        if self._saver is not None:
            self._known()
        return self._saver

    def _save_ended(self, step: int, end: Saved | SaveFailed, stall: Stall) -> None:
        """In the saver's thread. A disk that is full must not end the training: the checkpoint before still stands."""
        saved = end if isinstance(end, Saved) else None
        if saved is not None:
            self._saved_step = step
        elif self.rank == 0:
            log.warning("elasticd: %s", end)
        if self._link is None:
            return
        if saved is not None and self.rank == 0:
            self._link.post({"type": "commit", "step": step, "path": str(saved.path), "seconds": saved.seconds})
        self._link.post(
            {
                "type": "checkpoint",
                "result": "failed" if saved is None else "saved",
                "size_bytes": 0 if saved is None else saved.size_bytes,
                "seconds": 0.0 if saved is None else saved.seconds,
                "stall_seconds": stall.seconds,
                "waited": stall.waited,
            }
        )

    def _known(self) -> Registered:
        if self._registered is None:
            raise RuntimeError("a checkpoint would hold nothing: call session.register(model=..., optimizer=...) first")
        return self._registered

    def _check_ready(self) -> None:
        if self._directory is not None:
            self._known()
        if self._directory is not None and not self._restored and storage.complete_steps(self._directory):
            raise ConfigError(
                f"{self._directory} holds checkpoints of an earlier run: call session.restore() or name another one"
            )

    def _save_or_warn(self) -> None:
        with contextlib.suppress(SaveFailed):  # it has been logged
            self.save()

    def _save_before_stop(self) -> None:
        """In RAM first, which is quick; on disk too where the memory that holds it may be gone after the stop."""
        if self._memory is None or not self._memory.save(self._state, self._completed, self._control.stop_need):
            self._save_or_warn()

    def _park(self) -> None:
        """Say that this rank stands at the boundary, and wait to be stopped."""
        if self._link is not None:
            self._link.post({"type": "boundary", "step": self._completed})
            self._link.wait_closed()
        raise SystemExit(EXIT_PARKED)


def _connect(place: Place) -> DaemonLink | None:
    if not place.socket_path:
        return None
    hello = {
        "type": "worker_hello",
        "job": place.job_id,
        "round": place.round_number,
        "rank": place.rank,
        "local_rank": place.local_rank,
        "pid": os.getpid(),
    }
    try:
        return DaemonLink(place.socket_path, hello)
    except ChannelClosed as error:
        log.warning("elasticd: %s; training goes on without it", error)
        return None


def _show_operator_errors_as_one_line() -> None:
    """A mistake that only a person can mend is worth a line, not a traceback into this library."""
    previous = sys.excepthook
    if getattr(previous, "shows_operator_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, OperatorError):
            print(f"elasticd: error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        else:
            previous(kind, error, traceback)

    hook.shows_operator_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
