"""The daemon's end of the warm server: starts it, asks it, hears from it. Usable from an event loop: it never blocks.

Not here: the server itself (warm.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from elasticd.channel import Channel, Message
from elasticd.errors import ChannelClosed, OperatorError

#: Thread pools are made at import: one thread each, as torchrun's default; a worker's own setting is applied later.
IMPORT_ENV = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class WarmServer:
    """A running warm server. ``socket_path`` is where agents ask it for workers."""

    def __init__(self, python: str, socket_path: Path, env: Mapping[str, str]) -> None:
        """``env``: the environment that workers start from. OperatorError when the interpreter cannot be run."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket_path = socket_path
        command = [python, "-m", "elasticd.supervisor.warm", str(theirs.fileno()), str(socket_path)]
        full_env = {**IMPORT_ENV, **env}
        try:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL, env=full_env
            )
        except OSError as error:
            ours.close()
            raise OperatorError(f"cannot run {python}: {error.strerror}; set node.python") from error
        finally:
            theirs.close()
        self._channel = Channel(ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._channel.fileno()

    def preload(self, script: str = "", *, is_module: bool = False) -> None:
        self._channel.send({"type": "preload", "script": script, "is_module": is_module})

    def start_agent(self, config: Message, env: Mapping[str, str]) -> None:
        """ChannelClosed when the server is gone."""
        self._channel.send({"type": "start_agent", "config": config, "env": dict(env)})

    def messages(self) -> list[Message]:
        """What has arrived, without waiting. ChannelClosed when the server is gone."""
        found = []
        while (message := self._channel.receive(0.0)) is not None:
            found.append(message)
        return found

    def close(self, timeout_s: float = 5.0) -> None:
        """End-of-file: the server kills what it started, and ends."""
        self._channel.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


__all__ = ["ChannelClosed", "WarmServer"]
