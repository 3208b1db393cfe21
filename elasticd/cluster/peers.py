"""Links between daemons: a dead process is known in milliseconds, a silent one within the deadline.

One TCP connection a pair, dialled by the smaller node id; both sides say who they are, then send a byte every
heartbeat. End-of-file means nothing until one immediate reconnect was refused (measured: the kernel of a killed
process sends it within 1 ms). Nothing but the hello is ever parsed.

Not here: what a dead peer means (core/membership.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from elasticd.cluster.connection import LINE_LIMIT_BYTES, Connection
from elasticd.core.messages import Down, PeerAddress, PeerDown, PeerUp
from elasticd.core.model import PROTOCOL_VERSION, BootId, NodeId
from elasticd.errors import OperatorError

#: An unknown caller may be a peer whose record has not reached us yet.
STRANGER_PATIENCE_S = 5.0
MAX_BACKOFF_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """``server_tls`` and ``client_tls`` are both None (plain text) or both set (mutual TLS)."""

    heartbeat_s: float = 0.1
    dead_after_s: float = 0.5
    server_tls: ssl.SSLContext | None = None
    client_tls: ssl.SSLContext | None = None


class PeerLinks:
    """Holds links to the watched peers; calls ``post`` with PeerUp and PeerDown on changes only."""

    def __init__(
        self, me: NodeId, boot_id: BootId, settings: LinkSettings, post: Callable[[PeerUp | PeerDown], None]
    ) -> None:
        self._me, self._boot_id, self._settings, self._post = me, boot_id, settings, post
        self._tasks: dict[PeerAddress, asyncio.Task[None]] = {}
        self._incoming: dict[PeerAddress, asyncio.Queue[Connection]] = {}
        self._live: set[Connection] = set()
        self._said: dict[PeerAddress, Down | None] = {}
        self._heard_at: dict[PeerAddress, float] = {}
        self._server: asyncio.Server | None = None
        self._next_beat: asyncio.TimerHandle | None = None
        self._beat_at = 0.0
        self._callers: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def listen(self, address: str, port: int) -> int:
        """Returns the port. OperatorError when it is in use."""
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: Connection(self._opened), address, port, ssl=self._settings.server_tls
            )
        except OSError as error:
            raise OperatorError(
                f"cannot listen for other daemons on {address}:{port}: {error.strerror}; "
                "set node.address and node.peer_port"
            ) from error
        return int(self._server.sockets[0].getsockname()[1])

    def watch(self, peers: frozenset[PeerAddress]) -> None:
        """Hold links to exactly these."""
        for gone in set(self._tasks) - peers:
            self._tasks.pop(gone).cancel()
            self._incoming.pop(gone, None)
            self._said.pop(gone, None)
            self._heard_at.pop(gone, None)
        for peer in peers - set(self._tasks):
            self._incoming[peer] = asyncio.Queue()
            keep = self._dial_and_keep if self._me < peer.node_id else self._await_and_keep
            self._tasks[peer] = asyncio.create_task(keep(peer))
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        if self._next_beat is not None:
            self._next_beat.cancel()
        tasks = [*self._tasks.values(), *self._callers]
        for task in tasks:
            task.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self._live):
            self._drop(connection)
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- the side that dials ---

    async def _dial_and_keep(self, peer: PeerAddress) -> None:
        backoff_s = 0.05
        while True:
            how = await self._dial_once(peer)
            if how is None:
                backoff_s = 0.05
                continue  # it was up and ended: one immediate reconnect tells why
            self._say(peer, how)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _dial_once(self, peer: PeerAddress) -> Down | None:
        """None when the link was up and then ended by end-of-file; otherwise how it is down."""
        connection = await self._open(peer)
        if isinstance(connection, Down):
            return connection
        try:
            if not await self._greeted(connection, peer):
                return Down.REFUSED
            return Down.SILENT if await self._until_end(connection, peer) else None
        finally:
            self._drop(connection)

    async def _open(self, peer: PeerAddress) -> Connection | Down:
        try:
            async with asyncio.timeout(self._settings.dead_after_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, peer.address, peer.port, ssl=self._settings.client_tls
                )
        except ConnectionRefusedError:
            return Down.REFUSED
        except (OSError, TimeoutError):
            return Down.SILENT
        return connection

    async def _greeted(self, connection: Connection, peer: PeerAddress) -> bool:
        """Whether the other end is the very life of the node that was meant."""
        who = await self._exchange(connection)
        return who == (peer.node_id, peer.boot_id)

    # --- the side that is dialled ---

    async def _await_and_keep(self, peer: PeerAddress) -> None:
        patience_s = 2 * self._settings.dead_after_s
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    connection = await self._incoming[peer].get()
            except TimeoutError:
                self._say(peer, await self._why_silent(peer))
                patience_s = MAX_BACKOFF_S
                continue
            try:
                silent = await self._until_end(connection, peer)
            finally:  # also when it is not watched any more: the other end must see the end, and not a silence
                self._drop(connection)
            patience_s = self._settings.dead_after_s
            how = Down.SILENT if silent else await self._why_ended(peer)
            if how is not None and self._incoming[peer].empty():
                self._say(peer, how)

    async def _why_ended(self, peer: PeerAddress) -> Down | None:
        """After end-of-file: refused means dead; otherwise the dialler has a moment to come back."""
        probe = await self._open(peer)
        if isinstance(probe, Down):
            return probe
        try:
            return None if await self._greeted(probe, peer) else Down.REFUSED
        finally:
            self._drop(probe)

    async def _why_silent(self, peer: PeerAddress) -> Down:
        return await self._why_ended(peer) or Down.SILENT

    def _opened(self, connection: Connection) -> None:
        task = asyncio.create_task(self._accept(connection))
        self._callers.add(task)
        task.add_done_callback(self._callers.discard)

    async def _accept(self, connection: Connection) -> None:
        try:
            peer = await self._admit(connection)
            if peer is None:
                self._drop(connection)
            else:
                self._incoming[peer].put_nowait(connection)
        except asyncio.CancelledError:
            self._drop(connection)

    async def _admit(self, connection: Connection) -> PeerAddress | None:
        """The watched peer that calls, once its record has reached us; None for strangers and probes."""
        who = await self._exchange(connection)
        if who is None:
            return None
        deadline = time.monotonic() + STRANGER_PATIENCE_S
        while time.monotonic() < deadline and not connection.ended.done():
            for peer in self._incoming:
                if who == (peer.node_id, peer.boot_id):
                    return peer if self._me > peer.node_id else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.5)
        return None

    # --- both sides ---

    async def _exchange(self, connection: Connection) -> tuple[str, str] | None:
        """Say who we are and hear who they are; None when they are not of our kind."""
        hello = {"node": self._me, "boot": self._boot_id, "protocol": PROTOCOL_VERSION}
        try:
            connection.send(json.dumps(hello).encode() + b"\n")
            async with asyncio.timeout(2 * self._settings.dead_after_s):
                theirs = json.loads(await connection.line)
            if theirs.get("protocol") != PROTOCOL_VERSION:
                return None
            return str(theirs["node"]), str(theirs["boot"])
        except (TimeoutError, ValueError, KeyError, AttributeError):
            return None

    async def _until_end(self, connection: Connection, peer: PeerAddress) -> bool:
        """Waits until the link ends. True when it fell silent, False at end-of-file.

        It counts as up from the first heartbeat that is heard, and not from the hello: a caller that has given up
        meanwhile leaves a connection behind on which a hello still arrives.
        """
        connection.heard_at = time.monotonic()
        self._live.add(connection)
        if self._next_beat is None:
            self._beat_at = connection.heard_at
            self._beat_later()
        try:
            connection.send(b".")
            if await connection.alive:
                self._say(peer, None)
            await connection.ended
        finally:
            self._live.discard(connection)
        self._heard_at[peer] = connection.heard_at
        return connection.silent

    def _beat_later(self) -> None:
        self._next_beat = asyncio.get_running_loop().call_later(self._settings.heartbeat_s, self._beat)

    def _beat(self) -> None:
        """Sends a byte on every link, and ends those that fell silent; not again while there is none."""
        now = time.monotonic()
        paused = now - self._beat_at > self._settings.dead_after_s / 2
        self._beat_at, self._next_beat = now, None
        for connection in self._live:
            connection.look()
            if paused:  # we were stopped ourselves: what the others sent meanwhile may be still to come
                connection.heard_at = now
            elif now - connection.heard_at > self._settings.dead_after_s - self._settings.heartbeat_s / 2:
                connection.silent = True
                connection.drop()
                continue
            connection.send(b".")
        if self._live:
            self._beat_later()

    def _say(self, peer: PeerAddress, down: Down | None) -> None:
        if peer in self._said and self._said[peer] == down:
            return
        if peer in self._said and self._said[peer] is not None and down is not None:
            return  # down is down: the first evidence stands
        self._said[peer] = down
        if down is None:
            self._post(PeerUp(node_id=peer.node_id, boot_id=peer.boot_id))
        else:
            silence_s = time.monotonic() - self._heard_at[peer] if peer in self._heard_at else None
            self._post(PeerDown(node_id=peer.node_id, boot_id=peer.boot_id, how=down, silence_s=silence_s))

    def _drop(self, connection: Connection) -> None:
        self._live.discard(connection)
        connection.drop()


def probe(address: str, port: int, timeout_s: float, tls: ssl.SSLContext | None = None) -> BootId | Down:
    """Who listens there now (blocking): the boot id of a daemon, or how it does not answer."""
    try:
        with socket.create_connection((address, port), timeout_s) as raw:
            connection = tls.wrap_socket(raw, server_hostname=address) if tls else raw
            connection.settimeout(timeout_s)
            with connection, connection.makefile("rb") as stream:
                line = stream.readline(LINE_LIMIT_BYTES)
        return BootId(str(json.loads(line)["boot"]))
    except ConnectionRefusedError:
        return Down.REFUSED
    except (OSError, ValueError, KeyError, TypeError):
        return Down.SILENT
