"""What is written for people and for post-mortems, when nobody takes it: it costs lines, and no time of the loop."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from elasticd.daemon import lines
from elasticd.daemon.lines import LineWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """For reading and for writing; full after a page."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def explain(count: int) -> bytes:
    return b"%d lost\n" % count


def read_until(descriptor: int, last: bytes) -> bytes:
    found = b""
    while not found.endswith(last):
        found += os.read(descriptor, 65536)
    return found


def test_lines_come_whole_and_in_order(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1], explain)
    said = [b"%d %s\n" % (number, b"x" * 3000) for number in range(100)]  # four times what the pipe holds
    for line in said:
        writer.put(line)
    assert not writer.drain(0.05)
    assert read_until(pipe[0], said[-1]) == b"".join(said)
    assert writer.close()


@pytest.mark.parametrize("blocking", [True, False])
def test_what_is_not_taken_is_counted_and_said(
    blocking: bool, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.set_blocking(pipe[1], blocking)
    monkeypatch.setattr(lines, "KEPT_LINES", 5)
    writer = LineWriter(pipe[1], explain)
    long = b"x" * 100_000 + b"\n"
    writer.put(long)  # more than the pipe holds: the thread has taken it, and waits
    while writer._lines:
        time.sleep(0.001)
    for number in range(8):
        writer.put(b"%d\n" % number)
    assert read_until(pipe[0], b"\n4\n") == long + b"0\n1\n2\n3\n4\n"
    writer.put(b"8\n")
    assert read_until(pipe[0], b"8\n") == b"3 lost\n8\n"
    assert writer.close()


def test_the_end_does_not_wait_for_what_hangs(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "PATIENCE_S", 0.1)
    writer = LineWriter(pipe[1], explain)
    writer.put(b"x" * 100_000 + b"\n")
    assert not writer.close()
    read_until(pipe[0], b"\n")
    assert writer.close()  # so that its descriptor may be another's


_TALKS = """
import logging
from elasticd.daemon.main import configure_logging
configure_logging("INFO", as_json=True)
for number in range(20_000):
    logging.getLogger("elasticd").info("line %d", number)
print("done", flush=True)
"""


def test_a_log_that_nobody_takes_holds_nobody() -> None:
    """As under a terminal that is paused: the lines come when it goes on, and then what is missing."""
    command = [sys.executable, "-c", _TALKS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "done\n"
        said = [json.loads(line)["message"] for line in process.stderr]
        assert process.wait() == 0
    assert said[:1000] == [f"line {number}" for number in range(1000)]
