"""A step's micro-batches on this rank: which they are, their data, their gradients, their time.

They are those of its replica (layout.py): all of a replica's ranks compute the same ones.

What a micro-batch computes depends on the job's seed, the step and its number in it, and on nothing of the world: its
samples (data.py) and, where the job has a seed, what they draw at random (draws.py), and torch's random states, from
which dropout draws.

Not here: the step that they belong to (step.py), how each of these is done (loading.py, gradients.py, exact.py).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from elasticd.worker.agreement import agree, numbers_of_all
from elasticd.worker.clock import MicroBatchClock
from elasticd.worker.data import Cursor
from elasticd.worker.draws import MODEL, Draws
from elasticd.worker.exact import ExactGradients
from elasticd.worker.first_values import check_first_values
from elasticd.worker.gradients import Gradients, MeanGradients, Scaler, shards, trained
from elasticd.worker.layout import Arrangement
from elasticd.worker.loading import Loader, Source, make_loader, to_device
from elasticd.worker.losses import StepLosses
from elasticd.worker.order import Key, SampleOrder
from elasticd.worker.shares import CurrentShares, Work, as_told
from elasticd.worker.state import Registered
from elasticd.worker.stream import Stream
from elasticd.worker.world import make_side_group

if TYPE_CHECKING:
    from elasticd.worker.pipeline import Pipeline  # it takes as long to import as all the rest of torch.distributed
log = logging.getLogger(__name__)

_WHOLE = "give each rank the whole data set, without a DistributedSampler or a part of its own; the step divides it"


class PlannedSteps:
    """One for each session that says how many micro-batches a step has. Collective to make."""

    def __init__(
        self,
        work: Work,
        *,
        group: dist.ProcessGroup | None,
        arranged: Arrangement,
        device: torch.device,
        seed: int | None,
        tell: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._work, self._group, self._device, self._seed = work, group, device, seed or 0
        self._arranged = arranged
        given = seed is not None or work.exact
        of_this_run = 0 if given else numbers_of_all([secrets.randbits(62)], group)[0][0]
        self._draws = Draws(seed=self._seed or of_this_run, given=given, replica=arranged.replica)
        self._shares = CurrentShares(work, group, arranged, tell)
        self._clock = MicroBatchClock(device)
        self._losses = StepLosses(work.micro_batches, make_side_group(), device)
        self._gradients: Gradients | None = None
        self._registered: Registered | None = None
        #: Of how many micro-batches of the last step this rank's gradients were reduced by themselves (FSDP2).
        self.scatters = 1
        self._source: Source | None = None
        self._agreed = self._compared = self._warned = False
        #: Samples of a micro-batch: of the last step, and of the steps before a restart until they were compared.
        self._size: int | None = None
        self._saved_size: int | None = None
        self._loader: Loader | None = None
        self._loader_since = 0
        self._order: SampleOrder | None = None
        self._stream: Stream | None = None
        self._saved_stream: Mapping[str, Any] | None = None

    @property
    def micro_batches(self) -> int:
        return self._work.micro_batches

    @property
    def shares(self) -> tuple[int, ...]:
        return self._shares.plan.shares

    @property
    def balanced(self) -> bool:
        """Whether shares follow speed."""
        return self._shares.balanced

    @property
    def caps(self) -> tuple[int, ...]:
        """The most that each replica takes of a step; empty where none has a limit."""
        caps = self._shares.caps
        return caps if min(caps) < self.micro_batches else ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Of shares that were given and not measured."""
        return self._work.weights

    @property
    def unsettled(self) -> bool:
        """Whether shares wait for more measures, on all ranks alike."""
        return self._shares.unsettled

    # What the session does between steps.

    def use(self, registered: Registered, on_gradients: Callable[[], None]) -> None:
        """The model whose gradients are meant. ConfigError when they could not be averaged as asked for.

        ``on_gradients`` is called, where that can be seen, when this rank has computed all gradients of a step.
        """
        make = ExactGradients if self._work.exact else MeanGradients
        self._gradients = make(registered, micro_batches=self.micro_batches, arranged=self._arranged)
        self._registered = registered
        self._clock.watch(trained(registered), on_gradients)
        if self._work.balance == "auto":
            self._shares.balanced = not shards(registered)

    def measure(self) -> int:
        """Of the time since the last call, as it is told to the others."""
        return as_told(self._clock.take())

    def decide(self, step: int, told: list[int]) -> None:
        self._shares.decide(step, told)

    def state(self, step: int) -> dict[str, Any]:
        """For a checkpoint of so many completed steps: what a step is, and where the stream stands, if there is one."""
        stream = self._saved_stream if self._stream is None else self._stream.state(step)
        return {"micro_batches": self.micro_batches, "size": self._size, "stream": stream}

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``state`` gave, among other things, for the step that comes now."""
        self._stream, self._saved_stream = None, saved.get("stream")
        self._size = self._saved_size = saved.get("size")
        _tell_of_another_batch("steps", "micro-batches", saved.get("micro_batches"), self.micro_batches)

    def close(self) -> None:
        """Workers that load ahead end."""
        self._loader = self._stream = None

    # What a step does.

    def run(self, step: int, cursor: Cursor, source: Source, begun: StepWork) -> Iterator[Any]:
        """This rank's micro-batches, one at a time, each to be followed by ``begun.backward``."""
        gradients, owned, todo = self._begin(step), self._owned, self._todo
        loader = self._loader_of(source, step, cursor)
        loader.begin(step, todo)
        self._clock.begin(len(todo))
        self.scatters = len(todo) if gradients.scatters_each else 1
        for micro_batch in todo:
            last = micro_batch == todo[-1]
            if last:
                self._clock.begin_last()
            batch = loader.take((step, micro_batch))
            if self._device.type != "cpu":
                batch = to_device(batch, self._device)
            self._seed_for(step, micro_batch)
            gradients.before(last=last)
            begun.open(micro_batch, self._ids_of((step, micro_batch)), counts=bool(owned), last=last)
            yield batch
            begun.check_closed()
        self._clock.end(waited=not self._work.exact)
        gradients.finish()
        begun.done = True

    def run_pipeline(self, step: int, cursor: Cursor, source: Source, begun: StepWork, pipeline: Pipeline) -> None:
        """All of this replica's micro-batches, forward and backward; what this rank is of them is one stage."""
        gradients, owned, todo = self._begin(step), self._owned, self._todo
        loader = self._loader_of(source, step, cursor)
        loader.begin(step, todo)
        self._clock.begin(len(todo))
        self._clock.begin_last()
        reads = pipeline.needs_data or self._stream is not None  # a stream goes on for whoever reads it
        keys = [(step, micro_batch) for micro_batch in todo] if reads else []
        batches = [to_device(loader.take(key), self._device) for key in keys]
        losses = pipeline.run(
            batches,
            len(todo),
            scale=gradients.scale if owned else 0.0,
            on_forward=lambda place: self._seed_for(step, todo[place], pipeline.stage),
        )
        self._clock.end_together()
        gradients.finish()
        for micro_batch in owned:
            begun.sample_ids += self._ids_of((step, micro_batch))
        begun.take_losses(dict(zip(owned, losses, strict=False)))  # there are none but on the last stage

    def backward(self, loss: torch.Tensor, *, counts: bool, scaler: Scaler | None) -> None:
        self._known_gradients().backward(loss, counts=counts, scaler=scaler)

    def _begin(self, step: int) -> Gradients:
        """Collective before the job's first step: its state is in by then."""
        gradients = self._known_gradients()
        self._losses.begin()
        if step == 0 and self._registered is not None and not self._compared:
            check_first_values(self._registered, self._arranged, self._group, exact=self._work.exact)
            self._compared = True  # once: who does the step again does not wait for others that do not
        gradients.clear(unequal=self._unequal)
        return gradients

    @property
    def _owned(self) -> tuple[int, ...]:
        return self._shares.plan.owned[self._arranged.replica]

    @property
    def _todo(self) -> tuple[int, ...]:
        """What is owned, or a stand-in: as finite as the step is."""
        return self._owned or (0,)

    @property
    def _unequal(self) -> bool:
        return len(set(self.shares)) > 1

    def complete_losses(self, losses: Mapping[int, torch.Tensor]) -> None:
        """Those of this rank are all known; its last backward pass is to come."""
        self._losses.complete_here(losses if self._arranged.leads else {})

    def mean(self, losses: Mapping[int, torch.Tensor]) -> float:
        """Collective: over the losses of all micro-batches of all replicas."""
        return self._losses.mean(losses if self._arranged.leads else {})

    def end_step(self) -> None:
        """Collective in the first step. StepsDiverged when only other ranks have asked for the mean of its losses."""
        self._losses.end_step()

    def _known_gradients(self) -> Gradients:
        if self._gradients is None:
            raise RuntimeError(
                "step.micro_batches needs the model: call session.register(model=..., optimizer=...) first"
            )
        return self._gradients

    def _loader_of(self, source: Source, step: int, cursor: Cursor) -> Loader | Stream:
        """The one that is in use, as long as the data set is the same and the cursor where it was expected."""
        if not self._agreed:
            self._agree_on(source)
        self._size = source.size
        if source.length is None or self._stream is not None:
            return self._stream_of(source, step)
        if self._loader is None or self._order is None or not self._goes_on(source, step, cursor):
            _tell_of_another_batch("micro-batches", "samples", self._saved_size, source.size)
            self._source, self._saved_size, self._loader_since = source, None, step
            of_a_step = {"micro_batches": self.micro_batches, "size": source.size, "length": source.length}
            self._order = SampleOrder(step, cursor, **of_a_step, seed=self._seed)
            self._loader = make_loader(source, self._order.ids_of, self._draws, pinned=self._device.type == "cuda")
        self._order.begin(step, self._todo)
        return self._loader

    def _goes_on(self, source: Source, step: int, cursor: Cursor) -> bool:
        assert self._source is not None
        assert self._order is not None
        if self._order.cursor_at(step) != cursor:
            return False
        changed = source.changed_from(self._source)
        if not changed:
            return True
        if source.workers and step <= self._loader_since + 1 and not self._warned and dist.get_rank() == 0:
            log.warning(
                "elasticd: step.micro_batches got another %s than in the step before, so its %d workers start anew, as "
                "they will in each step that brings new ones: make it once, before the loop over steps",
                " and ".join(changed),
                source.workers,
            )
            self._warned = True
        return False

    def _agree_on(self, source: Source) -> None:
        """Collective, once: who is used to divide the data among ranks will have done so before.

        A size that changes later is found out by where the data stands then (control.py): to compare it here would take
        an exchange in each step, and to refuse it would forbid schedules of it, which all ranks may well keep to.
        """
        said = {"dataset": source.described(), "size": source.size, "workers": source.readers}
        agree("step.micro_batches", said, self._group, advice={"dataset": _WHOLE})
        self._agreed = True

    def _stream_of(self, source: Source, step: int) -> Stream:
        if self._stream is None:
            self._stream = Stream(
                source, self._draws, step=step, micro_batches=self.micro_batches, saved=self._saved_stream
            )
        if not self._stream.is_like(source):
            raise ValueError("give step.micro_batches the same stream in each step: another would begin at its start")
        return self._stream

    def _ids_of(self, key: Key) -> list[int]:
        order = self._stream or self._order
        assert order is not None
        return order.ids_of(key)

    def _seed_for(self, step: int, micro_batch: int, stage: int = 0) -> None:
        """What the model draws. Stages of a pipeline must not draw the same; it is not what the data has drawn."""
        if not self._draws.given:
            return
        seed = self._draws.of(step, micro_batch, MODEL + stage)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index].manual_seed(seed)


def _tell_of_another_batch(what: str, have: str, then: int | None, now: int) -> None:
    """After a restart; ``then`` None: nothing is known."""
    if then not in (None, now) and dist.get_rank() == 0:
        log.warning(
            "elasticd: %s had %d %s so far, and %d from here on: the batch is another, and the curve",
            what,
            then,
            have,
            now,
        )


class StepWork:
    """What a step has done of its micro-batches: each is opened, gets one backward pass, and is closed."""

    def __init__(self, planned: PlannedSteps) -> None:
        self._planned = planned
        self._open: int | None = None
        self._counts, self._last = True, False
        self.done = False
        self.sample_ids: list[int] = []
        self._losses: dict[int, torch.Tensor] = {}

    def open(self, micro_batch: int, ids: list[int], *, counts: bool, last: bool) -> None:
        """``last``: of this rank's in the step."""
        self._open, self._counts, self._last = micro_batch, counts, last
        if counts:
            self.sample_ids += ids

    def backward(self, loss: torch.Tensor, scaler: Scaler | None) -> None:
        """RuntimeError outside of the loop, or a second time; ValueError for what is no loss of the model."""
        if self._open is None:
            raise RuntimeError("call step.backward(loss) once for each micro-batch, in the loop over them")
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise ValueError("a loss that no parameter has part in: give step.backward what the model made, undetached")
        if loss.numel() != 1:
            raise ValueError(f"a loss of shape {tuple(loss.shape)}: give step.backward the mean over the micro-batch")
        if isinstance(loss, DTensor):
            loss = loss.full_tensor()
        if self._counts:
            self._losses[self._open] = loss.detach()
        self._open = None
        if self._last:
            self._planned.complete_losses(self._losses)
        self._planned.backward(loss, counts=self._counts, scaler=scaler)

    def take_losses(self, losses: Mapping[int, torch.Tensor]) -> None:
        """Of a pipeline, which has computed everything at once."""
        self._losses.update(losses)
        self.done = True

    def check_closed(self) -> None:
        if self._open is not None:
            raise RuntimeError("a micro-batch had no step.backward(loss): its samples would be missing from the step")

    def end(self) -> None:
        """The step's block has ended. RuntimeError when samples are missing; StepsDiverged as ``end_step`` says."""
        self.check_done()
        self._planned.end_step()

    def check_done(self) -> None:
        if not self.done:
            raise RuntimeError(
                "the loop over step.micro_batches() was left early: samples would be missing from the step"
            )

    def mean_loss(self) -> float:
        self.check_done()
        return self._planned.mean(self._losses)
