"""Records: whatever the core holds survives JSON, and whatever is not a record is refused by name."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticd.checkpoint.manifest import Manifest
from elasticd.core.model import Cause, JobSpec, Member, Node, NodeId, Round
from elasticd.core.records import from_json, from_plain, to_json, to_plain
from elasticd.core.rendezvous import count_restart
from elasticd.core.stragglers import Grounds, Quarantine
from elasticd.errors import ProtocolError

KINDS: list[type] = [Node, JobSpec, Member, Round, Manifest]
#: JSON has no NaN; and a lone surrogate is no text.
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
records = st.sampled_from(KINDS).flatmap(st.from_type)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(records)
def test_a_record_survives_json(record: Any) -> None:
    assert from_json(type(record), to_json(record)) == record


@given(records, st.dictionaries(st.text(min_size=1).filter(lambda name: not name.isidentifier()), junk))
def test_fields_of_a_newer_version_are_ignored(record: Any, more: dict) -> None:
    assert from_plain(type(record), to_plain(record) | more) == record


@given(records)
def test_the_text_is_canonical(record: Any) -> None:
    """Compared as text by whoever asks whether a write is needed."""
    assert to_json(from_json(type(record), to_json(record))) == to_json(record)
    assert "\n" not in to_json(record)


@given(st.sampled_from(KINDS), junk)
def test_junk_is_refused_and_never_crashes(kind: type, plain: Any) -> None:
    with pytest.raises(ProtocolError):
        from_plain(kind, plain)


@given(records, st.data())
def test_a_field_of_another_type_is_refused_by_name(record: Any, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([f.name for f in dataclasses.fields(record)]))
    plain = to_plain(record) | {field: [{"no": "such type"}]}
    with pytest.raises(ProtocolError, match=field):
        from_plain(type(record), plain)


@given(records, st.data())
def test_a_field_without_a_default_must_be_there(record: Any, data: st.DataObject) -> None:
    needed = [
        f.name
        for f in dataclasses.fields(record)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    field = data.draw(st.sampled_from(needed))
    plain = to_plain(record)
    del plain[field]
    with pytest.raises(ProtocolError, match=f"{field} is missing"):
        from_plain(type(record), plain)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[1]", "expected an object, found list"),
        ('{"number": true}', "number: expected int, found bool"),
        ('{"number": 1.0}', "number: expected int, found float"),
        ('{"number": 1, "phase": "odd"}', "phase: 'odd' is not a Phase"),
        ('{"number": 1, "phase": "running", "cause": "join", "seats": {}}', "seats: expected a list, found dict"),
        ('{"number": 1, "phase": "running", "cause": "join", "seats": [7]}', r"seats\[0\]: expected an object"),
        ('{"number": 1, "phase": "running", "cause": "join", "restarts": [["join"]]}', "expected 2 items, found 1"),
        ('{"number": 1, "phase": ["running"]}', "phase"),
    ],
)
def test_what_is_no_round_is_refused_and_the_error_says_where(text: str, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        from_json(Round, text)


def test_a_cause_of_a_newer_version_is_read_and_written_again_as_it_is() -> None:
    """A round that could not be read would be no round: rolling upgrades must stand new causes and grounds."""
    text = '{"number":3,"phase":"running","cause":"moved","restarts":[["join",1],["moved",1]]}'
    read = from_json(Round, text)
    assert (read.cause, read.restarts_by(read.cause), read.restart_count) == ("moved", 1, 2)
    assert json.loads(text).items() <= to_plain(read).items()
    assert from_json(Round, to_json(read)) == read
    again = count_restart(read, Cause.JOIN)
    assert again == ((Cause.JOIN, 2), (read.cause, 1))
    kept = Quarantine(node_id=NodeId("a"), grounds=Grounds("hot"), reason="hot", offences=1, seconds=60)
    assert from_json(Quarantine, to_json(kept)) == kept


def test_a_whole_number_may_stand_for_a_float_but_not_the_other_way() -> None:
    spec = {"job_id": "j", "min_nodes": 1, "max_nodes": 1, "command": ["x"], "stop_timeout_s": 7}
    assert from_json(JobSpec, json.dumps(spec)).stop_timeout_s == 7.0
    with pytest.raises(ProtocolError, match="min_nodes"):
        from_plain(JobSpec, spec | {"min_nodes": 1.5})
