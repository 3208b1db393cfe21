"""The table of stages: whole, without dead ends, and the same as the diagram that readers see."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elasticd.core.stages import TABLE, Stage, Trigger, advance, mermaid

ARCHITECTURE = Path(__file__).parent.parent / "ARCHITECTURE.md"


def reachable(start: Stage) -> set[Stage]:
    found, todo = {start}, [start]
    while todo:
        new = set(TABLE[todo.pop()].values()) - found
        found |= new
        todo += new
    return found


def test_every_stage_is_reached_from_the_start_and_leads_back_to_it() -> None:
    assert reachable(Stage.IDLE) == set(Stage) == set(TABLE)
    assert all(Stage.IDLE in reachable(stage) for stage in Stage)


def test_every_trigger_is_used() -> None:
    assert {trigger for row in TABLE.values() for trigger in row} == set(Trigger)


def test_workers_run_only_after_a_round_was_seen() -> None:
    into_running = {trigger for row in TABLE.values() for trigger, target in row.items() if target is Stage.RUNNING}
    assert into_running == {Trigger.ADMITTED}


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("trigger", Trigger)
def test_a_pair_leads_where_the_table_says_or_raises(stage: Stage, trigger: Trigger) -> None:
    if trigger in TABLE[stage]:
        assert advance(stage, trigger) is TABLE[stage][trigger]
        return
    with pytest.raises(LookupError, match=f"'{stage.value}' on '{trigger.value}'"):
        advance(stage, trigger)


def test_the_diagram_in_the_documentation_is_the_table() -> None:
    """Run ``python -m elasticd.core.stages`` and put its output into ARCHITECTURE.md when this fails."""
    diagrams = re.findall(r"^```mermaid\n(stateDiagram.*?)\n```", ARCHITECTURE.read_text(), re.DOTALL | re.MULTILINE)
    assert diagrams == [mermaid()]
