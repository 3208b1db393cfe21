"""torch's RendezvousHandler over the daemon's socket: the daemon decides, the handler blocks until it has.

It keeps a TCPStore for the *next* round listening and says its port, so that a round can name a store that is ready
and that no earlier round has used (TORCH.md, defects 1 and 2). It never raises from num_nodes_waiting(), since that
would end torchrun's agent and close the job for everybody.

Not here: who is in a round (core/rendezvous.py).
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError

from elasticd.channel import Channel, Message
from elasticd.core.model import NodeId, Round, Seat
from elasticd.core.records import from_plain
from elasticd.errors import ChannelClosed

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
END_TIMEOUT_S = 5.0
STORE_TIMEOUT = timedelta(minutes=5)


class DaemonRendezvousHandler(RendezvousHandler):
    """``connect``: give the agent a client of the store too (torchrun's agent needs one, ours does not).

    ``asks``: tell the daemon when a new round is wanted (torchrun's agent restarts workers by itself).
    """

    def __init__(
        self, channel: Channel, *, job_id: str, node_id: NodeId, nproc: int, connect: bool, asks: bool
    ) -> None:
        self.channel = channel
        self._job_id, self._node_id, self._nproc = job_id, node_id, nproc
        self._connect, self._asks = connect, asks
        self.round: Round | None = None
        self._newer: Round | None = None
        self._closed = False
        self._next_store: TCPStore | None = None
        self._stores: list[Store] = []
        self.stop_timeout_s = 0.0
        self._stop_up_to = 0

    def hello(self, pid: int) -> None:
        self.channel.send({"type": "agent_hello", "job": self._job_id, "pid": pid})
        self._offer_store()

    # --- torch's interface ---

    def get_backend(self) -> str:
        return "elasticd"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Blocks until the daemon admits this node to a newer round. RendezvousClosedError when the job is over."""
        if self._newer is None and self._asks:
            self.channel.send({"type": "round_wanted", "after": self.round.number if self.round else 0})
        while True:
            self._wait_for_round()
            assert self._newer is not None
            self.round, self._newer = self._newer, None
            try:
                return self._enter(self.round)
            except (RuntimeError, OSError) as error:
                log.warning(
                    "round %d: its store does not answer (%s); waiting for a newer one", self.round.number, error
                )

    def num_nodes_waiting(self) -> int:
        """1 when these workers must stop, else 0: torchrun's agent stops them, and comes back for a newer round."""
        try:
            self.drain()
        except ChannelClosed:
            return 0  # the daemon is gone or being restarted: what runs goes on
        return int(self._newer is not None or self._closed or self.must_stop)

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def get_run_id(self) -> str:
        return self._job_id

    def shutdown(self) -> bool:
        """torchrun is done with the job, for all nodes: well, or with the error that is on its way through."""
        error = sys.exc_info()[1]
        if self._asks and not self._closed:
            with contextlib.suppress(ChannelClosed):
                self._say_how_it_ended(error)
        self._closed = True
        self.channel.close()
        return True

    def _say_how_it_ended(self, error: BaseException | None) -> None:
        """Until the daemon answers that the job is over; a round that was written meanwhile is told, too."""
        deadline, told = time.monotonic() + END_TIMEOUT_S, 0
        while not self._closed and (left_s := deadline - time.monotonic()) > 0:
            newest = self._newer or self.round
            if newest is not None and newest.number > told:
                told = newest.number
                self.channel.send(_last_words(told, error))
            self.drain(left_s)

    # --- for our own agent ---

    def drain(self, timeout_s: float = 0.0) -> None:
        """Takes in what the daemon has said."""
        message = self.channel.receive(timeout_s)
        while message is not None:
            self._hear(message)
            message = self.channel.receive(0.0)

    @property
    def has_newer_round(self) -> bool:
        return self._newer is not None

    @property
    def must_stop(self) -> bool:
        """Whether the daemon has said that the current round's workers must not run any longer."""
        return self.round is not None and self.round.number <= self._stop_up_to

    def seat(self) -> Seat:
        """This node's seat in the current round."""
        assert self.round is not None
        seat = self.round.seat_of(self._node_id)
        assert seat is not None
        return seat

    def offer_next_store(self) -> None:
        """After a round has begun: if it uses our store, make another for the next."""
        used = self._next_store is not None and self._hosts(self.round)
        if used:
            self._next_store = None
            self._offer_store()

    def _hear(self, message: Message) -> None:
        match message["type"]:
            case "round":
                heard = from_plain(Round, message["round"])
                current = self._newer or self.round
                if current is None or heard.number > current.number:
                    self._newer = heard
            case "stop":
                self._stop_up_to = int(message["round"])
                self.stop_timeout_s = float(message["timeout_s"])
            case "exit":
                self._closed = True
                self.stop_timeout_s = float(message["timeout_s"])
            case other:
                log.warning("the daemon said %r, which this version does not know", other)

    def _wait_for_round(self) -> None:
        try:
            while self._newer is None:
                if self._closed:
                    # torchrun takes an orderly exit for a result, and stumbles over it: for it, it is an error.
                    kind = RendezvousClosedError if self._asks else RendezvousGracefulExitError
                    raise kind(f"job {self._job_id} is over: another node ended it")
                self.drain(timeout_s=3600.0)
        except ChannelClosed as error:
            raise RendezvousConnectionError("the daemon is gone") from error

    def _enter(self, current: Round) -> RendezvousInfo:
        seat = self.seat()
        store = self._open_store(current)
        self._stores = self._stores[-2:]  # the last round's workers may still be stopping
        info = RendezvousStoreInfo(current.store_address, current.store_port)
        return RendezvousInfo(store, seat.group_rank, len(current.seats), info)

    def _open_store(self, current: Round) -> Any:
        if self._hosts(current):
            assert self._next_store is not None
            self._stores.append(self._next_store)
            store: Store = self._next_store
            if self._asks:
                self.offer_next_store()
            return store
        if not self._connect:
            return None
        return _connect(current.store_address, current.store_port)

    def _hosts(self, current: Round | None) -> bool:
        return (
            current is not None
            and self._next_store is not None
            and current.store_port == self._next_store.port
            and current.store_address == self.seat().address
        )

    def _offer_store(self) -> None:
        self._next_store = TCPStore(
            host_name="0.0.0.0",  # noqa: S104 - members connect from other nodes
            port=0,
            is_master=True,
            wait_for_workers=False,
            timeout=STORE_TIMEOUT,
        )
        self.channel.send({"type": "ready", "store_port": self._next_store.port, "nproc": self._nproc})


def _last_words(number: int, error: BaseException | None) -> Message:
    """What torchrun's agent says of its workers; an error is final, since torchrun has its own restarts behind it."""
    if error is None:
        return {"type": "workers_succeeded", "round": number}
    failures = error.failures.values() if isinstance(error, ChildFailedError) else ()
    first = min(failures, key=lambda failure: failure.timestamp, default=None)
    failure = {
        "rank": first.local_rank if first else 0,  # torchrun counts failures by global rank, and calls it so
        "local_rank": first.local_rank if first else 0,
        "exit_code": first.exitcode if first else 1,
        "message": str(first.message if first else error)[:4096],
        "final": True,
    }
    return {"type": "workers_failed", "round": number, "failure": failure}


def _connect(address: str, port: int) -> TCPStore:
    """A client of a store on another node, which listens already."""
    started = time.monotonic()
    store = TCPStore(
        host_name=address,
        port=port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
    )
    store.set_timeout(STORE_TIMEOUT)
    log.debug("store %s:%d answered in %.1f ms", address, port, 1e3 * (time.monotonic() - started))
    return store
