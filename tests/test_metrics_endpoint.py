"""A real loop behind the real endpoint: what is scraped, health and discovery, whatever hangs or is away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import need
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from test_node_loop import Agent, eventually

from elasticd.channel import encode
from elasticd.cluster.embedded import EmbeddedEtcd
from elasticd.cluster.etcd import EtcdStore
from elasticd.cluster.peers import LinkSettings
from elasticd.config import DaemonConfig, MetricsConfig
from elasticd.core.machine import Settings
from elasticd.core.model import JobId, JobSpec, Topology
from elasticd.daemon.main import describe_node
from elasticd.daemon.node import NodeLoop, Setup
from elasticd.daemon.observer import MetricsService
from elasticd.metrics import definitions


def samples_of(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def fetch(port: int, path: str, accept: str = "") -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Accept": accept} if accept else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


class Host:
    """A node loop with its metrics, as daemon/main.py joins them; the agent and the workers are the test's."""

    def __init__(self, endpoint: str, folder: Path) -> None:
        config = DaemonConfig(
            node_id="m", address="127.0.0.1", topology=Topology(zone="z1", rack="r2"), metrics=MetricsConfig(port=0)
        )
        self.metrics = MetricsService(config)
        self.port = self.metrics.listen()
        node = describe_node(config, self.metrics.capacity)
        spec = JobSpec(job_id=JobId("job"), min_nodes=1, max_nodes=1, command=("x",))
        self.setup = Setup(
            node=replace(node, peer_port=0, metrics_port=self.port),
            settings=Settings(lease_ttl_s=2, fixed_job=spec),
            links=LinkSettings(heartbeat_s=0.05, dead_after_s=0.4),
            socket_path=folder / "m.sock",
        )
        self.agent = Agent(self.setup.socket_path)
        self.loop = NodeLoop(self.setup, EtcdStore([endpoint]), self.agent, self.metrics)

    async def get(self, path: str, accept: str = "") -> tuple[int, str]:
        return await asyncio.get_running_loop().run_in_executor(None, fetch, self.port, path, accept)

    def metrics_of_job(self, name: str) -> float | None:
        families = self.metrics._tracker.families(self.loop.machine)
        return next((s.value for family in families for s in family.samples if s.name == name), None)

    async def worker(self, rank: int) -> Callable[..., None]:
        """A training process: the function that it reports steps with."""
        _, writer = await asyncio.open_unix_connection(str(self.setup.socket_path))
        number = self.agent.rounds[-1][1]["number"]
        writer.write(encode({"type": "worker_hello", "job": "job", "round": number, "rank": rank}))

        def report(**message: Any) -> None:
            writer.write(encode({"type": "step", "round": number, "step": 1, "seconds": 0.1, **message}))

        return report


@contextlib.asynccontextmanager
async def host(endpoint: str, folder: Path) -> AsyncIterator[Host]:
    made = Host(endpoint, folder)
    try:
        await made.loop.start()
        made.metrics.attach(made.loop)
        await eventually(lambda: bool(made.agent.rounds))
        yield made
    finally:
        await made.loop.close()
        made.metrics.close()


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with EmbeddedEtcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


def test_a_node_is_scraped_while_its_job_runs(etcd: EmbeddedEtcd, tmp_path: Path) -> None:
    async def scenario() -> str:
        async with host(etcd.endpoint, tmp_path) as node:
            report = await node.worker(rank=0)
            report(step=3, metrics={"loss": 2.5})
            await eventually(lambda: node.metrics_of_job("elasticd_job_step") == 3)
            status, text = await node.get("/metrics")
            assert status == 200
            _, newer = await node.get("/metrics", "application/openmetrics-text;version=1.0.0")
            assert newer.endswith("# EOF\n")
            assert {f.name for f in openmetrics.text_string_to_metric_families(newer)} >= {"elasticd_rank_steps"}
            assert json.loads((await node.get("/healthz"))[1])["job_id"] == "job"
            return text

    text = asyncio.run(scenario())
    seen = samples_of(text)
    assert seen["elasticd_store_up", ()] == 1
    assert 0 <= seen["elasticd_store_last_answer_age_seconds", ()] < 5
    assert seen["elasticd_node_cpus", ()] > 0
    assert seen["elasticd_node_memory_bytes", ()] == psutil.virtual_memory().total
    assert seen["elasticd_process_start_time_seconds", ()] == pytest.approx(psutil.Process().create_time(), abs=1)
    assert seen["elasticd_node_network_received_bytes_total", (("interface", "lo"),)] > 0
    defined = {definition.name for definition in definitions.ALL}
    exposed_names = {name for name, _ in seen}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed_names} <= defined
    check_with_promtool(text)


def check_with_promtool(text: str) -> None:
    need("" if shutil.which("promtool") else "promtool not found: apt install prometheus")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_a_script_sends_hurts_nobody_and_is_said_once(
    etcd: EmbeddedEtcd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with host(etcd.endpoint, tmp_path) as node:
            report = await node.worker(rank=0)
            for wrong in ({"wait_seconds": "soon"}, {"metrics": {"loss": [1]}}, {"samples": -1}):
                report(**wrong)
            report(step=7)
            await eventually(lambda: node.metrics_of_job("elasticd_job_step") == 7)

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    said = [record.getMessage() for record in caplog.records if record.name == "elasticd.daemon.observer"]
    assert said == ["metrics: step is not counted (said once)"]


def test_health_and_discovery_while_etcd_is_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        with EmbeddedEtcd(tmp_path / "etcd") as etcd:
            async with host(etcd.endpoint, tmp_path) as node:
                await eventually(lambda: node.loop.keeper.reachable)
                assert json.loads((await node.get("/healthz"))[1])["store"] == "up"
                before = json.loads((await node.get("/sd"))[1])
                assert [group["targets"] for group in before] == [[f"127.0.0.1:{node.port}"]]
                assert {k: before[0]["labels"][k] for k in ("node", "zone", "rack")} == {
                    "node": "m", "zone": "z1", "rack": "r2"}  # fmt: skip
                await asyncio.get_running_loop().run_in_executor(None, etcd.stop)
                await eventually(lambda: not node.loop.keeper.reachable, 20)
                status, text = await node.get("/healthz")
                assert status == 200
                assert json.loads(text)["store"].startswith("away")
                assert json.loads((await node.get("/sd"))[1]) == before
                assert samples_of((await node.get("/metrics"))[1])["elasticd_store_up", ()] == 0

    asyncio.run(scenario())


def test_a_daemon_that_hangs_or_has_not_started_is_not_healthy(etcd: EmbeddedEtcd, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with host(etcd.endpoint, tmp_path) as node:
            with ThreadPoolExecutor() as pool:  # waited for in the loop's thread: it hangs for as long as they ask
                asked = [pool.submit(fetch, node.port, path) for path in ("/healthz", "/sd", "/metrics")]
                (health_status, health_text), (sd_status, _), (metrics_status, text) = [one.result() for one in asked]
            assert (health_status, json.loads(health_text)["reason"]) == (503, "the daemon's loop does not answer")
            assert sd_status == 503
            assert metrics_status == 200
            assert ("elasticd_node_cpus", ()) in samples_of(text)
            assert ("elasticd_registered", ()) not in samples_of(text)

    asyncio.run(scenario())
    idle = MetricsService(DaemonConfig(node_id="m", address="127.0.0.1", metrics=MetricsConfig(port=0)))
    port = idle.listen()
    assert [fetch(port, path)[0] for path in ("/healthz", "/sd", "/metrics")] == [503, 503, 200]
    idle.close()
