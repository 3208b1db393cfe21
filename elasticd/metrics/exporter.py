"""A small HTTP server for scrapers, in threads of its own: who is slow or hostile costs the daemon nothing.

One thread a connection, of a bounded number: when there are more, who has not said what he wants gives way. A request
is small and must arrive whole within a time, and the answer must be taken within a time. One request a connection.
Not here: what is answered (the routes it is given).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from elasticd.errors import OperatorError

log = logging.getLogger(__name__)

RETRY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one caller, and all of them together, may take."""

    connections: int = 32
    request_bytes: int = 8192
    request_timeout_s: float = 5.0
    response_timeout_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to listen; port 0 lets the kernel choose. The certificate and its key belong together."""

    address: str
    port: int
    tls_cert: str = ""
    tls_key: str = ""

    @property
    def scheme(self) -> str:
        return "https" if self.tls_cert else "http"

    def context(self) -> ssl.SSLContext | None:
        """OperatorError when the certificate or the key cannot be used."""
        if not self.tls_cert and not self.tls_key:
            return None
        if not self.tls_cert or not self.tls_key:
            raise OperatorError("metrics.tls_cert and metrics.tls_key belong together: set both or none")
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            # An empty password: a key that needs one is an error, and not a question on the terminal.
            context.load_cert_chain(self.tls_cert, self.tls_key, password="")
        except (OSError, ssl.SSLError) as error:
            files = f"metrics.tls_cert {self.tls_cert} or metrics.tls_key {self.tls_key}"
            raise OperatorError(f"{files} cannot be used: {error}") from error
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """``headers``: names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK

    @classmethod
    def line(cls, status: HTTPStatus, text: str = "") -> Response:
        return cls(body=f"{text or status.phrase}\n".encode(), status=status)


Route = Callable[[Request], Response]


class Exporter:
    """``routes`` by path; they are called from many threads, and answer 500 when they raise."""

    def __init__(self, endpoint: Endpoint, routes: Mapping[str, Route], limits: Limits | None = None) -> None:
        self._endpoint, self._routes, self._limits = endpoint, routes, limits or Limits()
        self._context = endpoint.context()
        self._receiving: dict[socket.socket, None] = {}  # in the order of their arrival
        self._slots = threading.BoundedSemaphore(self._limits.connections)
        self._listener: socket.socket | None = None
        self._closed = threading.Event()

    def listen(self) -> int:
        """Serves from now on; returns the port. OperatorError when it cannot be had."""
        where = self._endpoint
        family = socket.AF_INET6 if ":" in where.address else socket.AF_INET
        try:
            self._listener = socket.create_server((where.address, where.port), family=family, backlog=128)
        except OSError as error:
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error
            raise OperatorError(
                f"cannot listen for scrapers on {where.address}:{where.port}: {why}; "
                "set metrics.address and metrics.port"
            ) from error
        threading.Thread(target=self._accept, args=(self._listener,), name="metrics", daemon=True).start()
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Connections that are being served end by themselves, or with the process."""
        self._closed.set()
        if self._listener is not None:
            with contextlib.suppress(OSError):  # wakes the thread that accepts; close() alone does not
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                stream = self._secured(listener.accept()[0])
            except (OSError, ValueError):  # closed, out of file descriptors, or a caller that has left again
                if self._closed.wait(RETRY_S):
                    return
                continue
            self._make_room()
            self._receiving[stream] = None
            threading.Thread(target=self._serve, args=(stream,), name="scrape", daemon=True).start()

    def _make_room(self) -> None:
        """Scrapers say at once what they want: who has been silent longest gives up its place."""
        while not self._slots.acquire(blocking=False):
            for oldest in list(self._receiving)[:1]:
                with contextlib.suppress(OSError):  # gone by itself
                    socket.socket.shutdown(oldest, socket.SHUT_RDWR)  # below TLS, whose state is another thread's
            if self._slots.acquire(timeout=RETRY_S):
                return

    def _secured(self, connection: socket.socket) -> socket.socket:
        if self._context is None:
            return connection
        return self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)

    def _serve(self, stream: socket.socket) -> None:
        try:
            request = self._receive(stream)
            response = request if isinstance(request, Response) else self._answer(request)
            head_only = isinstance(request, Request) and request.method == "HEAD"
            stream.settimeout(self._limits.response_timeout_s)
            stream.sendall(_render(response, head_only=head_only))
        except OSError:  # left, too slow, or no TLS: nothing to be done for this caller
            pass
        finally:
            stream.close()
            self._slots.release()

    def _receive(self, stream: socket.socket) -> Request | Response:
        deadline_s = time.monotonic() + self._limits.request_timeout_s
        try:
            if isinstance(stream, ssl.SSLSocket):
                stream.settimeout(self._limits.request_timeout_s)
                stream.do_handshake()
            return _receive(stream, self._limits.request_bytes, deadline_s)
        finally:
            del self._receiving[stream]

    def _answer(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            return Response.line(HTTPStatus.METHOD_NOT_ALLOWED)
        route = self._routes.get(request.path)
        if route is None:
            return Response.line(HTTPStatus.NOT_FOUND, f"not found; there is {' '.join(sorted(self._routes))}")
        try:
            return route(request)
        except Exception:
            log.exception("answering %s", request.path)
            return Response.line(HTTPStatus.INTERNAL_SERVER_ERROR)


def _receive(stream: socket.socket, limit_bytes: int, deadline_s: float) -> Request | Response:
    """The request, or the answer to something that is none. TimeoutError when it is not here by the deadline."""
    received = b""
    while b"\r\n\r\n" not in received:
        if len(received) > limit_bytes:
            return Response.line(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        stream.settimeout(left_s)
        chunk = stream.recv(4096)
        if not chunk:
            raise ConnectionResetError
        received += chunk
    return _parse(received.partition(b"\r\n\r\n")[0].decode("latin-1"))


def _parse(head: str) -> Request | Response:
    first, *lines = head.split("\r\n")
    match first.split(" "):
        case [method, target, version] if version.startswith("HTTP/1."):
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            return Request(method=method, path=target.partition("?")[0], headers=headers)
        case _:
            return Response.line(HTTPStatus.BAD_REQUEST)


def _render(response: Response, *, head_only: bool) -> bytes:
    head = (
        f"HTTP/1.1 {response.status.value} {response.status.phrase}\r\n"
        f"Content-Type: {response.content_type}\r\nContent-Length: {len(response.body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (b"" if head_only else response.body)
