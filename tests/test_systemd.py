"""The unit file as it ships, on nodes that boot a real systemd: it brings a daemon back, and the job goes on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import alive, eventually, need

from elasticd.testing.etcd_cluster import EtcdCluster
from elasticd.testing.history import Event, Tail, Trained, events_of, parse_event, parse_trained
from elasticd.testing.hosts import NamespaceHosts
from elasticd.testing.systemd_host import SystemdHost, why_not_systemd
from elasticd.testing.validators import validate

TOP = Path(__file__).parents[1]
UNIT = TOP / "systemd" / "elasticd.service"
SCRUB = TOP / "systemd" / "elasticd-scrub@.service"
TIMER = TOP / "systemd" / "elasticd-scrub@.timer"
SCRIPT = Path(__file__).parent / "chaos" / "train.py"
#: Where the script and what it writes are on the nodes.
SHARED = "/srv/shared"
#: systemd's own scale: 0 is a prison, 10 anything goes; network and root alone cost 1.6.
EXPOSURE_LIMIT = 4.0

HISTORY = "/var/lib/elasticd/history.jsonl"
CONFIGURATION = """
[node]
address = "{address}"
history_file = "{history}"
[etcd]
endpoints = ["{endpoint}"]
[links]
insecure = true
"""


@pytest.fixture
def analyzed(tmp_path: Path) -> Path:
    """The units with a program that exists here, which is all that verify would find wrong on a build machine."""
    need("" if shutil.which("systemd-analyze") else "systemd-analyze not found: apt install systemd")
    for unit in (UNIT, SCRUB, TIMER):
        # A template is analyzed as one of its instances.
        copy = tmp_path / unit.name.replace("@", "@mnt")
        copy.write_text(unit.read_text().replace("/opt/elasticd/bin/elasticd", sys.executable))
    return tmp_path


UNITS = ["elasticd.service", "elasticd-scrub@mnt.service", "elasticd-scrub@mnt.timer"]


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_files_are_valid(analyzed: Path, unit: str) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(analyzed / unit)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # a bad value is told on stderr, with status 0


@pytest.mark.parametrize(("unit", "limit"), [("elasticd.service", EXPOSURE_LIMIT), ("elasticd-scrub@mnt.service", 2.0)])
def test_the_unit_files_are_hardened(analyzed: Path, unit: str, limit: float) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(analyzed / unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert float(re.search(rf"level for {re.escape(unit)}: ([0-9.]+)", done.stdout).group(1)) <= limit
    assert "✗ NoNewPrivileges" not in done.stdout


def test_devices_stay_reachable() -> None:
    """Any of these would take the GPUs away from the workers."""
    settings = [line for line in UNIT.read_text().splitlines() if not line.startswith("#")]
    assert "PrivateDevices=no" in settings
    assert not any(line.startswith(("DeviceAllow", "DevicePolicy", "ProtectClock")) for line in settings)


def test_the_example_configuration_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from elasticd.config import load_daemon

    monkeypatch.delenv("ELASTICD_ENDPOINTS", raising=False)
    config = load_daemon(str(TOP / "systemd" / "elasticd.toml"))
    assert (config.peer_port, config.metrics.port, config.detection.lease_ttl_s) == (7420, 7421, 5)
    assert config.links.tls


class Nodes:
    """Booted nodes with the daemon installed as an operator would, and an etcd beside them."""

    def __init__(self, hosts: NamespaceHosts, etcd: EtcdCluster, shared: Path) -> None:
        self._hosts, self.etcd, self.shared = hosts, etcd, shared
        self.nodes: list[SystemdHost] = []
        self._tail = Tail()
        self._history: list[Event] = []
        self._trained: list[Trained] = []

    def boot(self, count: int) -> None:
        self.nodes = [SystemdHost(self._hosts, f"node{i}", binds={self.shared: SHARED}) for i in range(count)]
        names = {node.host.name: node.host.address for node in self.nodes}
        for node in self.nodes:
            node.know(names)
            # A node has a /tmp of its own, and sees nothing of what is mounted here.
            if TOP.is_relative_to("/tmp") or not node.folder(str(UNIT)).exists():
                node.bind(TOP, str(TOP))
            self._install(node)
            node.boot()

    def _install(self, node: SystemdHost) -> None:
        node.install(
            UNIT, ["[Service]", f"Environment=ELASTICD_TEST_STEPS={SHARED}/steps", "Environment=OMP_NUM_THREADS=1"]
        )
        (node.folder("/opt") / "elasticd").symlink_to(sys.prefix)
        node.folder("/etc/elasticd").mkdir(exist_ok=True)
        text = CONFIGURATION.format(address=node.host.address, history=HISTORY, endpoint=self.etcd.endpoints[0])
        node.folder("/etc/elasticd/elasticd.toml").write_text(text)

    def history(self) -> list[Event]:
        files = [node.folder(HISTORY) for node in self.nodes]
        self._history += [parse_event(line) for line in self._tail.read(files)]
        self._history.sort(key=lambda event: event.t)
        return self._history

    def trained(self) -> list[Trained]:
        self._trained += [parse_trained(line) for line in self._tail.read((self.shared / "steps").glob("*.jsonl"))]
        return self._trained

    def steps(self, world: int, since: float, timeout_s: float = 40.0) -> None:
        """Waits for a step that a world of that size completed after that time."""
        eventually(
            lambda: any(line.t > since and line.world == world for line in self.trained()), timeout_s, self.words()
        )

    def wait(self, condition: Callable[[list[Event]], object], timeout_s: float = 20.0) -> None:
        eventually(lambda: bool(condition(self.history())), timeout_s, self.words())

    def words(self) -> str:
        return "\n".join(node.journal("elasticd")[-3000:] for node in self.nodes)


@pytest.fixture
def machines(namespaces: None, tmp_path: Path) -> Iterator[Nodes]:
    need(why_not_systemd())
    shared = tmp_path / "shared"
    (shared / "steps").mkdir(parents=True)
    (shared / "train.py").write_text(SCRIPT.read_text())
    with NamespaceHosts() as hosts:
        store = hosts.add("etcd")
        with EtcdCluster(tmp_path / "etcd", members=1, hosts=[store.address], command_prefixes=[store.prefix]) as etcd:
            yield Nodes(hosts, etcd, shared)


def submit(machines: Nodes, job: str, nodes: str) -> None:
    (machines.shared / f"{job}.toml").write_text(
        f'id = "{job}"\nnodes = "{nodes}"\ncommand = ["{SHARED}/train.py", "{SHARED}"]\n'
    )
    machines.nodes[0].run(
        "/opt/elasticd/bin/elasticd",
        "submit",
        f"{SHARED}/{job}.toml",
        env={"PATH": os.environ["PATH"], "ELASTICD_ENDPOINTS": machines.etcd.endpoints[0]},
    )


@pytest.mark.net
@pytest.mark.timeout(240)
def test_systemd_brings_the_daemon_back_and_the_job_goes_on(machines: Nodes) -> None:
    machines.boot(2)
    first, second = machines.nodes
    for node in machines.nodes:
        node.run("systemctl", "enable", "--now", "elasticd")  # returns at READY=1
        assert node.show("elasticd", "ActiveState") == "active"
    submit(machines, "job", "1:2")
    machines.steps(world=2, since=0)

    for way, signal_name in (("a crash", "KILL"), ("a hang", "STOP")):
        pid = int(second.show("elasticd", "MainPID"))
        boots = {event.boot for event in events_of(machines.history(), "started") if event.node == second.host.name}
        at = time.monotonic()
        second.run("systemctl", "kill", "--kill-who=main", f"--signal={signal_name}", "elasticd")
        machines.steps(world=1, since=at)
        came_back = lambda history, known=boots: any(  # noqa: E731
            event.node == second.host.name and event.boot not in known for event in events_of(history, "registered")
        )
        machines.wait(came_back)
        print(f"after {way}, a new daemon was registered in {time.monotonic() - at:.2f} s")
        machines.steps(world=2, since=at)
        assert int(second.show("elasticd", "MainPID")) != pid
    assert second.show("elasticd", "NRestarts") == "2"
    assert first.show("elasticd", "NRestarts") == "0", first.run("journalctl", "-u", "elasticd").stdout[-4000:]
    assert "WatchdogSec" in second.run("systemctl", "cat", "elasticd").stdout

    at = time.monotonic()
    second.run("systemctl", "stop", "elasticd", timeout_s=90)
    assert second.show("elasticd", "Result") == "success"
    assert second.run("pgrep", "--count", "--full", "train.py|elasticd", check=False).stdout.strip() == "0"
    machines.steps(world=1, since=at)

    (machines.shared / "finish").touch()
    machines.wait(lambda history: any(e.details["phase"] == "succeeded" for e in events_of(history, "job_over")))
    assert validate(machines.history()) == []


@pytest.mark.net
@pytest.mark.timeout(120)
def test_a_mistake_in_the_configuration_is_told_once_and_not_retried(machines: Nodes) -> None:
    machines.boot(1)
    (node,) = machines.nodes
    file = node.folder("/etc/elasticd/elasticd.toml")
    file.write_text(file.read_text() + "[metrics]\nprot = 1\n")
    assert node.run("systemctl", "start", "elasticd", check=False).returncode != 0
    assert node.show("elasticd", "ActiveState") == "failed"
    assert node.show("elasticd", "NRestarts") == "0"
    told = [line for line in node.journal("elasticd").splitlines() if "prot" in line]
    assert len(told) == 1
    assert "metrics.prot" in told[0]
    assert "Traceback" not in node.journal("elasticd")


@pytest.mark.net
@pytest.mark.timeout(120)
def test_a_node_that_loses_power_takes_everything_with_it(machines: Nodes) -> None:
    machines.boot(1)
    (node,) = machines.nodes
    node.run("systemctl", "enable", "--now", "elasticd")
    machines.wait(lambda history: len(events_of(history, "registered")) == 1)
    pids = node.host.pids()
    node.power_off()
    eventually(lambda: not any(alive(pid) for pid in pids), 5)  # the kernel counts who is about to be gone as gone
    node.host.heal()
    node.boot()  # the enabled unit starts by itself
    machines.wait(lambda history: len(events_of(history, "registered")) == 2)


@pytest.mark.net
@pytest.mark.timeout(120)
def test_checkpoints_are_scrubbed_by_a_timer(machines: Nodes, tmp_path: Path) -> None:
    """As an operator sets it up, for a directory that belongs to somebody else; damage fails the unit."""
    from small_checkpoints import data_file, flip, save

    directory = machines.shared / "my checkpoints"
    directory.mkdir()
    save(directory, 1, 2)
    for path in (directory, *directory.rglob("*")):
        os.chown(path, 1234, 1234)
        path.chmod(0o700)
    machines.boot(1)
    (node,) = machines.nodes
    node.install(SCRUB, ["[Service]", f"Environment=PYTHONPATH={TOP}"])
    node.install(TIMER)
    node.run("systemctl", "daemon-reload")
    name = node.run("systemd-escape", "--path", f"{SHARED}/{directory.name}").stdout.strip()
    node.run("systemctl", "enable", "--now", f"elasticd-scrub@{name}.timer")
    assert node.show(f"elasticd-scrub@{name}.timer", "ActiveState") == "active"
    assert "elasticd-scrub" in node.run("systemctl", "list-timers", "--no-pager", "elasticd-scrub@*").stdout

    def scrub() -> str:
        node.run("systemctl", "start", f"elasticd-scrub@{name}.service", check=False, timeout_s=60)
        return node.folder(f"/var/lib/elasticd-scrub/{name}.prom").read_text()

    text = scrub()
    assert node.show(f"elasticd-scrub@{name}.service", "Result") == "success"
    assert f'elasticd_scrub_checkpoints{{directory="{SHARED}/{directory.name}"}} 2.0' in text
    assert f'elasticd_scrub_damaged_checkpoints{{directory="{SHARED}/{directory.name}"}} 0.0' in text
    flip(data_file(directory / "step-1"))
    assert f'elasticd_scrub_damaged_checkpoints{{directory="{SHARED}/{directory.name}"}} 1.0' in scrub()
    assert node.show(f"elasticd-scrub@{name}.service", "Result") == "exit-code"
    assert "step 1: DAMAGED" in node.journal(f"elasticd-scrub@{name}.service")
