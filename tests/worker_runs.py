"""Training processes for tests: worlds of forked ranks, scripts in fresh interpreters, and a scripted daemon at the socket."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from elasticd.cluster.embedded import free_port

#: A process that has torch, and forks the ranks: one import for all tests instead of one for each rank (4 s, and 1 s for
#: torch._dynamo, which DDP and optimizers import when they are made).
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "elasticd.worker.session",
        "elasticd.examples.byte_gpt",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "pytest",
        "hypothesis.strategies",
    ]
)


def environment(**extra: str) -> dict[str, str]:
    unwanted = ("ELASTICD_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(unwanted)}
    return clean | {"OMP_NUM_THREADS": "1"} | extra


class Rank:
    """A forked process that calls a function, in torchrun's environment but without its agent: nothing restarts it.

    Within the network namespace that ELASTICD_TEST_NETNS names, if it is there.
    """

    def __init__(self, target: Callable[..., object], arguments: tuple[object, ...], env: dict[str, str]) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="rank-", suffix=".log")  # noqa: SIM115 - as long as the rank
        # The fork server is started by the first process, and torch reads this when it is imported.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._process = _FORKS.Process(target=_become, args=(target, arguments, env, self._log.name), daemon=True)
        self._process.start()

    @property
    def output(self) -> str:
        return Path(self._log.name).read_text()

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float = 60) -> int:
        """The exit status; negative for a signal."""
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"still runs after {timeout_s:g} s: {self.output}"
        return self._process.exitcode

    def close(self) -> None:
        self.kill()
        self._process.join()
        self._process.close()
        self._log.close()


def _become(target: Callable[..., object], arguments: tuple[object, ...], env: dict[str, str], log: str) -> None:
    import torch

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the tests
    if netns := env.get("ELASTICD_TEST_NETNS"):
        with Path("/run/netns", netns).open() as namespace:
            assert libc.setns(namespace.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNET
    os.environ.clear()
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.current_process()._config["daemon"] = False  # it may have children: a DataLoader's workers
    multiprocessing.set_start_method("fork", force=True)  # Linux's own again: a server for each rank imports torch anew
    try:
        target(*arguments)
    except Exception:  # noqa: BLE001 - this is the top level of the rank
        sys.excepthook(*sys.exc_info())  # as the interpreter would, which multiprocessing does not
        sys.exit(1)
    finally:
        sys.stdout.flush()


@contextmanager
def world(size: int, target: Callable[..., object], *arguments: object, **env: str) -> Iterator[list[Rank]]:
    """``size`` ranks that call ``target(*arguments)``: a function of a test module, or of ``byte_gpt``."""
    base = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
    with ExitStack() as stack:
        ranks = []
        for rank in range(size):
            own = environment(**base, RANK=str(rank), LOCAL_RANK=str(rank))
            ranks.append(Rank(target, arguments, own))
            stack.callback(ranks[-1].close)
        yield ranks


@contextmanager
def alone(target: Callable[..., object], *arguments: object, **env: str) -> Iterator[Rank]:
    """One process as plain python starts it: a world of one without torchrun's variables."""
    rank = Rank(target, arguments, environment(**env))
    try:
        yield rank
    finally:
        rank.close()


def run_world(size: int, target: Callable[..., object], *arguments: object, **env: str) -> list[str]:
    """All ranks must end well; what each of them printed."""
    with world(size, target, *arguments, **env) as ranks:
        for rank in ranks:
            assert rank.wait() == 0, rank.output
        return [rank.output for rank in ranks]


def byte_gpt(*arguments: str) -> None:
    """The shipped example, tiny. To be run by a rank."""
    from elasticd.examples import byte_gpt as script

    sys.argv = ["byte_gpt", "--length", "16", "--width", "16", "--print-every", "1000", *arguments]
    script.main()


@contextmanager
def started(command: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    """A fresh program in a process group of its own, which is killed at the end whatever happens."""
    process = subprocess.Popen(
        command,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
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


def ledger(path: Path) -> list[dict]:
    """The whole lines of a file of JSON lines: the last one may be half written when a rank was killed."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class FakeDaemon:
    """The daemon's end of the socket: keeps what workers say, and says what the test tells it to."""

    def __init__(self, path: Path, *, commit_reason: str = "") -> None:
        self.path, self.commit_reason = str(path), commit_reason
        #: What is said to those who ask whether their round stands; the last one again and again.
        self.fence_answers: list[bool | None] = [True]
        self.messages: list[dict] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._workers: list[socket.socket] = []
        self._buffers: dict[socket.socket, bytes] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def of_type(self, kind: str) -> list[dict]:
        return [message for message in list(self.messages) if message["type"] == kind]

    def tell(self, rank: int, message: dict) -> None:
        """Say it to the worker of this rank."""
        self.send_raw(rank, json.dumps(message).encode() + b"\n")

    def send_raw(self, rank: int, content: bytes) -> None:
        index = next(m["connection"] for m in self.of_type("worker_hello") if m["rank"] == rank)
        with contextlib.suppress(OSError):  # it hung up while it was spoken to
            self._workers[index].sendall(content)

    def heard_out(self) -> bool:
        """Whether every worker that ever connected has hung up, and all that it said is in ``messages``."""
        return bool(self._workers) and not self._buffers

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
        while not self._stopping.is_set():
            for ready in select.select([self._listener, *self._buffers], [], [], 0.02)[0]:
                if ready is self._listener:
                    connection = self._listener.accept()[0]
                    self._buffers[connection] = b""
                    self._workers.append(connection)
                else:
                    self._read(ready)

    def _read(self, connection: socket.socket) -> None:
        try:
            chunk = connection.recv(65536)
        except ConnectionResetError:
            chunk = b""
        *lines, rest = (self._buffers[connection] + chunk).split(b"\n")
        for line in lines:
            self._receive(connection, json.loads(line))
        self._buffers[connection] = rest
        if not chunk:
            del self._buffers[connection]

    def _receive(self, connection: socket.socket, message: dict) -> None:
        self.messages.append({**message, "connection": self._workers.index(connection), "t": time.monotonic()})
        answer = {"step": message.get("step"), "reason": self.commit_reason}
        if message["type"] == "commit":
            answer |= {"type": "commit_result", "committed": not self.commit_reason}
        elif message["type"] == "fence":
            stands = self.fence_answers.pop(0) if len(self.fence_answers) > 1 else self.fence_answers[0]
            answer |= {"type": "fence_result", "id": message["id"], "stands": stands}
        else:
            return
        with contextlib.suppress(OSError):  # it does not wait for the answer when it ends
            connection.sendall(json.dumps(answer).encode() + b"\n")
