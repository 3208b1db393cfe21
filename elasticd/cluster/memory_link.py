"""Bytes between daemons: copies of workers' memory, over TCP connections of their own, in threads of their own.

Links carry heartbeats and must never wait behind a gigabyte, so data has another port; it has the links' TLS settings.
A connection serves one request: a header of one line of JSON each way, then bytes. Nothing is unpickled. Threads spend
their time in sendfile, recv and crc32, which all release the GIL: the daemon's loop goes on beside them.

Not here: what is kept, and for whom (daemon/memory.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import ssl
import threading
import zlib
from collections.abc import Callable
from typing import Any, Self

from elasticd.core.memory import BLOCK_BYTES, combine
from elasticd.core.model import PROTOCOL_VERSION
from elasticd.errors import MemoryRefused, OperatorError

log = logging.getLogger(__name__)

HEADER_LIMIT_BYTES = 4 * 1024 * 1024
#: A peer that takes or sends nothing for so long is given up.
SILENT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
MAX_CALLERS = 16
ACCEPT_AGAIN_S = 0.2
_PIECE_BYTES = 1024 * 1024

Header = dict[str, Any]


class DataConnection:
    """One end, blocking. OSError when the other end is gone or silent, ValueError when it does not keep to the form."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(SILENT_S)
        self._buffer = b""

    @classmethod
    def dial(cls, address: str, port: int, tls: ssl.SSLContext | None) -> Self:
        raw = socket.create_connection((address, port), CONNECT_TIMEOUT_S)
        try:
            return cls(tls.wrap_socket(raw, server_hostname=address) if tls is not None else raw)
        except BaseException:
            raw.close()
            raise

    def send(self, header: Header) -> None:
        self._socket.sendall(json.dumps(header, separators=(",", ":")).encode() + b"\n")

    def receive(self) -> Header:
        while b"\n" not in self._buffer:
            if len(self._buffer) > HEADER_LIMIT_BYTES:
                raise ValueError("a header over the limit")
            piece = self._socket.recv(65536)
            if not piece:
                raise ConnectionError("end of file")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        header = json.loads(line)
        if not isinstance(header, dict):
            raise ValueError("not a header")
        return header

    def ask(self, header: Header) -> Header:
        """Send it, and have the answer. MemoryRefused with the other side's reason when that is no."""
        self.send({**header, "protocol": PROTOCOL_VERSION})
        return self.answer()

    def answer(self) -> Header:
        """The other side's. MemoryRefused with its reason when that is no."""
        answer = self.receive()
        if not answer.get("ok"):
            raise MemoryRefused(str(answer.get("reason", "no reason given"))[:1024])
        return answer

    def send_file(self, descriptor: int, size_bytes: int) -> None:
        """Its first bytes, from wherever it stands. OSError when there are fewer: whoever owns the file cut it off."""
        at = 0
        buffer = memoryview(bytearray(_PIECE_BYTES)) if isinstance(self._socket, ssl.SSLSocket) else None
        while at < size_bytes:
            wanted = min(_PIECE_BYTES, size_bytes - at)
            if buffer is None:
                count = self._send_piece(descriptor, at, wanted)
            else:
                count = os.preadv(descriptor, [buffer[:wanted]], at)
                self._socket.sendall(buffer[:count])
            if not count:
                raise OSError(f"a part ends after {at} of {size_bytes} bytes")
            at += count

    def _send_piece(self, descriptor: int, at: int, wanted: int) -> int:
        while True:
            try:
                return os.sendfile(self._socket.fileno(), descriptor, at, wanted)
            except BlockingIOError:  # a socket with a time-out never blocks by itself
                if not select.select([], [self._socket], [], SILENT_S)[1]:
                    raise TimeoutError(f"the other end has taken nothing for {SILENT_S:g} s") from None

    def receive_file(self, descriptor: int, size_bytes: int) -> int:
        """Write so many bytes from the file's start on; their checksum, as core.memory.combine has it.

        By write(2) and not through a mapping: a file that somebody cuts off must not end this process by a signal.
        """
        at, crc32 = 0, 0
        block_crc32s: list[int] = []
        buffer = memoryview(bytearray(_PIECE_BYTES))
        while at < size_bytes:
            room = min(_PIECE_BYTES, size_bytes - at, BLOCK_BYTES - at % BLOCK_BYTES)
            count = self._receive_into(buffer[:room])
            crc32 = zlib.crc32(buffer[:count], crc32)
            if os.pwrite(descriptor, buffer[:count], at) != count:
                raise OSError("a part could not be written whole")
            at += count
            if at % BLOCK_BYTES == 0 or at == size_bytes:
                block_crc32s.append(crc32)
                crc32 = 0
        return combine(block_crc32s)

    def _receive_into(self, view: memoryview) -> int:
        """As much as there is, and at least a byte. What came along with a header goes first."""
        if self._buffer:
            count = min(len(self._buffer), len(view))
            view[:count] = self._buffer[:count]
            self._buffer = self._buffer[count:]
            return count
        count = self._socket.recv_into(view)
        if not count:
            raise ConnectionError("end of file")
        return count

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


#: Answers one request, in a thread of its own. OSError, ValueError, KeyError and TypeError end the connection;
#: MemoryRefused is told to the caller.
Serve = Callable[[DataConnection, Header], None]


class DataServer:
    """Accepts requests until it is closed."""

    def __init__(self, serve: Serve, tls: ssl.SSLContext | None) -> None:
        self._serve, self._tls = serve, tls
        self._listener: socket.socket | None = None
        self._places = threading.BoundedSemaphore(MAX_CALLERS)
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def listen(self, address: str, port: int) -> int:
        """Returns the port. OperatorError when it is in use."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            self._listener = socket.create_server((address, port), family=family, backlog=MAX_CALLERS)
        except OSError as error:
            raise OperatorError(
                f"cannot listen for other daemons' copies on {address}:{port}: {error.strerror}; set memory.port"
            ) from error
        threading.Thread(target=self._accept, args=(self._listener,), name="elasticd-memory", daemon=True).start()
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        with self._lock:
            self._closing.set()
            connections = list(self._connections)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept, which close alone does not
            self._listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:  # closed; or no descriptor is left, and the caller stays where it is
                self._closing.wait(ACCEPT_AGAIN_S)
                continue
            if not self._places.acquire(blocking=False):
                connection.close()
                continue
            with self._lock:
                self._connections.add(connection)
            threading.Thread(target=self._answer, args=(connection,), name="elasticd-memory", daemon=True).start()

    def _answer(self, raw: socket.socket) -> None:
        try:
            raw.settimeout(SILENT_S)
            secured = self._tls.wrap_socket(raw, server_side=True) if self._tls is not None else raw
            with DataConnection(secured) as connection:
                self._answer_one(connection)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.info("memory: a connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(raw)
            with contextlib.suppress(OSError):
                raw.close()
            self._places.release()

    def _answer_one(self, connection: DataConnection) -> None:
        header = connection.receive()
        try:
            if header.get("protocol") != PROTOCOL_VERSION:
                raise MemoryRefused(f"protocol {header.get('protocol')!r} is not {PROTOCOL_VERSION}")
            self._serve(connection, header)
        except MemoryRefused as error:
            connection.send({"ok": False, "reason": str(error)})
