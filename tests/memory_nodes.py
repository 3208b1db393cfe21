"""Daemons as far as copies in RAM go, several in one process: real sockets, real shared memory, no etcd and no agents."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any

from elasticd.cluster.peers import LinkSettings
from elasticd.core.memory import Generation
from elasticd.core.messages import Event
from elasticd.core.model import BootId, JobId, NodeId, Seat, Topology
from elasticd.daemon.local import Caller, LocalServer
from elasticd.daemon.memory_copies import Place
from elasticd.daemon.memory_files import MemorySettings
from elasticd.daemon.memory_service import MemoryService, World

JOB = JobId("j")
LIMIT_BYTES = 512 * 1024**2


def generation(step: int, round_number: int = 1) -> Generation:
    return Generation(step=step, round_number=round_number)


class _NoFence:
    """Every round stands: what is saved to disk is committed."""

    def commit(self, caller: Caller, round_number: int, step: int, path: str) -> None:
        caller.send({"type": "commit_result", "step": step, "committed": True})

    def confirm(self, caller: Caller, round_number: int, question: int) -> None:
        caller.send({"type": "fence_result", "id": question, "stands": True})


class MemoryNode:
    """One node. Made and closed in the loop's thread."""

    def __init__(self, nodes: MemoryNodes, name: str, zone: str) -> None:
        self.name, self.topology = NodeId(name), Topology(zone=zone)
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.observed: list[dict[str, Any]] = []
        self.posted: list[Event] = []
        settings = MemorySettings(folder=str(nodes.memory), limit_bytes=nodes.limit_bytes)
        self.service = MemoryService(
            settings,
            self.name,
            nodes.links,
            world=nodes.world,
            tell=lambda event, about: self.told.append((event, dict(about))),
        )
        self.place = Place(node_id=self.name, address="127.0.0.1", port=self.service.listen("127.0.0.1", 0))
        self.local = LocalServer(
            self.name,
            self.posted.append,
            lambda _, message: self.observed.append(dict(message)),
            _NoFence(),
            lambda *_: None,
            self.service,
        )
        self.socket = nodes.folder / f"{name}.sock"

    def events(self, name: str) -> list[dict[str, Any]]:
        return [about for event, about in list(self.told) if event == name]


class MemoryNodes:
    """``zones``: of each node; nodes are called n0, n1, ... A node that is killed holds nothing and answers nobody."""

    def __init__(self, *zones: str, limit_bytes: int = LIMIT_BYTES, links: LinkSettings | None = None) -> None:
        self._zones, self.limit_bytes, self.links = zones, limit_bytes, links or LinkSettings()
        self.folder = Path(tempfile.mkdtemp(prefix="edm-"))
        self.memory = Path(tempfile.mkdtemp(prefix="edm-", dir="/dev/shm"))
        self.nodes: dict[str, MemoryNode] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> MemoryNodes:
        self._thread.start()
        for number, zone in enumerate(self._zones):
            self.start(f"n{number}", zone)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for name in list(self.nodes):
            self.kill(name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        left = list(self.memory.rglob("*"))
        shutil.rmtree(self.memory)
        shutil.rmtree(self.folder)
        assert left == [], "a daemon that stopped left something in shared memory"

    def start(self, name: str, zone: str = "") -> None:
        async def start() -> None:
            node = MemoryNode(self, name, zone)
            await node.local.listen(node.socket)
            self.nodes[name] = node

        self.call(start())
        self.enter_round()

    def kill(self, name: str) -> None:
        async def stop() -> None:
            node = self.nodes.pop(name)
            await node.local.close()
            await node.service.close()

        self.call(stop())

    def enter_round(self) -> None:
        """As a daemon does when a round begins."""

        async def enter() -> None:
            for node in self.nodes.values():
                node.service.enter_round(JOB, "")

        self.call(enter())

    def end_job(self) -> None:
        """As a daemon does when its node leaves the job."""

        async def end() -> None:
            for node in self.nodes.values():
                node.service.end_job()

        self.call(end())

    def world(self) -> World:
        seats = tuple(
            Seat(
                node_id=node.name,
                boot_id=BootId("b"),
                address="127.0.0.1",
                group_rank=number,
                first_rank=number,
                nproc=1,
                topology=node.topology,
            )
            for number, node in enumerate(self.nodes.values())
        )
        return World(seats=seats, places={node.name: node.place for node in self.nodes.values()})

    def environment(self, round_number: int) -> dict[str, str]:
        """For a world of ranks; each finds its node's socket by ``join_node``."""
        return {"ELASTICD_JOB_ID": JOB, "ELASTICD_ROUND": str(round_number), "MEMORY_NODES": str(self.folder)}

    def tell_workers(self, round_number: int, message: dict[str, Any]) -> None:
        """As a daemon tells its own."""

        async def tell() -> None:
            for node in self.nodes.values():
                node.local.tell_workers(round_number, message)

        self.call(tell())

    def call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)
