"""The store in etcd: keys, leases, transactions and watches, over whichever member answers.

Not here: the Protocol and its values (store.py), channels and errors (etcd_link.py), an etcd of our own (embedded.py).
Values are text; nothing is unpickled.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

from elasticd.cluster.etcd_link import (
    COMPACT,
    DELETE,
    GRANT,
    KEEPALIVE,
    PUT,
    RANGE,
    REVOKE,
    TXN,
    EtcdLink,
    EtcdTls,
)
from elasticd.cluster.etcd_messages import message
from elasticd.cluster.etcd_watch import EtcdWatch, key_value, prefix_end
from elasticd.cluster.store import Compare, KeyValue, Operation, Put, Snapshot, TxnResult
from elasticd.errors import LeaseLost

__all__ = ["EtcdStore", "EtcdTls"]

_COMPARE = message("etcdserverpb.Compare")
_OPERATION = message("etcdserverpb.RequestOp")
_EQUAL = 0
_BY_CREATE_REVISION = 1
_BY_MOD_REVISION = 2


class EtcdStore:
    """``Store`` over etcd 3.4 or later. Endpoints: ``http://host:port``, ``https://host:port`` or ``host:port``.

    Reads, puts, deletes and lease calls go to each member in turn until one answers, for ``call_timeout_s`` a member.
    A transaction is sent once: again only after an error that proves that it was not executed.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        call_timeout_s: float = 1.0,
        tls: EtcdTls | None = None,
        credentials: tuple[str, str] | None = None,
    ) -> None:
        self._link = EtcdLink(endpoints, call_timeout_s=call_timeout_s, tls=tls, credentials=credentials)
        self._watches: weakref.WeakSet[EtcdWatch] = weakref.WeakSet()
        self._lock = threading.Lock()

    @property
    def current_endpoint(self) -> str:
        """``host:port`` of the member that calls go to now."""
        return self._link.current.target

    def get(self, key: str) -> KeyValue | None:
        found = self._link.call(RANGE, RANGE.request(key=key.encode())).kvs
        return key_value(found[0]) if found else None

    def snapshot(self, prefix: str) -> Snapshot:
        request = RANGE.request(key=prefix.encode() or b"\0", range_end=prefix_end(prefix))
        answer = self._link.call(RANGE, request)
        return Snapshot(revision=answer.header.revision, entries=tuple(key_value(kv) for kv in answer.kvs))

    def put(self, key: str, value: str, lease: int = 0) -> int:
        request = PUT.request(key=key.encode(), value=value.encode(), lease=lease)
        return int(self._link.call(PUT, request).header.revision)

    def delete(self, key: str) -> bool:
        return bool(self._link.call(DELETE, DELETE.request(key=key.encode())).deleted)

    def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        request = TXN.request(
            compare=[_compare(guard) for guard in compares],
            success=[_operation(operation) for operation in operations],
        )
        for part in (*compares, *operations)[:1]:
            self._link.find_living(part.key.encode())
        answer = self._link.call(TXN, request, repeatable=False)
        return TxnResult(succeeded=answer.succeeded, revision=answer.header.revision)

    def grant(self, ttl_s: int) -> int:
        # Sent twice, it may leave a lease that nobody uses: that one expires.
        return int(self._link.call(GRANT, GRANT.request(TTL=ttl_s)).ID)

    def keepalive(self, lease: int) -> float:
        ttl_s = self._link.call(KEEPALIVE, KEEPALIVE.request(ID=lease)).TTL
        if ttl_s <= 0:
            raise LeaseLost(f"lease {lease:x} does not exist any more")
        return float(ttl_s)

    def revoke(self, lease: int) -> None:
        try:
            self._link.call(REVOKE, REVOKE.request(ID=lease))
        except LeaseLost:
            return  # gone already, which is what was asked for

    def watch(self, prefix: str, after_revision: int) -> EtcdWatch:
        watch = EtcdWatch(self._link, prefix, after_revision)
        with self._lock:
            self._watches.add(watch)
        return watch

    def compact(self, revision: int) -> None:
        """Drops the history before ``revision``. Production's etcd does it by --auto-compaction-retention."""
        self._link.call(COMPACT, COMPACT.request(revision=revision))

    def close(self) -> None:
        with self._lock:
            watches = list(self._watches)
        for watch in watches:
            watch.close()
        self._link.close()


def _compare(guard: Compare) -> Any:
    if (guard.create_revision is None) == (guard.mod_revision is None):
        raise ValueError(f"a guard compares exactly one revision: {guard}")
    key = guard.key.encode()
    if guard.create_revision is not None:
        return _COMPARE(result=_EQUAL, target=_BY_CREATE_REVISION, key=key, create_revision=guard.create_revision)
    return _COMPARE(result=_EQUAL, target=_BY_MOD_REVISION, key=key, mod_revision=guard.mod_revision)


def _operation(operation: Operation) -> Any:
    key = operation.key.encode()
    if isinstance(operation, Put):
        return _OPERATION(request_put=PUT.request(key=key, value=operation.value.encode(), lease=operation.lease))
    return _OPERATION(request_delete_range=DELETE.request(key=key))
