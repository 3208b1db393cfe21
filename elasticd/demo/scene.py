"""What a view of the demo shows at one moment, made anew from the whole record each time. Pure.

Not here: how it is drawn (view.py), what is judged at the end (claims.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from elasticd.demo.plan import BATCH, JOB, LENGTH, Act, Plan
from elasticd.demo.record import Line, Mark, Record, joins_of, kept_losses, kills_of
from elasticd.testing.history import Event, events_of

_RATE_WINDOW_S = 3.0
_NO_WORLD: Mapping[str, Any] = {"seats": (), "cause": "", "store_address": ""}


class NodeState(StrEnum):
    """What a node does, as seen from outside."""

    STARTING = "starting"
    PRELOADING = "preloading"  # imports torch and what the script imports
    READY = "ready"  # has no seat yet
    ENTERING = "entering"  # has a seat, its workers start
    TRAINING = "training"
    DONE = "done"
    DEAD = "killed"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """``links``: the other daemons that it is connected to. ``rank`` None: it has no seat."""

    name: str
    address: str
    state: NodeState
    rank: int | None = None
    links: int = 0
    hosts_store: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A step of the curve, and how many ranks computed it."""

    step: int
    loss: float
    world: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """Something worth a line, in seconds since the demo began. ``kind`` is what its colour depends on."""

    t: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """``elapsed_s`` since the demo began; ``curve`` one point a step, in order; ``happenings`` in order of time."""

    elapsed_s: float = 0.0
    steps: int = 0
    nodes: tuple[NodeRow, ...] = ()
    round_number: int = 0
    cause: str = ""
    world: int = 0
    step: int = 0
    steps_in_round: int = 0
    checkpoint: int = 0
    steps_per_s: float = 0.0
    restarts: Mapping[str, int] | None = None
    curve: tuple[Point, ...] = ()
    marks: tuple[Mark, ...] = ()
    happenings: tuple[Happening, ...] = ()
    over: str = ""

    @property
    def loss(self) -> float | None:
        """The mean of the newest steps."""
        newest = [point.loss for point in self.curve[-10:]]
        return sum(newest) / len(newest) if newest else None

    @property
    def bytes_per_s(self) -> float:
        """Bytes of text that the model was trained on."""
        return self.steps_per_s * BATCH * LENGTH


def look(record: Record, plan: Plan, addresses: Mapping[str, str], *, start: float, now: float) -> Scene:
    """``addresses``: of all nodes that were ever made, in order; ``start``: when the demo began."""
    worlds = {number: told for number, told in record.rounds().items() if told["seats"]}
    number, newest = max(worlds.items(), default=(0, _NO_WORLD))
    kept = kept_losses(record.lines)
    in_round = {line.step for line in record.lines if line.round_number == number}
    return Scene(
        elapsed_s=now - start,
        steps=plan.steps,
        nodes=tuple(_node(record, name, address, newest) for name, address in addresses.items()),
        round_number=number,
        cause=str(newest["cause"]),
        world=sum(int(seat["nproc"]) for seat in newest["seats"]),
        step=record.lines[-1].step if record.lines else 0,
        steps_in_round=len(in_round),
        checkpoint=max((int(event.details["step"]) for event in _commits(record.history)), default=0),
        steps_per_s=_mean_rate(record.lines) if record.over else _rate(record.lines, now),
        restarts=record.restarts(),
        curve=tuple(Point(step=line.step, loss=line.loss, world=line.world) for _, line in sorted(kept.items())),
        marks=tuple(record.marks),
        happenings=tuple(_happenings(record, start)),
        over=record.over,
    )


def _node(record: Record, name: str, address: str, newest: Mapping[str, Any]) -> NodeRow:
    own = [event for event in record.history if event.node == name]
    seat = next((seat for seat in newest["seats"] if seat["node_id"] == name), None)
    dead = any(mark.act is Act.KILL and mark.node == name for mark in record.marks)
    return NodeRow(
        name=name,
        address=address,
        state=NodeState.DEAD if dead else _state(own, seated=seat is not None, number=int(newest.get("number", 0))),
        rank=None if seat is None or dead else int(seat["first_rank"]),
        links=0 if dead else _links(own),
        hosts_store=seat is not None and not dead and newest["store_address"] == address,
    )


def _state(own: Sequence[Event], *, seated: bool, number: int) -> NodeState:
    names = {event.name for event in own}
    if "job_over" in names:
        return NodeState.DONE
    if seated:
        running = any(event.round_number == number for event in events_of(own, "workers_started"))
        return NodeState.TRAINING if running else NodeState.ENTERING
    if "agent_ready" in names:
        return NodeState.READY
    return NodeState.PRELOADING if "job_taken" in names else NodeState.STARTING


def _links(own: Sequence[Event]) -> int:
    newest = {event.details["peer"]: event.name for event in events_of(own, "peer_up", "peer_down")}
    return sum(name == "peer_up" for name in newest.values())


def _commits(history: Sequence[Event]) -> list[Event]:
    return [event for event in events_of(history, "commit", job=JOB) if event.details["committed"]]


def _rate(lines: Sequence[Line], now: float) -> float:
    """Steps a second, of late; less while nothing is completed."""
    recent = {(line.round_number, line.step) for line in lines[-600:] if line.t > now - _RATE_WINDOW_S}
    return len(recent) / min(_RATE_WINDOW_S, max(0.5, now - lines[0].t)) if lines else 0.0


def _mean_rate(lines: Sequence[Line]) -> float:
    return max(line.step for line in lines) / (lines[-1].t - lines[0].t) if len(lines) > 1 else 0.0


# --- what just happened ---------------------------------------------------------------------------------------------


def _happenings(record: Record, start: float) -> list[Happening]:
    found = [_of_mark(mark) for mark in record.marks]
    found += _of_rounds(record)
    found += _of_kills(record) + _of_joins(record)
    found += [
        Happening(t=event.t, kind="failed", text=f"{event.node}: a worker failed: {event.details['message']}")
        for event in events_of(record.history, "workers_failed", job=JOB)
    ]
    for end in events_of(record.history, "job_over", job=JOB)[:1]:
        kind = "over" if record.over == "succeeded" else "failed"
        found.append(Happening(t=end.t, kind=kind, text=f"the job {record.over}"))
    return [replace(one, t=one.t - start) for one in sorted(found, key=lambda one: one.t)]


def _of_mark(mark: Mark) -> Happening:
    if mark.act is Act.JOIN:
        return Happening(t=mark.t, kind="join", text=f"{mark.node} starts: it imports torch while the others train")
    store = ", which hosts the workers' store" if mark.hosts_store else ""
    return Happening(t=mark.t, kind="kill", text=f"SIGKILL to all of {mark.node}{store}, at step {mark.step}")


def _of_rounds(record: Record) -> list[Happening]:
    seen = {event.round_number: event for event in reversed(events_of(record.history, "round_seen", job=JOB))}
    found = []
    for number, event in sorted(seen.items()):
        told = event.details["round"]
        nodes = ", ".join(seat["node_id"] for seat in told["seats"])
        if nodes:
            cause = str(told["cause"]).replace("_", " ")
            found.append(Happening(t=event.t, kind="round", text=f"round {number} ({cause}): {nodes}"))
    return found


def _of_kills(record: Record) -> list[Happening]:
    found = []
    for kill in kills_of(record):
        at = kill.mark.t
        if kill.detected_s is not None:
            text = f"{kill.mark.node} is known to be dead, {kill.detected_s * 1000:.0f} ms after the kill"
            found.append(Happening(t=at + kill.detected_s, kind="round", text=text))
        if kill.next_step_s is not None:
            text = f"training goes on, {kill.next_step_s:.2f} s after the kill; {kill.steps_redone} steps to do again"
            found.append(Happening(t=at + kill.next_step_s, kind="good", text=text))
    return found


def _of_joins(record: Record) -> list[Happening]:
    found = []
    for join in joins_of(record):
        at, name = join.mark.t, join.mark.node
        if join.ready_s is not None:
            text = f"{name} is ready after {join.ready_s:.1f} s; it is let in at a step boundary"
            found.append(Happening(t=at + join.ready_s, kind="round", text=text))
        if join.stall_s is not None and join.first_step_t is not None:
            text = f"{name} trains too; the others stood still for {join.stall_s:.2f} s"
            found.append(Happening(t=join.first_step_t, kind="good", text=text))
    return found
