"""All that happened in a demo as one value, and what can be measured in it. Pure.

Everybody wrote down their own part: the demo its acts (Mark), the training script its steps (Line), the daemons the
rest (testing/history.py). All on one machine's monotonic clock. Not here: what must hold of it (claims.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elasticd.demo.plan import JOB, Act
from elasticd.testing.history import Event, Trained, events_of, rounds_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that the demo did: ``step`` and ``round_number`` are the newest that were known then."""

    t: float
    act: Act
    node: str
    step: int
    round_number: int
    hosts_store: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A completed step of one rank, as the training script's ledger has it."""

    t: float
    step: int
    world: int
    rank: int
    round_number: int
    loss: float
    samples: tuple[int, ...]

    @property
    def trained(self) -> Trained:
        """The same for the validators."""
        return Trained(
            t=self.t,
            round_number=self.round_number,
            rank=self.rank,
            step=self.step,
            world=self.world,
            samples=self.samples,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """``lines`` and ``history`` in order of time."""

    history: Sequence[Event] = ()
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()

    @property
    def over(self) -> str:
        """How the job ended; empty while it runs."""
        ends = events_of(self.history, "job_over", job=JOB)
        return str(ends[0].details["phase"]) if ends else ""

    def rounds(self) -> dict[int, Mapping[str, Any]]:
        return rounds_of(self.history, JOB)

    def restarts(self) -> dict[str, int]:
        """Rounds by cause, as the newest round counts them."""
        rounds = self.rounds()
        return {str(cause): int(count) for cause, count in max(rounds.items())[1]["restarts"]} if rounds else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What a kill cost. Seconds are from the kill; None: it never came.

    ``detected_s``: until the first of the others knew; ``steps_redone``: completed steps that no checkpoint held.
    """

    mark: Mark
    detected_s: float | None
    next_step_s: float | None
    steps_redone: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """What a join cost. ``ready_s``: from the daemon's start until its worker could start; None: it never came.

    ``stall_s``: between the last step without it and the first with it, that step included.
    """

    mark: Mark
    ready_s: float | None
    stall_s: float | None
    first_step: int | None = None
    first_step_t: float | None = None


def parse_line(plain: Mapping[str, Any]) -> Line:
    return Line(
        t=plain["t"],
        step=plain["step"],
        world=plain["world"],
        rank=plain["rank"],
        round_number=plain["round"],
        loss=plain["loss"],
        samples=tuple(plain["ids"]),
    )


def kills_of(record: Record) -> list[Kill]:
    return [_measure_kill(record, mark) for mark in record.marks if mark.act is Act.KILL]


def joins_of(record: Record) -> list[Join]:
    return [_measure_join(record, mark) for mark in record.marks if mark.act is Act.JOIN]


def _measure_kill(record: Record, mark: Mark) -> Kill:
    notices = [e for e in events_of(record.history, "peer_down") if e.t >= mark.t and e.details["peer"] == mark.node]
    before, after = split(record.lines, mark.round_number)
    first = after[0] if after else None
    return Kill(
        mark=mark,
        detected_s=notices[0].t - mark.t if notices else None,
        next_step_s=first.t - mark.t if first else None,
        steps_redone=max(line.step for line in before) - first.step + 1 if first and before else None,
    )


def _measure_join(record: Record, mark: Mark) -> Join:
    ready = [e for e in events_of(record.history, "agent_ready", job=JOB) if e.node == mark.node and e.t >= mark.t]
    entered = entry_of(record, mark)
    before, after = split(record.lines, entered - 1) if entered else ((), ())
    return Join(
        mark=mark,
        ready_s=ready[0].t - mark.t if ready else None,
        stall_s=after[0].t - before[-1].t if before and after else None,
        first_step=after[0].step if after else None,
        first_step_t=after[0].t if after else None,
    )


def entry_of(record: Record, mark: Mark) -> int:
    """The first round after the mark in which that node has a seat; 0 when there is none."""
    for number, told in sorted(record.rounds().items()):
        if number > mark.round_number and any(seat["node_id"] == mark.node for seat in told["seats"]):
            return number
    return 0


def split(lines: Sequence[Line], round_number: int) -> tuple[Sequence[Line], Sequence[Line]]:
    """The lines up to that round, and those of later ones: the training script knows which round it trains in."""
    before = [line for line in lines if line.round_number <= round_number]
    return before, [line for line in lines if line.round_number > round_number]


def kept_losses(lines: Sequence[Line]) -> dict[int, Line]:
    """One line a step: where a step was done again, the one that counts."""
    return {line.step: line for line in sorted(lines, key=lambda line: (line.round_number, line.t))}
