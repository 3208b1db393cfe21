"""``torchrun --rdzv-backend=elasticd``, through the entry point: torchrun's own agent, elasticd's rendezvous."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters, RendezvousStateError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from elasticd.cluster.embedded import EmbeddedEtcd, free_port
from tests.conftest import eventually

PATIENCE_S = 60.0
_TRAIN = Path(__file__).with_name("chaos") / "train.py"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd") / "data") as etcd:
        yield etcd.endpoint


class Nodes:
    """torchruns on this machine, each a node of one job, and the steps that their workers recorded."""

    def __init__(self, folder: Path, endpoint: str, job: str) -> None:
        self.folder, self.endpoint, self.job = folder, endpoint, job
        self.work, self.steps = folder / "work", folder / "steps"
        for made in (self.work, self.steps):
            made.mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *, nnodes: str, max_restarts: int = 2, script: str = str(_TRAIN)) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=elasticd"]
        command += [f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={self.job}", f"--nnodes={nnodes}"]
        command += ["--local-addr=127.0.0.1", f"--max-restarts={max_restarts}", script, str(self.work)]
        env = {**os.environ, "ELASTICD_TEST_STEPS": str(self.steps), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        number = len(self.processes)
        env["ELASTICD_NODE_ID"] = f"node{number}"  # for the script's own lines; torchrun passes it on
        with (self.folder / f"torchrun{number}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        return self.processes[-1]

    def log(self, number: int) -> str:
        return (self.folder / f"torchrun{number}.log").read_text()

    def lines(self) -> list[dict]:
        found = []
        for file in self.steps.glob("*.jsonl"):
            found += [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return sorted(found, key=lambda line: line["t"])

    def wait_step(self, world: int, after: float = 0.0) -> dict:
        """The first step of a world of that size after this time."""

        def found() -> list[dict]:
            return [line for line in self.lines() if line["world"] == world and line["t"] > after]

        eventually(lambda: bool(found()), PATIENCE_S, f"a step of a world of {world}")
        return found()[0]

    def kill(self, number: int) -> None:
        """The whole node, in the same instant: torchrun and its workers."""
        process = self.processes[number]
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
        process.wait()

    def wait(self, number: int) -> int:
        return self.processes[number].wait(PATIENCE_S)


@pytest.fixture
def nodes(tmp_path: Path, endpoint: str, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    made = Nodes(tmp_path, endpoint, request.node.name)
    try:
        yield made
    finally:
        for number, process in enumerate(made.processes):
            if process.poll() is None:
                made.kill(number)


def test_a_node_is_lost_and_another_joins_and_the_job_ends_well(nodes: Nodes) -> None:
    for _ in range(2):
        nodes.start(nnodes="1:2")
    first = nodes.wait_step(world=2)
    nodes.kill(1)
    alone = nodes.wait_step(world=1, after=first["t"])
    assert alone["node"] == "node0"
    nodes.start(nnodes="1:2")
    both = nodes.wait_step(world=2, after=alone["t"])
    assert both["step"] > first["step"], "it resumed"
    (nodes.work / "finish").touch()
    assert (nodes.wait(0), nodes.wait(2)) == (0, 0), nodes.log(0) + nodes.log(2)


def test_a_script_beyond_repair_ends_the_job_on_all_nodes(nodes: Nodes) -> None:
    broken = nodes.folder / "broken.py"
    broken.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\ntime.sleep(1000)")
    for _ in range(2):
        nodes.start(nnodes="2", max_restarts=0, script=str(broken))
    assert nodes.wait(0) != 0
    assert nodes.wait(1) != 0
    assert "exitcode  : 3" in nodes.log(0) + nodes.log(1)
    assert f"job {nodes.job} is over: another node ended it" in nodes.log(0) + nodes.log(1)


def params(endpoint: str, run_id: str = "one") -> RendezvousParameters:
    return RendezvousParameters("elasticd", endpoint, run_id, 1, 1, local_addr="127.0.0.1")


def test_the_entry_point_gives_torch_a_handler(endpoint: str) -> None:
    handler = get_rendezvous_handler(params(endpoint, "entry"))
    info = handler.next_rendezvous()
    assert (handler.get_backend(), handler.get_run_id(), handler.is_closed()) == ("elasticd", "entry", False)
    assert (info.rank, info.world_size, handler.num_nodes_waiting()) == (0, 1, 0)
    info.store.set("key", "value")
    assert info.store.get("key") == b"value"
    assert handler.shutdown()
    assert handler.is_closed()
    with pytest.raises(RendezvousStateError, match="job 'entry' has just succeeded"):
        get_rendezvous_handler(params(endpoint, "entry"))


def test_an_etcd_that_is_not_there_is_one_of_torch_s_errors() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(RendezvousConnectionError, match=f"etcd at {address} cannot be reached"):
        get_rendezvous_handler(params(address))


@pytest.mark.parametrize(
    ("endpoint_", "run_id", "says"),
    [("", "one", "--rdzv-endpoint is empty"), ("127.0.0.1:1", "a/b", "--rdzv-id 'a/b': letters, digits")],
)
def test_what_an_operator_must_mend_is_one_of_torch_s_errors(endpoint_: str, run_id: str, says: str) -> None:
    with pytest.raises(RendezvousStateError, match=says):
        get_rendezvous_handler(params(endpoint_, run_id))
