"""What a daemon tells its log, and status its reader: whatever a script's error holds."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
from rich.console import Console

from elasticd.commands.status import render
from elasticd.daemon.main import _JsonLines


@pytest.mark.parametrize("message", ['KeyError: "x"', "two\nlines", "back\\slash", "plain"])
def test_a_json_log_is_one_object_a_line(message: str) -> None:
    record = logging.LogRecord(
        "elasticd.x", logging.WARNING, __file__, 1, "workers_failed message=%s", (message,), None
    )
    line = _JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found["message"] == f"workers_failed message={message}"
    assert found["level"] == "WARNING"


def test_a_json_log_holds_the_traceback() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    assert "ValueError: no" in json.loads(_JsonLines().format(record))["traceback"]


@pytest.mark.parametrize("message", ["cannot open [/data/x] for reading", "[rank0]: boom", "a[i]"])
def test_status_shows_an_error_as_it_is(message: str) -> None:
    failure = {"node_id": "n", "rank": 0, "exit_code": 1, "message": message}
    job = {
        "job": "j",
        "phase": "failed",
        "round": 1,
        "cause": "worker_failed",
        "world_size": 0,
        "nodes": [],
        "min_nodes": 1,
        "max_nodes": 1,
        "restarts": {},
        "checkpoint": None,
        "failure": failure,
    }
    out = io.StringIO()
    Console(file=out, width=200).print(render({"nodes": [], "jobs": [job], "unreadable": {"k": message}}))
    assert out.getvalue().count(message) == 2
