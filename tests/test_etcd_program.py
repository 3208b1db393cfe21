"""The etcd server program that is started here, and the messages that are spoken with it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import alive
from etcd_follower import patiently, until

from elasticd.cluster import embedded
from elasticd.cluster.embedded import EmbeddedEtcd, PortInUse
from elasticd.cluster.etcd import EtcdStore
from elasticd.errors import OperatorError

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


def test_etcd_dies_with_its_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHANING, str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        try:
            pid = int(parent.stdout.readline())
            assert alive(pid)
        finally:
            parent.send_signal(signal.SIGKILL)
    until(lambda: not alive(pid), timeout_s=5)


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
