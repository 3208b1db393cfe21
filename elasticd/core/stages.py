"""The stages of one node's part in a job, as a table. A pair that is not listed is a bug and raises.

The diagram in ARCHITECTURE.md is generated from this table (``python -m elasticd.core.stages``). Pure.
"""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """What this node does for its job."""

    IDLE = "idle"  # has no job
    PREPARING = "preparing"  # the agent starts and preloads
    WAITING = "waiting"  # ready, and in no world: waiting for one, or a spare
    RUNNING = "running"  # the workers of the current round run
    BROKEN = "broken"  # a worker failed; the world has not changed yet
    FINISHED = "finished"  # the workers ended well; others may still run
    ENDING = "ending"  # the agent stops the workers and itself


class Trigger(StrEnum):
    """What moves a node from stage to stage."""

    JOB_TAKEN = "job taken"
    AGENT_READY = "agent ready"
    AGENT_LOST = "agent lost"
    ADMITTED = "admitted to a round"
    FENCED = "fenced by a newer round"
    WORKERS_FAILED = "workers failed"
    WORKERS_SUCCEEDED = "workers succeeded"
    DISMISSED = "dismissed"  # drained, moved or shutting down, and in no world
    JOB_OVER = "job over"
    AGENT_GONE = "agent gone"


_LEAVE = {Trigger.JOB_OVER: Stage.ENDING, Trigger.DISMISSED: Stage.ENDING, Trigger.AGENT_LOST: Stage.PREPARING}
_MOVE = {Trigger.ADMITTED: Stage.RUNNING, Trigger.FENCED: Stage.WAITING}

TABLE: dict[Stage, dict[Trigger, Stage]] = {
    Stage.IDLE: {Trigger.JOB_TAKEN: Stage.PREPARING},
    Stage.PREPARING: {Trigger.AGENT_READY: Stage.WAITING, **_LEAVE},
    Stage.WAITING: {Trigger.ADMITTED: Stage.RUNNING, **_LEAVE},
    Stage.RUNNING: {
        **_MOVE,
        Trigger.WORKERS_FAILED: Stage.BROKEN,
        Trigger.WORKERS_SUCCEEDED: Stage.FINISHED,
        **_LEAVE,
    },
    Stage.BROKEN: {**_MOVE, **_LEAVE},
    Stage.FINISHED: {**_MOVE, **_LEAVE},
    Stage.ENDING: {Trigger.AGENT_GONE: Stage.IDLE},
}


def advance(stage: Stage, trigger: Trigger) -> Stage:
    """The stage that follows. LookupError when the table has no such pair."""
    try:
        return TABLE[stage][trigger]
    except KeyError:
        raise LookupError(f"no transition from {stage.value!r} on {trigger.value!r}") from None


def mermaid() -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {Stage.IDLE.value}"]
    for stage, row in TABLE.items():
        lines += [f"    {stage.value} --> {target.value}: {trigger.value}" for trigger, target in row.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(mermaid())  # noqa: T201
