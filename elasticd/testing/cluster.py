"""A cluster of node daemons on one machine: hosts, an etcd, one ``elasticd serve`` a host, and what they recorded.

For this project's tests, the demo and the benchmark, and for users' own drills. Not here: how hosts are made
(hosts.py), what is done to them (faults.py), how their histories are judged (validators.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from elasticd.core.model import Topology
from elasticd.errors import ElasticdError
from elasticd.testing.etcd_cluster import EtcdCluster
from elasticd.testing.history import Event, Tail, Trained, parse_event, parse_trained, rounds_of
from elasticd.testing.hosts import Host, open_hosts

T = TypeVar("T")

POLL_S = 0.01
METRICS_PORT = 7421
#: Where a training script may append its lines (history.Trained), one file a process.
STEPS_VARIABLE = "ELASTICD_TEST_STEPS"


class NotInTime(ElasticdError):
    """What was waited for did not come; the text ends with what the daemons said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """``isolated``: True insists on namespaces, False on loopback, None takes what the machine allows.

    ``env``: of the daemons; ``{node}`` in a value stands for the node's name.
    """

    nodes: int = 3
    etcd_members: int = 1
    isolated: bool | None = None
    heartbeat_s: float = 0.1
    dead_after_s: float = 0.5
    lease_ttl_s: int = 5
    memory_bytes: int = 4 * 1024**3
    topology: tuple[Topology, ...] = ()
    #: More of each node's configuration, as TOML.
    more: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = (sys.executable, "-m", "elasticd.cli")


@dataclass(slots=True, kw_only=True)
class ClusterNode:
    """One host and the daemon on it. ``folder`` holds its configuration, log, history and sockets."""

    host: Host
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def history_file(self) -> Path:
        return self.folder / "history.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / "daemon.log"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.host.address}:{METRICS_PORT}/metrics"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Cluster:
    """A context manager: inside, etcd and the daemons run; afterwards nothing does.

    ``folder`` keeps logs and histories; without one, a temporary folder is made and left for the reader.
    """

    def __init__(self, spec: ClusterSpec | None = None, *, folder: Path | None = None) -> None:
        self.spec = spec or ClusterSpec()
        # A unix socket's path may be 107 bytes long: pytest's folders are too deep for it.
        self.folder = folder or Path(tempfile.mkdtemp(prefix="elasticd-"))
        self.sockets = Path(tempfile.mkdtemp(prefix="ed-"))
        #: On tmpfs: what killed nodes leave there goes with the cluster.
        self.memory = Path(tempfile.mkdtemp(prefix="ed-", dir="/dev/shm"))
        self.nodes: list[ClusterNode] = []
        self._close = contextlib.ExitStack()
        self._tail = Tail()
        self._events: list[Event] = []
        self._trained: list[Trained] = []

    # --- start and end ---

    def __enter__(self) -> Cluster:
        try:
            self._close.callback(shutil.rmtree, self.memory, ignore_errors=True)
            self.hosts = self._close.enter_context(open_hosts(isolated=self.spec.isolated))
            self._close.callback(_remove_sockets, self.sockets)
            self.etcd = self._close.enter_context(self._make_etcd())
            self._close.callback(self._kill_daemons)
            for _ in range(self.spec.nodes):
                self.start_node(self.add_node())
        except BaseException:
            self._close.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close.close()

    def _make_etcd(self) -> EtcdCluster:
        hosts = [self.hosts.add(f"etcd{index}") for index in range(self.spec.etcd_members)]
        return EtcdCluster(
            self.folder / "etcd",
            hosts=[host.address for host in hosts],
            command_prefixes=[host.prefix for host in hosts],
        )

    def _kill_daemons(self) -> None:
        for node in self.nodes:
            _kill(node)

    # --- nodes ---

    def add_node(self) -> int:
        """A host more, with a configuration, on which nothing runs yet; returns its index."""
        name = f"node{len(self.nodes)}"
        node = ClusterNode(host=self.hosts.add(name), folder=self.folder / name)
        node.folder.mkdir(parents=True)
        (node.folder / "elasticd.toml").write_text(self._configuration(node))
        self.nodes.append(node)
        return len(self.nodes) - 1

    def start_node(self, index: int) -> None:
        node = self.nodes[index]
        assert not node.running, f"{node.name} runs already"
        command = [*self.spec.command, "serve", "--config", str(node.folder / "elasticd.toml")]
        node.process = node.host.spawn(command, log=node.log, env=self._environment(node))

    def kill_node(self, index: int) -> None:
        """SIGKILL to all that runs there, in the same instant."""
        _kill(self.nodes[index])

    def index_of(self, name: str) -> int:
        return next(index for index, node in enumerate(self.nodes) if node.name == name)

    def _configuration(self, node: ClusterNode) -> str:
        spec = self.spec
        index = int(node.name.removeprefix("node"))
        place = spec.topology[index] if index < len(spec.topology) else Topology()
        endpoints = ", ".join(f'"{endpoint}"' for endpoint in self.etcd.endpoints)
        return (
            f'[node]\nid = "{node.name}"\naddress = "{node.host.address}"\nrun_dir = "{self.sockets}"\n'
            f'log_dir = "{node.folder}/log"\nhistory_file = "{node.history_file}"\n'
            f'zone = "{place.zone}"\nrack = "{place.rack}"\nswitch = "{place.switch}"\n'
            f"[etcd]\nendpoints = [{endpoints}]\n"
            "[links]\ninsecure = true\n"
            f"[metrics]\nport = {METRICS_PORT}\n"
            f'[memory]\nfolder = "{self.memory}"\nlimit_bytes = {spec.memory_bytes}\n'
            f"[detection]\nheartbeat_s = {spec.heartbeat_s}\ndead_after_s = {spec.dead_after_s}\n"
            f"lease_ttl_s = {spec.lease_ttl_s}\n{spec.more}"
        )

    def _environment(self, node: ClusterNode) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ELASTICD_")}
        steps = self.folder / "steps"
        steps.mkdir(exist_ok=True)
        return {
            "OMP_NUM_THREADS": "1",
            **inherited,
            "GLOO_SOCKET_IFNAME": node.host.interface,
            "NCCL_SOCKET_IFNAME": node.host.interface,
            STEPS_VARIABLE: str(steps),
            **{name: value.replace("{node}", node.name) for name, value in self.spec.env.items()},
        }

    # --- jobs ---

    def cli(self, *arguments: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """``elasticd`` from outside of all nodes, against this cluster's etcd."""
        return subprocess.run(
            [*self.spec.command, *arguments],
            check=False,
            env={**os.environ, "ELASTICD_ENDPOINTS": ",".join(self.etcd.endpoints)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def submit(self, job_id: str, command: Sequence[str], **fields: object) -> None:
        """Puts a job into etcd through ``elasticd submit``; ``fields`` are further keys of a job file."""
        file = self.folder / f"{job_id}.toml"
        lines = {"id": job_id, "command": list(command), **fields}
        file.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in lines.items()))
        done = self.cli("submit", str(file))
        if done.returncode != 0:
            raise ElasticdError(f"elasticd submit: {done.stderr.strip() or done.stdout.strip()}")

    # --- what happened ---

    def history(self) -> list[Event]:
        """All that the daemons recorded so far, in order of time."""
        new = [parse_event(line) for line in self._tail.read(node.history_file for node in self.nodes)]
        if new:
            self._events = sorted([*self._events, *new], key=lambda event: event.t)
        return self._events

    def trained(self) -> list[Trained]:
        """All steps that the training scripts recorded so far, in order of time."""
        new = [parse_trained(line) for line in self._tail.read(sorted((self.folder / "steps").glob("*.jsonl")))]
        if new:
            self._trained = sorted([*self._trained, *new], key=lambda line: line.t)
        return self._trained

    def wait_for(self, condition: Callable[[list[Event]], T], timeout_s: float = 20.0, what: str = "") -> T:
        """The first truthy value of the condition over the history."""
        return self.wait_until(lambda: condition(self.history()), timeout_s, what)

    def wait_until(self, condition: Callable[[], T], timeout_s: float = 20.0, what: str = "") -> T:
        """The first truthy value of the condition. NotInTime otherwise."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline_s:
                raise NotInTime(f"not in {timeout_s:g} s: {what or condition}\n{self.last_words()}")
            time.sleep(POLL_S)
        return value

    def wait_step(self, after: float, *, world: int = 0, timeout_s: float = 20.0) -> Trained:
        """The first completed step later than ``after`` (of a world of that size, if one is given)."""

        def found() -> Trained | None:
            lines = self.trained()
            return next((line for line in lines if line.t > after and world in (0, line.world)), None)

        line = self.wait_until(found, timeout_s, f"a step of a world of {world or 'any size'}")
        assert line is not None
        return line

    def seated(self, job_id: str) -> list[str]:
        """The nodes of the newest round, in the order of their ranks; empty when it waits or there is none."""
        rounds = rounds_of(self.history(), job_id)
        return [seat["node_id"] for seat in max(rounds.items())[1]["seats"]] if rounds else []

    def store_host(self, job_id: str) -> int:
        """The node that hosts the workers' store in the newest round."""
        _, newest = max(rounds_of(self.history(), job_id).items())
        return next(i for i, node in enumerate(self.nodes) if node.host.address == newest["store_address"])

    def last_words(self, lines: int = 25) -> str:
        """The ends of the daemons' logs: for a test that has failed."""
        logs = [(node.log, node.log.read_text(errors="replace")) for node in self.nodes if node.log.exists()]
        return "\n".join(f"--- {log}\n" + "\n".join(text.splitlines()[-lines:]) for log, text in logs)


def _kill(node: ClusterNode) -> None:
    """All of the host at once; a daemon that was only just started may not have entered it yet."""
    node.host.kill()
    if node.process is not None:
        node.process.kill()
        node.process.wait()
        node.host.kill()


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{name}" = {_toml(item)}' for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, int | float):
        return str(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _remove_sockets(folder: Path) -> None:
    for path in folder.glob("*"):
        path.unlink(missing_ok=True)
    folder.rmdir()
