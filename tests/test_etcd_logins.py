"""Who is let in by a real etcd: endpoints, passwords and roles, certificates; a refusal is the operator's."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from etcd_follower import PREFIX, Follower, patiently, until

from elasticd.cluster.embedded import EmbeddedEtcd, EtcdProcess, MemberSpec, free_port
from elasticd.cluster.etcd import EtcdStore, EtcdTls
from elasticd.cluster.etcd_link import EtcdLink, rpc_of
from elasticd.cluster.etcd_messages import message
from elasticd.cluster.store import Compare, Put
from elasticd.errors import ConfigError, StoreRefused, StoreUnavailable


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
