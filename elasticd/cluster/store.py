"""The store that the cluster agrees through: a Protocol, and the values that cross it.

Not here: etcd itself (etcd.py), the store in memory for tests (testing/memory_store.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValue:
    """One key as the store holds it. ``lease`` is 0 when the key hangs on none."""

    key: str
    value: str
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All keys under a prefix, as of one revision."""

    revision: int
    entries: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change seen by a watch; ``entry`` is None when the key was deleted."""

    key: str
    entry: KeyValue | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What one revision changed (possibly empty: a sign of life), in order."""

    revision: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """A guard: exactly one of the two revisions is given; 0 means that the key does not exist."""

    key: str
    create_revision: int | None = None
    mod_revision: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    value: str
    lease: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    key: str


Operation = Put | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class TxnResult:
    succeeded: bool
    revision: int


class Watch(Protocol):
    """Changes after a revision, in order, none missing, none twice, until closed.

    Iteration resumes by itself on another endpoint when a connection breaks; it raises Compacted when it cannot,
    StoreRefused when etcd says no, and ends (StopIteration) after close(), which any thread may call.
    """

    def __iter__(self) -> Iterator[Changes]: ...

    def close(self) -> None: ...


class Store(Protocol):
    """Blocking calls, safe from several threads. Each raises StoreUnavailable when no endpoint answered in time.

    After StoreUnavailable from ``txn`` the transaction may or may not have happened: read again, never retry blindly.
    """

    def get(self, key: str) -> KeyValue | None: ...

    def snapshot(self, prefix: str) -> Snapshot:
        """A linearizable read of all keys that start with ``prefix``."""
        ...

    def put(self, key: str, value: str, lease: int = 0) -> int:
        """Returns the new revision. LeaseLost when the lease does not exist."""
        ...

    def delete(self, key: str) -> bool: ...

    def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        """All operations if all guards hold, otherwise none. LeaseLost when a put names a lease that is gone."""
        ...

    def grant(self, ttl_s: int) -> int:
        """A new lease; returns its id."""
        ...

    def keepalive(self, lease: int) -> float:
        """Renews once; returns the remaining TTL in seconds. LeaseLost when it is gone."""
        ...

    def revoke(self, lease: int) -> None: ...

    def watch(self, prefix: str, after_revision: int) -> Watch:
        """Changes under ``prefix`` with a revision greater than ``after_revision``."""
        ...

    def close(self) -> None: ...
