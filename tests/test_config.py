"""Configuration and job files: what is wrong is refused, in one line that names the field, before anything is done."""

from __future__ import annotations

import contextlib
import dataclasses
import ssl
import subprocess
from pathlib import Path

import pytest

from elasticd.addresses import default_node_id, find_address, is_loopback
from elasticd.config import (
    DaemonConfig,
    DetectionConfig,
    EtcdConfig,
    LinksConfig,
    MemoryConfig,
    MetricsConfig,
    checked,
    config_for_run,
    load_daemon,
    load_etcd,
)
from elasticd.core.model import JobSpec, Topology
from elasticd.errors import ConfigError
from elasticd.job_file import load_job

ETCD = '[etcd]\nendpoints = ["http://127.0.0.1:2379"]\n'
JOB = 'id = "train-1"\ncommand = ["train.py", "--fast"]\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.toml"


def daemon(file: Path, text: str, **environment: str) -> DaemonConfig:
    file.write_text(text)
    return load_daemon(str(file), environment)


def job(file: Path, text: str) -> JobSpec:
    file.write_text(text)
    return load_job(str(file))


# --- the daemon ---


def test_everything_that_can_be_said(file: Path) -> None:
    config = daemon(
        file,
        """
        [node]
        id = "n-1"
        address = "10.0.0.1"
        peer_port = 7000
        zone = "z"
        rack = "r"
        switch = "s"
        run_dir = "/run/x"
        log_dir = "/log/x"
        python = "/usr/bin/python3"
        history_file = "/tmp/h"
        [etcd]
        endpoints = ["https://a:2379", "https://b:2379"]
        ca = "/ca"
        cert = "/cert"
        key = "/key"
        user = "u"
        password_file = "/password"
        [links]
        ca = "/lca"
        cert = "/lcert"
        key = "/lkey"
        [metrics]
        address = "10.0.0.2"
        port = 0
        tls_cert = "/mcert"
        tls_key = "/mkey"
        [detection]
        heartbeat_s = 0.2
        dead_after_s = 1
        lease_ttl_s = 9
        [memory]
        limit_bytes = 5
        folder = "/tmp"
        port = 7001
        """,
    )
    etcd = EtcdConfig(
        endpoints=("https://a:2379", "https://b:2379"),
        ca="/ca",
        cert="/cert",
        key="/key",
        user="u",
        password_file="/password",
    )
    assert config == DaemonConfig(
        node_id="n-1",
        address="10.0.0.1",
        peer_port=7000,
        topology=Topology(zone="z", rack="r", switch="s"),
        run_dir="/run/x",
        log_dir="/log/x",
        python="/usr/bin/python3",
        history_file="/tmp/h",
        etcd=etcd,
        links=LinksConfig(ca="/lca", cert="/lcert", key="/lkey"),
        metrics=MetricsConfig(address="10.0.0.2", port=0, tls_cert="/mcert", tls_key="/mkey"),
        detection=DetectionConfig(heartbeat_s=0.2, dead_after_s=1.0, lease_ttl_s=9),
        memory=MemoryConfig(limit_bytes=5, folder="/tmp", port=7001),
    )
    assert load_etcd(str(file)) == etcd
    assert load_etcd(str(file), " http://c:1 ,").endpoints == ("http://c:1",)


def test_the_least_that_must_be_said(file: Path) -> None:
    config = daemon(file, ETCD)
    assert config.node_id == default_node_id()
    assert config.address == config.metrics.address == "127.0.0.1"  # this host's, on the way to etcd
    assert config == DaemonConfig(
        node_id=config.node_id,
        address="127.0.0.1",
        etcd=EtcdConfig(endpoints=("http://127.0.0.1:2379",)),
        metrics=MetricsConfig(address="127.0.0.1"),
    )


def test_the_environment_goes_before_the_file(file: Path) -> None:
    text = '[node]\nid = "file"\naddress = "127.0.0.9"\n' + ETCD
    config = daemon(
        file, text, ELASTICD_NODE_ID="env", ELASTICD_ADDRESS="127.0.0.8", ELASTICD_ENDPOINTS="http://a:1, http://b:2,"
    )
    assert (config.node_id, config.address, config.etcd.endpoints) == ("env", "127.0.0.8", ("http://a:1", "http://b:2"))
    config = daemon(file, text, ELASTICD_NODE_ID="", ELASTICD_ADDRESS="", ELASTICD_ENDPOINTS="")
    assert (config.node_id, config.address, config.etcd.endpoints) == ("file", "127.0.0.9", ("http://127.0.0.1:2379",))


NODE = "[node]\n{}\n" + ETCD
WRONG_FOR_A_DAEMON = [
    ("", "etcd.endpoints is empty"),
    ("[etcd]\nendpoints = []", "etcd.endpoints is empty"),
    ("[etcd]\nendpoints = ['', ' ']", "etcd.endpoints is empty"),
    ("[etcd]\nendpoints = 'http://a:1'", "etcd.endpoints: input should be a valid list"),
    ("[etcd]\nendpoints = [1]", "etcd.endpoints.0: input should be a valid string"),
    ("[etcd]\nendpoint = []", "etcd.endpoint: unknown key"),
    ("[etc]\nendpoints = []", "etc: unknown key"),
    (ETCD + "user = 'u'", "etcd.password_file is missing"),
    (ETCD + "cert = '/c'", "etcd.key missing: cert, key belong together"),
    (ETCD + "key = '/k'", "etcd.cert missing: cert, key belong together"),
    (NODE.format("id = 'a b'"), "node.id: 'a b': letters, digits"),
    (NODE.format("id = '-a'"), "node.id: '-a': letters, digits"),
    (NODE.format(f"id = '{'x' * 64}'"), "63 at most"),
    (NODE.format('id = "a\\n"'), "node.id: 'a\\\\n': letters"),
    (NODE.format("id = 3"), "node.id: input should be a valid string"),
    (NODE.format("peer_port = 65536"), "node.peer_port: input should be less than or equal to 65535"),
    (NODE.format("peer_port = '1'"), "node.peer_port: input should be a valid integer"),
    (NODE.format("peer_port = true"), "node.peer_port: input should be a valid integer"),
    (NODE.format("adress = 'x'"), "node.adress: unknown key"),
    (NODE.format("address = '0.0.0.0'"), "node.address 0.0.0.0 is not one that other nodes can reach"),
    (NODE.format("address = '::'"), "node.address :: is not one"),
    (NODE.format("address = '10.0.0.1'"), "links to other daemons on 10.0.0.1 would be plain text"),
    (NODE.format("address = 'gpu-7'"), "links to other daemons on gpu-7 would be plain text"),
    (ETCD + "[links]\nca = '/a'", "links.cert, key missing: ca, cert, key belong together"),
    (ETCD + "[links]\nca = '/a'\ncert = '/b'", "links.key missing"),
    (ETCD + "[links]\ninsecure = 'yes'", "links.insecure: input should be a valid boolean"),
    (ETCD + "[metrics]\ntls_cert = '/a'", "metrics.tls_key missing"),
    (ETCD + "[metrics]\ntls_key = '/a'", "metrics.tls_cert missing"),
    (ETCD + "[metrics]\nport = -1", "metrics.port: input should be greater than or equal to 0"),
    (ETCD + "[detection]\nheartbeat_s = 0", "detection.heartbeat_s: input should be greater than 0"),
    (ETCD + "[detection]\nheartbeat_s = 0.3", "detection.dead_after_s must be at least twice detection.heartbeat_s"),
    (ETCD + "[detection]\nlease_ttl_s = 1", "detection.lease_ttl_s: input should be greater than or equal to 2"),
    (ETCD + "[memory]\nlimit_bytes = -1", "memory.limit_bytes: input should be greater than or equal to 0"),
    (ETCD + '[memory]\nfolder = "/no/such"', "memory.folder /no/such: no such folder; name one on tmpfs"),
    (ETCD + "[detection]\nlease_ttl_s = 5.5", "detection.lease_ttl_s: input should be a valid integer"),
    ("[etcd", "not TOML"),
    ("a = 1\na = 2", "not TOML"),
]


@pytest.mark.parametrize(("text", "why"), WRONG_FOR_A_DAEMON, ids=[why for _, why in WRONG_FOR_A_DAEMON])
def test_what_is_wrong_with_a_daemons_file_is_named(file: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        daemon(file, text)
    assert "\n" not in str(caught.value)


def test_several_mistakes_are_said_at_once(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"node.zone: .*; .*etcd.endpoint: unknown key"):
        daemon(file, "[node]\nzone = 1\n[etcd]\nendpoint = []")


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    for load in (load_daemon, load_job, load_etcd):
        with pytest.raises(ConfigError, match=r"nothing.toml: No such file or directory"):
            load(str(tmp_path / "nothing.toml"))
        with pytest.raises(ConfigError, match="Is a directory"):
            load(str(tmp_path))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        load_daemon(str(tmp_path / "binary"))


def test_a_wrong_environment_is_refused_like_a_wrong_file(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"node.id 'a/b'"):
        daemon(file, ETCD, ELASTICD_NODE_ID="a/b")
    with pytest.raises(ConfigError, match="would be plain text"):
        daemon(file, ETCD, ELASTICD_ADDRESS="10.1.1.1")
    with pytest.raises(ConfigError, match=r"etcd.endpoints is empty"):
        daemon(file, ETCD, ELASTICD_ENDPOINTS=",")


def test_plain_text_off_loopback_only_when_said_so(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"links.insecure = true"):
        daemon(file, NODE.format("address = '10.0.0.1'"))
    assert not daemon(file, NODE.format("address = '10.0.0.1'") + "[links]\ninsecure = true").links.tls
    assert daemon(file, NODE.format("address = '127.9.9.9'")).links == LinksConfig()
    tls = "[links]\nca = '/a'\ncert = '/b'\nkey = '/c'"
    assert daemon(file, NODE.format("address = '10.0.0.1'") + tls).links.tls


@pytest.mark.parametrize(
    ("address", "is_one"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("10.0.0.1", False),
     ("128.0.0.1", False), ("localhost.example", False), ("", False)],
)  # fmt: skip
def test_what_counts_as_loopback(address: str, is_one: bool) -> None:
    assert is_loopback(address) is is_one


def test_the_address_on_the_way_to_etcd() -> None:
    assert find_address(("http://127.0.0.1:2379",)) == "127.0.0.1"
    assert find_address(("127.0.0.1",)) == "127.0.0.1"
    assert find_address(("http://no-such-host.invalid:1", "http://127.0.0.1:1")) == "127.0.0.1"
    assert find_address(()) == "127.0.0.1"


def test_the_password_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    etcd = EtcdConfig(user="u", password_file=str(tmp_path / "password"))
    assert etcd.credentials() == ("u", "secret")
    assert EtcdConfig().credentials() is None
    with pytest.raises(ConfigError, match=r"etcd.password_file .*gone.*: No such file"):
        EtcdConfig(user="u", password_file=str(tmp_path / "gone")).credentials()


def test_certificates_of_links_are_loaded_or_refused_by_field(tmp_path: Path) -> None:
    assert LinksConfig().contexts() is None
    key, cert = tmp_path / "key", tmp_path / "cert"
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=n", "-days", "2"]
    subprocess.run(["openssl", "req", "-x509", *made, "-keyout", key, "-out", cert], check=True, capture_output=True)
    contexts = LinksConfig(ca=str(cert), cert=str(cert), key=str(key)).contexts()
    assert contexts is not None
    assert all(context.verify_mode is ssl.CERT_REQUIRED for context in contexts)
    for wrong in ({"key": str(cert)}, {"ca": str(key)}, {"cert": str(tmp_path / "gone")}):
        broken = LinksConfig(**{"ca": str(cert), "cert": str(cert), "key": str(key), **wrong})
        with pytest.raises(ConfigError, match=r"links.ca, links.cert or links.key cannot be used"):
            broken.contexts()


def test_a_node_of_one_run_shares_a_machine_with_others() -> None:
    one, two = (config_for_run(("http://127.0.0.1:1",), run_dir=f"/tmp/{n}") for n in "ab")
    assert one.node_id != two.node_id
    assert (one.peer_port, one.metrics.port, one.memory.port, one.links.insecure) == (0, 0, 0, True)
    base = DaemonConfig(node_id="n", address="10.0.0.1", links=LinksConfig(ca="/a", cert="/b", key="/c"))
    of_base = config_for_run(("http://127.0.0.1:1",), run_dir="/tmp/c", base=base)
    assert of_base.links == base.links  # a file that demands certificates is not weakened


@pytest.mark.parametrize(("in_file", "by_flag", "allowed"), [(None, 0, True), (0, 1 << 30, False), (0, None, True)])
def test_the_folder_of_copies_is_asked_for_as_the_flag_would_have_them(
    in_file: int | None, by_flag: int | None, allowed: bool
) -> None:
    memory = MemoryConfig(limit_bytes=in_file, folder="/no/such")
    base = DaemonConfig(node_id="n", address="127.0.0.1", memory=memory)
    with contextlib.nullcontext() if allowed else pytest.raises(ConfigError, match=r"memory\.folder /no/such"):
        config_for_run(("http://127.0.0.1:1",), run_dir="/tmp/d", base=base, memory_bytes=by_flag)


def test_checked_changes_nothing_that_was_said() -> None:
    config = DaemonConfig(node_id="n", address="127.0.0.1", metrics=MetricsConfig(address="127.0.0.3"))
    assert checked(config) == config
    assert checked(dataclasses.replace(config, metrics=MetricsConfig())).metrics.address == "127.0.0.1"


# --- jobs ---


def test_a_job_file_as_a_spec(file: Path) -> None:
    spec = job(
        file,
        JOB
        + """
        nodes = "2:4"
        nproc_per_node = 8
        module = true
        max_restarts = 7
        working_dir = "/w"
        user = "u"
        log_dir = "/l"
        warm = false
        stop_timeout_s = 9
        boundary_timeout_s = 1.5
        spares = 2
        straggler_factor = 2.5
        straggler_after_s = 7
        [env]
        B = "2"
        A = ""
        """,
    )
    assert spec == JobSpec(
        job_id="train-1",
        min_nodes=2,
        max_nodes=4,
        command=("train.py", "--fast"),
        nproc_per_node="8",
        is_module=True,
        max_restarts=7,
        working_dir="/w",
        env=(("A", ""), ("B", "2")),
        user="u",
        log_dir="/l",
        warm=False,
        stop_timeout_s=9.0,
        boundary_timeout_s=1.5,
        spares=2,
        straggler_factor=2.5,
        straggler_after_s=7.0,
    )


def test_stragglers_of_a_job_may_be_left_alone(file: Path) -> None:
    assert job(file, JOB + "stragglers = false\nstraggler_factor = 2").straggler_factor == 0.0




@pytest.mark.parametrize(
    ("text", "nodes"),
    [("", (1, 1)), ("nodes = '3'", (3, 3)), ("nodes = '1:9'", (1, 9)), ("min_nodes = 2", (2, 2)),
     ("min_nodes = 2\nmax_nodes = 5", (2, 5)), ("max_nodes = 5", (1, 5))],
)  # fmt: skip
def test_nodes_are_said_in_one_of_two_ways(file: Path, text: str, nodes: tuple[int, int]) -> None:
    spec = job(file, JOB + text)
    assert (spec.min_nodes, spec.max_nodes) == nodes


@pytest.mark.parametrize("word", ["auto", "gpu", "cpu"])
def test_torchruns_words_for_the_number_of_workers(file: Path, word: str) -> None:
    assert job(file, JOB + f"nproc_per_node = '{word}'").nproc_per_node == word


WRONG_FOR_A_JOB = [
    ("", "id: field required; .*command: field required"),
    ("id = 'a'", "command: field required"),
    ("id = 'a'\ncommand = []", "command: list should have at least 1 item"),
    ("id = 'a'\ncommand = 'train.py'", "command: input should be a valid list"),
    ("id = ''\ncommand = ['x']", "id: '': letters, digits"),
    ("id = 'a/../b'\ncommand = ['x']", "id: 'a/../b': letters, digits"),
    (JOB + "comand = []", "comand: unknown key"),
    (JOB + "ranks_per_replica = 0", "ranks_per_replica: input should be greater than or equal to 1"),
    (JOB + "nodes = '1:3'\nranks_per_replica = 4", "1 to 3 nodes with 1 ranks each never make whole replicas of 4 ranks"),
    (JOB + "nodes = 2", "nodes: input should be a valid string"),
    (JOB + "nodes = '2-3'", "nodes: '2-3' is not of the form MIN:MAX"),
    (JOB + "nodes = '3:2'", "nodes: the minimum 3 is above the maximum 2"),
    (JOB + "nodes = '0'", "nodes: the minimum 0 is above the maximum 0, or below 1"),
    (JOB + "nodes = '1:2'\nmax_nodes = 2", "nodes: says the same as min_nodes and max_nodes"),
    (JOB + "min_nodes = 3\nmax_nodes = 2", "min_nodes: 3 is above max_nodes, which is 2"),
    (JOB + "min_nodes = 0", "min_nodes: input should be greater than or equal to 1"),
    (JOB + "nproc_per_node = 0", "nproc_per_node: 0 is neither a number above 0 nor 'auto'"),
    (JOB + "nproc_per_node = 'all'", "nproc_per_node: 'all' is neither"),
    (JOB + "nproc_per_node = true", "nproc_per_node: True is neither"),
    (JOB + "nproc_per_node = 2.0", "nproc_per_node: 2.0 is neither"),
    (JOB + "max_restarts = -1", "max_restarts: input should be greater than or equal to 0"),
    (JOB + "max_restarts = '3'", "max_restarts: input should be a valid integer"),
    (JOB + "stop_timeout_s = -0.1", "stop_timeout_s: input should be greater than or equal to 0"),
    (JOB + "straggler_factor = 1", "straggler_factor: input should be greater than 1"),
    (JOB + "straggler_factor = nan", "straggler_factor: input should be"),
    (JOB + "straggler_after_s = -1", "straggler_after_s: input should be greater than or equal to 0"),
    (JOB + "warm = 1", "warm: input should be a valid boolean"),
    (JOB + "env = {A = 1}", "env.A: input should be a valid string"),
    (JOB + "env = {'A=B' = 'x'}", "env: 'A=B' cannot be an environment variable"),
    (JOB + "id = 'again'", "not TOML"),
]


@pytest.mark.parametrize(("text", "why"), WRONG_FOR_A_JOB, ids=[why for _, why in WRONG_FOR_A_JOB])
def test_what_is_wrong_with_a_job_file_is_named(file: Path, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        job(file, text)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(file))
