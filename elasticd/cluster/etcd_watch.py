"""A watch that survives its member: it resumes at the next revision on another one, and finds out when one hangs.

A quiet stream and a hung member look alike, so after a quiet while the watch makes a linearizable read on the same
member: an answer proves the member and its quorum, and is passed on as an empty ``Changes``; silence moves the watch.

Not here: which member is next and how errors are judged (etcd_link.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

from elasticd.cluster.etcd_link import RANGE, WATCH, EtcdLink, Member, Verdict, judge, one_line
from elasticd.cluster.etcd_messages import message
from elasticd.cluster.quiet_grpc import grpc
from elasticd.cluster.store import Change, Changes, KeyValue
from elasticd.errors import Compacted, StoreRefused, StoreUnavailable

log = logging.getLogger(__name__)

_CREATE = message("etcdserverpb.WatchCreateRequest")
_PAUSE_S = 0.05
_MAX_DENIALS = 3
_DELETE = 1
_ENDED = object()


class _Moved(Exception):
    """This stream is over; the text says why."""


def key_value(kv: Any) -> KeyValue:
    return KeyValue(
        key=kv.key.decode(),
        value=kv.value.decode(),
        create_revision=kv.create_revision,
        mod_revision=kv.mod_revision,
        lease=kv.lease,
    )


def prefix_end(prefix: str) -> bytes:
    """The first key after all those that start with ``prefix``."""
    key = prefix.encode()
    return key[:-1] + bytes([key[-1] + 1]) if key else b"\0"


class _Stream:
    """One watch stream on one member, read by a thread of its own so that waiting for it can have a limit."""

    def __init__(self, link: EtcdLink, member: Member, create: Any, token: str | None) -> None:
        self.member = member
        self.token = token
        self.created = False
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._outbox.put(WATCH.request(create_request=create))
        # hasleader: a member that loses its quorum ends the stream instead of leaving it silent.
        metadata = (("hasleader", "true"), *link.token_metadata(token))
        # The stream of requests must stay open: etcd ends the watch with it.
        self._call = member.start(WATCH, iter(self._outbox.get, None), metadata=metadata)
        threading.Thread(target=self._read, name="etcd-watch", daemon=True).start()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._inbox.put(response)
            self._inbox.put(_ENDED)
        except grpc.RpcError as error:
            self._inbox.put(error)

    def next(self, timeout_s: float) -> Any:
        """The next response; None when there was none in time. Raises _Moved or StoreRefused."""
        try:
            item = self._inbox.get(timeout=timeout_s)
        except Empty:
            return None
        if item is _ENDED:
            raise _Moved("the stream ended")
        if isinstance(item, grpc.RpcError):
            raise _Moved(one_line(item)) from item
        return item

    def cancel(self) -> None:
        self._call.cancel()
        self._outbox.put(None)
        self._inbox.put(_ENDED)


class EtcdWatch:
    """The ``Watch`` of store.py. Iterate over it in one thread only."""

    def __init__(self, link: EtcdLink, prefix: str, after_revision: int) -> None:
        self._link = link
        self._prefix = prefix
        self._revision = after_revision
        self._denials = 0
        self._stream: _Stream | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Changes]:
        while not self._closed.is_set():
            member = self._link.current
            try:
                stream = self._open(member)
                if stream is None:
                    return
                yield from self._follow(stream)
            except (_Moved, StoreUnavailable) as reason:
                if self._closed.is_set():
                    return
                self._link.leave(member)
                log.info("watch of %s leaves etcd at %s: %s", self._prefix, member.target, reason)
                self._closed.wait(_PAUSE_S)
            finally:
                if self._stream is not None:
                    self._stream.cancel()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            if self._stream is not None:
                self._stream.cancel()

    def _open(self, member: Member) -> _Stream | None:
        create = _CREATE(
            key=self._prefix.encode() or b"\0",
            range_end=prefix_end(self._prefix),
            start_revision=self._revision + 1,
            progress_notify=True,
        )
        token = self._link.token()
        with self._lock:
            if self._closed.is_set():
                return None
            self._stream = _Stream(self._link, member, create, token)
            return self._stream

    def _follow(self, stream: _Stream) -> Iterator[Changes]:
        while True:
            response = stream.next(self._link.call_timeout_s)
            if self._closed.is_set():
                return
            if response is None:
                self._probe(stream)
                yield Changes(revision=self._revision, changes=())
            elif response.canceled:
                self._raise_cancelled(response, stream)
            elif response.created:
                stream.created = True
            else:
                self._denials = 0
                yield from self._take(response)

    def _probe(self, stream: _Stream) -> None:
        request = RANGE.request(key=self._prefix.encode() or b"\0", keys_only=True, limit=1)
        try:
            answer = self._link.attempt(stream.member, RANGE, request, self._link.call_timeout_s, token=stream.token)
        except grpc.RpcError as error:
            if judge(error) is Verdict.TOKEN_STALE:
                self._link.drop_token(stream.token)
            raise _Moved(f"a quiet stream, and {one_line(error)}") from error
        if not stream.created:
            raise _Moved("the watch was not confirmed")
        if answer.header.revision < self._revision:
            raise Compacted("etcd's revision went back: it was emptied, or restored from a backup")

    def _raise_cancelled(self, response: Any, stream: _Stream) -> None:
        if response.compact_revision:
            raise Compacted(f"revision {self._revision + 1} was compacted away at {response.compact_revision}")
        # etcd 3.4 says "permission denied" of a stale token too: a read, which renews the token, tells them apart.
        self._denials += 1
        self._link.drop_token(stream.token)
        self._link.call(RANGE, RANGE.request(key=self._prefix.encode() or b"\0", keys_only=True, limit=1))
        if self._denials >= _MAX_DENIALS:
            raise StoreRefused(f"etcd refuses to watch {self._prefix}: {response.cancel_reason}")
        raise _Moved(response.cancel_reason)

    def _take(self, response: Any) -> Iterator[Changes]:
        """The response's events, one Changes a revision. etcd never splits a revision over two responses."""
        by_revision: dict[int, list[Change]] = {}
        for event in response.events:
            revision = event.kv.mod_revision
            if revision > self._revision:
                entry = None if event.type == _DELETE else key_value(event.kv)
                by_revision.setdefault(revision, []).append(Change(key=event.kv.key.decode(), entry=entry))
        for revision in sorted(by_revision):
            self._revision = revision
            yield Changes(revision=revision, changes=tuple(by_revision[revision]))
        if not response.events:
            # A progress notice, in order with the events: nothing up to its revision is still to come.
            self._revision = max(self._revision, response.header.revision)
            yield Changes(revision=self._revision, changes=())
