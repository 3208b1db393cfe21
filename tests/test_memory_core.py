"""The RAM tier's decisions: who keeps whose copy, and which generation is whole. Properties and tables."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticd.core.buddies import Apart, Buddy, how_apart, rank_buddies
from elasticd.core.memory import (
    BLOCK_BYTES,
    Generation,
    Holding,
    Index,
    Need,
    Part,
    combine,
    decode_index,
    encode_index,
    find_whole,
    format_bytes,
    need_of_change,
    seal_of,
)
from elasticd.core.model import BootId, NodeId, Seat, Topology
from elasticd.errors import CheckpointInvalid


def seat(name: str, zone: str = "", rack: str = "", switch: str = "") -> Seat:
    place = Topology(zone=zone, rack=rack, switch=switch)
    boot = BootId("b")
    return Seat(node_id=NodeId(name), boot_id=boot, address="a", group_rank=0, first_rank=0, nproc=1, topology=place)


LABELS = st.sampled_from(["", "1", "2", "3"])
ROUNDS = st.lists(st.tuples(LABELS, LABELS, LABELS), max_size=9).map(
    lambda places: [seat(f"n{number}", *place) for number, place in enumerate(places)]
)


@given(seats=ROUNDS)
def test_buddies_are_all_others_the_farthest_first_and_the_same_for_everybody(seats: list[Seat]) -> None:
    for mine in seats:
        ranked = rank_buddies(mine.node_id, seats)
        assert sorted(buddy.node_id for buddy in ranked) == sorted(s.node_id for s in seats if s is not mine)
        by_id = {other.node_id: other for other in seats}
        assert [b.apart for b in ranked] == [how_apart(mine.topology, by_id[b.node_id].topology) for b in ranked]
        levels = [list(Apart).index(buddy.apart) for buddy in ranked]
        assert levels == sorted(levels)
        assert rank_buddies(mine.node_id, seats[::-1]) == ranked


@given(groups=st.integers(2, 4), size=st.integers(1, 4), level=st.sampled_from(["zone", "rack", "switch"]))
def test_in_domains_of_equal_size_each_node_keeps_one_copy(groups: int, size: int, level: str) -> None:
    seats = [seat(f"n{g}{n}", **{level: f"d{g}"}) for g in range(groups) for n in range(size)]
    first = {mine.node_id: rank_buddies(mine.node_id, seats)[0] for mine in seats}
    assert {buddy.apart for buddy in first.values()} == {Apart(level)}
    assert set(Counter(buddy.node_id for buddy in first.values()).values()) == {1}


@given(count=st.integers(2, 12))
def test_without_labels_each_node_keeps_one_copy(count: int) -> None:
    seats = [seat(f"n{number:02}") for number in range(count)]
    kept = Counter(rank_buddies(mine.node_id, seats)[0].node_id for mine in seats)
    assert kept == {mine.node_id: 1 for mine in seats}


@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4))
def test_no_node_keeps_more_copies_than_there_are_nodes_to_a_choice(sizes: list[int]) -> None:
    """The nodes of one zone spread evenly over those of the others."""
    seats = [seat(f"n{zone}{n}", zone=f"z{zone}") for zone, size in enumerate(sizes) for n in range(size)]
    for zone, size in enumerate(sizes):
        kept = Counter(rank_buddies(NodeId(f"n{zone}{n}"), seats)[0].node_id for n in range(size))
        assert max(kept.values()) <= -(-size // (len(seats) - size))


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], ()),
        ([seat("b", "z1", "r1", "s1")], (Buddy(node_id=NodeId("b"), apart=Apart.NODE),)),
        ([seat("b", "z1", "r1", "s2"), seat("c", "z1", "r2", "s1")], (("c", "rack"), ("b", "switch"))),
        ([seat("b", "z1", "r2", "s2"), seat("c", "z2", "r1", "s1")], (("c", "zone"), ("b", "rack"))),
        ([seat("b", "", "r2", "")], (("b", "rack"),)),  # a label that nobody gave is shared by all
    ],
)
def test_the_farthest_domain_goes_first(others: list[Seat], expected: tuple) -> None:
    wanted = tuple(
        one if isinstance(one, Buddy) else Buddy(node_id=NodeId(one[0]), apart=Apart(one[1])) for one in expected
    )
    assert rank_buddies(NodeId("a"), [seat("a", "z1", "r1", "s1"), *others]) == wanted


def test_who_holds_no_seat_has_no_buddy() -> None:
    assert rank_buddies(NodeId("x"), [seat("a"), seat("b")]) == ()


# --- generations ---


def holding(node: str, step: int, own: tuple = (), copied: tuple = (), *, seal: int = 7, size: int = 3) -> Holding:
    generation = Generation(step=step, round_number=1)
    return Holding(node_id=NodeId(node), generation=generation, seal=seal, own=own, copied=copied, world_size=size)


def test_a_generation_is_whole_when_the_live_nodes_have_every_part() -> None:
    held = [
        holding("a", 4, (0,), (2,)),
        holding("b", 4, (1,), (0,)),
        holding("a", 2, (0,), (2,)),
        holding("b", 2, (1,)),
    ]
    whole, torn = find_whole(held)
    assert [(one.generation.step, one.needs_buddy) for one in whole] == [(4, True), (2, True)]
    assert whole[0].holders == {0: ("a", "b"), 1: ("b",), 2: ("a",)}
    assert torn == []


def test_what_is_missing_is_named_and_an_older_one_is_still_found() -> None:
    held = [holding("a", 4, (0,)), holding("b", 4, (1,)), *(holding(n, 2, (r,)) for r, n in enumerate("abc"))]
    whole, torn = find_whole(held)
    assert [(one.generation.step, one.needs_buddy) for one in whole] == [(2, False)]
    assert [(one.generation.step, one.reason) for one in torn] == [(4, "no live node has the parts of ranks 2")]


@given(st.data())
def test_a_whole_generation_has_one_seal_and_every_rank(data: st.DataObject) -> None:
    """Parts of two copies of one name are never put together, whoever holds what."""
    size = data.draw(st.integers(1, 4))
    ranks = st.lists(st.integers(0, size - 1), unique=True).map(tuple)
    held = data.draw(
        st.lists(
            st.builds(
                holding,
                st.sampled_from("abc"),
                st.integers(1, 2),
                ranks,
                ranks,
                seal=st.integers(1, 2),
                size=st.just(size),
            ),
            max_size=8,
        )
    )
    whole, torn = find_whole(held)
    for one in whole:
        assert set(one.holders) == set(range(size))
        for rank, nodes in one.holders.items():
            for node in nodes:
                assert any(
                    h.node_id == node
                    and (h.generation, h.seal) == (one.generation, one.seal)
                    and rank in h.own + h.copied
                    for h in held
                )
    assert len(whole) + len(torn) == len({(h.generation, h.seal) for h in held})
    assert [one.generation for one in whole] == sorted((one.generation for one in whole), reverse=True)


INDEX = Index(
    generation=Generation(step=4, round_number=2),
    job_id="j",
    metadata_bytes=10,
    metadata_crc32=5,
    parts=(
        Part(rank=0, node_id=NodeId("a"), size_bytes=3, crc32=1),
        Part(rank=1, node_id=NodeId("b"), size_bytes=0, crc32=0),
    ),
)


def test_an_index_comes_back_as_it_was_and_nothing_else_does() -> None:
    line = encode_index(INDEX)
    assert decode_index(line) == INDEX
    assert seal_of(INDEX) != seal_of(replace(INDEX, job_id="k"))
    for at in range(len(line) - 1):
        damaged = line[:at] + bytes([line[at] ^ 4]) + line[at + 1 :]
        with pytest.raises(CheckpointInvalid):
            decode_index(damaged)
    newer = json.loads(line)
    newer["index"]["format"] = 2
    with pytest.raises(CheckpointInvalid, match="format 2"):
        decode_index(json.dumps(newer).encode())


def test_a_combined_checksum_depends_on_every_block_and_its_place() -> None:
    assert combine([1, 2]) != combine([2, 1])
    assert combine([1]) != combine([1, 0])
    assert BLOCK_BYTES % 4096 == 0


@pytest.mark.parametrize(
    ("wanted", "goes_on", "need"),
    [
        ("abcd", True, Need.COPY),
        ("ab", True, Need.BUDDY),
        ("a", True, Need.DISK),
        ("abc", False, Need.DISK),
        ("", False, Need.DISK),
    ],
)
def test_what_a_change_asks_of_the_state(wanted: str, goes_on: bool, need: Need) -> None:
    assert need_of_change([NodeId(n) for n in "abc"], [NodeId(n) for n in wanted], goes_on=goes_on) is need


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * 1024**3, "3.0 GiB")])
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text
