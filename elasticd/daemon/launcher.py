"""Starts agents through the warm server, and starts the warm server again when it dies. In the loop's thread.

Not here: what agents do (supervisor/agent.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from elasticd.channel import Message
from elasticd.config import LaunchOptions
from elasticd.core.model import JobId, JobSpec, NodeId
from elasticd.errors import ChannelClosed, JobRefused
from elasticd.supervisor.warm_client import WarmServer

log = logging.getLogger(__name__)

RETRY_S = 0.5
MAX_RETRY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherSettings:
    """``socket_path``: the daemon's own socket; the warm server's is made beside it."""

    node_id: NodeId
    socket_path: Path
    log_dir: str
    python: str = ""
    launch: LaunchOptions | None = None


class WarmLauncher:
    """A Launcher for NodeLoop. ``on_lost`` is called when a job's agent died with its server or by itself."""

    def __init__(self, settings: LauncherSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._server: WarmServer | None = None
        self._wanted: JobSpec | None = None
        self._agent_pid = 0
        self._closing = False
        self._retry_s = RETRY_S

    @property
    def pids(self) -> tuple[int, ...]:
        """The warm server's pid, if it runs."""
        return (self._server.pid,) if self._server is not None else ()

    def start(self, spec: JobSpec | None = None) -> None:
        """Preload now, so that the first job need not wait."""
        self._ensure(spec)

    def start_agent(self, spec: JobSpec) -> None:
        self._wanted = spec
        self._ensure(spec)
        assert self._server is not None
        _let_in(self._settings.socket_path, spec.user)
        try:
            self._server.start_agent(self._agent_config(spec), dict(spec.env))
        except ChannelClosed:
            self._lost()

    def end_agent(self, job_id: JobId, timeout_s: float) -> None:
        """The agent was told over its socket; nothing else is to be done."""
        del job_id, timeout_s
        self._wanted = None

    async def close(self) -> None:
        self._closing = True
        if self._server is not None:
            self._loop.remove_reader(self._server.fileno())
            server, self._server = self._server, None
            await self._loop.run_in_executor(None, server.close)

    def _ensure(self, spec: JobSpec | None) -> None:
        if self._server is None:
            path = self._settings.socket_path.with_suffix(".warm")
            self._server = WarmServer(self._settings.python or sys.executable, path, dict(os.environ))
            self._loop.add_reader(self._server.fileno(), self._readable)
            self._server.preload()
        if spec is not None and not spec.no_python:
            script = spec.command[0] if spec.is_module else str(Path(spec.working_dir) / spec.command[0])
            self._server.preload(script, is_module=spec.is_module)

    def _readable(self) -> None:
        assert self._server is not None
        try:
            for message in self._server.messages():
                self._hear(message)
        except ChannelClosed:
            self._lost()

    def _hear(self, message: Message) -> None:
        match message["type"]:
            case "preloaded":
                log.info("warm: imports took %.1f s", message["seconds"])
                self._retry_s = RETRY_S
                if message["cuda"]:
                    log.warning("an import initialised CUDA: workers forked from it cannot use the GPU; "
                                "set warm = false for this job")  # fmt: skip
            case "agent_started":
                self._agent_pid = int(message["pid"])
            case "exited" if int(message["pid"]) == self._agent_pid:
                log.info("the agent ended with status %s", message["status"])
            case _:
                pass

    def _lost(self) -> None:
        """The warm server died, and everything below it. Its agent's connection tells the machine; we start anew."""
        if self._server is None or self._closing:
            return
        log.warning("the warm server died; starting another in %.1f s", self._retry_s)
        self._loop.remove_reader(self._server.fileno())
        self._server.close(timeout_s=0.2)
        self._server = None
        self._loop.call_later(self._retry_s, self._again)
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)

    def _again(self) -> None:
        if self._server is None and not self._closing:
            self._ensure(self._wanted)

    def _agent_config(self, spec: JobSpec) -> Message:
        launch = self._settings.launch
        options = asdict(launch) if launch is not None else {}
        start_method = options.pop("start_method", "warm")
        config = {
            "job_id": spec.job_id,
            "node_id": self._settings.node_id,
            "daemon_socket": str(self._settings.socket_path),
            "warm_socket": str(self._settings.socket_path.with_suffix(".warm")),
            "command": list(spec.command),
            "nproc_per_node": spec.nproc_per_node,
            "is_module": spec.is_module,
            "no_python": spec.no_python,
            "max_restarts": spec.max_restarts,
            "working_dir": spec.working_dir,
            "user": spec.user,
            "stop_timeout_s": spec.stop_timeout_s,
            "warm": spec.warm and start_method == "warm",
        }
        if launch is None:
            # A daemon's console is the journal: the workers' output goes to files of their own.
            config |= {"redirects": "3", "log_dir": spec.log_dir or self._settings.log_dir}
        return {**config, **options}


def _let_in(socket_path: Path, user: str) -> None:
    """The job's user must reach the daemon's socket, and nobody else."""
    if not user:
        return
    try:
        os.chown(socket_path, pwd.getpwnam(user).pw_uid, -1)
    except (KeyError, OSError) as error:
        raise JobRefused(f"the job's user {user!r} cannot be used on this node: {error}") from error
