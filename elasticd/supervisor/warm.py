"""The warm server: a process that has torch and what the script imports, and forks agents and workers from itself.

One thread, no GPU context, no random state that a fork should not share. A restart of a worker costs a fork (about
10 ms) and not an import (2 to 4 s; TORCH.md). Started by the daemon as ``python -m elasticd.supervisor.warm``:
``CONTROL_FD LISTEN_PATH``. When the daemon goes, by end-of-file on the control socket or by a signal from the kernel,
every process group below the server is killed, and the server ends.

Requests, as lines of channel.py. From the daemon: preload, start_agent. From an agent: fork. Answers: preloaded,
agent_started, forked, exited; the daemon hears of every process, so that it can kill what outlives a server that dies.
Not here: what the child does (process.py, script.py, agent.py), what a script imports (imports.py).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elasticd.channel import Channel, Message
from elasticd.errors import ChannelClosed, ProtocolError
from elasticd.supervisor.imports import find_imports, hidden_modules, module_source, script_source
from elasticd.supervisor.process import ForkRequest, Origin, become_child, die_with_parent
from elasticd.supervisor.script import CANNOT_RUN, refuse, run

ALWAYS = (
    "torch.distributed",
    "torch.nn.parallel",
    "torch._dynamo",  # DDP imports it when it is constructed: 0.4 s, twice that while others need the CPU
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.data",
    "elasticd.supervisor.agent",
    "elasticd.worker.session",
)
#: numpy's BLAS makes its threads when it is imported, and a process with threads should not fork. An import may ask
#: whether there is CUDA: of NVML, then, since to initialise CUDA would keep forked processes from using the GPU.
IMPORT_ENV = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

Continuation = Callable[[], None]


@dataclass(slots=True)
class _Server:
    control: Channel
    listener: socket.socket
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    owners: dict[int, Channel] = field(default_factory=dict)  # pid -> who asked for it
    clients: set[Channel] = field(default_factory=set)
    wakeup: tuple[int, int] = (-1, -1)
    import_env: tuple[str, ...] = ()
    threads: int = 0
    why_not_warm: str = ""  # why workers need a new interpreter after all

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
        self.import_env = tuple(name for name in IMPORT_ENV if name not in os.environ)
        os.environ.update({name: IMPORT_ENV[name] for name in self.import_env})

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
        except (ChannelClosed, ProtocolError, KeyError, TypeError) as error:
            if not isinstance(error, ChannelClosed):
                sys.stderr.write(f"elasticd: the warm server closes a connection: {error!r}\n")
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

    def kill_everything(self) -> None:
        """The daemon died while the server was busy: a signal handler's work, done in the middle of anything."""
        for pid in list(self.owners):
            kill_group(pid)
        os._exit(1)

    def _answer(self, source: Channel, message: Message) -> Continuation | None:
        match message["type"]:
            case "preload":
                self._tell(source, self._preload(message))
            case "start_agent" if source is self.control:
                return self._fork_agent(message)
            case "fork":
                return self._fork_worker(source, message)
            case other:
                raise ProtocolError(f"unknown request {other!r}")
        return None

    # --- imports ---

    def _preload(self, message: Message) -> Message:
        """Imports what the script will; a module that fails is left for the script to fail on."""
        started = time.monotonic()
        with _frozen():
            if not self.threads:
                self.threads = _import_torch()
            before = set(os.environ)
            failed = [name for name in ALWAYS if not _import(name)]
            # torch._dynamo, for one, names a folder after the user: a script that needs it will name its own.
            self.import_env += tuple(os.environ.keys() - before)
            names, folder = _learn(message)
            failed += [name for name in names if not _import(name)]
        self.why_not_warm = _why_not_warm(folder)
        seconds = time.monotonic() - started
        return {"type": "preloaded", "seconds": seconds, "failed": failed[:50], "why_not_warm": self.why_not_warm}

    # --- processes ---

    def _fork_agent(self, message: Message) -> Continuation | None:
        from elasticd.supervisor.agent import AgentConfig, run_agent

        config: AgentConfig = AgentConfig.from_message(message["config"])
        if self._fork(self.control, ForkRequest(command=("elasticd-agent",)), "agent_started", 0):
            return lambda: run_agent(config)
        return None

    def _fork_worker(self, source: Channel, message: Message) -> Continuation | None:
        fields = {name: value for name, value in message.items() if name not in ("type", "id")}
        fields["fresh"] = bool(fields.get("fresh")) or bool(self.why_not_warm)
        request = ForkRequest(**{**fields, "command": tuple(message["command"])})
        return (lambda: run(request)) if self._fork(source, request, "forked", message["id"]) else None

    def _fork(self, owner: Channel, request: ForkRequest, answer: str, ident: object) -> bool:
        """True in the child."""
        origin = Origin(pid=os.getpid(), env=self.import_env, threads=self.threads)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # its handler would kill the siblings
            try:
                self._close_inherited()
                become_child(request, origin)
            except (OSError, KeyError) as error:
                text = f"cannot start {' '.join(request.command)}: {error}"
                refuse(text, request.env.get("TORCHELASTIC_ERROR_FILE", ""))
                os._exit(CANNOT_RUN)
            return True
        self.owners[pid] = owner
        started = {"type": answer, "id": ident, "pid": pid}
        self._tell(owner, started)
        if owner is not self.control:
            self._tell(self.control, started)
        return False

    def _close_inherited(self) -> None:
        """As objects and not as numbers: a number may be the script's own file by the time they are collected."""
        signal.set_wakeup_fd(-1)
        self.selector.close()
        self.listener.close()
        for channel in (self.control, *self.clients):
            channel.close()
        for fd in self.wakeup:
            os.close(fd)

    def _reap(self) -> None:
        while self.owners:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            # What a worker leaves behind (data loaders) goes with it, while its number cannot be anybody else's.
            kill_group(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
            owner = self.owners.pop(ended.si_pid, None)
            if owner is not None:
                gone = {"type": "exited", "pid": ended.si_pid, "status": os.waitstatus_to_exitcode(status)}
                self._tell(owner, gone)
                if owner is not self.control:
                    self._tell(self.control, gone)

    def _tell(self, whom: Channel, message: Message) -> None:
        with contextlib.suppress(ChannelClosed):
            whom.send(message)


def signal_group(pid: int, number: signal.Signals) -> None:
    """A signal to a child's process group; to the child alone before it has called setsid, a moment after the fork."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_group(pid: int) -> None:
    """SIGKILL to a child's process group; the child leads one since it called setsid, and may not have done so yet."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _learn(message: Message) -> tuple[list[str], Path | None]:
    """What the script imports, and the folder that comes first on its path."""
    script, folder = str(message.get("script", "")), Path(message.get("working_dir") or ".").absolute()
    if not script:
        return [], None
    if message.get("is_module"):
        source = module_source(script, folder)
    else:
        source, folder = script_source(str(folder / script))
    return (find_imports(source, folder) if source else []), folder


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """What is imported in here is to stay: it is not searched for garbage while it grows (a third of the time that
    torch's import takes: 5.1 s with that search, 3.5 s without), and no more later: forked children would copy pages
    only to look.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def _import_torch() -> int:
    """How many threads torch would take in a new interpreter; here it must not take more than this one."""
    _import("numpy")
    if not _import("torch"):
        return 0
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return threads


def _import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return "." in name  # `from package import function` names no module
    except (Exception, SystemExit):  # noqa: BLE001 - somebody else's module may raise anything
        return False
    return True


def _why_not_warm(folder: Path | None) -> str:
    """What makes a fork of this process unlike a new interpreter; empty when nothing does."""
    torch = sys.modules.get("torch")
    if (torch is not None and torch.cuda.is_initialized()) or _holds_gpu():
        return "an import initialised CUDA, and a forked process could not use the GPU"
    if (count := sum(1 for _ in Path("/proc/self/task").iterdir())) > 1:
        return f"an import started {count - 1} threads, which a forked process would lack"
    with contextlib.suppress(OSError):
        if folder is not None and (hidden := hidden_modules(folder)):
            return f"{folder} has a {hidden[0]!r} of its own, and another one is loaded already"
    return ""


def _holds_gpu() -> bool:
    """Whether the driver has been opened for computing (NVML alone does not need this device)."""
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if fd.readlink() == Path("/dev/nvidia-uvm"):
                return True
    return False


def main() -> None:
    """``python -u -m elasticd.supervisor.warm CONTROL_FD LISTEN_PATH PARENT_PID``."""
    control_fd, listen_path, parent_pid = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    del sys.path[0]  # python -m put the current folder there: what is found in it is not the script's
    control = Channel(socket.socket(fileno=control_fd))
    os.set_inheritable(control_fd, False)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    Path(listen_path).unlink(missing_ok=True)
    mask = os.umask(0o177)
    listener.bind(listen_path)
    os.umask(mask)
    listener.listen(8)
    server = _Server(control=control, listener=listener)
    signal.signal(signal.SIGTERM, lambda *_: server.kill_everything())
    die_with_parent(parent_pid, signal.SIGTERM)
    child = server.serve()
    if child is not None:
        child()  # in the child: the interpreter then ends as it would after a script
        return
    Path(listen_path).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
