"""Messages between the processes of one node: JSON objects, one a line, over a unix socket of mode 0600.

The daemon serves; agents (elasticd/supervisor), training scripts (elasticd/worker) and torchrun's handler connect.
Every message has a ``type``; the first of a connection is a hello. Lines are bounded, so that no peer can make the
other hold more than MAX_LINE_BYTES. Nothing is pickled.

Not here: the daemon's end (daemon/local.py) and what the messages mean to it.
"""

from __future__ import annotations

import json
import math
import select
import socket
import time
from typing import Any

from elasticd.errors import ChannelClosed, ProtocolError

MAX_LINE_BYTES = 256 * 1024

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """One line, newline included. ProtocolError when it is too long."""
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"message {message.get('type')!r} of {len(line)} bytes is over the limit")
    return line


def decode(line: bytes) -> Message:
    """The message on a line. ProtocolError when it is not a JSON object with a string ``type``."""
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise ProtocolError(f"not a message: {line[:80]!r}")
    return message


class Channel:
    """A client end. Not thread-safe: one reader and one writer at most.

    The socket never blocks, waiting is done beside it: so a read that does not wait cannot make a later write give up.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(False)
        self._buffer = b""

    @classmethod
    def connect(cls, path: str, timeout_s: float = 5.0) -> Channel:
        """ChannelClosed when nobody listens there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.settimeout(timeout_s)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise ChannelClosed(f"no daemon at {path}: {error}") from error
        return cls(connection)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Waits while the other end does not read. ChannelClosed when it is gone."""
        left = memoryview(encode(message))
        try:
            while left:
                try:
                    left = left[self._socket.send(left) :]
                except BlockingIOError:
                    self._wait(select.POLLOUT, None)
        except (OSError, ValueError) as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message; None when none came in time. ChannelClosed at end-of-file."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise ProtocolError("line over the limit")
            if not self._fill(deadline):
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return decode(line)

    def _fill(self, deadline: float | None) -> bool:
        """Takes in what has arrived; False when nothing has by the deadline."""
        try:
            while True:
                try:
                    chunk = self._socket.recv(65536)
                except BlockingIOError:
                    if not self._wait(select.POLLIN, deadline):
                        return False
                else:
                    break
        except (OSError, ValueError) as error:
            raise ChannelClosed(str(error)) from error
        if not chunk:
            raise ChannelClosed("end of file")
        self._buffer += chunk
        return True

    def _wait(self, events: int, deadline: float | None) -> bool:
        """Whether the socket became ready by the deadline."""
        left_s = None if deadline is None else deadline - time.monotonic()
        if left_s is not None and left_s <= 0:
            return False
        poll = select.poll()
        poll.register(self._socket.fileno(), events)  # ValueError when it has been closed
        return bool(poll.poll(None if left_s is None else math.ceil(1000 * left_s)))

    @property
    def pending(self) -> bool:
        """Whether receive() would return at once without touching the socket."""
        return b"\n" in self._buffer

    def close(self) -> None:
        self._socket.close()
