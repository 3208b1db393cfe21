"""The RAM tier's place in the daemon: workers ask over the local socket, threads do the work, the loop never waits.

Requests of workers are carried out in order by one thread; copies to and from other nodes by a few others. Not here:
the files (memory.py), what daemons say to each other (memory_copies.py), what a worker does with it (checkpoint/).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pwd
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from elasticd.channel import Message
from elasticd.cluster.memory_link import DataServer
from elasticd.cluster.peers import LinkSettings
from elasticd.core.buddies import Apart, Buddy, rank_buddies
from elasticd.core.memory import Generation
from elasticd.core.model import JobId, NodeId, Seat
from elasticd.core.records import to_plain
from elasticd.daemon.local import Caller
from elasticd.daemon.memory import Held, MemoryStore
from elasticd.daemon.memory_copies import Copies, Place, Sent, Wanted
from elasticd.daemon.memory_files import MemorySettings
from elasticd.errors import MemoryRefused

log = logging.getLogger(__name__)

COPY_THREADS = 4
#: How many nodes are asked to keep a copy before a generation stays on its own node alone.
MAX_BUDDIES_ASKED = 3

#: What is told to the rest of the daemon: an event of the history and of the metrics.
Tell = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The round that this node trains in, and where the others serve copies."""

    seats: tuple[Seat, ...] = ()
    places: Mapping[NodeId, Place] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Where a generation's parts of this node are now; ``buddy`` is None while they are here alone, for ``reason``."""

    buddy: Buddy | None = None
    reason: str = ""
    sent: Sent | None = None


class MemoryService:
    """Make it inside the running event loop. ``world`` is asked in the loop's thread."""

    def __init__(
        self,
        settings: MemorySettings,
        me: NodeId,
        links: LinkSettings,
        *,
        world: Callable[[], World],
        tell: Tell,
    ) -> None:
        self._me, self._world, self._tell = me, world, tell
        self._loop = asyncio.get_running_loop()
        self.store = MemoryStore(settings, me)
        self._copies = Copies(me, self.store, links.client_tls, self._enter)
        self._server = DataServer(self._copies.serve, links.server_tls)
        self._control = ThreadPoolExecutor(1, thread_name_prefix="elasticd-memory")
        self._copying = ThreadPoolExecutor(COPY_THREADS, thread_name_prefix="elasticd-memory-copy")
        self._job_id: JobId | None = None
        self._owner = os.geteuid()
        self._committed: Generation | None = None
        self._sealers: dict[Generation, list[tuple[Caller, Message]]] = {}
        self._said = ""
        self._closing = False

    def listen(self, address: str, port: int) -> int:
        """Returns the port. OperatorError when it is in use. What dead daemons have left in memory is removed."""
        port = self._server.listen(address, port)
        self._quietly(self.store.sweep)
        return port

    def enter_round(self, job_id: JobId, user: str) -> None:
        """This node's workers are in that job now."""
        if self._job_id not in (None, job_id):
            self.end_job()
        self._job_id, self._owner = job_id, _uid_of(user)
        self._sealers.clear()

    def end_job(self) -> None:
        """This node has left its job: nothing of it is kept."""
        job_id, self._job_id, self._committed = self._job_id, None, None
        if job_id is not None and not self._closing:
            self._control.submit(self.store.drop_job, job_id)

    def held(self) -> Held:
        return self.store.held()

    async def close(self) -> None:
        self._closing = True
        self._server.close()

        def shut() -> None:
            self._control.shutdown(cancel_futures=True)
            self.store.close()
            self._copying.shutdown(wait=False, cancel_futures=True)

        await self._loop.run_in_executor(None, shut)

    # --- what workers ask, in the loop's thread ---

    def handle(self, caller: Caller, message: Message) -> None:
        """ValueError, KeyError or TypeError when it is not of the form that it must have."""
        operation, generation = str(message["op"]), _generation(message)
        if caller.job_id != self._job_id:
            self._answer(caller, message, {"ok": False, "reason": f"this node is not in job {caller.job_id}"})
            return
        match operation:
            case "begin":
                sizes = int(message["size_bytes"]), int(message["index_bytes"])
                self._run(caller, message, lambda: self._begin(caller, _need(generation), *sizes))
            case "seal":
                self._seal(caller, message, _need(generation))
            case "commit":
                self._committed = _need(generation)
                self._quietly(self.store.commit, caller.job_id, _need(generation))
            case "abandon":
                self._void(caller.job_id, _need(generation), "a rank of this node has given it up")
            case "inventory":
                self._run(caller, message, lambda: {"holdings": to_plain(self.store.holdings(caller.job_id))})
            case "fetch":
                self._fetch(caller, message, _need(generation))
            case "restored":
                self._committed = generation  # what was committed later is void, and must not be taken for newer
                self._quietly(self.store.keep_only, caller.job_id, generation)
            case "refused":
                self._tell("memory_refused", {"step": int(message["step"]), "reason": str(message["reason"])[:1024]})
            case other:
                raise ValueError(f"no such request of memory: {other!r}")

    def left(self, caller: Caller) -> None:
        """A worker is gone."""
        self._quietly(self.store.forget_writer, _tag(caller))

    def _begin(self, caller: Caller, generation: Generation, size_bytes: int, index_bytes: int) -> dict[str, Any]:
        self._enter(caller.job_id)
        part = self.store.begin(caller.job_id, caller.rank, generation, size_bytes, _tag(caller))
        answer = {"path": str(part.path)}
        if index_bytes:
            index = self.store.begin_index(caller.job_id, generation, index_bytes, _tag(caller))
            answer["index_path"] = str(index.path)
        return answer

    def _seal(self, caller: Caller, message: Message, generation: Generation) -> None:
        """Answered once the parts of all local ranks are where they are to be."""
        index_bytes = int(message["index_bytes"])
        self._sealers.setdefault(generation, []).append((caller, message))

        def work() -> None:
            if self.store.seal(caller.job_id, caller.rank, generation, index_bytes):
                self._soon(self._keep, caller.job_id, generation)

        self._submit(self._control, work, lambda reason: self._soon(self._void, caller.job_id, generation, reason))

    def _void(self, job_id: JobId, generation: Generation, reason: str) -> None:
        """Whoever has sealed a part of it hears so at once, and who seals one later is refused."""
        self._quietly(self.store.abandon, job_id, generation)
        self._unsealed(generation, reason)

    def _keep(self, job_id: JobId, generation: Generation) -> None:
        """All local parts are written: find who keeps a copy of them."""
        world, committed = self._world(), self._committed
        ranked = rank_buddies(self._me, world.seats)

        def work() -> None:
            kept = self._copy_out(job_id, generation, ranked, world.places, committed)
            self._soon(self._is_kept, generation, kept)

        self._submit(self._copying, work, lambda reason: self._soon(self._unsealed, generation, reason))

    def _copy_out(
        self,
        job_id: JobId,
        generation: Generation,
        ranked: tuple[Buddy, ...],
        places: Mapping[NodeId, Place],
        committed: Generation | None,
    ) -> Kept:
        if not ranked:
            return Kept(reason=f"node {self._me} is alone in its round")
        reasons = []
        for buddy in ranked[:MAX_BUDDIES_ASKED]:
            place = places.get(buddy.node_id)
            if place is None:
                reasons.append(f"node {buddy.node_id} keeps no copies in RAM")
                continue
            try:
                sent = self._copies.put(job_id, generation, place, committed)
            except MemoryRefused as error:
                reasons.append(str(error))
            else:
                return Kept(buddy=buddy, sent=sent, reason="; ".join([*reasons, *_why_so_near(buddy)]))
        return Kept(reason="; ".join(reasons))

    def _is_kept(self, generation: Generation, kept: Kept) -> None:
        buddy, sent = kept.buddy, kept.sent
        where = f"node {buddy.node_id}, apart by {buddy.apart.value}" if buddy is not None else "this node alone"
        if (said := where + kept.reason) != self._said:  # once for each change, and not for every step
            self._said = said
            log.log(
                logging.INFO if buddy is not None else logging.WARNING,
                "copies in RAM are kept by %s%s",
                where,
                f" ({kept.reason})" if kept.reason else "",
            )
        self._tell(
            "memory_kept",
            {
                "step": generation.step,
                "buddy": buddy.node_id if buddy is not None else "",
                "apart": buddy.apart.value if buddy is not None else "",
                "reason": kept.reason,
                "size_bytes": sent.size_bytes if sent is not None else 0,
                "seconds": sent.seconds if sent is not None else 0.0,
            },
        )
        self._sealed(generation, {"ok": True, "at_buddy": buddy is not None, "reason": kept.reason})

    def _unsealed(self, generation: Generation, reason: str) -> None:
        self._sealed(generation, {"ok": False, "reason": reason})

    def _sealed(self, generation: Generation, answer: dict[str, Any]) -> None:
        for caller, message in self._sealers.pop(generation, []):
            self._answer(caller, message, answer)

    def _fetch(self, caller: Caller, message: Message, generation: Generation) -> None:
        wanted = Wanted(
            job_id=caller.job_id,
            generation=generation,
            seal=int(message["seal"]),
            parts={
                int(rank): (NodeId(str(writer)), tuple(NodeId(str(node)) for node in nodes))
                for rank, writer, nodes in message["wanted"]
            },
            index_from=tuple(NodeId(str(node)) for node in message["index_from"]),
            damaged=tuple((int(rank), str(path)) for rank, path in message["damaged"]),
        )
        places = self._world().places

        def work() -> dict[str, Any]:
            self._enter(caller.job_id)
            return self._copies.fetch(wanted, places)

        self._run(caller, message, work, self._copying)

    # --- threads ---

    def _run(
        self,
        caller: Caller,
        message: Message,
        work: Callable[[], dict[str, Any]],
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        """Answer with what it returns, or with why it was refused."""

        def run() -> None:
            self._soon(self._answer, caller, message, {"ok": True, **work()})

        def failed(reason: str) -> None:
            self._soon(self._answer, caller, message, {"ok": False, "reason": reason})

        self._submit(pool or self._control, run, failed)

    def _quietly(self, work: Callable[..., None], *arguments: object) -> None:
        self._submit(self._control, lambda: work(*arguments), lambda _: None)

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[[], None], failed: Callable[[str], None]) -> None:
        """``failed`` is told why it was refused, or what went wrong: whoever asked must not wait for ever."""

        def run() -> None:
            try:
                work()
            except MemoryRefused as error:
                failed(str(error))
            except Exception as error:  # the top of a thread's task: training goes on without this copy
                log.exception("memory: a request failed")
                failed(f"the daemon of node {self._me} failed: {error}")

        if not self._closing:
            with contextlib.suppress(RuntimeError):  # the pool is being shut down
                pool.submit(run)

    def _soon(self, call: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, *arguments)

    def _answer(self, caller: Caller, message: Message, answer: Mapping[str, object]) -> None:
        caller.send({"type": "memory_answer", "id": int(message["id"]), **answer})

    def _enter(self, job_id: JobId) -> None:
        """In any thread: makes room for the job's first copy. MemoryRefused when this node is not in it (any more).

        What has waited for its turn while the job ended must not make room for it again: nobody would remove it.
        """
        if job_id != self._job_id or self._closing:
            raise MemoryRefused(f"node {self._me} does not take part in job {job_id}")
        self.store.enter(job_id, self._owner)


def _why_so_near(buddy: Buddy) -> list[str]:
    """What an operator may want to know of a buddy that shares a failure domain with this node."""
    if buddy.apart is not Apart.NODE:
        return []
    return ["no node of the round is known to be in another zone, rack or switch"]


def _generation(message: Message) -> Generation | None:
    if "step" not in message or "of_round" not in message:
        return None
    return Generation(step=int(message["step"]), round_number=int(message["of_round"]))


def _need(generation: Generation | None) -> Generation:
    if generation is None:
        raise ValueError("which step?")
    return generation


def _tag(caller: Caller) -> str:
    return f"round-{caller.round_number}-rank-{caller.rank}-{id(caller)}"


def _uid_of(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid if user else os.geteuid()
    except KeyError:
        return os.geteuid()  # its workers cannot be started either, which says why
