"""One training job on several test hosts, run by elasticd or by torchrun: the same script, faults and clock.

The script is an unchanged one (examples/plain_ddp.py): 50 ms steps, a checkpoint, a line for each completed step. Not
here: what is done to a job, and what is read from its lines (the experiments).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import elasticd.examples
from elasticd.bench.figures import DEFAULT, ELASTICD, TUNED
from elasticd.testing.cluster import Cluster, ClusterSpec
from elasticd.testing.history import Event, Tail, Trained, events_of, parse_trained
from elasticd.testing.hosts import Host, open_hosts

SCRIPT = Path(elasticd.examples.__file__).with_name("plain_ddp.py")
STEP_S = 0.05
#: Times come from what workers and daemons recorded: looking seldom costs no accuracy, and little of the machine.
POLL_S = 0.05
RDZV_PORT = 29400
ENDLESS = 10_000_000
RESTARTS = 1000  # what an experiment breaks must not end the job
LAST_LINES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """``nodes`` hosts at the start, worlds of ``limits``, ``nproc`` workers a node.

    ``module``: the command names one, and no script. ``group_timeout_s`` 0: the script leaves its process group's
    time-out at torch's default, half an hour.
    """

    nodes: int = 3
    limits: str = "2:3"
    nproc: int = 1
    module: bool = False
    group_timeout_s: float = 0.0

    def command(self, folder: Path) -> list[str]:
        return [
            *(str(SCRIPT), "--steps", str(ENDLESS), "--step-seconds", str(STEP_S), "--print-every", "1000"),
            *("--checkpoint", str(folder / "checkpoint.pt"), "--ledger", str(folder / "ledger.jsonl")),
            *("--group-timeout", str(self.group_timeout_s)),
        ]


class Job(Protocol):
    """Inside its context the hosts exist and the job runs or has ended; afterwards nothing of it is left."""

    system: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def start_node(self, node: int) -> None:
        """On a host that was there at the start and was killed, or on a new one (the next index)."""
        ...

    def kill_node(self, node: int) -> None:
        """SIGKILL to all that runs there, in the same instant."""
        ...

    def host(self, node: int) -> Host: ...

    def trained(self) -> list[Trained]:
        """Every completed step so far, in order of time."""
        ...

    def store_node(self) -> int:
        """The node that hosts the store which the job cannot do without."""
        ...

    def ended(self) -> bool:
        """Whether the job has given up: nothing is left that could step again."""
        ...

    def last_words(self) -> str: ...


class ElasticdJob:
    """Daemons (``elasticd serve``) with an etcd of their own, and the job submitted to them."""

    system = ELASTICD

    def __init__(self, shape: JobShape) -> None:
        self.shape = shape
        self._folder = Path(tempfile.mkdtemp(prefix="elasticd-bench-"))
        self.cluster = Cluster(ClusterSpec(nodes=shape.nodes), folder=self._folder)

    def __enter__(self) -> Self:
        try:
            self.cluster.__enter__()
            steps = self._folder / "steps"
            fields = {"nodes": self.shape.limits, "nproc_per_node": self.shape.nproc, "max_restarts": RESTARTS}
            if self.shape.module:
                fields["module"] = True
            self.cluster.submit("bench", self.shape.command(steps), **fields)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.__exit__(None, None, None)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start_node(self, node: int) -> None:
        if node == len(self.cluster.nodes):
            self.cluster.add_node()
        self.cluster.start_node(node)

    def kill_node(self, node: int) -> None:
        self.cluster.kill_node(node)

    def host(self, node: int) -> Host:
        return self.cluster.nodes[node].host

    def trained(self) -> list[Trained]:
        return self.cluster.trained()

    def history(self) -> list[Event]:
        return self.cluster.history()

    def store_node(self) -> int:
        return self.cluster.store_host("bench")

    def ended(self) -> bool:
        return bool(events_of(self.cluster.history(), "job_over"))

    def last_words(self) -> str:
        return self.cluster.last_words(LAST_LINES)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchrunFlags:
    """How torchrun is started. Its defaults, and the best that was found without changing the script."""

    name: str
    flags: tuple[str, ...] = ()
    rdzv_conf: str = ""
    env: tuple[tuple[str, str], ...] = ()


DEFAULTS = TorchrunFlags(name=DEFAULT)
#: Two missed keep-alives of one second would already split the job in two; three do not.
BEST = TorchrunFlags(
    name=TUNED,
    flags=("--monitor-interval", "0.1"),
    rdzv_conf="keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1,close_timeout=1,join_timeout=60",
    env=(("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1"),),
)


class TorchrunJob:
    """One torchrun a host, with its c10d rendezvous, whose store is on the first host."""

    def __init__(self, shape: JobShape, flags: TorchrunFlags) -> None:
        self.shape, self.flags, self.system = shape, flags, flags.name
        self._folder = Path(tempfile.mkdtemp(prefix="torchrun-bench-"))
        self._close = contextlib.ExitStack()
        self._hosts: list[Host] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._tail, self._trained = Tail(), list[Trained]()

    def __enter__(self) -> Self:
        try:
            self._all = self._close.enter_context(open_hosts())
            for node in range(self.shape.nodes):
                self.start_node(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._processes:
            self.kill_node(node)
        self._close.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start_node(self, node: int) -> None:
        if node == len(self._hosts):
            self._hosts.append(self._all.add(f"node{node}"))
        host = self._hosts[node]
        self._processes[node] = host.spawn(self._command(node), log=self._log(node), env=self._environment(host))

    def kill_node(self, node: int) -> None:
        self._hosts[node].kill()
        self._processes[node].wait()

    def _command(self, node: int) -> list[str]:
        # Test hosts share the machine's name, by which torchrun would guess who hosts the store.
        conf = ",".join(part for part in (f"is_host={int(node == 0)}", self.flags.rdzv_conf) if part)
        return [
            *(sys.executable, "-m", "torch.distributed.run", *self.flags.flags),
            *("--nnodes", self.shape.limits, "--nproc-per-node", str(self.shape.nproc)),
            *("--max-restarts", str(RESTARTS), "--local-addr", self._hosts[node].address),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self._hosts[0].address}:{RDZV_PORT}"),
            *("--rdzv-id", "bench", "--rdzv-conf", conf),
            *self.shape.command(self._folder),
        ]

    def _environment(self, host: Host) -> dict[str, str]:
        return {"OMP_NUM_THREADS": "1", **os.environ, "GLOO_SOCKET_IFNAME": host.interface, **dict(self.flags.env)}

    def _log(self, node: int) -> Path:
        return self._folder / f"node{node}.log"

    def host(self, node: int) -> Host:
        return self._hosts[node]

    def trained(self) -> list[Trained]:
        new = [parse_trained(line) for line in self._tail.read([self._folder / "ledger.jsonl"])]
        if new:
            self._trained = sorted([*self._trained, *new], key=lambda line: line.t)
        return self._trained

    def store_node(self) -> int:
        return 0

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self._processes.values())

    def last_words(self) -> str:
        logs = [self._log(node) for node in range(len(self._hosts))]
        ends = [(log, log.read_text(errors="replace").splitlines()[-LAST_LINES:]) for log in logs if log.exists()]
        return "\n".join(f"--- {log}\n" + "\n".join(lines) for log, lines in ends)


def wait_line(job: Job, wanted: Callable[[Sequence[Trained]], Trained | None], timeout_s: float) -> Trained | None:
    """The first line that is wanted; None when the time is up or the job has ended without one."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        over = time.monotonic() > deadline_s or job.ended()
        line = wanted(job.trained())
        if line is not None or over:
            return line
        time.sleep(POLL_S)


def wait_whole(job: Job, nodes: int, timeout_s: float = 60.0) -> bool:
    """Whether a step of all nodes' workers came after now, in time."""
    since = time.monotonic()
    return wait_line(job, lambda lines: first_step(lines, since, world=nodes), timeout_s) is not None


def first_step(lines: Sequence[Trained], after: float, *, world: int) -> Trained | None:
    """The first completed step later than ``after`` of a world of that many ranks. Pure."""
    return next((line for line in lines if line.t > after and line.world == world), None)
