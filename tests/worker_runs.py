"""Training processes for tests: scripts run by plain torchrun or python, and a scripted daemon at their socket."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GPT = ["-m", "elasticd.examples.byte_gpt", "--length", "16", "--width", "16", "--print-every", "1000"]


def environment(**extra: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ELASTICD_", "TORCHELASTIC_", "RANK"))}
    return clean | {"OMP_NUM_THREADS": "1"} | extra


@contextmanager
def started(command: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, which is killed at the end whatever happens."""
    process = subprocess.Popen(
        command, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(command: list[str], timeout_s: float = 90, **env: str) -> tuple[int, str]:
    with started(command, **env) as process:
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output


def plain(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def world(size: int, *arguments: str, **env: str) -> Iterator[list[subprocess.Popen[str]]]:
    """``size`` ranks of a script, in torchrun's environment but without its agent: cheaper, and nothing restarts them."""
    port, ranks = str(free_port()), []
    base = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(size):
        own = environment(**base, **env, RANK=str(rank), LOCAL_RANK=str(rank))
        ranks.append(
            subprocess.Popen(plain(*arguments), env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.communicate()


def run_world(size: int, *arguments: str, timeout_s: float = 90, **env: str) -> None:
    with world(size, *arguments, **env) as ranks:
        for process in ranks:
            output, _ = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, output


def ledger(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition: Callable[[], object], timeout_s: float = 60, what: str = "the condition") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.01)


class FakeDaemon:
    """The daemon's end of the socket: keeps what workers say, and says what the test tells it to."""

    def __init__(self, path: Path, *, commit_reason: str = "") -> None:
        self.path, self.commit_reason = str(path), commit_reason
        self.messages: list[dict] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._workers: list[socket.socket] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def of_type(self, kind: str) -> list[dict]:
        return [message for message in list(self.messages) if message["type"] == kind]

    def tell(self, rank: int, message: dict) -> None:
        """Say it to the worker of this rank."""
        index = next(m["connection"] for m in self.of_type("worker_hello") if m["rank"] == rank)
        self._workers[index].sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        for connection in (self._listener, *self._workers):
            connection.close()

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        buffers: dict[socket.socket, bytes] = {}
        while not self._stopping.is_set():
            for ready in select.select([self._listener, *buffers], [], [], 0.02)[0]:
                if ready is self._listener:
                    connection = self._listener.accept()[0]
                    self._workers.append(connection)
                    buffers[connection] = b""
                    continue
                chunk = ready.recv(65536)
                if not chunk:
                    del buffers[ready]
                    continue
                *lines, buffers[ready] = (buffers[ready] + chunk).split(b"\n")
                for line in lines:
                    self._receive(ready, json.loads(line))

    def _receive(self, connection: socket.socket, message: dict) -> None:
        self.messages.append({**message, "connection": self._workers.index(connection), "t": time.monotonic()})
        if message["type"] == "commit":
            answer = {"type": "commit_result", "step": message["step"], "committed": not self.commit_reason}
            connection.sendall(json.dumps(answer | {"reason": self.commit_reason}).encode() + b"\n")
