"""Messages between the processes of one node, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from elasticd.channel import MAX_LINE_BYTES, Channel, decode, encode
from elasticd.errors import ChannelClosed, ProtocolError


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    yield one, other
    one.close()
    other.close()


def test_a_read_that_does_not_wait_leaves_writes_as_they_were(ends: tuple[Channel, Channel]) -> None:
    """More than the kernel keeps, to an end that reads late: a write must wait, and not be taken for a lost peer."""
    one, other = ends
    assert one.receive(0.0) is None
    sent = [{"type": "big", "number": number, "text": "x" * 100_000} for number in range(20)]
    writer = threading.Thread(target=lambda: [one.send(message) for message in sent])
    writer.start()
    writer.join(0.2)
    assert writer.is_alive(), "the kernel kept it all: this test has lost its meaning"
    assert [other.receive(10.0) for _ in sent] == sent
    writer.join()


def test_what_arrives_in_pieces_is_one_message(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    line = encode({"type": "a", "text": "ü"}) + encode({"type": "b"})
    for byte in line[:-1]:
        one._socket.send(bytes([byte]))
    assert other.receive(0.0) == {"type": "a", "text": "ü"}
    assert other.receive(0.0) is None
    one._socket.send(line[-1:])
    assert other.receive(10.0) == {"type": "b"}


def test_time_outs_are_kept(ends: tuple[Channel, Channel]) -> None:
    start = time.monotonic()
    assert ends[0].receive(0.05) is None
    assert time.monotonic() - start >= 0.05


def test_the_other_end_s_death_is_told_after_what_it_said(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.send({"type": "last words"})
    one.close()
    assert other.receive() == {"type": "last words"}
    for use in (other.receive, lambda: other.send({"type": "x"}), lambda: one.send({"type": "x"}), one.receive):
        with pytest.raises(ChannelClosed):
            use()


def test_nobody_there(tmp_path) -> None:
    with pytest.raises(ChannelClosed, match="no daemon at"):
        Channel.connect(str(tmp_path / "none.sock"))


@pytest.mark.parametrize("line", [b"nonsense\n", b"[]\n", b"{}\n", b'{"type": 1}\n', b"\xff\n"])
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line)


def test_lines_are_bounded_on_both_ends(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    with pytest.raises(ProtocolError, match="over the limit"):
        one.send({"type": "x", "text": "x" * MAX_LINE_BYTES})
    flood = threading.Thread(target=lambda: _flood(one))
    flood.start()
    with pytest.raises(ProtocolError, match="over the limit"):
        other.receive(10.0)
    other.close()
    flood.join()


def _flood(channel: Channel) -> None:
    channel._socket.setblocking(True)
    with contextlib.suppress(OSError):  # the reader hangs up
        channel._socket.sendall(b"x" * 4 * MAX_LINE_BYTES)
