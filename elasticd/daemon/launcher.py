"""Starts agents through the warm server, and starts the warm server again when it dies. In the loop's thread.

Not here: what agents do (supervisor/agent.py), and that one is missed whose connection ends (local.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from elasticd.channel import Message
from elasticd.config import LaunchOptions
from elasticd.core.model import JobId, JobSpec, NodeId
from elasticd.errors import ChannelClosed, JobRefused, OperatorError
from elasticd.supervisor.warm_client import WarmServer

log = logging.getLogger(__name__)

RETRY_S = 0.5
MAX_RETRY_S = 10.0

#: (pid, reason): the agent's process is gone; pid 0: it could not even be started.
Missed = Callable[[int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherSettings:
    """``socket_path``: the daemon's own socket; the warm server's is made beside it."""

    node_id: NodeId
    socket_path: Path
    log_dir: str
    python: str = ""
    launch: LaunchOptions | None = None


@dataclass(frozen=True, slots=True)
class _Preloaded:
    """What a warm server was made for: another job's imports and environment would not be those of a new process."""

    script: str = ""
    is_module: bool = False
    working_dir: str = ""
    env: tuple[tuple[str, str], ...] = ()


class WarmLauncher:
    """A Launcher for NodeLoop. ``missed`` is called, with back-off, for an agent that ended or could not be started."""

    def __init__(self, settings: LauncherSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self.missed: Missed = lambda _pid, _reason: None
        self._server: WarmServer | None = None
        self._preloaded = _Preloaded()
        self._wanted: JobSpec | None = None
        self._agent_pid: int | None = None  # None: there is none; 0: asked for, and not heard of yet
        self._agent_since = 0.0
        self._agent_retry_s = RETRY_S
        self._missing: asyncio.TimerHandle | None = None
        self._closing = False
        self._retry_s = RETRY_S

    @property
    def pids(self) -> tuple[int, ...]:
        """The warm server's pid, if it runs."""
        return (self._server.pid,) if self._server is not None else ()

    def start(self, spec: JobSpec | None = None) -> None:
        """Preload now, so that the first job need not wait. OperatorError when the interpreter cannot be run."""
        self._ensure(spec)

    def start_agent(self, spec: JobSpec) -> None:
        self._stop_missing()
        self._wanted, self._agent_pid, self._agent_since = spec, 0, self._loop.time()
        try:
            self._ensure(spec)
            _let_in(self._settings.socket_path, spec.user)
            if self._server is not None:
                self._server.start_agent(self._agent_config(spec))
        except ChannelClosed:
            self._lost()
        except OperatorError as error:
            log.error("job %s: %s", spec.job_id, error)
            self._miss(0, str(error))

    def end_agent(self, job_id: JobId, timeout_s: float) -> None:
        """The agent was told over its socket; one that was never started need not be missed."""
        del job_id, timeout_s
        self._wanted = None
        self._stop_missing()

    async def close(self) -> None:
        self._closing = True
        self._stop_missing()
        if self._server is not None:
            self._loop.remove_reader(self._server.fileno())
            server, self._server = self._server, None
            await self._loop.run_in_executor(None, server.close)

    # --- the server ---

    def _ensure(self, spec: JobSpec | None) -> None:
        """A server that has what the job needs, and nothing of another job's."""
        wanted = self._needs(spec)
        if self._server is not None and self._preloaded not in (wanted, _Preloaded(env=wanted.env)):
            self._drop()
        if self._server is None:
            path = self._settings.socket_path.with_suffix(".warm")
            env = {**os.environ, **dict(wanted.env)}
            self._server = WarmServer(self._settings.python or sys.executable, path, env)
            self._loop.add_reader(self._server.fileno(), self._readable)
            self._preloaded = _Preloaded(env=wanted.env)
            self._server.preload()
        if wanted.script and self._preloaded != wanted:
            self._server.preload(wanted.script, is_module=wanted.is_module, working_dir=wanted.working_dir)
            self._preloaded = wanted

    def _readable(self) -> None:
        try:
            for message in self._server.messages() if self._server is not None else ():
                self._hear(message)
        except ChannelClosed:
            self._lost()

    def _hear(self, message: Message) -> None:
        match message["type"]:
            case "preloaded":
                log.info("warm: imports took %.1f s", message["seconds"])
                self._retry_s = RETRY_S
                if message["why_not_warm"]:
                    log.warning("workers start from a new interpreter, which is slower: %s", message["why_not_warm"])
            case "agent_started":
                self._agent_pid = int(message["pid"])
            case "exited" if int(message["pid"]) == self._agent_pid:
                log.info("the agent ended with status %s", message["status"])
                if message["status"] == 0:
                    self._agent_pid = None
                else:
                    self._miss(self._agent_pid, f"it ended with status {message['status']}")
            case _:
                pass

    def _drop(self) -> None:
        assert self._server is not None
        self._loop.remove_reader(self._server.fileno())
        self._server.close(timeout_s=0.2)
        self._server = None

    def _lost(self) -> None:
        """The warm server died, and everything below it; we start anew."""
        if self._server is None or self._closing:
            return
        log.warning("the warm server died; starting another in %.1f s", self._retry_s)
        self._drop()
        self._loop.call_later(self._retry_s, self._again)
        if self._agent_pid is not None:
            self._miss(self._agent_pid, "the warm server died")
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)

    def _again(self) -> None:
        if self._server is not None or self._closing:
            return
        try:
            self._ensure(self._wanted)
        except ChannelClosed:
            self._lost()
        except OperatorError as error:
            log.error("%s", error)
            self._loop.call_later(MAX_RETRY_S, self._again)

    # --- agents ---

    def _miss(self, pid: int, reason: str) -> None:
        """Tells that the agent is gone, a while later: what keeps it from starting may do so again."""
        self._agent_pid = None
        if self._loop.time() - self._agent_since > MAX_RETRY_S:
            self._agent_retry_s = RETRY_S
        self._stop_missing()
        self._missing = self._loop.call_later(self._agent_retry_s, self.missed, pid, reason)
        self._agent_retry_s = min(2 * self._agent_retry_s, MAX_RETRY_S)

    def _stop_missing(self) -> None:
        if self._missing is not None:
            self._missing.cancel()
            self._missing = None

    def _is_warm(self, spec: JobSpec) -> bool:
        launch = self._settings.launch
        return spec.warm and (launch is None or launch.start_method == "warm")

    def _needs(self, spec: JobSpec | None) -> _Preloaded:
        if spec is None:
            return _Preloaded()
        if spec.no_python or not self._is_warm(spec):
            return _Preloaded(env=spec.env)
        return _Preloaded(spec.command[0], spec.is_module, spec.working_dir, spec.env)

    def _agent_config(self, spec: JobSpec) -> Message:
        launch = self._settings.launch
        options = asdict(launch) if launch is not None else {}
        options.pop("start_method", None)
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
            "warm": self._is_warm(spec),
        }
        if launch is None:
            # A daemon's console is the journal: the workers' output goes to files of their own.
            config |= {"redirects": "3", "log_dir": spec.log_dir or self._settings.log_dir}
        return {**config, **options}


def _let_in(socket_path: Path, user: str) -> None:
    """The job's user must reach the daemon's socket, and nobody else."""
    try:
        owner = pwd.getpwnam(user).pw_uid if user else os.getuid()
        if socket_path.stat().st_uid != owner:
            os.chown(socket_path, owner, -1)
    except (KeyError, OSError) as error:
        raise JobRefused(f"the job's user {user!r} cannot be used on this node: {error}") from error
