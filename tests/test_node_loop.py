"""Whole node loops on a real etcd and real links, with agents that only speak the channel's protocol."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from elasticd.channel import Message, decode, encode
from elasticd.cluster.embedded import EmbeddedEtcd
from elasticd.cluster.etcd import EtcdStore
from elasticd.cluster.peers import LinkSettings
from elasticd.core import keys
from elasticd.core.machine import Machine, Settings
from elasticd.core.messages import Report, ShutdownRequested
from elasticd.core.model import BootId, Capacity, JobId, JobSpec, Node, NodeId, StepLimits
from elasticd.core.stragglers import Measured
from elasticd.daemon.local import LocalServer
from elasticd.daemon.node import NodeLoop, Setup
from elasticd.errors import DuplicateNode, OperatorError


class Silent:
    """An observer without metrics."""

    def reported(self, report: Report, machine: Machine, now: float) -> None: ...

    def stepped(self, rank: int, round_number: int, message: Message) -> None: ...


class Agent:
    """Connects as an agent would; remembers the rounds that it was told to start."""

    #: All agents share an address here, so a port must be of one of them only.
    ports = itertools.count(40000)

    def __init__(self, path: Path) -> None:
        self.path, self.rounds = path, []
        self.task: asyncio.Task[None] | None = None
        self.writer: asyncio.StreamWriter | None = None

    def start_agent(self, spec: JobSpec) -> None:
        self.task = asyncio.create_task(self._run(spec.job_id))

    def end_agent(self, job_id: JobId, timeout_s: float) -> None:
        pass

    def say(self, message: Message) -> None:
        assert self.writer is not None
        self.writer.write(encode(message))

    async def _run(self, job_id: JobId) -> None:
        reader, self.writer = await asyncio.open_unix_connection(str(self.path))
        self.say({"type": "agent_hello", "job": job_id, "pid": 1})
        self.say({"type": "ready", "store_port": next(self.ports), "nproc": 1})
        with contextlib.closing(self.writer):
            while line := await reader.readline():
                message = decode(line)
                if message["type"] == "round":
                    self.rounds.append((time.monotonic(), message["round"]))
                    self.say({"type": "workers_started", "round": message["round"]["number"], "pids": []})
                    self.say({"type": "ready", "store_port": next(self.ports), "nproc": 1})
                elif message["type"] == "exit":
                    return


class Host:
    """A node loop and its agent."""

    def __init__(self, name: str, boot: str, endpoint: str, folder: Path, spec: JobSpec | None) -> None:
        node = Node(
            node_id=NodeId(name),
            boot_id=BootId(boot),
            host=name,
            address="127.0.0.1",
            peer_port=0,
            metrics_port=0,
            capacity=Capacity(cpu_count=1, memory_bytes=1),
        )
        self.setup = Setup(
            node=node,
            settings=Settings(fixed_job=spec, lease_ttl_s=2),
            links=LinkSettings(heartbeat_s=0.05, dead_after_s=0.4),
            socket_path=folder / f"{boot}.sock",
            history_file=str(folder / f"{boot}.jsonl"),
        )
        self.agent = Agent(self.setup.socket_path)
        self.loop = NodeLoop(self.setup, EtcdStore([endpoint]), self.agent, Silent())

    def seats(self) -> list[str]:
        return [s["node_id"] for s in self.agent.rounds[-1][1]["seats"]] if self.agent.rounds else []


async def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


SPEC = JobSpec(job_id=JobId("job"), min_nodes=1, max_nodes=3, command=("x",))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd.endpoint


@contextlib.asynccontextmanager
async def hosts(endpoint: str, folder: Path, names: str, spec: JobSpec) -> AsyncIterator[list[Host]]:
    made = [Host(name, f"{name}-{time.monotonic()}", endpoint, folder, spec) for name in names]
    try:
        for host in made:
            await host.loop.start()
        yield made
    finally:
        for host in made:
            await host.loop.close()


def job(name: str) -> JobSpec:
    return JobSpec(job_id=JobId(name), min_nodes=1, max_nodes=3, command=("x",))


def test_three_nodes_meet_and_outlive_one(endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "abc", job("meet")) as (a, b, c):
            await eventually(lambda: all(sorted(h.seats()) == ["a", "b", "c"] for h in (a, b, c)))
            first = a.agent.rounds[-1][1]
            await b.loop.close()
            died_at = time.monotonic()
            await eventually(lambda: all(sorted(h.seats()) == ["a", "c"] for h in (a, c)))
            assert a.agent.rounds[-1][0] - died_at < 1.0
            second = a.agent.rounds[-1][1]
            assert (second["store_address"], second["store_port"]) != (first["store_address"], first["store_port"])

    asyncio.run(scenario())


def test_a_job_succeeds_and_its_nodes_exit(endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "de", job("well")) as (d, e):
            await eventually(lambda: all(sorted(h.seats()) == ["d", "e"] for h in (d, e)))
            for host in (d, e):
                host.agent.say({"type": "workers_succeeded", "round": host.agent.rounds[-1][1]["number"]})
            assert [await asyncio.wait_for(h.loop.finished, 5) for h in (d, e)] == [0, 0]

    asyncio.run(scenario())


def test_a_failed_job_shows_its_first_error_everywhere(endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "fg", job("ill")) as (f, g):
            await eventually(lambda: all(sorted(h.seats()) == ["f", "g"] for h in (f, g)))
            failure = {"rank": 0, "local_rank": 0, "exit_code": 1, "message": "ValueError: no", "traceback": "..."}
            number = f.agent.rounds[-1][1]["number"]
            f.agent.say({"type": "workers_failed", "round": number, "failure": failure})
            assert [await asyncio.wait_for(h.loop.finished, 5) for h in (f, g)] == [1, 1]
            for host in (f, g):
                ended = host.loop.machine.ended
                assert ended is not None
                assert ended.failure is not None
                assert ended.failure.message == "ValueError: no"

    asyncio.run(scenario())


def test_a_second_daemon_of_the_same_id_is_refused(endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "h", job("twice")) as (first,):
            await eventually(lambda: first.seats() == ["h"])
            async with hosts(endpoint, tmp_path, "h", job("twice")) as (second,):
                with pytest.raises(DuplicateNode, match="node id 'h' is held by a live daemon"):
                    await asyncio.wait_for(second.loop.finished, 5)
            assert first.seats() == ["h"]

    asyncio.run(scenario())


def test_an_orderly_shutdown_leaves_the_job(endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "ij", job("leave")) as (i, j):
            await eventually(lambda: all(sorted(h.seats()) == ["i", "j"] for h in (i, j)))
            i.loop.post(ShutdownRequested())
            await eventually(lambda: j.seats() == ["j"])
            await asyncio.wait_for(i.loop.finished, 5)

    asyncio.run(scenario())


def test_what_workers_decide_about_their_shares_is_in_the_history(endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "l", job("shares")) as (node,):
            await eventually(lambda: node.seats() == ["l"])
            _, writer = await asyncio.open_unix_connection(str(node.setup.socket_path))
            number = node.agent.rounds[-1][1]["number"]
            writer.write(encode({"type": "worker_hello", "job": "shares", "round": number, "rank": 0}))
            said = {"step": 7, "shares": [6, 2], "reason": "rank 1 ended last", "before_s": 0.4, "after_s": 0.2}
            writer.write(encode({"type": "rebalanced", "round": number, **said}))
            await eventually(lambda: "rebalanced" in Path(node.setup.history_file).read_text())
            lines = [json.loads(line) for line in Path(node.setup.history_file).read_text().splitlines()]
            (found,) = [line for line in lines if line["event"] == "rebalanced"]
            assert {name: found[name] for name in said} == said
            assert (found["job"], found["round"]) == ("shares", number)
            writer.close()

    asyncio.run(scenario())


def test_how_much_of_a_step_workers_take_is_in_the_record_of_their_node(endpoint: str, tmp_path: Path) -> None:
    """And in what their speeds are judged by. Scripts that divide their batches themselves say nothing of it."""

    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "o", job("limits")) as (node,):
            await eventually(lambda: node.seats() == ["o"])
            number = node.agent.rounds[-1][1]["number"]
            hello = {"type": "worker_hello", "job": "limits", "round": number, "rank": 0}

            def recorded() -> StepLimits | None:
                return node.loop.machine.view.job(JobId("limits")).members[NodeId("o")].value.limits

            limits = {"micro_batches": 8, "cap": 9, "replica_size": 1}
            for said, expected in ((limits, StepLimits(micro_batches=8, caps=(9,))), ({}, None)):
                _, writer = await asyncio.open_unix_connection(str(node.setup.socket_path))
                writer.write(encode(hello | said))
                await eventually(lambda expected=expected: recorded() == expected)
                speeds = {"seconds": [0.1], "shares": [8], "balanced": True, "caps": [9], "weights": [2]}
                writer.write(encode({"type": "speeds", "round": number, **speeds}))
                speeds |= {"seconds": (0.1,), "shares": (8,), "caps": (9,), "weights": (2.0,)}
                await eventually(lambda: node.loop.machine.task.speeds._latest is not None)
                assert node.loop.machine.task.speeds._latest == Measured(**speeds)
                writer.close()

    asyncio.run(scenario())


def test_a_socket_of_a_living_daemon_is_not_taken(endpoint: str, tmp_path: Path) -> None:
    """Two files of one node id on one machine: the second daemon must not cut the first one off from its workers."""

    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "l", job("mine")) as (first,):
            await eventually(lambda: first.seats() == ["l"])
            other = Host("l", "other", endpoint, tmp_path, job("mine"))
            other.loop.setup = replace(other.setup, socket_path=first.setup.socket_path)
            with pytest.raises(OperatorError, match=r"a daemon listens at .* already"):
                await other.loop.start()
            await other.loop.close()
            _, writer = await asyncio.open_unix_connection(str(first.setup.socket_path))
            writer.close()
        assert first.setup.socket_path.exists()  # left behind, as by a daemon that was killed
        heir = LocalServer(NodeId("l"), lambda _event: None, lambda *_: None, first.loop, lambda *_: None)
        await heir.listen(first.setup.socket_path)
        await heir.close()

    asyncio.run(scenario())


def test_a_script_commits_for_its_own_job_alone(endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "m", job("own")) as (m,):
            await eventually(lambda: m.seats() == ["m"])
            number = m.agent.rounds[-1][1]["number"]
            for claimed, committed in (("own", True), ("foreign", False)):
                reader, writer = await asyncio.open_unix_connection(str(m.setup.socket_path))
                hello = {"type": "worker_hello", "job": claimed, "round": number, "rank": 0}
                commit = {"type": "commit", "round": number, "step": 1, "path": "p"}
                writer.write(encode(hello) + encode(commit))
                answer = decode(await asyncio.wait_for(reader.readline(), 5))
                assert (answer["type"], answer["committed"]) == ("commit_result", committed)
                writer.close()

    asyncio.run(scenario())


def test_a_script_hears_whether_its_round_stands(endpoint: str, tmp_path: Path) -> None:
    """The fence that is asked before a checkpoint becomes visible. etcd answers it, not what the node believes."""

    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "n", job("fenced")) as (n,):
            await eventually(lambda: n.seats() == ["n"])
            number = n.agent.rounds[-1][1]["number"]

            async def ask(claimed: str, round_number: int) -> bool | None:
                reader, writer = await asyncio.open_unix_connection(str(n.setup.socket_path))
                hello = {"type": "worker_hello", "job": claimed, "round": round_number, "rank": 0}
                writer.write(encode(hello) + encode({"type": "fence", "round": round_number, "id": 8}))
                answer = decode(await asyncio.wait_for(reader.readline(), 5))
                writer.close()
                assert (answer["type"], answer["id"]) == ("fence_result", 8)
                return answer["stands"]

            assert await ask("fenced", number) is True
            assert await ask("fenced", number - 1) is False
            assert await ask("foreign", number) is False
            # Written behind the node's back; asked before the watch can have told it, or after: no either way.
            EtcdStore([endpoint]).put(keys.round_(JobId("fenced")), "{}")
            assert await ask("fenced", number) is False

    asyncio.run(scenario())


def test_a_history_that_hangs_costs_no_heartbeat(endpoint: str, tmp_path: Path) -> None:
    """A pipe that is full stands for a disk or a mount that does not answer."""
    path = tmp_path / "a-hangs.jsonl"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(reader, b"\n")

    async def scenario() -> None:
        a = Host("a", "a-hangs", endpoint, tmp_path, job("hangs"))
        async with hosts(endpoint, tmp_path, "b", job("hangs")) as (b,):
            await a.loop.start()
            await eventually(lambda: all(sorted(h.seats()) == ["a", "b"] for h in (a, b)))
            await asyncio.sleep(3 * b.setup.links.dead_after_s)
            assert sorted(b.seats()) == ["a", "b"]
            os.set_blocking(reader, True)
            content = b""
            while b'"registered"' not in content:
                content += await asyncio.to_thread(os.read, reader, 65536)
            assert json.loads(content.split()[0])["event"] == "started"
            await a.loop.close()

    asyncio.run(scenario())
    os.close(reader)


def test_a_malformed_message_closes_only_its_connection(endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosts(endpoint, tmp_path, "k", job("noise")) as (k,):
            await eventually(lambda: k.seats() == ["k"])
            for noise in (b"nonsense\n", b'{"type":"ready"}\n', b'{"type":"worker_hello"}\n', b"x" * 300_000):
                reader, writer = await asyncio.open_unix_connection(str(k.setup.socket_path))
                writer.write(noise)
                with contextlib.suppress(ConnectionError), contextlib.closing(writer):
                    assert await reader.read() == b""
            assert oct(k.setup.socket_path.stat().st_mode & 0o777) == "0o600"
            assert not k.loop.finished.done()

    asyncio.run(scenario())
