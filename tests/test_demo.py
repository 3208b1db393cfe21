"""The demo: each of its claims can fail, its view draws without a terminal, and the real thing holds what it promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from elasticd.core.model import BootId, Cause, NodeId, Phase, Round, Seat
from elasticd.core.records import to_plain
from elasticd.demo.chart import draw
from elasticd.demo.claims import RECOVERY_BOUND_S, judge
from elasticd.demo.picture import draw_picture
from elasticd.demo.plan import BATCH, JOB, Act, Cue, DemoOptions, is_due, make_plan
from elasticd.demo.record import Line, Mark, Record, kills_of
from elasticd.demo.scene import NodeState, Point, Scene, look
from elasticd.demo.stage import PlainStage, open_stage
from elasticd.demo.view import Frame, summary_of
from elasticd.errors import ConfigError
from elasticd.testing.history import Event

STEPS = 120
PLAN = make_plan(DemoOptions(steps=STEPS))


# --- a forged performance: rounds of two or three nodes, as the plan has them ---

#: (round, nodes, cause, first step, last step); steps of 0.1 s. Rounds 2 and 4 do four steps again.
ROUNDS = [
    (1, "abc", Cause.START, 1, 24),
    (2, "ab", Cause.NODE_LOST, 21, 40),
    (3, "abd", Cause.JOIN, 41, 64),
    (4, "bd", Cause.NODE_LOST, 61, 80),
    (5, "bde", Cause.JOIN, 81, STEPS),
]


def starts() -> dict[int, float]:
    """When each round was seen; its first step comes 0.5 s later."""
    t, found = 10.0, {}
    for number, _, _, first, last in ROUNDS:
        found[number] = t
        t += 0.5 + 0.1 * (last - first + 1)
    return found


def forge_lines() -> list[Line]:
    lines = []
    for number, nodes, _, first, last in ROUNDS:
        for step in range(first, last + 1):
            ids = [step * BATCH + i for i in range(BATCH)]
            for rank in range(len(nodes)):
                lines.append(
                    Line(
                        t=starts()[number] + 0.5 + 0.1 * (step - first),
                        step=step,
                        world=len(nodes),
                        rank=rank,
                        round_number=number,
                        loss=1.5 + 4.0 / step**0.5,
                        samples=tuple(ids[rank :: len(nodes)]),
                    )
                )
    return lines


def forge_history() -> list[Event]:
    history, counts = [], {}
    for number, nodes, cause, _, last in ROUNDS:
        if number > 1:
            counts[cause] = counts.get(cause, 0) + 1
        seats = tuple(
            Seat(node_id=NodeId(n), boot_id=BootId(n), address=n, group_rank=i, first_rank=i, nproc=1)
            for i, n in enumerate(nodes)
        )
        world = Round(
            number=number,
            phase=Phase.RUNNING,
            cause=cause,
            seats=seats,
            store_address=nodes[0],
            store_port=number,
            restarts=tuple(sorted(counts.items())),
        )
        t = starts()[number]
        for node in nodes:
            history.append(event(t, node, "round_seen", round=to_plain(world)))
            history.append(event(t + 0.05, node, "workers_started", round=number))
        history.append(event(t + 0.6, nodes[0], "commit", round=number, step=last, committed=True))
    history += [
        event(starts()[2] - 0.01, "a", "peer_down", peer="c"),
        event(starts()[4] - 0.01, "b", "peer_down", peer="a"),
    ]
    history += [event(starts()[3] - 0.1, "d", "agent_ready"), event(starts()[5] - 0.1, "e", "agent_ready")]
    history += [event(60.0, node, "job_over", phase="succeeded") for node in "bde"]
    return sorted(history, key=lambda one: one.t)


def event(t: float, node: str, name: str, **details: object) -> Event:
    return Event(t=t, node=node, boot=node, name=name, details={"job": JOB, **details})


def forge_marks() -> list[Mark]:
    t = starts()
    return [
        Mark(t=t[2] - 0.02, act=Act.KILL, node="c", step=24, round_number=1),
        Mark(t=t[3] - 1.0, act=Act.JOIN, node="d", step=36, round_number=2),
        Mark(t=t[4] - 0.02, act=Act.KILL, node="a", step=64, round_number=3, hosts_store=True),
        Mark(t=t[5] - 1.0, act=Act.JOIN, node="e", step=76, round_number=4),
    ]


CLEAN = Record(history=forge_history(), lines=forge_lines(), marks=forge_marks())
ADDRESSES = {node: node for node in "abcde"}


def broken(record: Record) -> list[str]:
    return [claim.name for claim in judge(record, PLAN).claims if not claim.held]


def with_lines(change: object) -> Record:
    """The clean record with each line changed, or left out where the change says None."""
    return replace(CLEAN, lines=[new for line in CLEAN.lines if (new := change(line)) is not None])


def with_history(change: object) -> Record:
    return replace(CLEAN, history=[new for one in CLEAN.history if (new := change(one)) is not None])


# --- claims ---


def test_a_clean_performance_passes() -> None:
    assert broken(CLEAN) == []


def test_what_a_kill_and_a_join_cost_is_measured() -> None:
    summary = judge(CLEAN, PLAN).plain()
    assert summary["kills"] == [
        {"node": "c", "hosted_store": False, "at_step": 24, "detected_s": 0.01, "next_step_s": 0.52, "steps_redone": 4},
        {"node": "a", "hosted_store": True, "at_step": 64, "detected_s": 0.01, "next_step_s": 0.52, "steps_redone": 4},
    ]
    assert [(join["node"], join["at_step"], join["ready_s"]) for join in summary["joins"]] == [
        ("d", 41, 0.9),
        ("e", 81, 0.9),
    ]
    assert [join["stall_s"] for join in summary["joins"]] == [0.6, 0.6]
    assert summary["restarts"] == {"join": 2, "node_lost": 2}
    json.dumps(summary, allow_nan=False)


def late(line: Line) -> Line:
    return replace(line, t=line.t + RECOVERY_BOUND_S + 1) if line.round_number >= 4 else line


def stalled(line: Line) -> Line:
    return replace(line, t=line.t + RECOVERY_BOUND_S + 1) if line.round_number >= 5 else line


def from_scratch(line: Line) -> Line:
    return replace(line, loss=5.5) if line.round_number >= 4 and line.step > 64 else line


BROKEN_LINES = {
    "a step is missing": (lambda line: None if line.step == 100 else line, {"job_succeeded", "samples_once"}),
    "training goes on late": (late, {"kills_survived"}),
    "training never goes on": (
        lambda line: line if line.round_number < 4 else None,
        {"job_succeeded", "kills_survived", "joins_admitted", "samples_once"},
    ),
    "a join stalls the others": (stalled, {"joins_admitted"}),
    "a step done again has another loss": (
        lambda line: replace(line, loss=line.loss * 1.01) if (line.step, line.round_number) == (22, 2) else line,
        {"same_step_same_loss"},
    ),
    "no step was done again": (
        lambda line: None if line.round_number in (1, 3) and line.step in (21, 22, 23, 24, 61, 62, 63, 64) else line,
        {"same_step_same_loss"},
    ),
    "the loss starts again": (from_scratch, {"loss_goes_on", "loss_falls"}),
    "the loss does not fall": (lambda line: replace(line, loss=5.5), {"loss_falls"}),
    "a sample is used twice": (
        lambda line: replace(line, samples=(BATCH, *line.samples[1:])) if (line.step, line.rank) == (100, 0) else line,
        {"samples_once"},
    ),
    "a sample is left out": (
        lambda line: replace(line, samples=line.samples[1:]) if (line.step, line.rank) == (100, 0) else line,
        {"samples_once"},
    ),
    "a worker trained in a world of its own": (
        lambda line: replace(line, world=1) if (line.step, line.rank) == (100, 0) else line,
        {"history_clean"},
    ),
}


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_a_ledger_that_breaks_a_claim_is_found(name: str) -> None:
    change, wanted = BROKEN_LINES[name]
    assert set(broken(with_lines(change))) == wanted


def charged(one: Event) -> Event:
    if one.round_number != 5 or one.name != "round_seen":
        return one
    record = {**one.details["round"], "restarts": [["join", 2], ["node_lost", 1], ["worker_failed", 1]]}
    return replace(one, details={**one.details, "round": record})


def split_brain(one: Event) -> Event:
    if (one.node, one.name, one.round_number) != ("e", "round_seen", 5):
        return one
    return replace(one, details={**one.details, "round": {**one.details["round"], "store_port": 1}})


BROKEN_HISTORY = {
    "the job fails": (
        lambda one: replace(one, details={"job": JOB, "phase": "failed"}) if one.name == "job_over" else one,
        {"job_succeeded"},
    ),
    "the job never ends": (lambda one: None if one.name == "job_over" else one, {"job_succeeded"}),
    "the joiner gets no seat": (
        lambda one: None if one.name == "round_seen" and one.round_number == 5 else one,
        {"joins_admitted", "history_clean"},
    ),
    "the last checkpoint is not on record": (
        lambda one: None if one.name == "commit" and one.round_number == 5 else one,
        {"last_step_committed"},
    ),
    "a lost node is charged": (charged, {"budget_untouched", "history_clean"}),
    "two worlds in a round": (split_brain, {"history_clean"}),
}


@pytest.mark.parametrize("name", BROKEN_HISTORY)
def test_a_history_that_breaks_a_claim_is_found(name: str) -> None:
    change, wanted = BROKEN_HISTORY[name]
    assert set(broken(with_history(change))) == wanted


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_performance_that_leaves_out_acts_does_not_pass(kept: int) -> None:
    assert broken(replace(CLEAN, marks=CLEAN.marks[:kept]))


def test_the_store_must_be_among_what_was_killed() -> None:
    marks = [replace(mark, hosts_store=False) for mark in CLEAN.marks]
    assert broken(replace(CLEAN, marks=marks)) == ["kills_survived"]


def test_nothing_at_all_breaks_every_claim() -> None:
    summary = judge(Record(), PLAN)
    assert not any(claim.held for claim in summary.claims)
    json.dumps(summary.plain(), allow_nan=False)


def test_every_claim_is_broken_by_some_forgery() -> None:
    found = {name for _, wanted in (*BROKEN_LINES.values(), *BROKEN_HISTORY.values()) for name in wanted}
    assert found == {claim.name for claim in judge(CLEAN, PLAN).claims}


# --- the plan ---


def test_the_plan_needs_room() -> None:
    with pytest.raises(ConfigError, match="--steps 20"):
        make_plan(DemoOptions(steps=20))
    assert make_plan(DemoOptions()).steps > STEPS


def test_a_kill_waits_for_steps_that_no_checkpoint_holds() -> None:
    kill, join = Cue(act=Act.KILL, world=3, from_step=20, steady=5), Cue(act=Act.JOIN, world=3, from_step=20, steady=5)
    due = [step for step in range(31) if is_due(kill, world=3, step=step, steps_in_round=step)]
    assert due == [25, 26, 27, 28, 29]
    assert is_due(join, world=3, step=20, steps_in_round=5)
    assert not is_due(join, world=2, step=20, steps_in_round=5)
    assert not is_due(join, world=3, step=20, steps_in_round=4)


# --- the view ---


def scene_at(now: float) -> Scene:
    """What the view would have shown then."""
    record = Record(
        history=[one for one in CLEAN.history if one.t <= now],
        lines=[line for line in CLEAN.lines if line.t <= now],
        marks=[mark for mark in CLEAN.marks if mark.t <= now],
    )
    return look(record, PLAN, ADDRESSES, start=8.0, now=now)


def drawn(scene: Scene, width: int, height: int = 40) -> list[str]:
    output = StringIO()
    Console(file=output, width=width, height=height, force_terminal=False).print(Frame(scene, "a title"))
    return output.getvalue().splitlines()


def test_a_scene_shows_what_each_node_does() -> None:
    states = {row.name: row.state for row in scene_at(starts()[3] + 0.01).nodes}
    assert states == {
        "a": NodeState.ENTERING,
        "b": NodeState.ENTERING,
        "c": NodeState.DEAD,
        "d": NodeState.ENTERING,
        "e": NodeState.STARTING,
    }
    later = scene_at(starts()[4] + 1.0)
    assert {row.name: row.rank for row in later.nodes} == {"a": None, "b": 0, "c": None, "d": 1, "e": None}
    assert [row.name for row in later.nodes if row.hosts_store] == ["b"]
    assert (later.world, later.round_number, later.cause) == (2, 4, "node_lost")


def test_a_step_that_was_done_again_is_one_point_of_the_curve() -> None:
    curve = scene_at(60.0).curve
    assert [point.step for point in curve] == list(range(1, STEPS + 1))
    assert [point.world for point in curve[19:24]] == [3, 2, 2, 2, 2]


def test_what_happened_is_told_in_order_of_time() -> None:
    told = scene_at(60.0).happenings
    assert [one.t for one in told] == sorted(one.t for one in told)
    assert [one.kind for one in told].count("kill") == len(kills_of(CLEAN))
    assert told[-1].kind == "over"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("now", [8.0, 10.01, 13.1, 18.0, 60.0])
def test_a_frame_fits_its_terminal(width: int, now: float) -> None:
    for height in (24, 40):
        lines = drawn(scene_at(now), width, height)
        assert sum("charged" in line and "free" in line for line in lines) == 1
        assert len(lines) < height
        assert max(map(len, lines)) <= width
        assert "…" not in "".join(lines[1:])  # nothing but the title may be cut


def test_a_chart_uses_its_height_and_leaves_the_future_blank() -> None:
    curve = [Point(step=step, loss=4.0 - step / 50, world=3) for step in range(1, 51)]
    chart = draw(curve, steps=100, width=20, height=4)
    assert [len(row) for row in chart.rows] == [20] * 4
    assert all(row[10:].strip() == "" for row in chart.rows)
    assert chart.rows[0][0] == "█"
    assert chart.rows[0][9] == " "
    assert chart.rows[3][9] == "█"


def test_a_chart_without_a_step_is_empty() -> None:
    assert set("".join(draw([], steps=100, width=20, height=4).rows)) == {" "}


def test_without_a_terminal_it_is_plain_lines() -> None:
    output = StringIO()
    stage = open_stage(output, "a title", plain=False)
    assert isinstance(stage, PlainStage)
    with stage:
        for tenth in range(80, 600):
            stage.show(scene_at(tenth / 10))
    stage.conclude(judge(CLEAN, PLAN))
    text = output.getvalue()
    assert "\x1b" not in text
    assert text.count("SIGKILL") == 2
    assert "All 10 claims held" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_broken_claim_is_shown_as_one(width: int) -> None:
    output = StringIO()
    console = Console(file=output, width=width)
    console.print(summary_of(judge(with_lines(stalled), PLAN)))
    assert "1 of 10 claims did not hold" in output.getvalue()
    assert "…" not in output.getvalue()


def test_the_picture_is_well_formed_and_marks_each_change() -> None:
    picture = ET.fromstring(draw_picture(CLEAN, PLAN))
    names = [line.get("class") for line in picture.iter("{http://www.w3.org/2000/svg}line")]
    assert (names.count("kill"), names.count("join")) == (2, 2)
    ET.fromstring(draw_picture(Record(), PLAN))


# --- the real thing ---


def demo(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "elasticd.cli", "demo", *arguments]


def left_behind(folder: Path) -> list[str]:
    """Processes that name the folder, which every part of a demo does or has from one that does."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(folder) in line and process.info["pid"] != os.getpid() and process.info["status"] != "zombie":
            found.append(line)
    return found


@pytest.mark.net
@pytest.mark.timeout(150)
def test_the_demo_holds_its_claims_and_leaves_nothing(namespaces: None, tmp_path: Path) -> None:
    before = set(Path("/run/netns").glob("ed*")) if Path("/run/netns").exists() else set()
    keep = tmp_path / "kept"
    done = subprocess.run(
        demo("--json", "--steps", "300", "--keep", str(keep)), capture_output=True, text=True, timeout=140, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["passed"]
    assert summary["steps"] == 300
    assert [claim["name"] for claim in summary["claims"]] == [claim.name for claim in judge(CLEAN, PLAN).claims]
    assert all(claim["held"] for claim in summary["claims"])
    assert [kill["hosted_store"] for kill in summary["kills"]] == [False, True]
    assert left_behind(keep) == []
    assert set(Path("/run/netns").glob("ed*")) <= before
    assert (keep / "loss.svg").exists()
    assert (keep / "checkpoints" / "step-300" / "manifest.json").exists()


@pytest.mark.net
def test_ctrl_c_ends_it_and_all_that_it_started(namespaces: None, tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    process = subprocess.Popen(
        demo("--plain", "--keep", str(keep)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:  # until the job trains
            if "step 1 of" in line or "world 3" in line:
                break
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert left_behind(keep) == []


def test_what_a_person_must_mend_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    full = subprocess.run(demo("--keep", str(tmp_path)), capture_output=True, text=True, timeout=60, check=False)
    assert full.returncode == 2
    assert full.stderr.splitlines() == [f"elasticd: error: --keep {tmp_path}: the folder is not empty; name a new one"]
