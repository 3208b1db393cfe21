"""The way to etcd: one lazy channel a member, rotation, deadlines, the login token, and what each error means.

Not here: keys, leases and transactions (etcd.py), watches (etcd_watch.py). Nothing here knows what a request is for,
only whether it may be sent twice.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import randrange
from typing import Any
from urllib.parse import urlsplit

from elasticd.cluster.etcd_messages import message
from elasticd.cluster.quiet_grpc import grpc
from elasticd.errors import ConfigError, LeaseLost, StoreRefused, StoreUnavailable

log = logging.getLogger(__name__)

_OPTIONS = (
    # After an outage a member is tried again within half a second, not within grpc's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # The limit for one attempt to connect, whatever its name says.
    ("grpc.min_reconnect_backoff_ms", 2000),
    # etcd hangs up on clients that ping more often than every 5 s; the watch's own reads are the faster detector.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2000),
    # No ping beside each answer to measure the bandwidth: it costs what the answer costs, and windows of 64 KiB do.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_receive_message_length", -1),
    # A back-off that another store of this process caused is not ours.
    ("grpc.use_local_subchannel_pool", 1),
    # An etcd member is never behind a web proxy.
    ("grpc.enable_http_proxy", 0),
)
_PAUSE_S = 0.05
_MAX_TOKEN_RENEWALS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdTls:
    """PEM files. Without ``ca`` the system's roots are trusted; ``cert`` and ``key`` go with --client-cert-auth."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method of etcd's API, and the classes of its messages; ``rpc_of`` finds them."""

    path: str
    request: Any
    response: Any
    streaming: bool = False


def rpc_of(service: str, method: str, messages: str = "", *, streaming: bool = False) -> Rpc:
    name = messages or method
    request, response = (message(f"etcdserverpb.{name}{end}") for end in ("Request", "Response"))
    return Rpc(f"/etcdserverpb.{service}/{method}", request, response, streaming)


RANGE = rpc_of("KV", "Range")
PUT = rpc_of("KV", "Put")
DELETE = rpc_of("KV", "DeleteRange")
TXN = rpc_of("KV", "Txn")
COMPACT = rpc_of("KV", "Compact", "Compaction")
GRANT = rpc_of("Lease", "LeaseGrant")
REVOKE = rpc_of("Lease", "LeaseRevoke")
# A stream of one request and one answer is on the wire what a plain call is, and a plain call needs no threads.
KEEPALIVE = rpc_of("Lease", "LeaseKeepAlive")
WATCH = rpc_of("Watch", "Watch", streaming=True)
AUTHENTICATE = rpc_of("Auth", "Authenticate")


class Verdict(enum.Enum):
    """What an error of grpc says about the request that it answers."""

    NOT_DONE = enum.auto()  # certainly not executed: any request may be sent elsewhere
    UNSURE = enum.auto()  # may have been executed
    TOKEN_STALE = enum.auto()  # not executed: log in again
    LEASE_GONE = enum.auto()
    REFUSED = enum.auto()  # asking again cannot help


_BY_TEXT = (
    ("failed to connect to all addresses", Verdict.NOT_DONE),
    ("etcdserver: no leader", Verdict.NOT_DONE),
    ("raft proposal dropped", Verdict.NOT_DONE),
    ("etcdserver: too many requests", Verdict.NOT_DONE),
    ("etcdserver: rpc not supported for learner", Verdict.NOT_DONE),
    ("etcdserver: invalid auth token", Verdict.TOKEN_STALE),
    ("etcdserver: revision of auth store is old", Verdict.TOKEN_STALE),
    ("etcdserver: requested lease not found", Verdict.LEASE_GONE),
)
_REFUSING = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_TLS_SIGNS = ("certificate", "ssl", "tls", "tsi_")


def judge(error: Any) -> Verdict:
    text = str(error.details())
    for sign, verdict in _BY_TEXT:
        if sign in text:
            return verdict
    return Verdict.REFUSED if error.code() in _REFUSING else Verdict.UNSURE


def one_line(error: Any) -> str:
    return " ".join(str(error.details() or error.code().name).split())[:300]


def _refusal(error: Any, target: str) -> StoreRefused:
    text = one_line(error)
    if "user name is empty" in text:
        return StoreRefused(f"etcd at {target} asks for a login: set user and password_file under [etcd]")
    if "invalid user ID or password" in text:
        return StoreRefused(f"etcd at {target} refused the login: wrong user or password")
    if "permission denied" in text:
        return StoreRefused(f"etcd at {target}: permission denied: the user's role needs readwrite on /elasticd/")
    return StoreRefused(f"etcd at {target} refused: {text}")


class Member:
    """One endpoint and its channel, made when it is first needed."""

    def __init__(self, target: str, tls: grpc.ChannelCredentials | None) -> None:
        self.target = target
        self.answered_at = float("-inf")  # time.monotonic()
        self._tls = tls
        self._channel: grpc.Channel | None = None
        self._calls: dict[str, Any] = {}
        self._closed = False
        self._lock = threading.Lock()

    def start(self, rpc: Rpc, argument: Any, **options: Any) -> Any:
        """Starts a call; the answer, or for a stream the call itself. Raises grpc.RpcError, or StoreUnavailable."""
        try:
            return self._callable(rpc)(argument, **options)
        except ValueError as error:  # what grpc raises on a closed channel
            raise StoreUnavailable("the connection to etcd was closed by this process") from error

    def _callable(self, rpc: Rpc) -> Any:
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the connection to etcd was closed by this process")
            if rpc.path not in self._calls:
                channel = self._channel = self._channel or self._connect()
                make: Any = channel.stream_stream if rpc.streaming else channel.unary_unary
                self._calls[rpc.path] = make(
                    rpc.path,
                    request_serializer=rpc.request.SerializeToString,
                    response_deserializer=rpc.response.FromString,
                )
            return self._calls[rpc.path]

    def _connect(self) -> grpc.Channel:
        if self._tls is None:
            return grpc.insecure_channel(self.target, options=_OPTIONS)
        return grpc.secure_channel(self.target, self._tls, options=_OPTIONS)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._channel is not None:
                self._channel.close()


class EtcdLink:
    """Calls to whichever member answers. All threads share the choice of the member."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        call_timeout_s: float,
        tls: EtcdTls | None,
        credentials: tuple[str, str] | None,
    ) -> None:
        if not endpoints:
            raise ConfigError("etcd.endpoints is empty: name at least one, such as http://127.0.0.1:2379")
        self.members = tuple(_members(endpoints, tls))
        self.call_timeout_s = call_timeout_s
        self._credentials = credentials
        self._index = randrange(len(self.members))  # so that not all nodes lean on the first member
        self._token: str | None = None
        self._login = threading.Lock()
        self._closed = threading.Event()

    @property
    def current(self) -> Member:
        return self.members[self._index]

    def leave(self, member: Member) -> None:
        """Turns to the next member, unless another thread has done so already."""
        index = self._index
        if self.members[index] is member:
            self._index = (index + 1) % len(self.members)

    def find_living(self, key: bytes) -> None:
        """Makes sure that the current member lives, by reading ``key`` unless it answered a moment ago.

        For what cannot be repeated: a hung member would take the request and leave us unsure of it.
        """
        if time.monotonic() - self.current.answered_at > self.call_timeout_s:
            self.call(RANGE, RANGE.request(key=key, keys_only=True))

    def call(self, rpc: Rpc, request: Any, *, repeatable: bool = True) -> Any:
        """The answer of the first member that gives one, within ``call_timeout_s`` for each of them.

        A request that is not ``repeatable`` is sent again only when it certainly was not executed.
        """
        deadline_s = time.monotonic() + self.call_timeout_s * len(self.members)
        attempts = 0
        renewals = 0
        while True:
            member = self.current
            timeout_s = min(self.call_timeout_s, max(deadline_s - time.monotonic(), _PAUSE_S))
            # Without a leader a member would sit on what cannot be repeated until the deadline; this makes it say no.
            metadata = () if repeatable else (("hasleader", "true"),)
            token = self.token()
            try:
                return self.attempt(member, rpc, request, timeout_s, token=token, metadata=metadata)
            except grpc.RpcError as error:
                verdict = self._raise_if_final(error, member, repeatable=repeatable)
                if verdict is Verdict.TOKEN_STALE and renewals < _MAX_TOKEN_RENEWALS:
                    renewals += 1
                    self.drop_token(token)
                    continue
                self._move_on_or_raise(member, error, deadline_s)
            attempts += 1
            if attempts % len(self.members) == 0:
                self._closed.wait(_PAUSE_S)

    def attempt(
        self,
        member: Member,
        rpc: Rpc,
        request: Any,
        timeout_s: float,
        *,
        token: str | None,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        """One call to one member. Raises grpc.RpcError."""
        answer = member.start(rpc, request, timeout=timeout_s, metadata=metadata + self.token_metadata(token))
        member.answered_at = time.monotonic()
        return answer

    def _raise_if_final(self, error: Any, member: Member, *, repeatable: bool) -> Verdict:
        verdict = judge(error)
        if verdict is Verdict.LEASE_GONE:
            raise LeaseLost("the lease does not exist any more") from error
        if verdict is Verdict.REFUSED:
            raise _refusal(error, member.target) from error
        if verdict is Verdict.UNSURE and not repeatable:
            self.leave(member)
            raise StoreUnavailable(
                f"etcd at {member.target} gave no answer, the transaction may have happened: {one_line(error)}"
            ) from error
        return verdict

    def _move_on_or_raise(self, member: Member, error: Any, deadline_s: float) -> None:
        self.leave(member)
        text = one_line(error)
        if not self._closed.is_set() and time.monotonic() < deadline_s:
            log.debug("etcd at %s: %s; trying %s", member.target, text, self.current.target)
            return
        if any(sign in text.lower() for sign in _TLS_SIGNS):
            raise StoreRefused(f"etcd at {member.target}: the TLS handshake failed: {text}") from error
        raise StoreUnavailable(f"no etcd member answered in time; the last, {member.target}: {text}") from error

    def token(self) -> str | None:
        """The login's token, fetched when there is none. None without a login."""
        if self._credentials is None or self._token is not None:
            return self._token
        with self._login:
            if self._token is None:
                self._token = self._authenticate(*self._credentials)
            return self._token

    @staticmethod
    def token_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
        return (("token", token),) if token else ()

    def drop_token(self, token: str | None) -> None:
        with self._login:
            if self._token == token:
                self._token = None

    def _authenticate(self, user: str, password: str) -> str:
        deadline_s = time.monotonic() + self.call_timeout_s * len(self.members)
        request = AUTHENTICATE.request(name=user, password=password)
        while True:
            member = self.current
            try:
                # The password is hashed by etcd, slowly on purpose.
                return str(self.attempt(member, AUTHENTICATE, request, 2 * self.call_timeout_s, token=None).token)
            except grpc.RpcError as error:
                if "authentication is not enabled" in one_line(error):
                    return ""
                self._raise_if_final(error, member, repeatable=True)
                self._move_on_or_raise(member, error, deadline_s)
                self._closed.wait(_PAUSE_S)

    def close(self) -> None:
        self._closed.set()
        for member in self.members:
            member.close()


def _members(endpoints: Sequence[str], tls: EtcdTls | None) -> Iterator[Member]:
    secured: grpc.ChannelCredentials | None = None
    for endpoint in endpoints:
        parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
        try:
            known = parts.scheme in {"", "http", "https"} and parts.hostname and parts.port
        except ValueError:
            known = False
        if not known:
            raise ConfigError(f"etcd.endpoints: {endpoint!r} is not of the form http://host:port")
        secure = parts.scheme == "https" or (not parts.scheme and tls is not None)
        if secure and secured is None:
            secured = _channel_credentials(tls or EtcdTls())
        yield Member(parts.netloc.rpartition("@")[2], secured if secure else None)


def _channel_credentials(tls: EtcdTls) -> grpc.ChannelCredentials:
    if (tls.cert is None) != (tls.key is None):
        raise ConfigError("etcd.cert and etcd.key go together: one of them is missing")
    return grpc.ssl_channel_credentials(
        root_certificates=_read(tls.ca, "ca"),
        private_key=_read(tls.key, "key"),
        certificate_chain=_read(tls.cert, "cert"),
    )


def _read(path: Path | None, field: str) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"etcd.{field}: cannot read {path}: {error.strerror}") from error
