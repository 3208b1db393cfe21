"""A link that wakes nobody while it lives: what is read, when its silence is known, and how exactly, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from elasticd.cluster import connection
from elasticd.cluster.connection import UNREAD_BYTES, Connection
from elasticd.cluster.peers import LinkSettings, PeerLinks
from elasticd.config import LinksConfig
from elasticd.core.messages import Down, PeerAddress, PeerDown, PeerUp
from elasticd.core.model import BootId, NodeId

FAST = LinkSettings(heartbeat_s=0.05, dead_after_s=0.4)
#: Nobody listens there, so whose link ends is refused at once.
CALLER = PeerAddress(node_id=NodeId("a"), boot_id=BootId("a-boot"), address="127.0.0.1", port=9)
#: As fine as the kernel keeps the time (10 ms), and a busy machine.
FINE_S = 0.03
#: When a silence must be known, since the last heartbeat.
EARLIEST_S, LATEST_S = FAST.dead_after_s - FAST.heartbeat_s, FAST.dead_after_s + 3 * FAST.heartbeat_s


@pytest.fixture(params=["plain", "tls"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> LinkSettings:
    if request.param == "plain":
        return FAST
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=n", "-days", "1")
    subprocess.run(["openssl", "req", "-x509", *made, "-keyout", key, "-out", cert], check=True, capture_output=True)
    contexts = LinksConfig(ca=cert, cert=cert, key=key).contexts()
    assert contexts is not None
    return replace(FAST, server_tls=contexts[0], client_tls=contexts[1])


@dataclass(kw_only=True)
class Caller:
    """The other end of a link, in the test's hands."""

    writer: asyncio.StreamWriter
    heard: list[tuple[float, PeerUp | PeerDown]] = field(default_factory=list)

    async def beat(self, times: int, every_s: float) -> float:
        """Returns when the last heartbeat was sent."""
        for _ in range(times - 1):
            self.writer.write(b".")
            await asyncio.sleep(every_s)
        self.writer.write(b".")
        return time.monotonic()

    @property
    def events(self) -> list[PeerUp | PeerDown]:
        return [event for _, event in self.heard]

    async def down(self) -> tuple[float, PeerDown]:
        await eventually(lambda: isinstance(self.heard[-1][1], PeerDown))
        at, event = self.heard[-1]
        assert isinstance(event, PeerDown)
        return at, event


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def called(settings: LinkSettings) -> AsyncIterator[tuple[PeerLinks, Caller]]:
    """A node that watches one other, and that other, which has said who it is and sent one heartbeat."""
    heard: list[tuple[float, PeerUp | PeerDown]] = []
    links = PeerLinks(NodeId("b"), BootId("b-boot"), settings, lambda event: heard.append((time.monotonic(), event)))
    port = await links.listen("127.0.0.1", 0)
    links.watch(frozenset([CALLER]))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=settings.client_tls)
    try:
        writer.write(b'{"node":"a","boot":"a-boot","protocol":1}\n')
        assert b'"b-boot"' in await reader.readline()
        writer.write(b".")
        await eventually(lambda: bool(heard))
        yield links, Caller(writer=writer, heard=heard)
    finally:
        writer.transport.abort()
        await links.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much was read each time that something was."""
    sizes: list[int] = []
    received = Connection.data_received

    def count(self: Connection, data: bytes) -> None:
        sizes.append(len(data))
        received(self, data)

    monkeypatch.setattr(Connection, "data_received", count)
    return sizes


def test_heartbeats_wake_nobody_and_keep_the_link_up(settings: LinkSettings, reads: list[int]) -> None:
    async def scenario() -> None:
        async with called(settings) as (_, caller):
            await caller.beat(20, 0.01)  # by now the kernel was seen to keep the time
            before = len(reads)
            await caller.beat(200, 0.005)
            # 200 bytes; as TLS records, 22 and more of them each
            records = 200 * (22 if settings.client_tls else 1)
            assert len(reads) - before <= records / UNREAD_BYTES + 2
            assert [type(event) for event in caller.events] == [PeerUp]

    asyncio.run(scenario())


def test_silence_counts_from_the_last_heartbeat_that_nobody_read(settings: LinkSettings) -> None:
    async def scenario() -> None:
        async with called(settings) as (_, caller):
            last_at = await caller.beat(10, 0.1)
            at, event = await caller.down()
            assert event.how is Down.SILENT
            assert EARLIEST_S < at - last_at < LATEST_S

    asyncio.run(scenario())


def test_a_reset_is_known_at_once_with_its_time(settings: LinkSettings) -> None:
    """What a killed process leaves unread makes its kernel reset the link, and not end it."""

    async def scenario() -> None:
        async with called(settings) as (_, caller):
            last_at = await caller.beat(20, FAST.heartbeat_s)
            await asyncio.sleep(1.5 * FAST.heartbeat_s)
            caller.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            caller.writer.transport.abort()
            reset_at = time.monotonic()
            at, event = await caller.down()
            assert event.how is Down.REFUSED
            assert at - reset_at < FAST.dead_after_s / 2  # evidence, not silence
            assert event.silence_s == pytest.approx(at - last_at, abs=FINE_S)

    asyncio.run(scenario())


def test_an_end_that_nobody_has_heard_of_yet_can_be_looked_at(settings: LinkSettings) -> None:
    """Over TLS the socket is closed a turn of the loop earlier; an error then would end all heartbeats."""

    async def scenario() -> None:
        async with called(settings) as (links, _):
            (one,) = links._live
            one.drop()
            for _ in range(5):
                one.look()
                await asyncio.sleep(0)
            assert one.ended.done()

    asyncio.run(scenario())


def test_where_the_kernel_keeps_no_time_each_heartbeat_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in gVisor, whose account is 0 always: here by another field of it, which is 0 on a line without loss."""
    monkeypatch.setattr(connection, "_LAST_RECEIVED", struct.Struct("=28xI"))

    async def scenario() -> None:
        async with called(FAST) as (_, caller):
            last_at = await caller.beat(20, FAST.heartbeat_s)
            assert [type(event) for event in caller.events] == [PeerUp]
            at, event = await caller.down()
            assert event.how is Down.SILENT
            assert EARLIEST_S < at - last_at < LATEST_S

    asyncio.run(scenario())


def test_who_has_no_links_does_not_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[float] = []
    beat = PeerLinks._beat

    def count(self: PeerLinks) -> None:
        beats.append(time.monotonic())
        beat(self)

    monkeypatch.setattr(PeerLinks, "_beat", count)

    async def quiet() -> bool:
        before = len(beats)
        await asyncio.sleep(6 * FAST.heartbeat_s)
        return len(beats) == before

    async def scenario() -> None:
        alone = PeerLinks(NodeId("b"), BootId("b-boot"), FAST, lambda _: None)
        await alone.listen("127.0.0.1", 0)
        assert await quiet()
        await alone.close()
        async with called(FAST) as (links, _):
            assert not await quiet()
            links.watch(frozenset())
            await asyncio.sleep(2 * FAST.heartbeat_s)  # one more may be on its way
            assert await quiet()

    asyncio.run(scenario())
