"""What the demo promises, judged over the record of what happened. Pure: a record in, a summary out.

Every claim is computed from data that the cluster itself wrote, and each can fail. Not here: how it is shown (view.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from elasticd.core.records import to_plain
from elasticd.demo.plan import BATCH, JOB, Act, Plan
from elasticd.demo.record import Join, Kill, Line, Record, joins_of, kept_losses, kills_of, split
from elasticd.testing import validators
from elasticd.testing.history import events_of
from elasticd.testing.validators import Violation

#: Generous: a machine that does other things must not fail the demo. The bench measures what is usual.
RECOVERY_BOUND_S = 10.0
#: The same samples, summed by other ranks in another order.
SAME_LOSS = 1e-3
#: How far the mean of a few steps may lie above the mean of the few before: samples differ.
GOES_ON = 1.15
WINDOW = 10
MUST_FALL_TO = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """``promise`` is what should hold, ``found`` the figures on which it was judged."""

    name: str
    promise: str
    held: bool
    found: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """``seconds`` from the first step to the last one."""

    steps: int
    seconds: float
    first_loss: float | None
    last_loss: float | None
    kills: tuple[Kill, ...]
    joins: tuple[Join, ...]
    restarts: dict[str, int]
    claims: tuple[Claim, ...]

    @property
    def passed(self) -> bool:
        return all(claim.held for claim in self.claims)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "passed": self.passed,
            "steps": self.steps,
            "seconds": _rounded(self.seconds),
            "first_loss": _rounded(self.first_loss),
            "last_loss": _rounded(self.last_loss),
            "kills": [_plain_kill(kill) for kill in self.kills],
            "joins": [_plain_join(join) for join in self.joins],
            "restarts": dict(self.restarts),
            "claims": [to_plain(claim) for claim in self.claims],
        }


def judge(record: Record, plan: Plan) -> Summary:
    """Everything that the demo promises, whatever the record holds."""
    lines = record.lines
    losses = kept_losses(lines)
    curve = [losses[step].loss for step in sorted(losses)]
    return Summary(
        steps=max(losses, default=0),
        seconds=lines[-1].t - lines[0].t if lines else 0.0,
        first_loss=curve[0] if curve else None,
        last_loss=mean(curve[-WINDOW:]) if curve else None,
        kills=tuple(kills_of(record)),
        joins=tuple(joins_of(record)),
        restarts=record.restarts(),
        claims=(
            job_succeeded(record, plan),
            kills_survived(record, plan),
            joins_admitted(record, plan),
            same_step_same_loss(lines),
            loss_goes_on(lines),
            loss_falls(curve),
            samples_once(lines, plan),
            last_step_committed(record, plan),
            budget_untouched(record),
            history_clean(record),
        ),
    )


def job_succeeded(record: Record, plan: Plan) -> Claim:
    done = {line.step for line in record.lines}
    missing = [step for step in range(1, plan.steps + 1) if step not in done]
    return Claim(
        name="job_succeeded",
        promise="the job ends by itself, with every step completed",
        held=record.over == "succeeded" and not missing,
        found=f"{record.over or 'not over'}, {plan.steps - len(missing)} of {plan.steps} steps completed",
    )


def kills_survived(record: Record, plan: Plan) -> Claim:
    kills = kills_of(record)
    wanted = [cue.hosts_store for cue in plan.cues if cue.act is Act.KILL]
    in_time = [kill.next_step_s is not None and kill.next_step_s <= RECOVERY_BOUND_S for kill in kills]
    return Claim(
        name="kills_survived",
        promise=f"each kill, that of the store's host too, is followed by a step within {RECOVERY_BOUND_S:g} s",
        held=[kill.mark.hosts_store for kill in kills] == wanted and all(in_time),
        found=f"{len(kills)} of {len(wanted)} kills; next step after {_seconds(kill.next_step_s for kill in kills)}",
    )


def joins_admitted(record: Record, plan: Plan) -> Claim:
    joins = joins_of(record)
    wanted = sum(cue.act is Act.JOIN for cue in plan.cues)
    in_time = [join.stall_s is not None and join.stall_s <= RECOVERY_BOUND_S for join in joins]
    return Claim(
        name="joins_admitted",
        promise=f"each new node is let in, and holds the others up for less than {RECOVERY_BOUND_S:g} s",
        held=len(joins) == wanted and all(in_time),
        found=f"{len(joins)} of {wanted} joins; the others stood still for {_seconds(join.stall_s for join in joins)}",
    )


def same_step_same_loss(lines: Sequence[Line]) -> Claim:
    """The state was restored whole: the same samples give the same loss on another world."""
    seen: dict[int, dict[int, float]] = defaultdict(dict)
    for line in lines:
        seen[line.step][line.round_number] = line.loss
    again = {step: list(losses.values()) for step, losses in seen.items() if len(losses) > 1}
    worst = max((max(losses) / min(losses) - 1 for losses in again.values()), default=0.0)
    return Claim(
        name="same_step_same_loss",
        promise=f"a step that is done again gives the same loss, to {SAME_LOSS:.1%}",
        held=bool(again) and worst <= SAME_LOSS,
        found=f"{len(again)} steps were done again; they differ by {worst:.1e} at most",
    )


def loss_goes_on(lines: Sequence[Line]) -> Claim:
    """At each change of the world: the mean of the next steps against that of the last ones."""
    numbers = sorted({line.round_number for line in lines})
    ratios = [_rise(*split(lines, number)) for number, _ in pairwise(numbers)]
    worst = max(ratios, default=0.0)
    return Claim(
        name="loss_goes_on",
        promise="after each change of the world the loss goes on from where it was",
        held=bool(ratios) and worst <= GOES_ON,
        found=f"{len(ratios)} changes; the mean of the next {WINDOW} steps is {worst:.3f} of the last at most",
    )


def _rise(before: Sequence[Line], after: Sequence[Line]) -> float:
    last = list(kept_losses(before).values())[-WINDOW:]
    first = sorted(kept_losses(after).items())[:WINDOW]
    return mean([line.loss for _, line in first]) / mean([line.loss for line in last])


def loss_falls(curve: Sequence[float]) -> Claim:
    last = mean(curve[-WINDOW:]) if curve else 0.0
    return Claim(
        name="loss_falls",
        promise=f"the model learns: the last loss is below {MUST_FALL_TO:.0%} of the first",
        held=bool(curve) and last < MUST_FALL_TO * curve[0],
        found=f"{curve[0]:.3f} to {last:.3f}" if curve else "no step was completed",
    )


def samples_once(lines: Sequence[Line], plan: Plan) -> Claim:
    found = validators.samples_count_once([line.trained for line in lines], plan.steps, BATCH)
    return Claim(
        name="samples_once",
        promise="of the steps that count, every sample was used exactly once",
        held=not found,
        found=_violations(found) or f"{plan.steps * BATCH} samples",
    )


def last_step_committed(record: Record, plan: Plan) -> Claim:
    commits = [event for event in events_of(record.history, "commit", job=JOB) if event.details["committed"]]
    newest = max((int(event.details["step"]) for event in commits), default=0)
    return Claim(
        name="last_step_committed",
        promise="a sharded checkpoint of the last step is on record in etcd",
        held=newest == plan.steps,
        found=f"{len(commits)} checkpoints committed, the newest of step {newest}",
    )


def budget_untouched(record: Record) -> Claim:
    found = validators.budget_charged(record.history, JOB, 0)
    causes = ", ".join(f"{cause} {count}" for cause, count in sorted(record.restarts().items()))
    return Claim(
        name="budget_untouched",
        promise="lost nodes and joins cost nothing of the job's restart budget",
        held=bool(record.history) and not found,
        found=_violations(found) or f"0 charged; rounds by cause: {causes or 'none'}",
    )


def history_clean(record: Record) -> Claim:
    found = validators.validate(record.history)
    found += validators.workers_train_one_world([line.trained for line in record.lines], record.history, JOB)
    return Claim(
        name="history_clean",
        promise="what the daemons recorded breaks no invariant: one world a round, no stale commit, fenced in time",
        held=bool(record.history) and not found,
        found=_violations(found) or f"{len(record.history)} events of {len({e.node for e in record.history})} nodes",
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain_kill(kill: Kill) -> dict[str, Any]:
    return {
        "node": kill.mark.node,
        "hosted_store": kill.mark.hosts_store,
        "at_step": kill.mark.step,
        "detected_s": _rounded(kill.detected_s),
        "next_step_s": _rounded(kill.next_step_s),
        "steps_redone": kill.steps_redone,
    }


def _plain_join(join: Join) -> dict[str, Any]:
    return {
        "node": join.mark.node,
        "at_step": join.first_step,
        "ready_s": _rounded(join.ready_s),
        "stall_s": _rounded(join.stall_s),
    }


def _seconds(values: Any) -> str:
    return ", ".join("never" if value is None else f"{value:.2f} s" for value in values) or "-"


def _violations(found: Sequence[Violation]) -> str:
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{found[0].rule}: {found[0].what}{more}" if found else ""


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
