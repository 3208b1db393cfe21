"""The benchmark's pure parts: what each summariser makes of recorded lines, when a goal is reached, how it is shown."""

from __future__ import annotations

import io
import json
import math

import pytest

from elasticd.bench import __main__ as bench
from elasticd.bench import checkpoint, memory
from elasticd.bench.balance import AS_GOOD, BEFORE, lost_to_unevenness, read_release, read_settling, read_turns
from elasticd.bench.compression import WARM_UP, WINDOW, curve_distance, noise_of, read_steps
from elasticd.bench.figures import ELASTICD, TUNED, Figure, Goal, all_hold
from elasticd.bench.idle import Usage, all_linked, cpu_percent
from elasticd.bench.jobs import BEST, DEFAULTS, JobShape, TorchrunFlags, TorchrunJob, first_step
from elasticd.bench.join import longest_gap
from elasticd.bench.machine import MachineName, cpu_model
from elasticd.bench.options import Options
from elasticd.bench.overhead import percent_lost, steps_per_second
from elasticd.bench.recovery import seconds_to_step
from elasticd.bench.rendezvous import milliseconds_to_enter
from elasticd.bench.rendezvous_handlers import milliseconds_to_hold
from elasticd.bench.report import document, make_markdown, make_table, print_report, quantity, write_document
from elasticd.bench.restart import first_new_step
from elasticd.bench.session_cost import cost_of
from elasticd.errors import ElasticdError
from elasticd.testing.history import Event, Trained

MACHINE = MachineName(
    cpu="Abacus [9000]",
    cores=2,
    memory_bytes=8 * 2**30,
    kernel="6.1",
    python="3.11.7",
    torch="2.13.0",
    etcd="3.5.1",
    elasticd="0.1.0",
    date="2026-11-24T00:00:00+00:00",
    load_1min=0.5,
)


def line(t: float, *, world: int = 3, rank: int = 0, step: int = 1, pid: int = 1) -> Trained:
    return Trained(t=t, round_number=1, rank=rank, step=step, world=world, pid=pid)


def event(t: float, node: str, name: str, **details: object) -> Event:
    return Event(t=t, node=node, boot=node, name=name, details=details)


def figure(*samples: float | str, goal: Goal | None = None, unit: str = "s", system: str = ELASTICD) -> Figure:
    return Figure(experiment="x", what="a thing", system=system, unit=unit, samples=samples, goal=goal)


# --- summarisers ---


def test_recovery_ends_with_the_first_step_of_the_smaller_world() -> None:
    late_but_of_the_old_world = line(10.01)
    lines = [line(9.9, world=2), line(9.99), late_but_of_the_old_world, line(10.6, world=2), line(10.65, world=2)]
    assert seconds_to_step(lines, 10.0, world=2) == pytest.approx(0.6)
    assert seconds_to_step(lines[:3], 10.0, world=2) is None
    assert first_step(lines, 10.6, world=2) == lines[-1]  # later than, not at


def test_a_join_costs_the_longest_gap_of_those_who_were_there() -> None:
    joiner = [line(t / 100, rank=2) for t in range(1000, 1200)]
    others = [line(10.0), line(10.05), line(10.7), line(10.75), line(10.8)]
    assert longest_gap([*others, *joiner], 10.0, 10.8) == pytest.approx(0.65)


def test_a_join_whose_steps_stop_for_good_is_a_gap_to_the_end() -> None:
    assert longest_gap([line(10.0), line(10.05)], 10.0, 12.0) == pytest.approx(1.95)
    assert longest_gap([], 10.0, 12.0) == pytest.approx(2.0)


def test_a_restart_ends_with_a_step_of_a_new_process() -> None:
    survivor_still_steps = line(10.01, pid=1)
    lines = [line(9.9, pid=1), line(9.9, pid=2, rank=1), survivor_still_steps, line(10.5, pid=3)]
    assert first_new_step(lines, 10.0) == lines[-1]
    assert first_new_step(lines[:-1], 10.0) is None


def test_rendezvous_is_from_the_last_arrival_to_the_last_entry() -> None:
    history = [
        event(1.0, "a", "agent_ready", job="j"),
        event(1.5, "b", "agent_ready", job="j"),
        event(1.52, "b", "round_seen", job="j", round={"number": 1}),
        event(1.53, "a", "round_seen", job="j", round={"number": 1}),
        event(9.0, "a", "round_seen", job="j", round={"number": 2}),
        event(9.0, "a", "agent_ready", job="another"),
    ]
    assert milliseconds_to_enter(history, "j", 2) == pytest.approx(30)
    assert milliseconds_to_enter(history[:3], "j", 2) is None


def test_handlers_are_judged_by_the_last_to_ask_and_the_last_to_return() -> None:
    said = [{"asked": 1.0, "returned": 2.0}, {"asked": 1.9, "returned": 2.1}]
    assert milliseconds_to_hold(said) == pytest.approx(200)


def test_speed_is_that_of_rank_0_after_its_warm_up() -> None:
    slow_start = [line(float(step), step=step) for step in range(3)]
    steady = [line(3 + step / 100, step=3 + step) for step in range(101)]
    other = [line(t / 1000, rank=1, step=100) for t in range(5000)]
    assert steps_per_second([*slow_start, *steady, *other], 3) == pytest.approx(100)
    with pytest.raises(ValueError, match="0 steps after step 3"):
        steps_per_second(slow_start, 3)


def test_what_a_step_sends_and_takes_is_read_after_the_warm_up() -> None:
    """The first steps send more, and rank 1 counts for itself."""
    lines = [
        {"rank": rank, "step": step, "t": 0.5 * step, "sent": 9_000_000 + 2_000_000 * step if rank == 0 else 0}
        for step in range(WARM_UP + 4)
        for rank in (0, 1)
    ]
    lines[0]["sent"] = 0
    assert read_steps(lines) == pytest.approx((2.0, 0.5))
    with pytest.raises(ValueError, match="1 steps"):
        read_steps(lines[: 2 * (WARM_UP + 1)])


def test_curves_differ_by_their_means_and_the_noise_is_the_least_of_what_seeds_do() -> None:
    steps = range(4 * WINDOW)
    falling = [5 - step / 100 for step in steps]
    jagged = [loss + (-1) ** step for step, loss in enumerate(falling)]
    late = [loss * (1 if step < 3 * WINDOW else 1.02) for step, loss in enumerate(falling)]
    assert curve_distance(jagged, falling) == pytest.approx(0, abs=1e-9)  # no batch is like another
    assert curve_distance(late, falling) == pytest.approx(2)
    assert curve_distance([*falling[:-WINDOW], *[float("nan")] * WINDOW], falling) == math.inf
    assert noise_of([falling, [1.01 * loss for loss in falling], [1.5 * loss for loss in falling]]) == pytest.approx(1, rel=0.02)


def test_costs_are_medians_over_turns_of_both_ways() -> None:
    turns = [(1.0, 1.1), (2.0, 2.2), (1.0, 3.0)]
    lines = [
        {"turn": number, "way": way, "seconds": seconds, "cpu_s": seconds}
        for number, pair in enumerate(turns)
        for way, seconds in zip(("plain", "session"), pair, strict=True)
    ]
    found = cost_of([*lines, {"turn": 3, "way": "plain", "seconds": 9.0, "cpu_s": 9.0}], "session", "plain")
    assert found.percent == pytest.approx(10)
    assert found.cpu_us == pytest.approx(0.2e6)
    assert found.cpu_percent == pytest.approx(20)
    with pytest.raises(ValueError, match="exact"):
        cost_of(lines, "exact", "plain")


def test_shares_have_settled_when_they_no_longer_differ_by_more_than_chance() -> None:
    """Rank 1 is slowed down after step 6."""
    shares = [12] * 10 + [20 - AS_GOOD, 20, 20 + AS_GOOD, 20] + [20] * 15
    times = [0.5 * step for step in range(10)] + [5.0 + 0.25 * step for step in range(len(shares) - 10)]
    lines = [
        {"t": t, "rank": rank, "step": step, "share": share if rank == 0 else 30 - share}
        for step, (t, share) in enumerate(zip(times, shares, strict=True), start=1)
        for rank in (1, 0)
    ]
    assert read_settling(lines, times[BEFORE - 1] + 0.01) == (10 - BEFORE, 20)


def test_shares_that_have_not_followed_a_node_that_is_fast_again_are_no_figure() -> None:
    shares = [26, 26, 25, 12, 12, 12]
    lines = [{"t": float(step), "rank": 0, "step": step, "share": share} for step, share in enumerate(shares)]
    assert read_release(lines, released_at=0.5, slow_share=26) == 2
    with pytest.raises(ValueError, match="not followed in 2 steps"):
        read_release(lines[:3], released_at=0.5, slow_share=25)


def test_what_two_nodes_reach_is_held_against_the_sum_of_both_before_and_after() -> None:
    """Ten micro-batches a step: turns of a step that is not timed, and two of a second; the first and the last line of
    a turn say what each node does by itself, which changes in the second turn."""
    ends_at = [0.0, 9.0, 10.0, 11.0, 29.0, 30.0, 31.0]
    alone = {0: (5.0, 5.0), 3: (5.0, 5.0), 6: (7.0, 8.0)}
    lines = [
        {"t": t, "rank": rank, "step": step, **({"alone": [1 / alone[step][rank]] * 9} if step in alone else {})}
        for step, t in enumerate(ends_at)
        for rank in (1, 0)
    ]
    assert read_turns(lines, micro_batches=10) == pytest.approx([0, 20])
    with pytest.raises(ValueError, match="1 times: no turn"):
        read_turns(lines[:4], micro_batches=10)


def test_a_step_waits_for_whoever_is_slow_just_then() -> None:
    """One node takes 9 or 11 s for its two micro-batches, the other one always 3 s for its own. What is left over of
    a time by itself, and no whole share, does not count."""
    lines: list[dict] = [
        {"rank": 0, "step": 1, "share": 2, "alone": [4.5, 4.5, 6.0, 5.0, 99.0]},
        {"rank": 1, "step": 1, "share": 1, "alone": [3.0, 3.0]},
        {"rank": 0, "step": 2, "share": 2},
        {"rank": 1, "step": 2, "share": 1},
    ]
    assert lost_to_unevenness(lines) == pytest.approx(100 * (1 - 1 / 1.05))
    assert lost_to_unevenness([*lines[1:2], {**lines[1], "rank": 0}]) == 0


def test_a_slower_run_has_lost_and_a_faster_one_has_won() -> None:
    assert percent_lost(100.0, 99.0) == pytest.approx(1)
    assert percent_lost(100.0, 102.0) == pytest.approx(-2)


def test_the_share_of_a_core_is_between_two_looks() -> None:
    before, after = (Usage(t=t, cpu_s=cpu_s, resident_bytes=1) for t, cpu_s in ((10.0, 7.0), (30.0, 7.1)))
    assert cpu_percent(before, after) == pytest.approx(0.5)


def test_all_are_linked_when_each_has_heard_each_other() -> None:
    history = [
        event(1, "a", "peer_up", peer="b"),
        event(1, "a", "peer_up", peer="b"),
        event(2, "b", "peer_up", peer="a"),
    ]
    assert all_linked(history, 2)
    assert not all_linked(history[:2], 2)


# --- figures and goals ---


def test_a_goal_is_for_the_median_or_for_every_sample() -> None:
    samples = (0.5, 0.6, 1.4)
    assert figure(*samples, goal=Goal(at_most=1.0)).holds is True
    assert figure(*samples, goal=Goal(at_most=1.0, of="max")).holds is False
    assert figure(*samples).holds is None


def test_a_sample_that_is_no_number_reaches_no_goal() -> None:
    one_missing = figure(0.5, 0.6, "no step in 30 s", goal=Goal(at_most=1.0))
    assert (one_missing.p50, one_missing.max) == (pytest.approx(0.55), 0.6)
    assert one_missing.holds is False
    assert figure(goal=Goal(at_most=1.0)).holds is False


def test_all_hold_only_when_something_was_to_be_reached() -> None:
    reached, missed = figure(0.5, goal=Goal(at_most=1.0)), figure(1.5, goal=Goal(at_most=1.0))
    assert all_hold([reached, figure(99.0)])
    assert not all_hold([reached, missed])
    assert not all_hold([figure(99.0)])


# --- report ---


def rendered(*figures: Figure) -> str:
    stream = io.StringIO()
    print_report(MACHINE, figures, stream)
    return stream.getvalue()


def test_the_table_is_plain_text_where_there_is_no_terminal() -> None:
    figures = (
        figure(0.5, 0.7, 0.6, goal=Goal(at_most=1.0)),
        figure("the job ends", system=TUNED),
        figure(0.4, 12.0, goal=Goal(at_most=1.0), unit="ms"),
    )
    text = rendered(*figures)
    assert "\x1b" not in text
    rows = [row.split() for row in text.splitlines()]
    assert rows[0] == ["measured", "system", "n", "p50", "max", "goal"]
    assert rows[1] == ["a", "thing", "elasticd", "3", "0.600", "s", "0.700", "s", "p50", "1.000", "s", "holds"]
    assert rows[2] == ["torchrun,", "tuned", "1", "the", "job", "ends"]
    assert rows[3] == ["elasticd", "2", "6.2", "ms", "12.0", "ms", "p50", "1.0", "ms", "MISSED"]
    assert "Abacus [9000], 2 cores, 8 GiB, Linux 6.1, load 0.50" in text
    assert "torch 2.13.0, etcd 3.5.1" in text


def test_words_are_shown_beside_the_verdict_as_they_are() -> None:
    text = rendered(figure(0.5, "[red] no step", goal=Goal(at_most=1.0)))
    assert "MISSED [red] no step" in text


def test_a_terminal_gets_the_same_cells() -> None:
    one = figure(0.5, goal=Goal(at_most=1.0))
    plain, rich = make_table([one], plain=True), make_table([one], plain=False)
    assert [list(column.cells) for column in plain.columns] == [list(column.cells) for column in rich.columns]


def test_a_readme_gets_the_same_cells() -> None:
    one = figure(0.5, "no step", goal=Goal(at_most=1.0))
    header, rule, row, *_ = make_markdown(MACHINE, [one]).splitlines()
    cells = [next(iter(column.cells)) for column in make_table([one], plain=True).columns]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [str(cell) for cell in cells]
    assert header.count("|") == rule.count("|") == row.count("|")


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0512, "s", "0.051 s"),
        (45.04, "s", "45.0 s"),
        (37.84, "ms", "37.8 ms"),
        (-0.5, "%", "-0.50 %"),
        (0.333, "% of a core", "0.33 %"),
        (61.3, "MB", "61 MB"),
    ],
)
def test_quantities(value: float, unit: str, shown: str) -> None:
    assert quantity(value, unit) == shown


def test_the_document_has_every_sample_and_names_the_machine(tmp_path) -> None:
    figures = [figure(0.5, "no step", goal=Goal(at_most=1.0))]
    write_document(tmp_path / "out" / "bench.json", document(MACHINE, figures, 12.34))
    read = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert read["machine"]["cpu"] == "Abacus [9000]"
    assert read["all_hold"] is False
    assert read["wall_s"] == 12.3
    assert read["figures"][0] == {
        "experiment": "x",
        "what": "a thing",
        "system": ELASTICD,
        "unit": "s",
        "n": 2,
        "p50": 0.5,
        "max": 0.5,
        "goal": {"at_most": 1.0, "of": "p50"},
        "holds": False,
        "samples": [0.5, "no step"],
    }


def test_a_cpu_without_a_model_name_is_named_by_its_architecture() -> None:
    assert cpu_model("processor : 0\nmodel name\t: AMD EPYC\n") == "AMD EPYC"
    assert cpu_model("processor : 0\n") != ""


# --- the command line ---


def test_repeat_is_for_elasticd_and_never_lengthens_torchrun() -> None:
    assert (Options().ours(10), Options().theirs(4)) == (10, 4)
    assert (Options(repeat=20).ours(10), Options(repeat=20).theirs(4)) == (20, 4)
    assert (Options(repeat=2).ours(10), Options(repeat=2).theirs(4)) == (2, 2)
    assert (Options(quick=True).ours(10), Options(quick=True).theirs(4)) == (2, 1)
    assert Options(quick=True, repeat=5).ours(10) == 5


def run(monkeypatch, tmp_path, measure) -> int:
    monkeypatch.setitem(bench.EXPERIMENTS, "idle", measure)
    return bench.main(["--only", "idle", "--json", "--out", str(tmp_path / "bench.json")])


@pytest.mark.parametrize(("sample", "status"), [(0.5, 0), (1.5, 1)])
def test_the_exit_status_says_whether_all_goals_held(monkeypatch, tmp_path, capsys, sample: float, status: int) -> None:
    assert run(monkeypatch, tmp_path, lambda _: [figure(sample, goal=Goal(at_most=1.0))]) == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == json.loads((tmp_path / "bench.json").read_text())


def test_an_experiment_that_breaks_is_a_goal_missed(monkeypatch, tmp_path, capsys) -> None:
    def breaks(options: Options) -> list[Figure]:
        raise ElasticdError("no step\nand a long log")

    assert run(monkeypatch, tmp_path, breaks) == 1
    told = capsys.readouterr()
    assert "MISSED no step" in told.out
    assert "and a long log" in told.err
    assert "and a long log" not in told.out.splitlines()[0]


@pytest.mark.parametrize("wrong", [["--only", "nothing"], ["--repeat", "0"], ["--repeat", "many"]])
def test_wrong_arguments_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench.main(wrong)
    assert refused.value.code == 2


@pytest.mark.parametrize("flags", [BEST, DEFAULTS], ids=lambda flags: flags.name)
def test_torchrun_accepts_the_flags_that_it_is_compared_with(flags: TorchrunFlags) -> None:
    """Its own parser and its own reading of --rdzv-conf, so that a comparison is never with a misspelt option."""
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config
    from torch.distributed.run import get_args_parser

    class AHost:
        address = "127.0.0.1"

    job = TorchrunJob(JobShape(), flags)
    job._hosts = [AHost()]
    _python, _, module, *arguments = job._command(0)
    job.__exit__()
    assert module == "torch.distributed.run"
    parsed = get_args_parser().parse_args(arguments)
    conf = _parse_rendezvous_config(parsed.rdzv_conf)
    assert conf["is_host"] == "1"
    assert all(int(value) >= 0 for value in conf.values())
    assert parsed.training_script.endswith("plain_ddp.py")


# --- checkpoints ---

TURN = {
    "memory copy": 0.05,
    "torch's stager": 0.06,
    "stall": 0.055,
    "dcp stall": 0.2,
    "disk write": 1.0,
    "save": 1.1,
    "dcp save": 1.5,
    "torch.save": 1.4,
    "sealed write": 1.0,
    "checksum": 0.02,
    "disk read": 0.5,
    "restore": 0.5,
    "dcp load": 0.7,
}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, 0),
        ({"stall": 0.061}, 1),
        ({"save": 1.12}, 1),
        ({"checksum": 0.06}, 1),
        ({"restore": 0.56}, 1),
        ({"dcp save": 99.0, "dcp load": 99.0, "torch.save": 99.0}, 0),
    ],
)
def test_the_goals_of_checkpoints_are_ratios_within_one_turn(changes: dict[str, float], missed: int) -> None:
    figures = checkpoint.figures_of(2, 1, [{**TURN, **changes}] * 3)
    judged = [figure.holds for figure in figures if figure.goal is not None]
    assert len(judged) == 4
    assert judged.count(False) == missed


# --- copies in RAM ---

RAM_TURN = {
    "memory copy": 0.05,
    "stall": 0.06,
    "safe": 0.9,
    "restore": 0.3,
    "torch.save": 0.8,
    "torch.load": 0.7,
    "dcp stall": 0.2,
    "dcp load": 0.8,
}


@pytest.mark.parametrize(
    ("restore_s", "delay_s", "missed"), [(0.3, 0.002, 0), (0.51, 0.002, 1), (0.3, 0.11, 1), (0.51, 0.2, 2)]
)
def test_the_goals_of_copies_in_ram_are_a_fast_restore_and_a_loop_that_answers(
    restore_s: float, delay_s: float, missed: int
) -> None:
    figures = memory.figures_of([{**RAM_TURN, "restore": restore_s}] * 3, [0.001, delay_s])
    judged = [figure.holds for figure in figures if figure.goal is not None]
    assert (len(judged), judged.count(False)) == (2, missed)


def test_a_loop_that_was_never_asked_proves_nothing() -> None:
    assert any(figure.holds is False for figure in memory.figures_of([RAM_TURN], []))


def test_steps_lost_are_those_that_the_smaller_world_repeats() -> None:
    def at(t: float, number: int, step: int, world: int) -> Trained:
        return Trained(t=t, round_number=number, rank=0, step=step, world=world)

    lines = [at(1, 1, 8, 3), at(2, 1, 9, 3), at(3, 2, 8, 2), at(4, 2, 9, 2), at(5, 3, 10, 3), at(6, 4, 11, 2)]
    assert memory.steps_lost(lines, world=2) == [2, 0]
