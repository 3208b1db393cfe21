"""The metrics' HTTP server over real sockets: what it answers, and what a slow or hostile caller cannot do to it."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import eventually, need

from elasticd.errors import OperatorError
from elasticd.metrics.exporter import Endpoint, Exporter, Limits, Request, Response

LARGE = b"x" * 20_000_000
HERE = Endpoint(address="127.0.0.1", port=0)


def fail(_: Request) -> Response:
    raise ZeroDivisionError


ROUTES = {
    "/ok": lambda request: Response(body=request.headers.get("accept", "").encode()),
    "/large": lambda _: Response(body=LARGE),
    "/broken": fail,
}


@contextmanager
def exporter(endpoint: Endpoint = HERE, limits: Limits | None = None) -> Iterator[int]:
    server = Exporter(endpoint, ROUTES, limits)
    port = server.listen()
    try:
        yield port
    finally:
        server.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with exporter() as port:
        yield port


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def send(port: int, raw: bytes) -> bytes:
    """What comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(raw)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_it_answers_a_route_with_the_headers_of_the_request(port: int) -> None:
    assert ask(port, "/ok?x=1", Accept="text/plain") == (200, b"text/plain")
    assert ask(port, "/large") == (200, LARGE)
    assert ask(port, "/ok", "HEAD") == (200, b"")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /none HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /ok HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"405"),
        (b"GET /broken HTTP/1.0\r\n\r\n", b"500"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /ok SPDY/3\r\n\r\n", b"400"),
        (b"\x80\x04pickle\r\n\r\n", b"400"),
        (b"GET /ok HTTP/1.1\r\nA: " + b"a" * 8192, b"431"),
    ],
)
def test_what_it_refuses(port: int, raw: bytes, status: bytes) -> None:
    assert send(port, raw).split(b" ", 2)[1] == status


def test_idle_callers_do_not_keep_others_waiting(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    started = time.monotonic()
    assert ask(port, "/ok")[0] == 200
    assert time.monotonic() - started < Limits().request_timeout_s / 2
    for connection in idle:
        connection.close()


def test_a_crowd_of_idle_callers_gives_way_to_one_that_asks() -> None:
    limits = Limits(connections=4)
    with exporter(limits=limits) as port:
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        started = time.monotonic()
        assert ask(port, "/ok")[0] == 200
        assert time.monotonic() - started < limits.request_timeout_s
        for connection in crowd:
            connection.close()


def test_callers_that_trickle_are_cut_off_however_busy_they_look() -> None:
    limits = Limits(connections=2, request_timeout_s=0.5)
    with exporter(limits=limits) as port:
        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        started = time.monotonic()
        cut: set[socket.socket] = set()

        def trickle() -> bool:
            for connection in slow:
                try:
                    connection.send(b"G")
                except OSError:
                    cut.add(connection)
            return len(cut) == 2

        eventually(trickle, 5)
        assert time.monotonic() - started >= limits.request_timeout_s
        assert ask(port, "/ok")[0] == 200  # their places are free again
        for connection in slow:
            connection.close()


def test_a_caller_that_does_not_read_gives_up_its_place() -> None:
    with exporter(limits=Limits(connections=1, response_timeout_s=0.3)) as port:
        stuck = socket.create_connection(("127.0.0.1", port))
        stuck.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        assert ask(port, "/ok")[0] == 200
        stuck.close()


def test_an_address_that_is_not_ours_is_one_clear_line() -> None:
    with pytest.raises(OperatorError, match=r"cannot listen for scrapers on 192.0.2.1:0: .*; set metrics.address"):
        Exporter(Endpoint(address="192.0.2.1", port=0), ROUTES).listen()


def test_it_stops_when_closed() -> None:
    with exporter() as port:
        assert ask(port, "/ok")[0] == 200
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/ok")


# --- mistakes of operators ---


def test_a_port_in_use_is_one_clear_line(port: int) -> None:
    other = Exporter(Endpoint(address="127.0.0.1", port=port), ROUTES)
    with pytest.raises(OperatorError, match=f"127.0.0.1:{port}: Address already in use; set .*metrics.port"):
        other.listen()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("" if shutil.which("openssl") else "openssl not found: apt install openssl")
    folder = tmp_path_factory.mktemp("pki")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    name = ("-subj", "/CN=node", "-addext", "subjectAltName=IP:127.0.0.1")
    openssl("req", "-x509", *curve, "-nodes", "-keyout", "key.pem", "-out", "cert.pem", *name)
    openssl("req", "-x509", *curve, "-passout", "pass:secret", "-keyout", "locked.pem", "-out", "other.pem", *name)
    (folder / "empty.pem").touch()
    return folder


def endpoint(pki: Path, cert: str, key: str) -> Endpoint:
    paths = {"tls_cert": str(pki / cert) if cert else "", "tls_key": str(pki / key) if key else ""}
    return Endpoint(address="127.0.0.1", port=0, **paths)


def test_tls(pki: Path) -> None:
    with exporter(endpoint(pki, "cert.pem", "key.pem"), Limits(request_timeout_s=0.5)) as port:
        silent = socket.create_connection(("127.0.0.1", port))  # never shakes hands
        trusting = ssl.create_default_context(cafile=str(pki / "cert.pem"))
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=trusting, timeout=10)
        connection.request("GET", "/large")
        assert connection.getresponse().read() == LARGE
        with suppress(ConnectionResetError):
            assert send(port, b"GET /ok HTTP/1.1\r\n\r\n") == b""
        silent.settimeout(10)
        assert silent.recv(1) == b""
        silent.close()


@pytest.mark.parametrize(
    ("cert", "key", "said"),
    [
        ("cert.pem", "", "metrics.tls_cert and metrics.tls_key belong together"),
        ("", "key.pem", "metrics.tls_cert and metrics.tls_key belong together"),
        ("none.pem", "key.pem", "metrics.tls_cert .*none.pem .*cannot be used: .*No such file"),
        ("empty.pem", "key.pem", "cannot be used"),
        ("other.pem", "key.pem", "cannot be used"),
        ("other.pem", "locked.pem", "cannot be used"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_one_clear_line(pki: Path, cert: str, key: str, said: str) -> None:
    with pytest.raises(OperatorError, match=said) as raised:
        Exporter(endpoint(pki, cert, key), ROUTES)
    assert "\n" not in str(raised.value)
