"""Plans and balance: sums, exactly-once, stability, caps, optimal shares, and how soon a change of speed is followed."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticd.core.balance import (
    WORTHWHILE,
    Kept,
    Rebalanced,
    Speeds,
    SpeedUnknown,
    choose_first,
    choose_shares,
    fit_caps,
    lost_to_whole_shares,
    step_seconds,
)
from elasticd.core.plan import equal_shares, make_plan, moved, positions, weighted_shares
from elasticd.worker.data import Cursor, sample_ids

SHARES = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda shares: sum(shares) > 0).map(tuple)
SPEED = st.floats(1e-4, 10.0)


@st.composite
def transfers(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shares, and others that differ in a few micro-batches."""
    shares = list(draw(SHARES))
    after = list(shares)
    for _ in range(draw(st.integers(0, 3))):
        giver = draw(st.sampled_from([rank for rank, share in enumerate(after) if share]))
        taker = draw(st.integers(0, len(after) - 1))
        after[giver] -= 1
        after[taker] += 1
    return tuple(shares), tuple(after)


# --- the plan ---


@given(SHARES)
def test_every_micro_batch_is_computed_exactly_once_and_shares_sum_up(shares: tuple[int, ...]) -> None:
    plan = make_plan(shares)
    assert plan.shares == shares
    assert sorted(m for owned in plan.owned for m in owned) == list(range(sum(shares)))
    assert all(list(owned) == sorted(owned) for owned in plan.owned)
    assert [plan.owner_of()[m] for owned in plan.owned for m in owned] == [
        rank for rank, owned in enumerate(plan.owned) for _ in owned
    ]


@given(st.lists(st.lists(SPEED, min_size=2, max_size=2), min_size=2, max_size=20))
def test_whatever_was_measured_has_a_usual_value_within_it(windows: list[list[float]]) -> None:
    speeds = Speeds(2)
    for measured in windows:
        speeds.add(measured)
    for known, seen in zip(speeds.known(), zip(*windows, strict=True), strict=True):
        assert min(seen) * (1 - 1e-9) <= known <= max(seen) * (1 + 1e-9)


def test_the_first_window_is_warming_up_and_does_not_change_shares() -> None:
    """It was half of the mean with the second one: shares of 8 and 8 became 2 and 14, and came back with the third."""
    speeds = Speeds(2)
    for measured in ([1.0, 0.1], [0.1, 0.1]):
        speeds.add(measured)
    assert speeds.known() == [0.1, 0.1]
    assert choose_shares((8, 8), speeds.known(), [16, 16]) == Kept()


def test_half_of_the_windows_slow_and_half_fast_is_no_error() -> None:
    """It ended workers with "fmean requires at least one data point"."""
    speeds = Speeds(1)
    for measured in (0.1, 0.4, 0.1, 0.4):
        speeds.add([measured])
    assert speeds.known() == [pytest.approx(0.25)]


@given(st.integers(1, 60), st.lists(st.floats(0.01, 100.0), min_size=1, max_size=12))
def test_weighted_shares_are_within_one_of_their_proportion(micro_batches: int, weights: list[float]) -> None:
    shares = weighted_shares(micro_batches, weights)
    assert sum(shares) == micro_batches
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - micro_batches * weight / sum(weights)) < 1 + 1e-6


def test_weights_start_again_where_there_are_more_ranks_and_give_way_to_caps() -> None:
    assert choose_first(8, [8, 8, 8], (1, 2, 5)) == (1, 2, 5)
    assert choose_first(16, [16] * 6, (1, 2, 5)) == (1, 2, 5, 1, 2, 5)
    assert choose_first(8, [8, 8], (1, 2, 5)) == (3, 5)
    assert choose_first(8, [8, 8, 3], (1, 2, 5)) == (3, 2, 3)


@pytest.mark.parametrize("weights", [(), (0, 0), (-1, 2), (math.nan, 1), (math.inf, 1)])
def test_weights_that_are_none_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weights"):
        weighted_shares(4, weights)


@given(st.integers(1, 60), st.integers(1, 20))
def test_equal_shares_differ_by_one_at_most(micro_batches: int, world: int) -> None:
    shares = equal_shares(micro_batches, world)
    assert sum(shares) == micro_batches
    assert len(shares) == world
    assert max(shares) - min(shares) <= 1
    assert (min(shares) == 0) == (micro_batches < world)
    assert make_plan(shares).owner_of() == tuple(sorted(make_plan(shares).owner_of()))


@given(SHARES)
def test_from_equal_shares_no_more_moves_than_must(shares: tuple[int, ...]) -> None:
    equal = equal_shares(sum(shares), len(shares))
    must = sum(abs(one - other) for one, other in zip(equal, shares, strict=True)) // 2
    assert moved(make_plan(equal), make_plan(shares)) == must


@given(transfers())
def test_a_small_change_of_shares_moves_few_micro_batches(change: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """No rank has more than twice as many new ones as changed hands in all."""
    before, after = change
    changed = sum(abs(one - other) for one, other in zip(before, after, strict=True)) // 2
    one, other = make_plan(before), make_plan(after)
    for had, has in zip(one.owned, other.owned, strict=True):
        assert len(set(has) - set(had)) <= 2 * changed
    takers = sum(share > home for share, home in zip(after, equal_shares(sum(after), len(after)), strict=True))
    assert changed <= moved(one, other) <= changed * (1 + 2 * takers)


@given(SHARES, st.integers(1, 5), st.integers(0, 30))
def test_the_samples_of_a_step_do_not_depend_on_the_world(shares: tuple[int, ...], size: int, step: int) -> None:
    count = sum(shares)
    cursor = Cursor().advanced(step * count * size, 101)
    whole = sample_ids(cursor, range(count * size), size=101, seed=3)
    found = {
        m: sample_ids(cursor, positions(m, size), size=101, seed=3) for owned in make_plan(shares).owned for m in owned
    }
    assert [sample for m in range(count) for sample in found[m]] == whole


@pytest.mark.parametrize(("shares", "owned"), [
    ((1, 2, 5), ((0,), (3, 4), (1, 2, 5, 6, 7))),
    ((2, 2, 2), ((0, 1), (2, 3), (4, 5))),
    ((1, 1, 0), ((0,), (1,), ())),
    ((0, 0, 4), ((), (), (0, 1, 2, 3))),
])  # fmt: skip
def test_plans_by_example(shares: tuple[int, ...], owned: tuple[tuple[int, ...], ...]) -> None:
    assert make_plan(shares).owned == owned


@pytest.mark.parametrize("shares", [(), (0, 0), (3, -1)])
def test_what_cannot_be_divided(shares: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cannot be divided|is negative"):
        make_plan(shares)


# --- balance ---


@st.composite
def situations(draw: st.DrawFn) -> tuple[tuple[int, ...], list[float], list[int]]:
    """Shares within caps, and speeds."""
    caps = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    count = draw(st.integers(1, sum(caps)))
    return choose_first(count, caps), draw(st.lists(SPEED, min_size=len(caps), max_size=len(caps))), caps


@given(situations())
def test_new_shares_sum_up_and_respect_caps_and_shorten_the_step(
    situation: tuple[tuple[int, ...], list[float], list[int]],
) -> None:
    shares, seconds, caps = situation
    decision = choose_shares(shares, seconds, caps)
    if isinstance(decision, Rebalanced):
        assert sum(decision.shares) == sum(shares)
        assert all(share <= cap for share, cap in zip(decision.shares, caps, strict=True))
        assert sum(shares) < len(shares) or min(decision.shares) >= 1
        assert decision.after_s == step_seconds(decision.shares, seconds) <= (1 - WORTHWHILE) * decision.before_s
        assert choose_shares(decision.shares, seconds, caps) == Kept()


@given(st.lists(st.sampled_from([0.1, 0.15, 0.2, 0.5, 1.0]), min_size=2, max_size=4), st.integers(4, 9))
def test_no_other_shares_are_better(seconds: list[float], count: int) -> None:
    world = len(seconds)
    caps = [count] * world
    candidates = [s for s in product(range(1, count + 1), repeat=world) if sum(s) == count]
    best = min(step_seconds(shares, seconds) for shares in candidates)
    start = equal_shares(count, world)
    decision = choose_shares(start, seconds, caps)
    reached = decision.shares if isinstance(decision, Rebalanced) else start
    assert step_seconds(reached, seconds) * (1 - WORTHWHILE) <= best * (1 + 1e-9)


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
def test_a_speed_that_is_none_changes_nothing_and_says_whose(bad: float) -> None:
    decision = choose_shares((4, 4), [0.1, bad], [8, 8])
    assert isinstance(decision, SpeedUnknown)
    assert decision.rank == 1
    speeds = Speeds(2)
    for _ in range(3):
        speeds.add([0.1, bad])
    assert math.isnan(speeds.known()[1])
    speeds.add([0.1, 0.2])
    speeds.add([0.1, 0.2])
    speeds.add([0.1, bad])
    assert speeds.known() == pytest.approx([0.1, 0.2])


def test_a_small_difference_is_not_worth_a_change() -> None:
    assert choose_shares((32, 32), [0.1, 0.102], [64, 64]) == Kept()
    decision = choose_shares((32, 32), [0.1, 0.2], [64, 64])
    assert isinstance(decision, Rebalanced)
    assert (decision.shares, decision.rank) == ((43, 21), 1)


def test_caps_that_cannot_hold_a_step() -> None:
    with pytest.raises(ValueError, match="at most 7 micro-batches together, and a step has 8"):
        choose_first(8, [3, 4])
    assert choose_first(8, [3, 9, 9]) == (3, 3, 2)
    assert fit_caps((4, 4, 4), [1, 20, 5]) == (1, 6, 5)


def throttled(work_s: float, at: float, period_s: float = 0.1, quota: float = 0.5) -> float:
    """When work that needs so much CPU, begun at ``at`` after an idle time, is done: the quota is new in each period."""
    while True:
        period = math.floor(at / period_s + 1e-9)
        available = quota * period_s
        if work_s <= available:
            return at + work_s
        work_s -= min(available, (period + 1) * period_s - at)
        at = (period + 1) * period_s


@pytest.mark.parametrize("each_s", [0.012, 0.02, 0.03])
def test_a_rank_that_is_held_back_by_its_control_group_gets_what_it_can_do(each_s: float) -> None:
    """It runs in bursts, and looks faster than it is while it has little to do; the other one is steady."""
    count, now = 24, 0.013
    caps, speeds, shares = [count] * 2, Speeds(2), equal_shares(count, 2)
    lengths = []
    for _ in range(60):
        slow_s = throttled(shares[1] * each_s, now) - now
        fast_s = shares[0] * each_s
        lengths.append(max(slow_s, fast_s))
        now += lengths[-1] + 0.002
        speeds.add([fast_s / shares[0], slow_s / shares[1]])
        decision = choose_shares(shares, speeds.known(), caps)
        if isinstance(decision, Rebalanced):
            shares = decision.shares
    reached = count * each_s / (sum(lengths[20:]) / 40)
    assert reached >= 0.93 * 1.5


@pytest.mark.parametrize("seed", range(20))
def test_a_change_of_speed_is_followed_with_the_third_exchange_and_noise_is_not(seed: int) -> None:
    """Simulated: noisy windows, a rank that becomes slower in the middle of one, and one outlier that means nothing."""
    draw = random.Random(seed)
    world, count = draw.randint(2, 6), 48
    caps, speeds, shares = [count] * world, Speeds(world), equal_shares(count, world)
    true = [0.1] * world
    changes: list[int] = []

    def exchange(at: int, seconds: list[float]) -> None:
        nonlocal shares
        speeds.add([each * draw.gauss(1, 0.005) for each in seconds])
        decision = choose_shares(shares, speeds.known(), caps)
        if isinstance(decision, Rebalanced):
            shares = decision.shares
            changes.append(at)

    for at in range(20):
        exchange(at, [each * (5 if at == 10 and rank == 0 else 1) for rank, each in enumerate(true)])
    assert changes == [], "noise, or one outlier, changed the shares"
    slow = draw.randrange(world)
    polluted = list(true)
    polluted[slow] *= 1 + draw.random()  # it became slow within this window
    true[slow] *= 2
    exchange(20, polluted)
    for at in range(21, 40):
        exchange(at, true)
    assert changes, "the change was not followed"
    assert max(changes) <= 22, changes
    assert not speeds.unsettled, "the ranks would talk in a hurry for ever"
    ideal = count / sum(1 / each for each in true)
    assert step_seconds(shares, true) <= ideal * (1 + WORTHWHILE) + max(true)


def test_speeds_are_unsettled_until_there_are_enough_windows_and_while_the_last_one_is_far_off() -> None:
    speeds, heard = Speeds(2), []
    for slow in (0.1, 0.1, 0.1, 0.11, 0.2, 0.1, 0.2, 0.2, 0.2, 0.2):
        speeds.add([0.1, slow])
        heard.append(speeds.unsettled)
    steady, outlier, change = [True, True, False, False], [True, False], [True, True, True, False]
    assert heard == steady + outlier + change


@given(seconds=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), each=st.integers(1, 20))
def test_what_whole_shares_lose_is_bounded_and_vanishes_with_many_micro_batches(
    seconds: list[float], each: int
) -> None:
    """A rank's share is at most one away from the undivided one, or it is the least that a rank has."""
    count = each * len(seconds)
    lost = lost_to_whole_shares(count, seconds)
    undivided_s = count / sum(1 / one for one in seconds)
    assert -1e-9 <= lost <= 1 - undivided_s / (undivided_s + max(seconds)) + 1e-9
    assert lost_to_whole_shares(20 * count, seconds) <= max(seconds) / (20 * undivided_s) + 1e-9


def test_nothing_is_lost_where_shares_come_out_whole() -> None:
    assert lost_to_whole_shares(24, [0.1, 0.2]) == pytest.approx(0)
    assert lost_to_whole_shares(24, [0.1, 0.1 / 0.473]) == pytest.approx(0.037, abs=0.002)
    assert lost_to_whole_shares(48, [0.1, 0.1 / 0.473]) == pytest.approx(0.012, abs=0.002)
