"""What only a real etcd shows: members that die, hang and come back, logins, TLS, and the server program itself."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from elasticd.cluster import embedded
from elasticd.cluster.embedded import EmbeddedEtcd, EtcdProcess, MemberSpec, PortInUse, free_port
from elasticd.cluster.etcd import EtcdStore, EtcdTls
from elasticd.cluster.etcd_link import EtcdLink, rpc_of
from elasticd.cluster.etcd_messages import message
from elasticd.cluster.store import Changes, Compare, Put
from elasticd.errors import Compacted, ConfigError, ElasticdError, OperatorError, StoreRefused, StoreUnavailable
from elasticd.testing.etcd_cluster import EtcdCluster

PREFIX = "/elasticd/test/"
_keys = count()


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.01)
    return value


def patiently(call: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Repeats what time mends."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except StoreUnavailable:
            assert time.monotonic() < end
            time.sleep(0.02)


class Follower:
    """Watches a prefix in a thread and keeps all that it sees."""

    def __init__(self, store: EtcdStore, prefix: str, after_revision: int) -> None:
        self.seen: list[Changes] = []
        self.signs = 0
        self.error: BaseException | None = None
        self._watch = store.watch(prefix, after_revision)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for changes in self._watch:
                self.signs += 1
                if changes.changes:
                    self.seen.append(changes)
        except ElasticdError as error:
            self.error = error

    @property
    def values(self) -> list[str]:
        return [c.entry.value for changes in self.seen for c in changes.changes if c.entry is not None]

    def next_sign(self) -> None:
        now = self.signs
        until(lambda: self.signs > now)

    def close(self) -> None:
        self._watch.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    with EtcdCluster(tmp_path_factory.mktemp("cluster"), heartbeat_ms=50, election_ms=500) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: EtcdCluster) -> Iterator[EtcdCluster]:
    running_cluster.heal()
    yield running_cluster
    running_cluster.heal()


@pytest.fixture
def store(cluster: EtcdCluster) -> Iterator[EtcdStore]:
    store = EtcdStore(cluster.endpoints)
    yield store
    store.close()


@pytest.fixture
def key() -> str:
    return f"{PREFIX}{next(_keys)}/k"


def on(store: EtcdStore, cluster: EtcdCluster, *, leader: bool) -> int:
    """Turns the store to the leader, or to a follower; that member's index."""
    leading = cluster.leader()
    wanted = leading if leader else (leading + 1) % 3
    link = store._link
    while cluster.index_of(store.current_endpoint) != wanted:
        link.leave(link.current)
    store.get(PREFIX)
    assert cluster.index_of(store.current_endpoint) == wanted
    return wanted


# --- Members that die or hang ---


@pytest.mark.parametrize("leader", [False, True], ids=["follower", "leader"])
def test_a_killed_member_costs_no_call(cluster: EtcdCluster, store: EtcdStore, key: str, leader: bool) -> None:
    store.put(key, "before")
    cluster.kill(on(store, cluster, leader=leader))
    started = time.monotonic()
    store.put(key, "after")
    took_s = time.monotonic() - started
    found = store.get(key)
    assert found is not None
    assert found.value == "after"
    assert took_s < (3.0 if leader else 1.0)


@pytest.mark.parametrize("leader", [False, True], ids=["follower", "leader"])
def test_a_hung_member_costs_one_timeout(cluster: EtcdCluster, store: EtcdStore, key: str, leader: bool) -> None:
    cluster.pause(on(store, cluster, leader=leader))
    started = time.monotonic()
    store.put(key, "1")
    assert time.monotonic() - started < 3.0


def test_txn_on_a_member_that_hung_long_ago_is_no_gamble(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    member = on(store, cluster, leader=False)
    cluster.pause(member)
    store._link.current.answered_at -= 10.0
    assert store.txn([Compare(key=key, create_revision=0)], [Put(key=key, value="1")]).succeeded


def test_txn_is_not_repeated_after_a_deadline(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    member = on(store, cluster, leader=False)
    cluster.pause(member)
    store._link.current.answered_at = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.txn([Compare(key=key, create_revision=0)], [Put(key=key, value="1")])
    # The member that hangs may still do it; had it been repeated on another one, the key would be there now.
    assert cluster.index_of(store.current_endpoint) != member
    assert store.get(key) is None


def test_txn_goes_through_when_its_member_was_killed_before(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    member = on(store, cluster, leader=False)
    cluster.kill(member)
    patiently(lambda: store.txn([Compare(key=key, mod_revision=0)], [Put(key=key, value="1")]))
    assert store.get(key) is not None


def test_a_lease_outlives_its_member(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    lease = store.grant(5)
    store.put(key, "1", lease)
    cluster.kill(on(store, cluster, leader=True))
    assert patiently(lambda: store.keepalive(lease)) > 0
    assert store.get(key) is not None


def test_without_quorum_nobody_answers(cluster: EtcdCluster, key: str) -> None:
    store = EtcdStore(cluster.endpoints, call_timeout_s=0.4)
    revision = store.put(key, "1")
    follower = Follower(store, key, revision)
    left = on(store, cluster, leader=False)
    for index in {0, 1, 2} - {left}:
        cluster.kill(index)
    started = time.monotonic()
    for call in (lambda: store.get(key), lambda: store.txn([], [Put(key=key, value="x")])):
        with pytest.raises(StoreUnavailable):
            call()
    assert time.monotonic() - started < 8.0
    silent = follower.signs
    with pytest.raises(StoreUnavailable):
        store.get(key)
    assert follower.signs == silent
    cluster.heal()
    patiently(lambda: store.put(key, "2"))
    until(lambda: follower.values and follower.values[-1] == "2")
    follower.close()
    store.close()


# --- Watches ---


def changed_while(store: EtcdStore, key: str, follower: Follower, disturb: Callable[[], None]) -> None:
    """Writes numbers before, during and after the disturbance; the watch must show each revision once, in order."""
    written: list[int] = []
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            revision = patiently(lambda n=number: store.put(key, str(n)))
            written.append(revision)
            number += 1
            stop.wait(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        until(lambda: len(follower.seen) > 20)
        disturb()
        after = len(written)
        until(lambda: len(written) > after + 50)
    finally:
        stop.set()
        writer.join()
    until(lambda: follower.seen and follower.seen[-1].revision >= written[-1])
    revisions = [changes.revision for changes in follower.seen]
    assert revisions == sorted(set(revisions)), "doubled or out of order"
    missing = set(written) - set(revisions)
    assert not missing
    # A put that was repeated has revisions that its caller never saw; nothing else may be there.
    assert len(revisions) - len(written) <= 5
    assert follower.error is None


@pytest.mark.parametrize("fault", ["kill follower", "kill leader", "pause follower", "pause leader"])
def test_watch_moves_on_and_misses_nothing(cluster: EtcdCluster, store: EtcdStore, key: str, fault: str) -> None:
    verb, _, role = fault.partition(" ")
    member = on(store, cluster, leader=role == "leader")
    other = EtcdStore(cluster.endpoints)
    follower = Follower(store, key, store.put(key, "start"))
    until(lambda: follower.signs)
    changed_while(other, key, follower, lambda: getattr(cluster, verb)(member))
    follower.close()
    other.close()


def test_all_members_down_and_back(cluster: EtcdCluster, store: EtcdStore, key: str) -> None:
    follower = Follower(store, key, store.put(key, "start"))

    def outage() -> None:
        cluster.kill_all()
        with pytest.raises(StoreUnavailable):
            store.get(key)
        time.sleep(2.0)  # the length of the outage: back-off must grow, and not matter
        cluster.start_all()

    changed_while(store, key, follower, outage)
    follower.close()


def test_an_emptied_store_is_told_as_compacted(tmp_path: Path) -> None:
    with EmbeddedEtcd(tmp_path / "data") as etcd:
        store = EtcdStore([etcd.endpoint])
        for i in range(10):
            revision = store.put(PREFIX, str(i))
        follower = Follower(store, PREFIX, revision)
        follower.next_sign()
        etcd.process.kill()
        shutil.rmtree(tmp_path / "data")
        etcd.restart()
        assert isinstance(until(lambda: follower.error), Compacted)
        store.close()


# --- Endpoints, logins, TLS ---


@pytest.mark.parametrize("endpoint", ["", "ftp://h:1", "http://h", "h", "http://h:x", "http://:2379"])
def test_a_malformed_endpoint_is_named(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"etcd\.endpoints"):
        EtcdStore([endpoint])


def test_no_endpoints() -> None:
    with pytest.raises(ConfigError, match=r"etcd\.endpoints"):
        EtcdStore([])


def test_nobody_there_is_unavailable_in_time() -> None:
    store = EtcdStore([f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"], call_timeout_s=0.3)
    started = time.monotonic()
    for call in (lambda: store.get("/a"), lambda: store.txn([], [Put(key="/a", value="1")])):
        with pytest.raises(StoreUnavailable):
            call()
    assert time.monotonic() - started < 3.0
    store.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[EmbeddedEtcd]:
    """An etcd with logins: root, and elasticd, which may write under /elasticd/."""
    with EmbeddedEtcd(tmp_path / "data", extra_args=("--bcrypt-cost", "4")) as etcd:
        link = EtcdLink([etcd.endpoint], call_timeout_s=2.0, tls=None, credentials=None)

        def auth(method: str, **fields: Any) -> None:
            rpc = rpc_of("Auth", method, f"Auth{method.removeprefix('Auth')}")
            link.call(rpc, rpc.request(**fields))

        auth("UserAdd", name="root", password="r00t")
        auth("UserGrantRole", user="root", role="root")
        auth("UserAdd", name="elasticd", password="secret")
        auth("RoleAdd", name="elasticd")
        everything = message("authpb.Permission")(permType=2, key=b"/elasticd/", range_end=b"/elasticd0")
        auth("RoleGrantPermission", name="elasticd", perm=everything)
        auth("UserGrantRole", user="elasticd", role="elasticd")
        auth("AuthEnable")
        link.close()
        yield etcd


def refusal(store: EtcdStore, key: str = PREFIX) -> str:
    with pytest.raises(StoreRefused) as caught:
        store.put(key, "1")
    store.close()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_logins(guarded: EmbeddedEtcd) -> None:
    endpoints = [guarded.endpoint]
    refusal(EtcdStore(endpoints))
    refusal(EtcdStore(endpoints, credentials=("elasticd", "wrong")))
    refusal(EtcdStore(endpoints, credentials=("nobody", "secret")))
    refusal(EtcdStore(endpoints, credentials=("elasticd", "secret")), "/elsewhere")
    store = EtcdStore(endpoints, credentials=("elasticd", "secret"))
    lease = store.grant(5)
    revision = store.put(PREFIX, "1", lease)
    assert store.keepalive(lease) > 0
    assert store.txn([Compare(key=PREFIX, mod_revision=revision)], [Put(key=PREFIX, value="2")]).succeeded
    assert len(store.snapshot(PREFIX).entries) == 1
    store.revoke(lease)
    store.close()


def test_a_watch_beyond_the_role_is_refused(guarded: EmbeddedEtcd) -> None:
    store = EtcdStore([guarded.endpoint], credentials=("elasticd", "secret"))
    with pytest.raises(StoreRefused):
        next(iter(store.watch("/elsewhere/", 0)))
    store.close()


def test_a_token_that_etcd_forgot_is_renewed(guarded: EmbeddedEtcd) -> None:
    store = EtcdStore([guarded.endpoint], credentials=("elasticd", "secret"))
    follower = Follower(store, PREFIX, store.put(PREFIX, "1"))
    follower.next_sign()
    guarded.process.kill()
    guarded.restart()  # simple tokens live in memory
    patiently(lambda: store.put(PREFIX, "2"))
    until(lambda: follower.values == ["2"])
    store._link._token = "stale.1"
    store.put(PREFIX, "3")
    assert store.txn([], [Put(key=PREFIX, value="4")]).succeeded
    until(lambda: follower.values == ["2", "3", "4"])
    store._link._token = "stale.2"
    fresh = Follower(store, PREFIX, 0)
    until(lambda: fresh.values[-1:] == ["4"])
    for each in (follower, fresh):
        assert each.error is None
        each.close()
    store.close()


def test_credentials_for_an_etcd_without_logins_do_no_harm(cluster: EtcdCluster, key: str) -> None:
    store = EtcdStore(cluster.endpoints, credentials=("elasticd", "secret"))
    store.put(key, "1")
    assert store.get(key) is not None
    store.close()


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make certificates")
    folder = tmp_path_factory.mktemp("pki")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for ca in ("ca", "other-ca"):
        _openssl(folder, "req", "-x509", *curve, "-keyout", f"{ca}.key", "-out", f"{ca}.pem", "-subj", f"/CN={ca}")
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    for name, ca in (("server", "ca"), ("client", "ca"), ("stranger", "other-ca")):
        _openssl(folder, "req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        sign = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-extfile", "ext", "-days", "2")
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem")
    return folder


@pytest.fixture
def tls_endpoint(certificates: Path, tmp_path: Path) -> Iterator[str]:
    files = {"--cert-file": "server.pem", "--key-file": "server.key", "--trusted-ca-file": "ca.pem"}
    spec = MemberSpec(
        name="tls",
        data_dir=tmp_path / "data",
        host="127.0.0.1",
        client_port=free_port(),
        peer_port=free_port(),
        client_scheme="https",
        health_port=free_port(),
        extra_args=("--client-cert-auth", *(part for k, v in files.items() for part in (k, str(certificates / v)))),
    )
    member = EtcdProcess(spec)
    member.start()
    try:
        member.wait_ready()
        yield spec.endpoint
    finally:
        member.kill()


def test_tls(tls_endpoint: str, certificates: Path) -> None:
    def tls(ca: str, name: str | None) -> EtcdTls:
        cert, key = (certificates / f"{name}{end}" if name else None for end in (".pem", ".key"))
        return EtcdTls(ca=certificates / ca, cert=cert, key=key)

    for endpoint in (tls_endpoint, tls_endpoint.removeprefix("https://")):
        store = EtcdStore([endpoint], tls=tls("ca.pem", "client"))
        store.put(PREFIX, "1")
        assert store.get(PREFIX) is not None
        store.close()
    for bad in (tls("other-ca.pem", "client"), tls("ca.pem", "stranger"), tls("ca.pem", None)):
        refusal(EtcdStore([tls_endpoint], tls=bad))


def test_certificate_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"etcd\.ca"):
        EtcdStore(["https://127.0.0.1:1"], tls=EtcdTls(ca=tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match=r"etcd\.cert"):
        EtcdStore(["https://127.0.0.1:1"], tls=EtcdTls(cert=tmp_path / "none.pem"))


# --- The messages ---


COEXIST = """
import sys
from google.protobuf import descriptor_pb2, descriptor_pool
import elasticd.cluster.etcd_messages as ours
kv = descriptor_pb2.FileDescriptorProto()
kv.ParseFromString(ours._serialized_descriptor(ours._definitions_folder() / "kv_pb2.py"))
kv.name = "mvccpb/kv.proto"  # another client's copy: the same messages out of a file of another name
descriptor_pool.Default().AddSerializedFile(kv.SerializeToString())
request = ours.message("etcdserverpb.PutRequest")(key=b"k", value=b"v", lease=7)
again = ours.message("etcdserverpb.PutRequest").FromString(request.SerializeToString())
assert (again.key, again.value, again.lease) == (b"k", b"v", 7)
assert ours.message("mvccpb.KeyValue").DESCRIPTOR.file.pool is not descriptor_pool.Default()
assert "etcd3" not in sys.modules
import google.protobuf
print(google.protobuf.__version__)
"""


def test_messages_live_beside_another_client_in_the_default_pool() -> None:
    subprocess.run([sys.executable, "-c", COEXIST], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.25", "5.29", "6.33", "7.34"])
def test_messages_load_with_every_protobuf_of_the_range(version: str, tmp_path: Path) -> None:
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        tmp_path,
        f"protobuf~={version}.0",
    ]
    if subprocess.run(install, check=False, capture_output=True, timeout=100).returncode != 0:
        pytest.skip(f"protobuf {version} cannot be installed here")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COEXIST], env=environment, check=True, timeout=60, capture_output=True)
    assert done.stdout.decode().startswith(version)


# --- The server program ---


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)), EmbeddedEtcd(tmp_path / "data", client_port=port):
            pass


@pytest.mark.net
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip to make a namespace")
def test_etcd_in_a_network_namespace(tmp_path: Path) -> None:
    name = f"etcd{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        inside = ["ip", "netns", "exec", name]
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
        with EmbeddedEtcd(tmp_path / "data", client_port=2379, command_prefix=inside) as etcd:
            assert Path(f"/proc/{etcd.pid}/comm").read_text().strip() == "etcd"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_data_stays_over_a_kill(tmp_path: Path) -> None:
    with EmbeddedEtcd(tmp_path / "data") as etcd:
        store = EtcdStore([etcd.endpoint])
        store.put("/a", "1")
        etcd.process.kill()
        etcd.restart()
        assert patiently(lambda: store.get("/a")).value == "1"
        store.close()


ORPHANING = """
import sys, time
from pathlib import Path
from elasticd.cluster.embedded import EmbeddedEtcd
etcd = EmbeddedEtcd(Path(sys.argv[1]))
etcd.start()
print(etcd.pid, flush=True)
time.sleep(60)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_etcd_dies_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHANING, str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        try:
            pid = int(parent.stdout.readline())
            assert _alive(pid)
        finally:
            parent.send_signal(signal.SIGKILL)
    until(lambda: not _alive(pid), timeout_s=5)


def test_etcd_is_found_on_path_or_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    embedded.find_etcd.cache_clear()
    try:
        monkeypatch.setenv("PATH", str(tmp_path))
        packaged = embedded._packaged_etcd()
        if packaged is not None:
            assert embedded.find_etcd() == packaged
        embedded.find_etcd.cache_clear()
        monkeypatch.setattr(embedded, "_packaged_etcd", lambda: None)
        with pytest.raises(OperatorError, match="install etcd"):
            embedded.find_etcd()
    finally:
        embedded.find_etcd.cache_clear()


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ((3, 3, 27), True),
        ((3, 4, 21), True),
        ((3, 4, 22), False),
        ((3, 5, 1), True),
        ((3, 5, 6), False),
        ((3, 6, 0), False),
    ],
)
def test_versions_with_known_faults_are_warned_of(
    version: tuple[int, ...], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        embedded._warn_of_version(Path("etcd"), version)
    assert bool(caplog.records) is warned
