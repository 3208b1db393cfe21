"""The warm server: a process that has torch and what the script imports, and forks agents and workers from itself.

One thread, no GPU context, no random state that a fork should not share. A restart of a worker costs a fork (about
10 ms) and not an import (2 to 4 s; TORCH.md). Started by the daemon as ``python -m elasticd.supervisor.warm``:
``CONTROL_FD LISTEN_PATH``. End-of-file on the control socket ends the server and every process group below it.

Requests, as lines of channel.py. From the daemon: preload, start_agent. From an agent: fork. Answers: preloaded,
agent_started, forked, exited. Not here: what the child does (process.py, script.py, agent.py).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from elasticd.channel import Channel, Message
from elasticd.errors import ChannelClosed, ProtocolError
from elasticd.supervisor.process import ForkRequest, become_child
from elasticd.supervisor.script import find_imports, run

ALWAYS = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.data",
    "elasticd.supervisor.agent",
    "elasticd.worker.session",
)

Continuation = Callable[[], None]


@dataclass(slots=True)
class _Server:
    control: Channel
    listener: socket.socket
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    owners: dict[int, Channel] = field(default_factory=dict)  # pid -> who asked for it
    clients: set[Channel] = field(default_factory=set)
    wakeup: tuple[int, int] = (-1, -1)

    def serve(self) -> Continuation | None:
        """Serves until the daemon goes; in a forked child, returns what the child is to do."""
        self._prepare()
        while True:
            for key, _ in self.selector.select():
                child = self._ready(key.fileobj)
                if child is not None:
                    return child
                if self.control.fileno() < 0:
                    return None

    def _prepare(self) -> None:
        self.wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self.wakeup[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the daemon, which decides
        for source in (self.control, self.listener, self.wakeup[0]):
            self.selector.register(source, selectors.EVENT_READ)

    def _ready(self, source: object) -> Continuation | None:
        if source is self.listener:
            connection, _ = self.listener.accept()
            client = Channel(connection)
            self.clients.add(client)
            self.selector.register(client, selectors.EVENT_READ)
        elif source == self.wakeup[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self.wakeup[0], 4096)
            self._reap()
        elif isinstance(source, Channel):
            return self._read(source)
        return None

    def _read(self, source: Channel) -> Continuation | None:
        try:
            while (message := source.receive(0.0)) is not None:
                child = self._answer(source, message)
                if child is not None:
                    return child
        except (ChannelClosed, ProtocolError):
            self._gone(source)
        return None

    def _gone(self, source: Channel) -> None:
        """Whoever asked for processes is gone: so are they. The daemon is gone: everything is."""
        self.selector.unregister(source)
        doomed = self.owners if source is self.control else {p for p, c in self.owners.items() if c is source}
        for pid in list(doomed):
            kill_group(pid)
        self.clients.discard(source)
        source.close()

    def _answer(self, source: Channel, message: Message) -> Continuation | None:
        match message["type"]:
            case "preload":
                self._tell(source, preload(message))
            case "start_agent" if source is self.control:
                return self._fork_agent(message)
            case "fork":
                return self._fork_worker(source, message)
            case other:
                raise ProtocolError(f"unknown request {other!r}")
        return None

    def _fork_agent(self, message: Message) -> Continuation | None:
        from elasticd.supervisor.agent import AgentConfig, run_agent

        request = ForkRequest(command=("elasticd-agent",), env=message.get("env", {}))
        config: AgentConfig = AgentConfig.from_message(message["config"])
        if self._fork(self.control, request, "agent_started", message):
            return lambda: run_agent(config)
        return None

    def _fork_worker(self, source: Channel, message: Message) -> Continuation | None:
        fields = {name: value for name, value in message.items() if name not in ("type", "id")}
        request = ForkRequest(**{**fields, "command": tuple(message["command"])})
        return (lambda: run(request)) if self._fork(source, request, "forked", message) else None

    def _fork(self, owner: Channel, request: ForkRequest, answer: str, message: Message) -> bool:
        """True in the child."""
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                become_child(request, parent, self._fds())
            except (OSError, KeyError) as error:
                sys.stderr.write(f"elasticd: cannot start {' '.join(request.command)}: {error}\n")
                sys.stderr.flush()
                os._exit(127)
            return True
        self.owners[pid] = owner
        self._tell(owner, {"type": answer, "id": message.get("id", 0), "pid": pid})
        return False

    def _fds(self) -> list[int]:
        mine = [self.control.fileno(), self.listener.fileno(), *self.wakeup, *(c.fileno() for c in self.clients)]
        selector = self.selector
        assert isinstance(selector, selectors.EpollSelector)
        return [*mine, selector.fileno()]

    def _reap(self) -> None:
        while self.owners:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            kill_group(pid)  # what a worker leaves behind (data loaders) goes with it
            owner = self.owners.pop(pid, None)
            if owner is not None:
                self._tell(owner, {"type": "exited", "pid": pid, "status": os.waitstatus_to_exitcode(status)})

    def _tell(self, whom: Channel, message: Message) -> None:
        with contextlib.suppress(ChannelClosed):
            whom.send(message)


def kill_group(pid: int) -> None:
    """SIGKILL to a child's process group; the child leads one since it called setsid."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def preload(message: Message) -> Message:
    """Imports what the script will; a module that fails is left for the script to fail on."""
    started = time.monotonic()
    names = [*ALWAYS]
    if message.get("script"):
        names += find_imports(message["script"], is_module=bool(message.get("is_module")))
    failed = [name for name in names if not _import(name)]
    torch = sys.modules.get("torch")
    cuda = bool(torch is not None and torch.cuda.is_initialized())
    return {"type": "preloaded", "seconds": time.monotonic() - started, "failed": failed[:50], "cuda": cuda}


def _import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return "." in name  # `from package import function` names no module
    except Exception:  # noqa: BLE001 - somebody else's module may raise anything
        return False
    return True


def main() -> None:
    """``python -m elasticd.supervisor.warm CONTROL_FD LISTEN_PATH``."""
    control_fd, listen_path = int(sys.argv[1]), sys.argv[2]
    control = Channel(socket.socket(fileno=control_fd))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    Path(listen_path).unlink(missing_ok=True)
    mask = os.umask(0o177)
    listener.bind(listen_path)
    os.umask(mask)
    listener.listen(8)
    server = _Server(control=control, listener=listener)
    child = server.serve()
    if child is not None:
        child()  # in the child: the interpreter then ends as it would after a script
        return
    Path(listen_path).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
