"""The recorded histories of several nodes as one: what validators judge and tests wait on.

Nodes on one machine share a monotonic clock, so their lines can be put in one order. Not here: who writes them
(daemon/history.py, and a training script's own lines), what they must look like (validators.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of a history. ``t`` is the monotonic clock in seconds."""

    t: float
    node: str
    boot: str
    name: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def job(self) -> str:
        return str(self.details.get("job", ""))

    @property
    def round_number(self) -> int:
        """The round that it speaks of; 0 when none."""
        told = self.details.get("round", 0)
        return int(told["number"] if isinstance(told, Mapping) else told)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One completed step of one rank, written by a training script.

    ``samples``: what it trained on, ``loss``: the mean over the step, if it says so.
    """

    t: float
    round_number: int
    rank: int
    step: int
    world: int
    node: str = ""
    pid: int = 0
    samples: tuple[int, ...] = ()
    loss: float | None = None


class Tail:
    """Reads the lines that were appended to some files since the last time; a line still being written waits."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}

    def read(self, files: Iterable[Path]) -> list[dict[str, Any]]:
        found = []
        for file in files:
            if file.exists():
                found += self._read(file)
        return found

    def _read(self, file: Path) -> list[dict[str, Any]]:
        offset = self._offsets.get(file, 0)
        with file.open("rb") as stream:
            stream.seek(offset)
            text = stream.read()
        complete = text[: text.rfind(b"\n") + 1]
        self._offsets[file] = offset + len(complete)
        return [json.loads(line) for line in complete.splitlines()]


def parse_event(line: Mapping[str, Any]) -> Event:
    known = ("t", "wall", "node", "boot", "event")
    details = {name: value for name, value in line.items() if name not in known}
    return Event(t=line["t"], node=line["node"], boot=line["boot"], name=line["event"], details=details)


def parse_trained(line: Mapping[str, Any]) -> Trained:
    return Trained(
        t=line["t"],
        round_number=line["round"],
        rank=line["rank"],
        step=line["step"],
        world=line["world"],
        node=line.get("node", ""),
        pid=line.get("pid", 0),
        samples=tuple(line.get("samples", line.get("ids", ()))),
        loss=line.get("loss"),
    )


def read_trained(file: Path) -> list[Trained]:
    """All whole lines of one file, in the order in which they were written; none when it is not there."""
    return [parse_trained(line) for line in Tail().read([file])]


def events_of(history: Sequence[Event], *names: str, job: str = "") -> list[Event]:
    """Those with one of the names, of that job if one is given, in order."""
    return [event for event in history if event.name in names and (not job or event.job == job)]


def rounds_of(history: Sequence[Event], job: str) -> dict[int, Mapping[str, Any]]:
    """Each round that somebody saw, as first seen."""
    rounds: dict[int, Mapping[str, Any]] = {}
    for event in events_of(history, "round_seen", job=job):
        rounds.setdefault(event.round_number, event.details["round"])
    return rounds


def jobs_of(history: Sequence[Event]) -> list[str]:
    return sorted({event.job for event in history if event.job})
