"""The store in this process's memory, with etcd's semantics, for tests and simulations.

The contract suite (tests/test_store_contract.py) runs on it and on a real etcd.

Beyond the Protocol: ``fail``/``heal`` make an outage, ``lose_next_answer`` a write that happens although its caller is
told that nobody answered, ``compact`` drops history, and leases run on a clock that the test may turn by hand.

Not here: several members, permissions, persistence.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice

from elasticd.cluster.store import Change, Changes, Compare, KeyValue, Operation, Put, Snapshot, TxnResult
from elasticd.errors import Compacted, LeaseLost, StoreUnavailable

# How often a waiting watch looks whether a lease has expired: the clock may be one that does not wake us.
_POLL_S = 0.02
_SIGN_OF_LIFE_S = 1.0


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    expires_at: float
    keys: set[str] = field(default_factory=set)


class MemoryStore:
    """``Store`` in memory. ``clock`` gives seconds for the leases; after turning it by hand call ``tick()``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._entries: dict[str, KeyValue] = {}
        self._leases: dict[int, _Lease] = {}
        self._lease_ids = count(0x7E57_0001)
        self._history: list[Changes] = []
        self._revision = 1
        self._compacted = 0
        self._failed = False
        self._answers_to_lose = 0
        self._closed = False

    # --- Faults and time ---

    def fail(self) -> None:
        """From now on nobody answers. Leases do not expire meanwhile, as in an etcd that is down."""
        with self._changed:
            self._expire()
            self._failed = True

    def heal(self) -> None:
        """Leases start again with their whole TTL, as under a new leader of etcd."""
        with self._changed:
            self._failed = False
            now = self._clock()
            for lease in self._leases.values():
                lease.expires_at = now + lease.ttl_s
            self._changed.notify_all()

    def lose_next_answer(self) -> None:
        """The next write happens, and its caller gets StoreUnavailable."""
        with self._changed:
            self._answers_to_lose += 1

    def compact(self, revision: int) -> None:
        with self._changed:
            self._compacted = max(self._compacted, revision)
            self._history = [changes for changes in self._history if changes.revision >= self._compacted]
            self._changed.notify_all()

    def tick(self) -> None:
        """Lets leases expire that are due by the clock."""
        with self._changed:
            self._expire()

    # --- The Protocol ---

    def get(self, key: str) -> KeyValue | None:
        with self._changed:
            self._enter()
            return self._entries.get(key)

    def snapshot(self, prefix: str) -> Snapshot:
        with self._changed:
            self._enter()
            keys = sorted(key for key in self._entries if key.startswith(prefix))
            return Snapshot(revision=self._revision, entries=tuple(self._entries[key] for key in keys))

    def put(self, key: str, value: str, lease: int = 0) -> int:
        return self.txn([], [Put(key=key, value=value, lease=lease)]).revision

    def delete(self, key: str) -> bool:
        with self._changed:
            self._enter()
            existed = key in self._entries
            if existed:
                self._commit({key: None})
            self._answer()
            return existed

    def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        with self._changed:
            self._enter()
            if not all(self._holds(guard) for guard in compares):
                return TxnResult(succeeded=False, revision=self._revision)
            for operation in operations:
                if isinstance(operation, Put) and operation.lease and operation.lease not in self._leases:
                    raise LeaseLost(f"lease {operation.lease:x} does not exist any more")
            self._commit({op.key: op if isinstance(op, Put) else None for op in operations})
            self._answer()
            return TxnResult(succeeded=True, revision=self._revision)

    def grant(self, ttl_s: int) -> int:
        with self._changed:
            self._enter()
            lease = next(self._lease_ids)
            self._leases[lease] = _Lease(float(ttl_s), self._clock() + ttl_s)
            self._answer()
            return lease

    def keepalive(self, lease: int) -> float:
        with self._changed:
            self._enter()
            held = self._leases.get(lease)
            if held is None:
                raise LeaseLost(f"lease {lease:x} does not exist any more")
            held.expires_at = self._clock() + held.ttl_s
            return held.ttl_s

    def revoke(self, lease: int) -> None:
        with self._changed:
            self._enter()
            self._drop_lease(lease)
            self._answer()

    def watch(self, prefix: str, after_revision: int) -> MemoryWatch:
        return MemoryWatch(self, prefix, after_revision)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- Inside, with the lock held ---

    def _enter(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store was closed by this process")
        if self._failed:
            raise StoreUnavailable("the store is made to fail")
        self._expire()

    def _answer(self) -> None:
        if self._answers_to_lose:
            self._answers_to_lose -= 1
            raise StoreUnavailable("the answer is made to get lost; the write happened")

    def _holds(self, guard: Compare) -> bool:
        if (guard.create_revision is None) == (guard.mod_revision is None):
            raise ValueError(f"a guard compares exactly one revision: {guard}")
        entry = self._entries.get(guard.key)
        if guard.create_revision is not None:
            return guard.create_revision == (entry.create_revision if entry else 0)
        return guard.mod_revision == (entry.mod_revision if entry else 0)

    def _commit(self, writes: dict[str, Put | None]) -> None:
        """One new revision with these keys put or deleted; none when nothing changes."""
        revision = self._revision + 1
        changes: list[Change] = []
        for key, put in writes.items():
            old = self._entries.pop(key, None)
            if put is not None:
                self._entries[key] = self._attach(put, old, revision)
            elif old is None:
                continue
            if old is not None and old.lease and (put is None or put.lease != old.lease):
                self._detach(old)
            changes.append(Change(key=key, entry=self._entries.get(key)))
        if changes:
            self._revision = revision
            self._history.append(Changes(revision=revision, changes=tuple(changes)))
            self._changed.notify_all()

    def _attach(self, put: Put, old: KeyValue | None, revision: int) -> KeyValue:
        if put.lease:
            self._leases[put.lease].keys.add(put.key)
        created = old.create_revision if old else revision
        return KeyValue(key=put.key, value=put.value, create_revision=created, mod_revision=revision, lease=put.lease)

    def _detach(self, entry: KeyValue) -> None:
        if entry.lease in self._leases:
            self._leases[entry.lease].keys.discard(entry.key)

    def _expire(self) -> None:
        if self._failed:
            return
        now = self._clock()
        for lease in [lease for lease, held in self._leases.items() if held.expires_at <= now]:
            self._drop_lease(lease)

    def _drop_lease(self, lease: int) -> None:
        held = self._leases.pop(lease, None)
        if held is not None and held.keys:
            self._commit(dict.fromkeys(sorted(held.keys)))

    def _next_changes(self, watch: MemoryWatch) -> Changes | None:
        """The next that the watch has not seen; moves its revision on."""
        if self._failed:
            return None
        if watch.revision + 1 < self._compacted:
            raise Compacted(f"revision {watch.revision + 1} was compacted away at {self._compacted}")
        self._expire()
        start = bisect_right(self._history, watch.revision, key=lambda changes: changes.revision)
        for changes in islice(self._history, start, None):
            seen = tuple(change for change in changes.changes if change.key.startswith(watch.prefix))
            watch.revision = changes.revision
            if seen:
                return replace(changes, changes=seen)
        return None


class MemoryWatch:
    """The ``Watch`` of a MemoryStore. ``pending`` is for simulations: it never waits."""

    def __init__(self, store: MemoryStore, prefix: str, after_revision: int) -> None:
        self.prefix = prefix
        self.revision = after_revision
        self._store = store
        self._closed = False

    def pending(self) -> list[Changes]:
        """All that there is to see now."""
        found: list[Changes] = []
        with self._store._changed:  # noqa: SLF001 - the two are one thing
            while (changes := self._take()) is not None:
                found.append(changes)
        return found

    def __iter__(self) -> Iterator[Changes]:
        while True:
            changes = self._wait()
            if changes is None:
                return
            yield changes

    def _wait(self) -> Changes | None:
        """The next changes, or an empty sign of life; None when closed."""
        store = self._store
        with store._changed:  # noqa: SLF001
            quiet_until = time.monotonic() + _SIGN_OF_LIFE_S
            while not (self._closed or store._closed):  # noqa: SLF001
                changes = self._take()
                if changes is not None:
                    return changes
                if time.monotonic() >= quiet_until and not store._failed:  # noqa: SLF001
                    return Changes(revision=self.revision, changes=())
                store._changed.wait(_POLL_S)  # noqa: SLF001
            return None

    def _take(self) -> Changes | None:
        return self._store._next_changes(self)  # noqa: SLF001

    def close(self) -> None:
        with self._store._changed:  # noqa: SLF001
            self._closed = True
            self._store._changed.notify_all()  # noqa: SLF001
