"""One stage of a model that is split over several ranks, by torch.distributed.pipelining: a replica is a pipeline.

    model = stage_of(ByteGPT(), session.mesh["pp"].get_local_rank())  # names as in the whole model: checkpoints reshard
    if session.replicas > 1:
        model = DistributedDataParallel(model, process_group=session.mesh.get_group("dp"))
    session.register(model=model, optimizer=optimizer)
    pipeline = Pipeline(model, loss_of, mesh=session.mesh["pp"])
    for step in session.steps(until=10_000):
        with step:
            step.run_pipeline(pipeline, dataset, size=4)
            optimizer.step()

Stages may as well be in FSDP2, over "dp". The micro-batches of the replica's share are the schedule's. torch builds a
schedule, and what a stage has received, for one number of them: so there is one for each number that shares have had,
and all stages go over to another together. A 1F1B schedule needs as many micro-batches as stages; a smaller share runs
as GPipe, which gives the same gradients. A replica without a share runs one micro-batch of weight zero, to take part in
the averaging.

Not here: which micro-batches those are (planned.py); schedules with several stages on a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.nn.parallel import DistributedDataParallel

from elasticd.errors import ConfigError

Loss = Callable[[Any, torch.Tensor], torch.Tensor]

SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}


class Pipeline:
    """This rank's stage of the model, which is the rank's place in ``mesh`` (``session.mesh["pp"]``).

    ``loss_of(output, targets)`` is the mean over a micro-batch, as one number; the last stage calls it. A data set's
    sample is a pair of inputs and targets; inputs may be a tuple of tensors. What goes from stage to stage has the same
    shape for every micro-batch. ConfigError for a schedule that is none of "1F1B" and "GPipe".
    """

    def __init__(
        self, model: torch.nn.Module, loss_of: Loss, *, mesh: DeviceMesh, schedule: Literal["1F1B", "GPipe"] = "1F1B"
    ) -> None:
        if schedule not in SCHEDULES:
            raise ConfigError(f"a pipeline's schedule is {schedule!r}: say one of {', '.join(SCHEDULES)}")
        self._model, self._loss_of, self._schedule = model, loss_of, SCHEDULES[schedule]
        self._group: dist.ProcessGroup = mesh.get_group()
        self._index, self._count = mesh.get_local_rank(), mesh.size()
        self._device = next(model.parameters()).device
        self._scale = 1.0
        self._on_forward: Callable[[int], None] = lambda _: None
        self._known: dict[int, PipelineScheduleSingle] = {}
        if isinstance(model, DistributedDataParallel):
            # The stage prepares DDP for its last backward pass by itself. A run in which torch learns shapes would do
            # so too, and the replica would average once more than one that runs a schedule it knows.
            model.require_backward_grad_sync = False

    @property
    def stage(self) -> int:
        return self._index

    @property
    def needs_data(self) -> bool:
        """A stage in the middle gets what it needs from its neighbours."""
        return self._index in (0, self._count - 1)

    def run(
        self, batches: Sequence[Any], count: int, *, scale: float, on_forward: Callable[[int], None]
    ) -> list[torch.Tensor]:
        """Collective over the replica: forward and backward passes of ``count`` micro-batches; gradients add up.

        ``batches`` may be empty where ``needs_data`` is False. Each loss is multiplied by ``scale`` for the backward
        pass. ``on_forward`` is told the place of each micro-batch before its forward pass. The losses, not multiplied;
        empty but on the last stage.
        """
        self._scale, self._on_forward = scale, on_forward
        inputs, targets = self._whole(batches)
        losses: list[torch.Tensor] = []
        try:
            self._of(count).step(*inputs, target=targets, losses=losses, return_outputs=False)
        except BaseException:
            self._known.clear()  # what is half done in it would be taken for the next step's
            raise
        return [each.detach() / scale for each in losses] if scale else losses

    def _whole(self, batches: Sequence[Any]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """All micro-batches behind one another, as torch wants them, to cut them apart again; what this stage needs."""
        inputs: tuple[torch.Tensor, ...] = ()
        targets: torch.Tensor | None = None
        if self._index == 0:
            each = [batch[0] if isinstance(batch[0], tuple | list) else (batch[0],) for batch in batches]
            inputs = tuple(torch.cat(parts) for parts in zip(*each, strict=True))
        if self._index == self._count - 1:
            targets = torch.cat([batch[1] for batch in batches])
        return inputs, targets

    def _of(self, count: int) -> PipelineScheduleSingle:
        if count not in self._known:
            make = ScheduleGPipe if count < self._count else self._schedule
            stage = _Stage(self._model, self._index, self._count, self._device, group=self._group)
            stage.begins = self._forward_begins
            self._known[count] = make(stage, count, loss_fn=self._scaled, scale_grads=False)
        return self._known[count]

    def _forward_begins(self, place: int) -> None:
        self._on_forward(place)

    def _scaled(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        return self._loss_of(output, targets) * self._scale


class _Stage(PipelineStage):
    """Says which micro-batch it begins."""

    begins: Callable[[int], None]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.begins(fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)


def names_of_all_stages(own: list[list[str]], group: dist.ProcessGroup) -> list[list[str]]:
    """Collective over the pipeline: the parameters of each of an optimizer's groups, on all stages, in their order.

    ConfigError, on all stages, when their optimizers do not have as many groups.
    """
    stages: list[Any] = [None] * group.size()
    dist.all_gather_object(stages, own, group=group)
    if len({len(stage) for stage in stages}) > 1:
        raise ConfigError(f"the optimizers of the stages have {[len(stage) for stage in stages]} parameter groups")
    return [[name for stage in stages for name in stage[index]] for index in range(len(own))]
