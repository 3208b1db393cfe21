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


class WarmServer:
    """A running warm server. ``socket_path`` is where agents ask it for workers.

    It dies with the *thread* that started it (Linux's PDEATHSIG), so start it from one that lives on.
    """

    def __init__(self, python: str, socket_path: Path, env: Mapping[str, str]) -> None:
        """``env``: the environment that workers start from. OperatorError when the interpreter cannot be run."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket_path = socket_path
        arguments = [str(theirs.fileno()), str(socket_path), str(os.getpid())]
        command = [python, "-u", "-m", "elasticd.supervisor.warm", *arguments]
        try:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL, env=env
            )
        except OSError as error:
            ours.close()
            raise OperatorError(f"cannot run {python}: {error.strerror}; set node.python") from error
        finally:
            theirs.close()
        self._channel = Channel(ours)
        self._below: set[int] = set()  # agents and workers, as far as the server has told

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._channel.fileno()

    def preload(self, script: str = "", *, is_module: bool = False, working_dir: str = "") -> None:
        """ChannelClosed when the server is gone."""
        self._channel.send({"type": "preload", "script": script, "is_module": is_module, "working_dir": working_dir})

    def start_agent(self, config: Message) -> None:
        """ChannelClosed when the server is gone."""
        self._channel.send({"type": "start_agent", "config": config})

    def messages(self) -> list[Message]:
        """What has arrived, without waiting. ChannelClosed when the server is gone, and nothing is left to hear."""
        found: list[Message] = []
        try:
            while (message := self._channel.receive(0.0)) is not None:
                self._note(message)
                found.append(message)
        except ChannelClosed:
            if not found:
                raise
        return found

    def _note(self, message: Message) -> None:
        match message["type"]:
            case "agent_started" | "forked":
                self._below.add(int(message["pid"]))
            case "exited":
                self._below.discard(int(message["pid"]))

    def close(self, timeout_s: float = 5.0) -> None:
        """End-of-file: the server kills what it started, and ends. What outlives a server that was killed goes too."""
        with contextlib.suppress(ChannelClosed):
            self.messages()
        self._channel.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pid in self._below:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


__all__ = ["ChannelClosed", "WarmServer"]
