"""A warm server and one client of it, for tests."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil

from elasticd.channel import Channel, Message
from elasticd.supervisor.warm_client import WarmServer
from tests.conftest import eventually

PATIENCE_S = 60.0


class Forks:
    """A server and one client of it, as an agent is."""

    def __init__(self, folder: Path, **env: str) -> None:
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.server = WarmServer(sys.executable, folder / "warm", {**inherited, **env})
        self.told: list[Message] = []
        self.agent: Channel | None = None

    def preload(self, script: str = "", **fields: object) -> Message:
        self.server.preload(script, **fields)
        return self.heard("preloaded")

    def heard(self, kind: str) -> Message:
        """The next message of this type on the control socket."""
        found: list[Message] = []

        def arrived() -> bool:
            self.told += self.server.messages()
            found[:] = [message for message in self.told if message["type"] == kind]
            return bool(found)

        eventually(arrived, PATIENCE_S, f"{kind} from the warm server")
        self.told.remove(found[0])
        return found[0]

    def fork(self, *command: str, **fields: object) -> int:
        """The new process's pid."""
        if self.agent is None:
            self.agent = Channel.connect(str(self.server.socket_path))
        defaults = {"stdout": str(self.folder / "out"), "stderr": str(self.folder / "err")}
        self.agent.send({"type": "fork", "id": 0, "command": list(command), **defaults, **fields})
        return int(self._answer("forked")["pid"])

    def status(self, pid: int) -> int:
        """How it ended: its exit code; negative: the signal."""
        message = self._answer("exited")
        assert message["pid"] == pid
        return int(message["status"])

    def run(self, *command: str, **fields: object) -> tuple[int, str, str]:
        """(status, stdout, stderr) of a process that ends by itself."""
        for name in ("out", "err"):
            (self.folder / name).unlink(missing_ok=True)
        status = self.status(self.fork(*command, **fields))
        return status, (self.folder / "out").read_text(), (self.folder / "err").read_text()

    def _answer(self, kind: str) -> Message:
        assert self.agent is not None
        message = self.agent.receive(PATIENCE_S)
        assert message is not None
        assert message["type"] == kind, message
        return message

    def close(self) -> None:
        if self.agent is not None:
            self.agent.close()
        self.server.close()


@contextlib.contextmanager
def forks(folder: Path, **env: str) -> Iterator[Forks]:
    made = Forks(folder, **env)
    try:
        yield made
    finally:
        made.close()


def script(folder: Path, text: str, name: str = "script.py") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return str(path)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
