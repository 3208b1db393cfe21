"""Judges of a recorded history: each takes events in order of time and returns what broke an invariant of DESIGN.md.

Pure functions; an empty list means that the history is clean. Not here: the recording (daemon/history.py), the
reading (history.py), the faults that lead to it (faults.py).

Two lines of different nodes that are closer than GRACE_S say nothing about which was first in the store: a daemon
writes its line after the store's answer has reached it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from elasticd.core.model import Cause, Phase
from elasticd.testing.history import Event, Trained, events_of, jobs_of, rounds_of

GRACE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """What was broken, when, and by which node ("" for the cluster)."""

    rule: str
    t: float
    node: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A node that could not act from ``start`` to ``end`` (frozen, cut off or dead); its lines came late or never."""

    node: str
    start: float
    end: float


Validator = Callable[[Sequence[Event]], list[Violation]]

#: After one of these a daemon has no workers running.
_NO_WORKERS = ("workers_stopped", "workers_succeeded", "agent_lost", "job_over", "stopped", "started")


def one_world_per_round(history: Sequence[Event]) -> list[Violation]:
    """Invariant 1: all who saw a round of a job saw the same world."""
    found = []
    first: dict[tuple[str, int], Event] = {}
    for event in events_of(history, "round_seen"):
        known = first.setdefault((event.job, event.round_number), event)
        ours, theirs = _world(event), _world(known)
        if ours != theirs:
            what = f"round {event.round_number} is {ours} here and {theirs} on {known.node}"
            found.append(_violation(one_world_per_round, event, what))
    return found


def ranks_belong_to_one_seat(history: Sequence[Event]) -> list[Violation]:
    """Invariant 1: the seats of a round hold the ranks 0 .. world-1 once each, and no node twice."""
    found = []
    for event in events_of(history, "round_seen"):
        seats = event.details["round"]["seats"]
        ranks = sorted(seat["first_rank"] + local for seat in seats for local in range(seat["nproc"]))
        twice = [node for node, count in Counter(seat["node_id"] for seat in seats).items() if count > 1]
        if ranks != list(range(len(ranks))):
            found.append(_violation(ranks_belong_to_one_seat, event, f"round {event.round_number} has ranks {ranks}"))
        if twice:
            found.append(_violation(ranks_belong_to_one_seat, event, f"round {event.round_number} seats {twice} twice"))
    return found


def stale_rounds_commit_nothing(history: Sequence[Event], pauses: Sequence[Pause] = ()) -> list[Violation]:
    """Invariant 2: no commit succeeds under a round once a newer one stands, or on a node without a seat in it."""
    found = []
    seen: dict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    rounds = {job: rounds_of(history, job) for job in jobs_of(history)}
    for event in events_of(history, "round_seen", "commit"):
        newest, since = seen[event.job]
        number = event.round_number
        if event.name == "round_seen":
            if number > newest:
                seen[event.job] = (number, event.t)
            continue
        if not event.details["committed"]:
            continue
        seats = rounds[event.job].get(number, {}).get("seats", ())
        if seats and event.node not in [seat["node_id"] for seat in seats]:
            found.append(_violation(stale_rounds_commit_nothing, event, f"committed in round {number} without a seat"))
        elif number < newest and event.t > since + GRACE_S and not _paused(pauses, event, since):
            what = f"step {event.details['step']} committed under round {number} after round {newest}"
            found.append(_violation(stale_rounds_commit_nothing, event, what))
    return found


def _paused(pauses: Sequence[Pause], event: Event, since: float) -> bool:
    """A node that was frozen between the store's answer and its line: the line is late, the commit was not."""
    return any(
        pause.node == event.node and pause.start < since + GRACE_S and event.t < pause.end + GRACE_S for pause in pauses
    )


def committed_step_never_goes_back(history: Sequence[Event]) -> list[Violation]:
    """Invariant 3: in the order of rounds, and of time within one, no commit is of an earlier step."""
    found = []
    for job in jobs_of(history):
        commits = [event for event in events_of(history, "commit", job=job) if event.details["committed"]]
        commits.sort(key=lambda event: (event.round_number, event.t))
        for before, after in pairwise(commits):
            if after.details["step"] < before.details["step"]:
                what = f"step {after.details['step']} committed after step {before.details['step']}"
                found.append(_violation(committed_step_never_goes_back, after, what))
    return found


def rounds_never_go_back(history: Sequence[Event]) -> list[Violation]:
    """A node never sees an older round of a job than it saw before, and one life of it sees none twice."""
    found = []
    last: dict[tuple[str, str], tuple[str, int]] = {}
    for event in events_of(history, "round_seen"):
        boot, newest = last.get((event.node, event.job), ("", 0))
        number = event.round_number
        if number < newest or (number == newest and boot == event.boot):
            found.append(_violation(rounds_never_go_back, event, f"round {number} after round {newest}"))
        last[event.node, event.job] = (event.boot, max(number, newest))
    return found


def fenced_workers_stop(
    history: Sequence[Event], within_s: float = 6.0, pauses: Sequence[Pause] = ()
) -> list[Violation]:
    """A bounded time after ``fenced`` no worker of an older round runs on that node.

    A daemon that ended meanwhile took its workers with it; a history that ends before the time is up proves nothing.
    """
    found = []
    end = history[-1].t if history else 0.0
    for fenced in events_of(history, "fenced"):
        due = fenced.t + within_s
        if end < due or any(p.node == fenced.node and p.start <= due <= p.end for p in pauses):
            continue
        running = _running_round(history, fenced, due)
        if running is not None and running < fenced.round_number:
            what = f"workers of round {running} still ran {within_s:g} s after round {fenced.round_number} fenced them"
            found.append(_violation(fenced_workers_stop, fenced, what))
    return found


def _running_round(history: Sequence[Event], fenced: Event, at: float) -> int | None:
    """The round of the workers that this node had running then; None when it had none."""
    running = None
    for event in history:
        if event.t > at:
            break
        if event.node != fenced.node:
            continue
        if event.boot != fenced.boot or event.name in _NO_WORKERS:
            running = None
        elif event.name == "workers_started" and event.job == fenced.job:
            running = event.round_number
    return running


def lost_nodes_cost_no_restart(history: Sequence[Event]) -> list[Violation]:
    """The count of worker failures rises only in rounds whose cause is a worker's failure, and then by one."""
    found = []
    for job in jobs_of(history):
        charged = 0
        for number, record in sorted(rounds_of(history, job).items()):
            now = _charged(record)
            allowed = charged + (1 if record["cause"] == Cause.WORKER_FAILED else 0)
            if now > allowed:
                what = f"round {number} ({record['cause']}) raised the worker failures from {charged} to {now}"
                found.append(
                    Violation(rule="lost_nodes_cost_no_restart", t=_seen_at(history, job, number), node="", what=what)
                )
            charged = max(charged, now)
    return found


def budget_charged(history: Sequence[Event], job: str, failures: int) -> list[Violation]:
    """Exactly so many restarts were charged to the script of that job."""
    rounds = rounds_of(history, job)
    charged = max((_charged(record) for record in rounds.values()), default=0)
    if charged == failures:
        return []
    what = f"{charged} restarts were charged, {failures} were the script's own"
    return [Violation(rule="budget_charged", t=history[-1].t if history else 0.0, node="", what=what)]


def steps_go_on(trained: Sequence[Trained], start: float, end: float, within_s: float) -> list[Violation]:
    """Invariant 7: between ``start`` and ``end`` no two completed steps, of whichever ranks, are further apart."""
    times = [start, *sorted(line.t for line in trained if start <= line.t <= end), end]
    return [
        Violation(
            rule="steps_go_on", t=before, node="", what=f"no step for {after - before:.3f} s ({within_s:g} allowed)"
        )
        for before, after in pairwise(times)
        if after - before > within_s
    ]


def nobody_is_moved(history: Sequence[Event], start: float, end: float) -> list[Violation]:
    """While etcd is away, and for one lease after it is back: no round, no fence, no stopped workers."""
    moves = events_of(history, "round_proposed", "round_seen", "fenced", "workers_stopped", "workers_failed")
    return [
        _violation(nobody_is_moved, event, f"{event.name} of round {event.round_number}")
        for event in moves
        if start <= event.t <= end
    ]


def workers_train_one_world(trained: Sequence[Trained], history: Sequence[Event], job: str) -> list[Violation]:
    """Invariant 1, seen by the workers: each trained as a rank that its node's seat in that round holds."""
    found = []
    rounds = rounds_of(history, job)
    for line in trained:
        record = rounds.get(line.round_number)
        holder = _holder(record, line.rank) if record is not None else None
        size = sum(seat["nproc"] for seat in record["seats"]) if record is not None else 0
        if record is None or line.world != size or (line.node and holder != line.node):
            what = (
                f"rank {line.rank} of {line.world} in round {line.round_number}, whose rank it is: {holder} of {size}"
            )
            found.append(Violation(rule="workers_train_one_world", t=line.t, node=line.node, what=what))
    return found


def samples_count_once(
    trained: Sequence[Trained], committed_step: int, batch: int, *, first_step: int = 1
) -> list[Violation]:
    """Invariant 5: over the steps that count, up to the committed one, every sample was used once, in whole batches.

    A round that starts at step s makes all that older rounds did from s on not count: it restored the state before it.
    """
    kept = _steps_that_count(trained)
    used: Counter[int] = Counter()
    found = []
    for step in range(first_step, committed_step + 1):
        samples = [sample for line in kept.get(step, ()) for sample in line.samples]
        used.update(samples)
        if len(samples) != batch:
            found.append(_sample_violation(f"step {step} used {len(samples)} samples, not {batch}"))
    twice = sorted(sample for sample, count in used.items() if count > 1)
    if twice:
        found.append(_sample_violation(f"{len(twice)} samples were used more than once: {twice[:10]}"))
    return found


def same_as(reference: Sequence[Trained], trained: Sequence[Trained], relative: float) -> list[Violation]:
    """Every step that counts has the samples of the same step of ``reference``; no loss, not even of a step that was
    done again, is further from it than by this part of it. The reference is the ledger of a run without faults."""
    wanted: dict[int, list[Trained]] = defaultdict(list)
    for line in reference:
        wanted[line.step].append(line)
    found = []
    kept = _steps_that_count(trained)
    for step, lines in sorted(wanted.items()):
        ours, theirs = _samples(kept.get(step, ())), _samples(lines)
        if ours != theirs:
            found.append(_sample_violation(f"step {step} has samples {ours[:10]}..., not {theirs[:10]}..."))
    for line in trained:
        known = next((other.loss for other in wanted.get(line.step, ())), None)
        if known is None or line.loss is None or not abs(line.loss - known) <= relative * abs(known):
            what = f"loss {line.loss} in step {line.step} of a world of {line.world}, where it should be {known}"
            found.append(Violation(rule="same_as", t=line.t, node=line.node, what=what))
    return found


def _samples(lines: Iterable[Trained]) -> list[int]:
    return sorted(sample for line in lines for sample in line.samples)


def _steps_that_count(trained: Sequence[Trained]) -> dict[int, list[Trained]]:
    by_round: dict[int, list[Trained]] = defaultdict(list)
    for line in trained:
        by_round[line.round_number].append(line)
    kept: dict[int, list[Trained]] = {}
    for _, lines in sorted(by_round.items()):
        first = min(line.step for line in lines)
        kept = {step: done for step, done in kept.items() if step < first}
        for line in lines:
            kept.setdefault(line.step, []).append(line)
    return kept


def healthy(history: Sequence[Event], job: str, nodes: Iterable[str]) -> list[Violation]:
    """The newest round of the job runs on exactly these nodes. For before the fault and after the heal."""
    rounds = rounds_of(history, job)
    if not rounds:
        return [Violation(rule="healthy", t=0.0, node="", what="no round was seen")]
    number, record = max(rounds.items())
    seated, wanted = {seat["node_id"] for seat in record["seats"]}, set(nodes)
    if record["phase"] == Phase.RUNNING and seated == wanted:
        return []
    what = f"round {number} is {record['phase']} on {sorted(seated)}, not running on {sorted(wanted)}"
    return [Violation(rule="healthy", t=_seen_at(history, job, number), node="", what=what)]


#: What holds of every history, whatever happened to the cluster.
ALWAYS: tuple[Validator, ...] = (
    one_world_per_round,
    ranks_belong_to_one_seat,
    committed_step_never_goes_back,
    rounds_never_go_back,
    lost_nodes_cost_no_restart,
)


def validate(history: Sequence[Event], pauses: Sequence[Pause] = ()) -> list[Violation]:
    """All of ALWAYS, and those that must know which nodes could not act for a while."""
    found = [violation for validator in ALWAYS for violation in validator(history)]
    return found + stale_rounds_commit_nothing(history, pauses) + fenced_workers_stop(history, pauses=pauses)


def _world(event: Event) -> Mapping[str, Any]:
    """What makes a round this round; who wrote it is for the record only."""
    record = event.details["round"]
    return {name: record[name] for name in ("phase", "seats", "store_address", "store_port")}


def _holder(record: Mapping[str, Any], rank: int) -> str | None:
    for seat in record["seats"]:
        if seat["first_rank"] <= rank < seat["first_rank"] + seat["nproc"]:
            return str(seat["node_id"])
    return None


def _charged(record: Mapping[str, Any]) -> int:
    return int(dict(record["restarts"]).get(Cause.WORKER_FAILED, 0))


def _seen_at(history: Sequence[Event], job: str, number: int) -> float:
    return next(e.t for e in events_of(history, "round_seen", job=job) if e.round_number == number)


def _violation(rule: Callable[..., Any], event: Event, what: str) -> Violation:
    return Violation(rule=rule.__name__, t=event.t, node=event.node, what=what)


def _sample_violation(what: str) -> Violation:
    return Violation(rule="samples_count_once", t=0.0, node="", what=what)
