"""Links between daemons over real sockets: how fast, and by what evidence, the end of a peer is known."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable

import pytest

from elasticd.cluster.peers import LinkSettings, PeerLinks, probe
from elasticd.core.messages import Down, PeerAddress, PeerDown, PeerUp
from elasticd.core.model import BootId, NodeId
from elasticd.errors import OperatorError

FAST = LinkSettings(heartbeat_s=0.05, dead_after_s=0.4)

CHILD = """
import asyncio, sys
from elasticd.cluster.peers import LinkSettings, PeerLinks
from elasticd.core.messages import PeerAddress
async def main(me, other, port):
    links = PeerLinks(me, me + "-boot", LinkSettings(heartbeat_s=0.05, dead_after_s=0.4), lambda e: print(e, flush=True))
    mine = await links.listen("127.0.0.1", 0)
    print(mine, flush=True)
    links.watch(frozenset([PeerAddress(node_id=other, boot_id=other + "-boot", address="127.0.0.1", port=port)]))
    await asyncio.sleep(60)
asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


class Node:
    """One end in this process, and what it heard."""

    def __init__(self, name: str, boot: str = "") -> None:
        self.heard: list[tuple[float, PeerUp | PeerDown]] = []
        self.name = name
        self.boot = BootId(boot or f"{name}-boot")
        self.links = PeerLinks(NodeId(name), self.boot, FAST, self._hear)

    def _hear(self, event: PeerUp | PeerDown) -> None:
        self.heard.append((time.monotonic(), event))

    async def listen(self) -> PeerAddress:
        port = await self.links.listen("127.0.0.1", 0)
        return PeerAddress(node_id=NodeId(self.name), boot_id=self.boot, address="127.0.0.1", port=port)

    @property
    def last(self) -> PeerUp | PeerDown | None:
        return self.heard[-1][1] if self.heard else None


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def pair(other: str) -> AsyncIterator[tuple[Node, subprocess.Popen[str]]]:
    """A node here, and one in a process of its own, linked. ``other`` decides which side dials."""
    here = Node("m")
    address = await here.listen()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, other, "m", str(address.port)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        port = int(await asyncio.get_running_loop().run_in_executor(None, child.stdout.readline))
        peer = PeerAddress(node_id=NodeId(other), boot_id=BootId(f"{other}-boot"), address="127.0.0.1", port=port)
        here.links.watch(frozenset([peer]))
        await eventually(lambda: isinstance(here.last, PeerUp))
        yield here, child
    finally:
        child.kill()
        child.wait()
        await here.links.close()


@pytest.mark.parametrize("other", ["a", "z"])
def test_a_killed_peer_is_known_at_once(other: str) -> None:
    async def scenario() -> None:
        async with pair(other) as (here, child):
            child.kill()
            killed_at = time.monotonic()
            await eventually(lambda: isinstance(here.last, PeerDown))
            at, event = here.heard[-1]
            assert isinstance(event, PeerDown)
            assert event.how is Down.REFUSED
            assert at - killed_at < FAST.dead_after_s  # evidence, not silence
            assert event.silence_s is not None
            assert event.silence_s < FAST.dead_after_s

    asyncio.run(scenario())


@pytest.mark.parametrize("other", ["a", "z"])
def test_a_stopped_peer_is_known_by_its_silence_and_comes_back(other: str) -> None:
    async def scenario() -> None:
        async with pair(other) as (here, child):
            child.send_signal(19)
            await eventually(lambda: isinstance(here.last, PeerDown))
            event = here.last
            assert isinstance(event, PeerDown)
            assert event.how is Down.SILENT
            assert event.silence_s is not None
            assert event.silence_s >= FAST.dead_after_s - FAST.heartbeat_s
            child.send_signal(18)
            await eventually(lambda: isinstance(here.last, PeerUp))

    asyncio.run(scenario())


def test_a_hello_that_nobody_stands_behind_is_no_link() -> None:
    """What a caller leaves behind that has given up: a link is up from the first heartbeat on."""

    async def scenario() -> None:
        b = Node("b")
        address = await b.listen()
        nobody = PeerAddress(node_id=NodeId("a"), boot_id=BootId("a-boot"), address="127.0.0.1", port=9)
        b.links.watch(frozenset([nobody]))
        reader, writer = await asyncio.open_connection(address.address, address.port)
        writer.write(b'{"node":"a","boot":"a-boot","protocol":1}\n')
        assert b'"b-boot"' in await reader.readline()
        assert await reader.read(1) == b"."  # b believes it, and says so with a heartbeat; nobody answers
        writer.transport.abort()
        await eventually(lambda: isinstance(b.last, PeerDown))
        assert not any(isinstance(event, PeerUp) for _, event in b.heard)
        await b.links.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("dropper", ["a", "b"])
def test_who_is_not_watched_any_more_sees_the_end_of_the_link(dropper: str) -> None:
    """And not a silence: that would be held against the one that only looked away."""

    async def scenario() -> None:
        a, b = Node("a"), Node("b")
        at_a, at_b = await a.listen(), await b.listen()
        a.links.watch(frozenset([at_b]))
        b.links.watch(frozenset([at_a]))
        await eventually(lambda: isinstance(a.last, PeerUp) and isinstance(b.last, PeerUp))
        looks_away, other = (a, at_b) if dropper == "a" else (b, at_a)
        stays = b if dropper == "a" else a
        looks_away.links.watch(frozenset())
        looks_away.links.watch(frozenset([other]))
        until = time.monotonic() + 2 * FAST.dead_after_s
        await eventually(lambda: time.monotonic() > until)
        assert stays.last == PeerUp(node_id=NodeId(looks_away.name), boot_id=looks_away.boot)
        assert looks_away.heard[-1][1] == PeerUp(node_id=NodeId(stays.name), boot_id=stays.boot)
        assert not any(isinstance(event, PeerDown) for _, event in stays.heard)
        await a.links.close()
        await b.links.close()

    asyncio.run(scenario())


def test_another_life_of_the_node_is_not_the_peer() -> None:
    async def scenario() -> None:
        a, b = Node("a"), Node("b", boot="second")
        await a.listen()
        address = await b.listen()
        old = PeerAddress(node_id=NodeId("b"), boot_id=BootId("first"), address=address.address, port=address.port)
        a.links.watch(frozenset([old]))
        await eventually(lambda: isinstance(a.last, PeerDown))
        assert a.last == PeerDown(node_id=NodeId("b"), boot_id=BootId("first"), how=Down.REFUSED)
        await a.links.close()
        await b.links.close()

    asyncio.run(scenario())


def test_who_never_answered_is_down() -> None:
    async def scenario() -> None:
        z = Node("z")
        await z.listen()
        z.links.watch(frozenset([PeerAddress(node_id=NodeId("a"), boot_id=BootId("x"), address="127.0.0.1", port=9)]))
        await eventually(lambda: isinstance(z.last, PeerDown))
        await z.links.close()

    asyncio.run(scenario())


def test_noise_from_strangers_hurts_nobody() -> None:
    async def scenario() -> None:
        a, b = Node("a"), Node("b")
        at_a, at_b = await a.listen(), await b.listen()
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04pickle\n", b"x" * 200_000, b"{}\n", b'{"node":1}\n'):
            _, writer = await asyncio.open_connection(at_b.address, at_b.port)
            writer.write(noise)
            writer.close()
        a.links.watch(frozenset([at_b]))
        b.links.watch(frozenset([at_a]))
        await eventually(lambda: isinstance(a.last, PeerUp) and isinstance(b.last, PeerUp))
        await a.links.close()
        await b.links.close()

    asyncio.run(scenario())


def test_a_port_in_use_is_one_clear_line() -> None:
    async def scenario() -> None:
        a, b = Node("a"), Node("b")
        address = await a.listen()
        with pytest.raises(OperatorError, match=f"127.0.0.1:{address.port}"):
            await b.links.listen("127.0.0.1", address.port)
        await a.links.close()

    asyncio.run(scenario())


def test_a_probe_tells_who_lives_there() -> None:
    async def scenario() -> None:
        a = Node("a")
        address = await a.listen()
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, probe, address.address, address.port, 1.0) == "a-boot"
        await a.links.close()
        assert await loop.run_in_executor(None, probe, address.address, address.port, 1.0) is Down.REFUSED

    asyncio.run(scenario())
