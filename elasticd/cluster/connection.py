"""One TCP connection between two daemons: a line that says who is there, then bytes that say that he still is.

Heartbeats wake nobody: the kernel notes when the last one came, and is asked when we send our own. Otherwise a daemon
with sixteen links would wake up a hundred and sixty times a second to read a byte. The end of the connection wakes us
at once, whatever is left unread.

Not here: who may call, when a silence is too long, and what an end means (peers.py).
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LINE_LIMIT_BYTES = 1024
#: So many heartbeats are read together, so that they do not pile up.
UNREAD_BYTES = 64
#: ``tcpi_last_data_recv`` of Linux's struct tcp_info, in ms, in steps of the kernel's tick (at most 10 ms).
_LAST_RECEIVED = struct.Struct("=52xI")


class Connection(asyncio.Protocol):
    """Its futures are done in the order in which they stand; the end of the connection makes the others b"" or False.

    ``alive``: a heartbeat came, so somebody stands behind the line. ``heard_at``: on the monotonic clock.
    """

    def __init__(self, opened: Callable[[Connection], None] | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.line: asyncio.Future[bytes] = loop.create_future()
        self.alive: asyncio.Future[bool] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.heard_at = time.monotonic()
        self.silent = False
        self._opened = opened
        self._begun = b""
        self._timed = False

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def drop(self) -> None:
        self._transport.abort()

    def look(self) -> None:
        """Brings ``heard_at`` up to date, once it was seen that the kernel keeps the time.

        Where it does not (gVisor says 0 for ever) each heartbeat wakes us, as the first ones do everywhere.
        """
        if self._transport.is_closing() or not self.alive.done():
            return
        information = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_RECEIVED.size)
        (silence_ms,) = _LAST_RECEIVED.unpack(information)
        if silence_ms and not self._timed:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, UNREAD_BYTES)
            self._timed = True
        if self._timed:
            self.heard_at = max(self.heard_at, time.monotonic() - silence_ms / 1000)

    # --- called by the loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._socket: socket.socket = transport.get_extra_info("socket")
        if self._opened is not None:
            self._opened(self)

    def data_received(self, data: bytes) -> None:
        if self._timed:  # it may be older: what was left unread comes with the end
            self.look()
        else:
            self.heard_at = time.monotonic()
        if not self.line.done():
            line, newline, data = (self._begun + data).partition(b"\n")
            if len(line) > LINE_LIMIT_BYTES:
                self.drop()
            elif newline:
                self.line.set_result(line)
            else:
                self._begun = line
        if data:
            _settle(self.alive, True)

    def connection_lost(self, _: Exception | None) -> None:
        _settle(self.line, b"")
        _settle(self.alive, False)
        _settle(self.ended, None)


def _settle(future: asyncio.Future[T], value: T) -> None:
    """It may be done already, or given up by who waited."""
    if not future.done():
        future.set_result(value)
