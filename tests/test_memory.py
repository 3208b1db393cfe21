"""Copies in RAM by real daemons and ranks: what is told and sent, and what ranks get back, whatever happened meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import eventually
from memory_nodes import JOB, MemoryNode, MemoryNodes, generation
from torch.nn.parallel import DistributedDataParallel
from worker_runs import run_world, world

import elasticd
from elasticd.channel import MAX_LINE_BYTES, encode
from elasticd.checkpoint import storage
from elasticd.checkpoint.memory_save import Copied, MemoryCopies
from elasticd.cluster.memory_link import DataConnection
from elasticd.cluster.peers import LinkSettings
from elasticd.config import LinksConfig
from elasticd.core.memory import Index, Need, Part, encode_index
from elasticd.core.messages import BoundaryReached
from elasticd.core.model import NodeId
from elasticd.daemon.memory_files import MemorySettings
from elasticd.daemon.memory_service import COPY_THREADS
from elasticd.errors import MemoryRefused
from elasticd.worker import memory_host
from elasticd.worker.link import DaemonLink
from elasticd.worker.memory_host import PARTS_AT_ONCE, MemoryHost

SEED = int(os.environ.get("ELASTICD_TEST_SEED", "0")) or 20261125
MIB = 1024**2
#: Parts of this size and up are copied in several blocks.
BALLAST = 5_000_000


# --- what a daemon answers ---


def call_daemon(nodes: MemoryNodes, rank: int) -> tuple[DaemonLink, MemoryHost]:
    hello = {"type": "worker_hello", "job": JOB, "round": 1, "rank": rank, "local_rank": rank, "pid": os.getpid()}
    link = DaemonLink(str(nodes.nodes["n0"].socket), hello)
    return link, MemoryHost(link, "n0", timeout_s=20)


def test_a_rank_that_gives_up_keeps_no_other_of_its_node_waiting() -> None:
    with MemoryNodes("") as nodes, ThreadPoolExecutor(1) as pool:
        (link, leader), (other_link, other) = (call_daemon(nodes, rank) for rank in (0, 1))
        leader.begin(generation(1), MIB, 4096)
        other.begin(generation(1), MIB, 0)
        waiting = pool.submit(other.seal, generation(1), 0)
        leader.abandon(generation(1))
        with pytest.raises(MemoryRefused, match=r"has given it up|was begun"):
            waiting.result(10)
        link.close()
        other_link.close()


def test_a_restore_that_waited_its_turn_until_the_job_was_over_brings_nothing_of_it_back() -> None:
    with MemoryNodes("") as nodes, ThreadPoolExecutor(1) as pool:
        node, over = nodes.nodes["n0"], threading.Event()
        for _ in range(COPY_THREADS):
            node.service._copying.submit(over.wait)
        link, host = call_daemon(nodes, 0)
        waiting = pool.submit(host.fetch, generation(1), 0, {}, [NodeId("n0")])
        eventually(lambda: node.service._copying._work_queue.qsize() == 1)
        nodes.end_job()
        over.set()
        with pytest.raises(MemoryRefused, match="does not take part in job j"):
            waiting.result(10)
        link.close()
        assert list(nodes.memory.iterdir()) == []


def test_a_daemon_that_keeps_no_copies_says_so(tmp_path: Path) -> None:
    with MemoryNodes("") as nodes:
        nodes.nodes["n0"].local._memory = None
        link, host = call_daemon(nodes, 0)
        with pytest.raises(MemoryRefused, match=r"memory\.limit_bytes is 0"):
            host.inventory()
        link.close()
        nodes.nodes["n0"].local._memory = nodes.nodes["n0"].service


def test_a_daemon_that_is_gone_is_no_reason_to_wait() -> None:
    with MemoryNodes("") as nodes:
        link, host = call_daemon(nodes, 0)
        assert host.inventory() == []
        nodes.kill("n0")
        with pytest.raises(MemoryRefused, match="the daemon is gone"):
            host.inventory()
        link.close()


def test_a_request_of_a_great_world_fits_its_line() -> None:
    """The longest names that a node may have, and their parts' paths."""
    name = "n" * 64
    asked = [[100_000 + rank, name, [name, name]] for rank in range(PARTS_AT_ONCE)]
    path = f"/dev/shm/elasticd-{name}-abcdefgh/{'j' * 64}/step-100000000.r100000.rank-100000.from-{name}"
    told = [[100_000 + rank, path] for rank in range(PARTS_AT_ONCE)]
    for message in ({"wanted": asked}, {"paths": told}):
        assert len(encode({"type": "memory", **message})) < MAX_LINE_BYTES * 0.7


# --- ranks and their daemons ---


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 16, bias=False)
        self.register_buffer("ballast", torch.zeros(BALLAST))


def join_node(nodes: int) -> None:
    """Each rank is on the node of its number, the last node takes the rest."""
    name = f"n{min(int(os.environ['RANK']), nodes - 1)}"
    os.environ["ELASTICD_NODE_ID"] = name
    os.environ["ELASTICD_SOCKET"] = f"{os.environ['MEMORY_NODES']}/{name}.sock"
    os.environ["LOCAL_RANK"] = str(max(0, int(os.environ["RANK"]) - nodes + 1))
    memory_host.PARTS_AT_ONCE = 2  # so that three ranks are more than one request, as hundreds are


def train(nodes: int, until: int, every: int = 1, kind: str = "ddp", wait: float = 0.0, directory: str = "") -> None:
    """Steps whose weights depend on their number alone. Prints where it began and what it has in the end."""
    join_node(nodes)
    with elasticd.Session(memory_every_steps=every, seed=1, checkpoint_dir=directory or None) as session:
        torch.manual_seed(0)
        model: torch.nn.Module = Net()
        if kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model.linear)
        else:
            model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        began = session.restore()
        for step in session.steps(until=until):
            with step:
                optimizer.zero_grad()
                inner = model.module if kind == "ddp" else model
                (model.linear if kind == "fsdp" else _Through(model))(torch.ones(4, 16)).square().mean().backward()
                optimizer.step()
                inner.ballast.fill_(step.index + 1)
                time.sleep(wait)
            print(json.dumps({"done": session.step}), flush=True)
        inner = model.module if kind == "ddp" else model
        assert inner.ballast.min() == inner.ballast.max() == session.step, "ballast of another step"
        weight = inner.linear.weight
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        counts = session.memory_counts
        told = {"committed": counts.committed, "stall_s": counts.stall_s}
        print(json.dumps({"began": began, "weights": weight.double().sum().item(), **told}))


class _Through:
    """A forward pass through DDP's own module, whose forward is its linear layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        model.module.forward = model.module.linear.forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._model(x)


def last(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])


def run(nodes: MemoryNodes, size: int, round_number: int, *arguments: object) -> list[dict]:
    nodes.enter_round()
    outputs = run_world(size, train, *arguments, **nodes.environment(round_number))
    return [last(output) for output in outputs]


def expected(steps: int) -> float:
    """What the weights are after so many steps, on any world."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model.linear(torch.ones(4, 16)).square().mean().backward()
        optimizer.step()
    return model.linear.weight.double().sum().item()


def test_a_restart_takes_up_what_the_daemons_hold_and_a_lost_node_is_made_up_for_by_its_buddy() -> None:
    with MemoryNodes("z1", "z2", "z1") as nodes:
        first = run(nodes, 3, 1, 3, 6)
        assert {one["began"] for one in first} == {0}
        kept = nodes.nodes["n0"].events("memory_kept")[-1]
        assert (kept["step"], kept["buddy"], kept["apart"]) == (6, "n1", "zone")
        assert {one["began"] for one in run(nodes, 3, 2, 3, 8)} == {6}
        assert restored(nodes) == {"memory"}
        nodes.kill("n2")
        again = run(nodes, 2, 3, 2, 10)
        assert {one["began"] for one in again} == {8}
        assert restored(nodes) == {"memory", "buddy"}
        assert all(one["weights"] == pytest.approx(expected(10), rel=1e-6) for one in again)


def go_back() -> None:
    """Run by a rank: the fifth step raises after its update, while the copy of those before it is under way."""
    join_node(1)
    finish = MemoryCopies._finish

    def take_long(*arguments: Any) -> Copied:
        time.sleep(0.3)
        return finish(*arguments)

    MemoryCopies._finish = take_long
    with elasticd.Session(memory_every_steps=4, seed=1) as session:
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.register(model=model, optimizer=optimizer)
        session.restore()
        with contextlib.suppress(ArithmeticError):
            for step in session.steps():
                with step:
                    optimizer.zero_grad()
                    model.linear(torch.ones(4, 16)).square().mean().backward()
                    optimizer.step()
                    if step.index == 4:
                        raise ArithmeticError
        print(json.dumps([session.restore(), model.linear.weight.double().sum().item()]))


def test_a_script_that_goes_back_takes_up_the_copy_that_was_under_way() -> None:
    with MemoryNodes("") as nodes:
        (output,) = run_world(1, go_back, **nodes.environment(1))
        assert last(output) == [4, pytest.approx(expected(4), rel=1e-6)]


def restored(nodes: MemoryNodes) -> set[str]:
    return {m["source"] for node in nodes.nodes.values() for m in node.observed if m["type"] == "restored"}


def test_a_copy_is_resharded_onto_another_world_and_another_layout() -> None:
    with MemoryNodes("", "") as nodes:
        run(nodes, 4, 1, 2, 4, 1, "fsdp")  # one rank on n0, three on n1
        (three,) = {one["began"] for one in run(nodes, 3, 2, 2, 6, 1, "fsdp")}
        (one,) = run(nodes, 1, 3, 1, 8, 1, "ddp")
        assert (three, one["began"]) == (4, 6)
        assert one["weights"] == pytest.approx(expected(8), rel=1e-6)


def test_a_bit_that_flips_is_noticed_before_anything_is_filled() -> None:
    """In a part: then its copy is taken. In its copy too: then nothing, and a fresh start is a fresh start."""
    with MemoryNodes("", "") as nodes:
        run(nodes, 2, 1, 2, 4)
        own, copy = sorted(nodes.memory.rglob("step-4.*rank-0*"), key=lambda path: "from" in path.name)
        flip(own, BALLAST)
        outputs = run_world(2, train, 2, 4, **nodes.environment(2))
        assert {last(output)["began"] for output in outputs} == {4}
        assert "step 4 in RAM: the part of rank 0 does not match its checksum" in outputs[0]
        assert not own.exists()
        assert copy.exists()
        flip(copy, BALLAST)
        nodes.enter_round()
        outputs = run_world(2, train, 2, 3, **nodes.environment(2))
        assert {last(output)["began"] for output in outputs} == {0}
        (told,) = [line for line in outputs[0].splitlines() if "step 4 in RAM is passed over" in line]
        assert "does not match its checksum" in told
        assert last(outputs[0])["weights"] == pytest.approx(expected(3), rel=1e-6)


def test_bits_that_flip_in_a_part_and_in_its_copy_are_passed_over_for_the_disk(tmp_path: Path) -> None:
    with MemoryNodes("", "") as nodes:
        run(nodes, 2, 1, 2, 4, 1, "ddp", 0.0, str(tmp_path))  # the end stands on disk too
        for path in nodes.memory.rglob("step-4.*rank-1*"):
            flip(path, 100)
        assert {one["began"] for one in run(nodes, 2, 2, 2, 6, 1, "ddp", 0.0, str(tmp_path))} == {4}
        assert restored(nodes) == {"disk"}


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_a_state_that_does_not_fit_is_refused_once_with_sizes_and_training_goes_on() -> None:
    with MemoryNodes("", "", limit_bytes=16 * MIB) as nodes:
        outputs = run_world(2, train, 2, 5, **nodes.environment(1))
        assert [last(output)["committed"] for output in outputs] == [0, 0]
        assert outputs[0].count("no copy of step") == 1
        assert "does not fit on node" in outputs[0]
        assert "16.0 MiB that memory.limit_bytes allows" in outputs[0]
        refused = [about["reason"] for node in nodes.nodes.values() for about in node.events("memory_refused")]
        assert len(refused) == 1
        assert last(outputs[0])["weights"] == pytest.approx(expected(5), rel=1e-6)


@pytest.mark.parametrize(("every", "whole"), [(1, True), (2, False)])
def test_a_step_that_waits_for_its_own_copy_waits_visibly(every: int, whole: bool) -> None:
    with MemoryNodes("") as nodes:
        (one,) = run(nodes, 1, 1, 1, 4, every)
        copied = [m for m in nodes.nodes["n0"].observed if m["type"] == "memory_copied"]
        assert [m["stall_seconds"] == m["seconds"] for m in copied] == [whole] * 4
        assert (one["stall_s"] >= sum(m["seconds"] for m in copied)) == whole


def test_without_a_buddy_that_takes_it_a_copy_stays_on_its_own_node_and_says_why() -> None:
    with MemoryNodes("", "") as nodes:
        nodes.nodes["n1"].service._server.close()
        assert {one["committed"] for one in run(nodes, 2, 1, 2, 3)} == {3}
        kept = nodes.nodes["n0"].events("memory_kept")[-1]
        assert kept["buddy"] == ""
        assert "node n1: [Errno 111] Connection refused" in kept["reason"]


def test_a_buddy_without_room_says_so_and_is_heard() -> None:
    """It refuses and hangs up in the middle of what it is sent."""
    with MemoryNodes("", "") as nodes:
        nodes.nodes["n1"].service.store._files._settings = MemorySettings(limit_bytes=MIB)
        link, host = call_daemon(nodes, 0)
        made = generation(1)
        path, index_path = host.begin(made, 64 * MIB, 4096)
        assert index_path is not None
        part = Part(rank=0, node_id=NodeId("n0"), size_bytes=64 * MIB, crc32=0)
        line = encode_index(Index(generation=made, job_id=JOB, metadata_bytes=0, metadata_crc32=0, parts=(part,)))
        with index_path.open("r+b") as file:
            file.write(line)
        assert path.stat().st_size == 64 * MIB
        at_buddy, reason = host.seal(made, len(line))
        assert not at_buddy
        assert reason.startswith("node n1: a copy in RAM does not fit on node n1: a part has 64.0 MiB")
        link.close()


def test_ranks_killed_at_any_moment_of_a_copy_lose_fewer_steps_than_asked_for_and_mix_nothing() -> None:
    """All ranks at once, at moments chosen from the seed: what is taken up is of one step, on every rank."""
    every, done, chance = 4, 0, random.Random(SEED)
    print(f"seed {SEED}")
    with MemoryNodes("", "") as nodes:
        for round_number in range(1, 5):
            nodes.enter_round()
            with world(2, train, 2, 10_000, every, "ddp", 0.005, **nodes.environment(round_number)) as ranks:
                eventually(lambda ranks=ranks: all("done" in rank.output for rank in ranks), 30)
                time.sleep(chance.uniform(0.0, 0.4))
                for rank in ranks:
                    rank.kill()
                for rank in ranks:
                    assert rank.wait() == -signal.SIGKILL
                (began,) = {steps_of(rank.output)[0] - 1 for rank in ranks}
                assert max(0, done - every + 1) <= began <= done
                done = max(steps_of(rank.output)[-1] for rank in ranks)
        (end,) = {one["weights"] for one in run(nodes, 2, 9, 2, done + 1)}
        assert end == pytest.approx(expected(done + 1), rel=1e-6)


@pytest.mark.parametrize(("need", "on_disk"), [(Need.BUDDY, False), (Need.DISK, True)])
def test_a_stop_saves_at_its_step_where_the_memory_outlives_it_and_on_disk_where_it_may_not(
    need: Need, on_disk: bool, tmp_path: Path
) -> None:
    with MemoryNodes("", "") as nodes:
        nodes.enter_round()
        arguments = (2, 10_000, 8, "ddp", 0.005, str(tmp_path))
        with world(2, train, *arguments, **nodes.environment(1)) as ranks:
            eventually(lambda: all("done" in rank.output for rank in ranks), 30)
            nodes.tell_workers(1, {"type": "boundary_wanted", "round": 1, "need": need.value})
            eventually(lambda: all(boundaries(node) for node in nodes.nodes.values()), 20)
            (stopped,) = {step for node in nodes.nodes.values() for step in boundaries(node)}
        assert storage.complete_steps(tmp_path) == ([stopped] if on_disk else [])
        assert {one["began"] for one in run(nodes, 2, 2, 2, 0)} == {stopped}
        assert restored(nodes) == {"memory"}


def boundaries(node: MemoryNode) -> set[int]:
    """The steps at which its ranks have parked."""
    return {event.step for event in list(node.posted) if isinstance(event, BoundaryReached)}


def steps_of(output: str) -> list[int]:
    """The steps that a rank has told; the last line may be torn."""
    lines = output.splitlines(keepends=True)
    return [json.loads(line)["done"] for line in lines if line.startswith('{"done"') and line.endswith("}\n")]


# --- what comes over the network ---


@pytest.fixture
def tls(tmp_path: Path) -> LinkSettings:
    """One certificate that signs itself, for all nodes."""
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=n", "-days", "1")
    subprocess.run(["openssl", "req", "-x509", *made, "-keyout", key, "-out", cert], check=True, capture_output=True)
    contexts = LinksConfig(ca=cert, cert=cert, key=key).contexts()
    assert contexts is not None
    return LinkSettings(server_tls=contexts[0], client_tls=contexts[1])


def test_copies_go_over_mutual_tls_where_links_do(tls: LinkSettings) -> None:
    with MemoryNodes("", "", links=tls) as nodes:
        run(nodes, 2, 1, 2, 3)
        assert nodes.nodes["n0"].events("memory_kept")[-1]["buddy"] == "n1"
        nodes.kill("n1")
        assert [one["began"] for one in run(nodes, 1, 2, 1, 4)] == [3]
        place = nodes.nodes["n0"].place
        with (
            DataConnection.dial(place.address, place.port, None) as plain,
            pytest.raises((ConnectionError, ValueError)),
        ):
            plain.ask({"op": "get", "job": JOB, "step": 3, "round": 1, "seal": 0, "ranks": []})


CROWDED = """
import os, resource, socket, time
from elasticd.cluster.memory_link import DataServer
server = DataServer(lambda connection, header: connection.send({"ok": True}), None)
port = server.listen("127.0.0.1", 0)
caller = socket.socket()
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (caller.fileno() + 1, hard))
caller.connect(("127.0.0.1", port))
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
caller.sendall(b"{}\\n")
print(caller.recv(100))
"""


def test_a_daemon_without_descriptors_does_not_spin_and_answers_later() -> None:
    done = subprocess.run([sys.executable, "-c", CROWDED], check=True, capture_output=True, text=True, timeout=30)
    busy_s, answer = done.stdout.splitlines()
    assert float(busy_s) < 0.3
    assert "protocol None" in answer


@pytest.mark.parametrize(
    "header",
    [
        {"op": "put", "job": "j"},
        {"op": "put", "job": "j", "writer": "n9", "index_bytes": -1, "ranks": [0]},
        {"op": "put", "job": "j", "writer": "n9", "index_bytes": 10**15, "ranks": [0]},
        {"op": "put", "job": "../j", "writer": "../n9", "index_bytes": 8, "ranks": [0]},
        {"op": "put", "job": "j", "writer": "../n9", "index_bytes": 8, "ranks": ["../x"]},
        {"op": "get", "job": "j", "step": 1, "round": 1, "seal": 1, "ranks": [0]},
        {"op": "erase", "job": "j"},
        {"job": []},
    ],
)
def test_a_request_of_another_form_is_refused_and_leaves_nothing(header: dict) -> None:
    with MemoryNodes("") as nodes:
        place = nodes.nodes["n0"].place
        with DataConnection.dial(place.address, place.port, None) as caller:
            refused = False
            try:
                caller.ask(header)
                caller._socket.sendall(b"{}\n{}\n{}")
                caller.answer()
            except (MemoryRefused, OSError):
                refused = True
        assert refused
        eventually(lambda: nodes.nodes["n0"].service.held().copied_bytes == 0)
        assert not [path for path in nodes.memory.rglob("*") if path.is_file() and path.name != "lock"]
