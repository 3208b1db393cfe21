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
works but reports and stops. This module is the composition root of the training process: with checkpoints.py, which
keeps state and takes it up, it alone joins worker/ and checkpoint/. Not here: what the daemon is told (reports.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from elasticd.checkpoint.background import Counts
from elasticd.checkpoint.memory_save import MemoryCounts
from elasticd.checkpoint.retention import Keep
from elasticd.checkpoint.save import Saved
from elasticd.errors import Fenced
from elasticd.torch_defects import keep_destroyed_groups
from elasticd.worker.checkpoints import Checkpoints, Policy, open_directory
from elasticd.worker.compress import Compression, check_compression, compress_gradients
from elasticd.worker.control import Control
from elasticd.worker.data import Cursor
from elasticd.worker.excepthook import show_operator_errors_as_one_line
from elasticd.worker.layout import Layout, arrange
from elasticd.worker.planned import PlannedSteps
from elasticd.worker.position import Position
from elasticd.worker.powersgd import PowerSGD
from elasticd.worker.progress import Progress, choose_display
from elasticd.worker.reports import Reports, connect
from elasticd.worker.settings import agree_on_settings, check_settings
from elasticd.worker.shares import Balance, as_told, make_work
from elasticd.worker.speeds import BusySteps
from elasticd.worker.state import Optimizers, Registered, Stateful, as_optimizers, check_fit, seed_random
from elasticd.worker.step import Step
from elasticd.worker.traffic import Traffic
from elasticd.worker.updates import Updates
from elasticd.worker.waiting import GradientWait
from elasticd.worker.world import Place, choose_device, join_world

#: How long a script that failed waits for a save under way, before it leaves the process groups to the system.
CLOSE_AFTER_ERROR_S = 5.0
#: The exit status of a worker that parked at a boundary and then lost its daemon: not a success, not a crash.
EXIT_PARKED = 75  # EX_TEMPFAIL


class Session:
    """One training process's part in the job. Made by all ranks together (it makes process groups).

    ``checkpoint_dir`` must be the same directory for all ranks (one host, or a shared file system), or a URL for fsspec
    ("s3://bucket/prefix"); without it nothing is saved. ``save_every_steps``: 0 saves only at stops and at the end.
    ``keep``: how many checkpoints stay, or more finely which (``checkpoint.retention.Keep``). ``seed`` seeds the random
    states and the order of samples. ``device`` overrides the choice of the GPU of this local rank. ``save_timeout_s``:
    for how long a save waits for a rank that is silent (one that died fails it at once). It must be longer than the
    slowest rank takes to write its part: a save that times out ends the process. Saving keeps a copy of this rank's
    state in host memory.

    ``memory_every_steps``: of completed steps fewer than so many are lost when workers or a node die: the state is
    copied into memory that the daemon owns, and to a node in another failure domain, behind the steps (the copies are
    begun half as far apart; with 1 each step waits for its own). 0: none. It needs elasticd's daemon, and a restart
    takes up whichever is newer, the copy in RAM or the checkpoint on disk.

    ``micro_batches``: how many a step has, on all ranks together and for the whole job, for ``step.micro_batches``.
    ``max_micro_batches``: no more than so many in a step for this rank, whatever the world: nodes that could not hold
    a step together form no world, and the job waits for more. ``balance``: "on" gives faster ranks more of
    them, "off" divides them equally, "auto" is on where each rank holds the whole model, numbers divide them in that
    proportion: (1, 2, 5) gives rank 2 five times as many as rank 0. Under FSDP2 unequal shares cost what sharding had
    saved: each rank holds all parameters and all gradients during a step (worker/gradients.py). ``exact``: gradients
    are summed in fixed point, the same bits on any world (worker/exact.py says what that costs, and does not cover).

    ``layout``: how ranks share one model (tensor parallel, pipeline stages, HSDP), where each does not compute samples
    of its own (worker/layout.py). "Rank" above is then a replica; ``max_micro_batches`` is the least of its ranks'.

    ``compress``: "bf16" or "fp16": gradients are averaged over ranks in that type, in half of the bytes; for DDP
    (worker/compress.py). "powersgd", or PowerSGD(rank=...): as matrices of low rank, in far fewer (worker/powersgd.py).

    All arguments must be the same on all ranks but for ``device`` (of one kind), ``max_micro_batches``, ``keep`` and
    ``save_timeout_s``. ConfigError, on all ranks, when they are not, and when the world cannot hold the layout;
    ConfigError when the directory is not writable, or the environment is not whole.
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
        show_operator_errors_as_one_line()
        check_settings(save_every_steps=save_every_steps, memory_every_steps=memory_every_steps, keep=keep, seed=seed)
        work = make_work(micro_batches, at_most=max_micro_batches, balance=balance, exact=exact)
        self._place = Place.from_environment()
        self.device = choose_device(self._place, device)
        directory = open_directory(checkpoint_dir)
        self._made_world = join_world(self._place, self.device)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._control = Control()
        agree_on_settings(
            self._control.group,
            device=self.device.type,
            checkpoint_dir=None if directory is None else "a directory",
            save_every_steps=save_every_steps,
            memory_every_steps=memory_every_steps,
            seed=seed,
            micro_batches=micro_batches,
            balance=balance,
            exact=exact,
            layout=repr(layout),
            compress=PowerSGD() if compress == "powersgd" else compress,
        )
        check_compression(compress, exact=exact)
        self._compress = compress
        self.arranged = arrange(layout, self._place, self._control.group)
        self._traffic = Traffic(self.arranged, exact=exact)
        self._mesh = self.arranged.make_mesh(self.device) if layout is not None else None
        self._save_every_steps = save_every_steps
        self._link = connect(self._place, work, self.arranged.layout.replica_size)
        self._reports = Reports(self._link, rank=self._rank, leads_node=self._place.leads_node)
        self.planned: PlannedSteps | None = None
        if work is not None:
            self.planned = PlannedSteps(
                work,
                group=self._control.group,
                arranged=self.arranged,
                device=self.device,
                seed=seed,
                tell=self._reports.shares_changed,
            )
        self._position = Position(
            seed=seed or 0,
            device=self.device,
            rank=self._rank,
            random_of=self.arranged.first_rank,
            planned=self.planned,
        )
        self._checkpoints = Checkpoints(
            Policy(
                directory=directory,
                keep=Keep(last=keep) if isinstance(keep, int) else keep,
                memory_every_steps=memory_every_steps,
                timeout_s=save_timeout_s,
            ),
            place=self._place,
            group=self._control.group,
            link=self._link,
            reports=self._reports,
            position=self._position,
        )
        self._waiting = GradientWait(self.device)
        self._updates = Updates()
        self._half_done: Step | None = None  # given up, with its update applied
        self._busy = BusySteps()
        self._in_step = self._closed = False
        self._until: int | None = None
        self._progress: Progress | None = None
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
        return self._position.seed

    @property
    def step(self) -> int:
        """How many steps are completed: also the index of the step to come."""
        return self._position.completed

    @property
    def save_counts(self) -> Counts | None:
        """What saving has done and cost so far on this rank; None without a directory."""
        return self._checkpoints.save_counts

    @property
    def sent_bytes(self) -> int:
        """By this rank, for gradients, in the steps that are completed (worker/traffic.py says what is counted)."""
        return self._traffic.sent_bytes

    @property
    def memory_counts(self) -> MemoryCounts | None:
        """What copies in RAM have done and cost so far on this rank; None without them."""
        return self._checkpoints.memory_counts

    def register(
        self,
        *,
        model: torch.nn.Module | None = None,
        optimizer: Optimizers | None = None,
        extra: Mapping[str, Stateful] | None = None,
    ) -> None:
        """Name what a checkpoint must hold. Once, before ``restore``; wrap the model (DDP, FSDP2) first.

        ``optimizer``: one, or several that share the model's parameters out: optimizer=[muon, adamw]. Several models
        are one in a ModuleDict. ``extra``: whatever else has ``state_dict`` and ``load_state_dict``, by name: a
        scheduler, an average of the weights. It gets back all that it gave, on the CPU where it has no tensor yet
        (worker/extras.py).

        RuntimeError a second time, or too late; ValueError when the optimizer's parameters are not the model's, or two
        optimizers have the same; ConfigError when gradients could not be averaged as asked for.
        """
        if self._checkpoints.settled:
            raise RuntimeError("call session.register() once, with everything, before session.restore()")
        registered = Registered(model=model, optimizers=as_optimizers(optimizer), extra=dict(extra or {}))
        check_fit(registered)
        self._checkpoints.hold(registered)
        if self.arranged.layout.pipeline > 1:
            registered.unite = self._unite_stages
        if model is not None and registered.optimizers:
            self._waiting.attach(model.parameters() if self.planned is None else (), registered.optimizers)
        self._updates.attach(registered.optimizers)
        self._traffic.use(registered)
        if model is not None and self._compress is not None:
            compress_gradients(
                registered,
                self._compress,
                world_size=self.world_size,
                step=lambda: self.step,
                sent=self._traffic.all_reduced,
            )
        if model is not None and self.planned is not None:
            self.planned.use(registered, on_gradients=self._waiting.gradients_came)

    def restore(self, *, start_from: str | os.PathLike[str] | None = None) -> int:
        """Collective. Take up the newest checkpoint that verifies; the number of completed steps (0: a fresh start).

        ``start_from``: where there is none yet, fill what is registered from this directory, which plain
        torch.distributed.checkpoint.save wrote ("model", "optimizer" and "extra", or a model's state alone). It has no
        checksums, so it is taken unverified, with a warning, and unpickled; steps are counted from 0.

        ConfigError when the checkpoint is not of the model and optimizer that are registered, was made with another
        seed, or is not there for every rank. StateLost when what was registered has been overwritten by a checkpoint
        that proved damaged, and no other one is whole.
        """
        if self._checkpoints.restore(start_from):
            self._half_done = None
        return self.step

    def steps(self, until: int | None = None) -> Iterator[Step]:
        """The steps to come, up to ``until`` completed ones in all. Each is to be used as ``with step:``.

        A step whose block raised is not counted: if the script goes on all the same, on every rank, it is yielded
        again. Not once a registered optimizer's step() has begun in it: the update would be applied twice. To go on
        then is a RuntimeError, unless ``restore`` has taken up a checkpoint meanwhile.

        Saves, stops and the final checkpoint (at ``until``; call ``save`` when you leave earlier) happen in between.
        StepsDiverged when the ranks are not in the same step; ConfigError when ``until`` is not the same on all of
        them, or their data do not stand at the same place. Fenced when a newer round stands without this
        process; SystemExit after a stop, when the daemon is gone.
        """
        self._checkpoints.begin_training()
        self._control.talk_next()
        self._until = until
        while until is None or self.step < until:
            self._check_whole()
            step = Step(self, self.step)
            yield step
            if not step.entered:
                raise RuntimeError("a step of session.steps() was not used: write 'with step:' in the loop")
            if not step.completed:
                continue
            if step.stop_agreed and self.step != until:
                self._checkpoints.save_before_stop(self._control.stop_need)
                self._park()
            elif self.step == until:
                self._checkpoints.save_or_warn()
            elif self._saves_at(self.step):
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
        self._check_between_steps()
        return self._checkpoints.save()

    def begin_save(self) -> None:
        """Collective, between two steps. Returns once the state is copied: it is written behind the steps to come.

        It waits for a save that is still under way. That the storage refused is logged, and counted in ``save_counts``.
        """
        self._check_between_steps()
        self._checkpoints.begin_save()

    def close(self) -> None:
        """Wait for a save under way, send the last reports, and leave the process groups that were made here."""
        self._close(None, leaves_groups=True)

    def _close(self, wait_s: float | None, *, leaves_groups: bool) -> None:
        self._closed = True
        if self._progress is not None:  # before a traceback is printed, if there is one
            self._progress.close()
        if self.planned is not None:
            self.planned.close()
        try:
            self._checkpoints.wait(wait_s)
        finally:
            if self._link is not None:
                self._link.close()
            still_saving = self._checkpoints.in_flight  # over a group: do not take it away
            if self._made_world and leaves_groups and dist.is_initialized() and not still_saving:
                keep_destroyed_groups()
                dist.destroy_process_group()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(Exception):  # what broke the save, most likely by the same cause as the error
            # NCCL ends its groups together with the others, who may wait for this rank: the error would not get out.
            self._close(CLOSE_AFTER_ERROR_S, leaves_groups=self.device.type != "cuda")

    # What Step needs of its session.

    @property
    def cursor(self) -> Cursor:
        return self._position.cursor

    @property
    def dataset_size(self) -> int:
        return self._position.dataset_size

    def begin(self, step: Step) -> None:
        if self._in_step or self._closed:
            raise RuntimeError("the session is closed" if self._closed else "a step is under way: end its block first")
        if self._link is not None and self._link.refusal:
            raise Fenced(f"checkpoint refused: {self._link.refusal}")
        self._checkpoints.check_saves()
        self._set_in_step(True)
        self._checkpoints.check_copies()
        wanted = self._link.stop_need if self._link is not None else 0
        due = self._saves_at(self.step + 1)
        planned = self.planned
        own = planned.measure if planned is not None else lambda: as_told(self._busy.take())
        hurried = planned is not None and planned.unsettled
        self._control.start(self.step, stop_wanted=wanted, due=due, hurried=hurried, own=own, alike=self._alike)
        self._updates.begin(step)

    def abandon(self, step: Step) -> None:
        self._set_in_step(False)
        self._waiting.drop()
        self._half_done = step if step.updated else None
        if not step.updated:
            step.error = None  # with its traceback it holds all that the pass has left

    def complete(self, step: Step) -> None:
        step.stop_agreed, blocked_s = self._control.finish(step.index)
        self._set_in_step(False)
        seconds = time.monotonic() - step.started_at
        self._position.advance(step.index + 1, step.next_cursor, step.dataset_size)
        if self.planned is not None:
            self.planned.decide(self.step, self._control.told)
        self._checkpoints.step_completed()
        waited_s = self._waiting.take() + blocked_s
        self._busy.add(seconds - waited_s)
        self._reports.speeds(self._control.told, self.planned)
        sent_bytes = self._traffic.take(scatters=self.planned.scatters if self.planned is not None else 1)
        self._reports.step_completed(step, seconds=seconds, waited_s=waited_s, sent_bytes=sent_bytes)

    def _alike(self) -> Mapping[str, int]:
        until = {"until, of session.steps(),": -1 if self._until is None else int(min(self._until, 1 << 62))}
        return until | self._position.alike()

    def _saves_at(self, step: int) -> bool:
        """Whether a checkpoint is due once so many steps are completed."""
        return step == self._until or (self._save_every_steps > 0 and step % self._save_every_steps == 0)

    def _set_in_step(self, value: bool) -> None:  # noqa: FBT001
        self._in_step = value
        self._updates.end()
        if self._link is not None:
            self._link.in_step = value

    def _unite_stages(self, own: list[list[str]]) -> list[list[str]]:
        from elasticd.worker.pipeline import names_of_all_stages

        return names_of_all_stages(own, self.mesh.get_group("pp"))

    def _check_between_steps(self) -> None:
        if self._in_step:
            raise RuntimeError("save between two steps: a half-done step cannot be taken up again")
        self._check_whole()

    def _check_whole(self) -> None:
        """What is registered is that of so many completed steps."""
        if self._half_done is not None:
            raise RuntimeError(
                f"the block of step {self._half_done.index} raised after optimizer.step(): its update is applied "
                "already, and the step cannot be done again: call session.restore(), or start again"
            ) from self._half_done.error

    def _park(self) -> None:
        """Say that this rank stands at the boundary, and wait to be stopped."""
        if self._link is not None:
            self._reports.at_boundary(self.step)
            self._link.wait_closed()
        raise SystemExit(EXIT_PARKED)
