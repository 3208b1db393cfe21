"""Test hosts for machines without namespaces: processes that share the machine, each host with a 127.x address.

Killing and freezing work on the tree of processes, found again by a mark in their environment after their parents
have died. Faults of the network do not exist here. Not here: real hosts (hosts.py).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from elasticd.testing.cgroups import Unsupported
from elasticd.testing.hosts import Host, spawn

_MARK = "ELASTICD_TEST_HOST"
_ENTER = str(Path(__file__).with_name("enter.py"))
_KILL_TIMEOUT_S = 10.0


class LoopbackHost:
    """Made by LoopbackHosts.add()."""

    interface = "lo"

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._mark = f"{name}-{uuid.uuid4().hex}"
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("env", f"{_MARK}={self._mark}")

    def spawn(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        marked = {**(os.environ if env is None else env), _MARK: self._mark}
        enter = (sys.executable, "-I", "-S", _ENTER, str(os.getpid()), "-", "-")
        process = spawn([*enter, *argv], log=log, env=marked)
        self._started.append(process)
        return process

    def pids(self) -> list[int]:
        return [process.pid for process in self._processes()]

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == self._mark:
                    yield process

    def kill(self) -> None:
        """Stopped first, so that none can start another while the rest is found."""
        deadline_s = time.monotonic() + _KILL_TIMEOUT_S
        self._signal_until_stable(signal.SIGSTOP)
        while self.pids():
            self._signal_all(signal.SIGKILL)
            for started in self._started:
                started.poll()
            if time.monotonic() > deadline_s:
                raise Unsupported(f"processes of {self.name} could not be killed: {self.pids()}")
            time.sleep(0.005)

    def _signal_until_stable(self, number: signal.Signals) -> None:
        known: set[int] = set()
        while not known >= (found := set(self.pids())):
            self._signal_all(number)
            known |= found

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def freeze(self) -> None:
        self._signal_until_stable(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def cut(self) -> None:
        raise Unsupported("hosts on loopback share one network: they cannot be cut off (run as root on Linux)")

    def slow(self, fraction: float, period_s: float = 0.0) -> None:  # noqa: ARG002
        raise Unsupported("hosts on loopback have no control group: they cannot be slowed down (run as root on Linux)")

    def heal(self) -> None:
        self.thaw()


class LoopbackHosts:
    """Hosts on addresses 127.A.B.10 and up; A and B come from the owner's pid, so that clusters seldom meet."""

    isolated = False

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise Unsupported("test hosts need Linux: elsewhere only 127.0.0.1 is there")
        LoopbackHosts._made += 1
        number = os.getpid() * 7 + LoopbackHosts._made
        self._network = f"127.{1 + number // 250 % 250}.{1 + number % 250}"
        self._hosts: list[LoopbackHost] = []
        atexit.register(self.close)

    _made = 0

    def add(self, name: str) -> LoopbackHost:
        host = LoopbackHost(name, f"{self._network}.{10 + len(self._hosts)}")
        self._hosts.append(host)
        return host

    def partition(self, one: Host, other: Host) -> None:  # noqa: ARG002
        one.cut()

    def block_port(self, host: Host, port: int) -> None:  # noqa: ARG002
        host.cut()

    def heal(self) -> None:
        for host in self._hosts:
            host.heal()

    def close(self) -> None:
        atexit.unregister(self.close)
        for host in self._hosts:
            host.kill()

    def __enter__(self) -> LoopbackHosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
