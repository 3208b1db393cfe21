"""The daemon's end of the store: keeps the lease, watches, and carries out the machine's writes. Three threads.

The watch thread alone posts snapshots and changes, so that they reach the machine in the store's order. The lease
thread's keepalive doubles as the probe of whether the store is there. Nothing here decides anything.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from elasticd.cluster.store import Change, Compare, Delete, KeyValue, Operation, Put, Store, Watch
from elasticd.core import keys, messages
from elasticd.core.messages import Event, Write
from elasticd.core.model import Node
from elasticd.core.records import from_json, to_json
from elasticd.core.stragglers import Tally
from elasticd.core.view import Entry
from elasticd.errors import (
    Compacted,
    DuplicateNode,
    ElasticdError,
    LeaseLost,
    OperatorError,
    ProtocolError,
    StoreUnavailable,
)

log = logging.getLogger(__name__)

WriteEffect = messages.Register | messages.PutMember | messages.DeleteMember | messages.ProposeRound
#: Says whether the daemon that registered this node before is still alive.
IsAlive = Callable[[Node], bool]
RETRY_S = 0.3


class StoreKeeper:
    """``post`` takes events from any thread; ``fail`` takes an OperatorError that no retry can mend."""

    def __init__(
        self,
        store: Store,
        node: Node,
        ttl_s: int,
        post: Callable[[Event], None],
        fail: Callable[[OperatorError], None],
        is_alive: IsAlive,
    ) -> None:
        self._store, self._node, self._ttl_s = store, node, ttl_s
        self._post, self._fail, self._is_alive = post, fail, is_alive
        self._lease = 0
        self._writes: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._watch: Watch | None = None
        self._closing = threading.Event()
        self._reload = threading.Event()
        self._down = False
        self._answered_at: float | None = None
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._guarded, args=(run,), name=f"store-{name}", daemon=True)
            for name, run in (("watch", self._watch_loop), ("lease", self._lease_loop), ("write", self._write_loop))
        ]

    @property
    def reachable(self) -> bool:
        return not self._down

    @property
    def answered_at(self) -> float | None:
        """When the store last answered a read or a keepalive, on the monotonic clock; None before the first answer."""
        return self._answered_at

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def reload(self) -> None:
        """Post a fresh snapshot soon."""
        self._reload.set()
        with self._lock:
            watch = self._watch
        if watch is not None:
            watch.close()

    def write(self, effect: WriteEffect) -> None:
        self._writes.put(lambda: self._carry_out(effect))

    def commit(self, key: str, value: str, guard: Compare, answer: Callable[[bool, str], None]) -> None:
        """A record of commit under a guard; retried until the store answers. ``answer`` is called from a thread."""
        self._writes.put(lambda: self._commit(key, value, guard, answer))

    def confirm(self, guard: Compare, answer: Callable[[bool | None, str], None]) -> None:
        """Whether a guard holds now; None when the store gives no answer. ``answer`` may be called from a thread.

        While the store is known to be away the answer comes at once: a record that waits for it is in the queue before.
        """
        if self._down:
            answer(None, "etcd is away")
        else:
            self._writes.put(lambda: self._confirm(guard, answer))

    def close(self) -> None:
        """Gives the lease back, so that the others need not wait for it."""
        self._closing.set()
        self._writes.put(None)
        if self._lease and not self._down:
            with contextlib.suppress(ElasticdError):
                self._store.revoke(self._lease)
        self.reload()
        self._store.close()

    # --- watching ---

    def _watch_loop(self) -> None:
        while not self._closing.is_set():
            try:
                self._reload.clear()
                snapshot = self._store.snapshot(keys.PREFIX)
                self._seen_up()
                self._post(
                    messages.SnapshotLoaded(entries=tuple(map(_entry, snapshot.entries)), revision=snapshot.revision)
                )
                self._follow(snapshot.revision)
            except StoreUnavailable:
                self._seen_down()
                self._closing.wait(RETRY_S)
            except Compacted:
                log.info("the watch fell behind a compaction: loading a snapshot")

    def _follow(self, revision: int) -> None:
        watch = self._store.watch(keys.PREFIX, revision)
        with self._lock:
            self._watch = watch
        if self._reload.is_set():
            watch.close()
        try:
            for changes in watch:
                if changes.changes:
                    entries = tuple(map(_changed, changes.changes))
                    self._post(messages.KeysChanged(entries=entries, revision=changes.revision))
        finally:
            watch.close()

    # --- the lease ---

    def _lease_loop(self) -> None:
        while not self._closing.wait(RETRY_S if self._down else self._ttl_s / 3):
            lease = self._lease
            try:
                if lease:
                    self._store.keepalive(lease)
                else:
                    self._store.get(keys.PREFIX)
                self._seen_up()
            except StoreUnavailable:
                self._seen_down()
            except LeaseLost:
                if self._lease == lease:  # the writer may have a new one by now
                    self._lease = 0
                self._seen_up()
                self._post(messages.LeaseLost())
                self.reload()

    def _seen_down(self) -> None:
        with self._lock:
            was, self._down = self._down, True
        if not was:
            log.warning("etcd does not answer; training goes on, changes of the world wait")
            self._post(messages.StoreLost())

    def _seen_up(self) -> None:
        with self._lock:
            was, self._down = self._down, False
            self._answered_at = time.monotonic()
        if was:
            log.info("etcd answers again")
            self._post(messages.StoreBack())
            self.reload()

    # --- writing ---

    def _write_loop(self) -> None:
        while (job := self._writes.get()) is not None:
            job()

    def _carry_out(self, effect: WriteEffect) -> None:
        write = {messages.Register: Write.REGISTER, messages.ProposeRound: Write.ROUND}.get(type(effect), Write.MEMBER)
        try:
            succeeded, revision = self._attempt(effect)
        except StoreUnavailable as error:
            log.debug("write %s: %s", write, error)
            self._seen_down()
            self._post(messages.WriteFinished(write=write, succeeded=False, known=False))
            return
        except LeaseLost:
            if write is not Write.ROUND:  # whose records are on leases of their own
                self._lease = 0
                self._post(messages.LeaseLost())
            succeeded, revision = False, 0
        self._post(messages.WriteFinished(write=write, succeeded=succeeded, revision=revision))

    def _attempt(self, effect: WriteEffect) -> tuple[bool, int]:
        match effect:
            case messages.Register():
                return self._register()
            case messages.PutMember():
                if not self._lease:  # a record without a lease would outlive this node
                    return False, 0
                guard = Compare(key=keys.node(self._node.node_id), create_revision=effect.node_create_revision)
                key = keys.member(effect.job_id, self._node.node_id)
                put = Put(key=key, value=to_json(effect.member), lease=self._lease)
                result = self._store.txn([guard], [put])
                return result.succeeded, result.revision if result.succeeded else 0
            case messages.DeleteMember():
                self._store.delete(keys.member(effect.job_id, self._node.node_id))
                return True, 0
            case messages.ProposeRound():
                return self._propose(effect)

    def _propose(self, effect: messages.ProposeRound) -> tuple[bool, int]:
        key = keys.round_(effect.job_id)
        lasting_s = {key: effect.linger_s} | {mark.key: mark.ttl_s for mark in effect.marks}
        leases = {name: self._store.grant(ttl_s) if ttl_s else 0 for name, ttl_s in lasting_s.items()}
        lease = leases[key]
        compares = [Compare(key=key, mod_revision=effect.expected_mod_revision)]
        compares += [Compare(key=guard.key, create_revision=guard.create_revision) for guard in effect.guards]
        compares += [
            Compare(key=mark.key, mod_revision=mark.expected_mod_revision)
            for mark in effect.marks
            if mark.expected_mod_revision is not None
        ]
        operations: list[Operation] = [Put(key=key, value=to_json(effect.round), lease=lease)]
        operations += [Delete(key=doomed) for doomed in effect.delete_keys]
        operations += [Put(key=mark.key, value=to_json(_dated(mark)), lease=leases[mark.key]) for mark in effect.marks]
        if effect.spec is not None:
            operations.append(Put(key=keys.spec(effect.job_id), value=to_json(effect.spec), lease=lease))
        if lease:  # all that the job leaves behind goes with its last record
            held = [self._store.get(key(effect.job_id)) for key in (keys.spec, keys.checkpoint)]
            written = {operation.key for operation in operations}
            operations += [Put(key=kv.key, value=kv.value, lease=lease) for kv in held if kv and kv.key not in written]
        result = self._store.txn(compares, operations)
        if not result.succeeded:
            for granted in filter(None, leases.values()):
                self._store.revoke(granted)
        return result.succeeded, result.revision if result.succeeded else 0

    def _register(self) -> tuple[bool, int]:
        """This node's key on a lease that is alive; takes over from a dead earlier life at once."""
        if not self._lease:
            self._lease = self._store.grant(self._ttl_s)
        key = keys.node(self._node.node_id)
        put = Put(key=key, value=to_json(self._node), lease=self._lease)
        held = self._store.get(key)
        if held is None:
            guard = Compare(key=key, create_revision=0)
        else:
            self._yield_to_living(held)
            guard = Compare(key=key, mod_revision=held.mod_revision)
        result = self._store.txn([guard], [put])
        return result.succeeded, result.revision if result.succeeded else 0

    def _yield_to_living(self, held: KeyValue) -> None:
        try:
            other = from_json(Node, held.value)
        except ProtocolError as error:
            raise OperatorError(
                f"the record of node id {self._node.node_id!r} in etcd cannot be read ({error}): a daemon of another "
                f"version may hold it; give this node an id of its own (node.id), or delete {held.key}"
            ) from error
        if other.boot_id != self._node.boot_id and self._is_alive(other):
            raise DuplicateNode(
                f"node id {other.node_id!r} is held by a live daemon on {other.host} ({other.address}:"
                f"{other.peer_port}); give this node an id of its own (node.id)"
            )

    def _commit(self, key: str, value: str, guard: Compare, answer: Callable[[bool, str], None]) -> None:
        while not self._closing.is_set():
            try:
                done = self._store.txn([guard], [Put(key=key, value=value)]).succeeded
            except StoreUnavailable:
                self._seen_down()
                held = self._read_back(key)
                if held == value:
                    answer(True, "")
                    return
                continue
            answer(done, "" if done else "a newer round stands")
            return

    def _confirm(self, guard: Compare, answer: Callable[[bool | None, str], None]) -> None:
        try:
            holds = self._store.txn([guard], []).succeeded
        except StoreUnavailable:
            self._seen_down()
            answer(None, "etcd gives no answer")
        else:
            answer(holds, "" if holds else "a newer round stands")

    def _read_back(self, key: str) -> str | None:
        """Whether an unanswered transaction happened after all; waits until the store can tell."""
        while not self._closing.wait(RETRY_S):
            try:
                held = self._store.get(key)
            except StoreUnavailable:
                continue
            return held.value if held is not None else None
        return None

    def _guarded(self, run: Callable[[], None]) -> None:
        """A thread's root: an operator's error ends the daemon with its one line, any other is logged with it."""
        try:
            run()
        except OperatorError as error:
            self._fail(error)
        except Exception as error:
            if not self._closing.is_set():
                log.exception("store thread failed")
                self._fail(OperatorError(f"internal error in the store's thread: {error!r}"))


def wait_until_reachable(store: Store, patience_s: float) -> None:
    """StoreUnavailable when the store gave no answer within the patience."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            store.get(keys.PREFIX)
        except StoreUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)
        else:
            return


def _dated(mark: messages.Mark) -> object:
    """The record with the end of its lease in Unix time, for people."""
    record = mark.record
    return record if isinstance(record, Tally) else replace(record, until=time.time() + mark.ttl_s)


def _entry(found: KeyValue) -> Entry:
    return Entry(
        key=found.key, value=found.value, create_revision=found.create_revision, mod_revision=found.mod_revision
    )


def _changed(change: Change) -> Entry:
    return Entry(key=change.key, value=None) if change.entry is None else _entry(change.entry)


def entries(found: Iterable[KeyValue]) -> tuple[Entry, ...]:
    """What a snapshot holds, in the core's terms."""
    return tuple(map(_entry, found))
