"""Test hosts do what they say: each fault is seen from another host, and nothing is left behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import alive, eventually

from elasticd.testing import cgroups
from elasticd.testing.claims import FOLDER, sweep
from elasticd.testing.hosts import NamespaceHost, NamespaceHosts, open_hosts
from elasticd.testing.loopback import LoopbackHosts

# Answers every line on a TCP port with its own time, and has a child in a session of its own.
ECHO = """
import socket, subprocess, sys, time
subprocess.Popen(["sleep", "600"], start_new_session=True)
server = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("up", flush=True)
while True:
    connection, _ = server.accept()
    while connection.recv(1): connection.sendall(b"y")
"""
ASK = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=0.4)
connection.settimeout(0.4)
connection.sendall(b"x")
sys.exit(connection.recv(1) != b"y")
"""


def echo(host, log: Path, port: int = 7000) -> None:
    host.spawn([sys.executable, "-c", ECHO, host.address, str(port)], log=log)
    eventually(lambda: log.exists() and log.read_text().endswith("up\n"), what="the echo server")


def reaches(host, other, port: int = 7000) -> bool:
    asked = subprocess.run(
        [*host.prefix, sys.executable, "-S", "-c", ASK, other.address, str(port)], capture_output=True
    )
    return asked.returncode == 0


@pytest.fixture
def three(namespaces, tmp_path: Path):
    with NamespaceHosts() as hosts:
        made = [hosts.add(f"n{i}") for i in range(3)]
        for host in made:
            echo(host, tmp_path / host.name)
        yield hosts, *made


def test_hosts_reach_each_other_and_a_cut_one_is_silent(three) -> None:
    _hosts, a, b, c = three
    assert reaches(a, b)
    assert reaches(b, c)
    with socket.create_connection((b.address, 7000), timeout=5) as ours:
        b.cut()
        assert not reaches(a, b)
        assert not reaches(b, a)
        assert reaches(a, c)
        ours.settimeout(0.2)
        with pytest.raises(TimeoutError):  # neither end-of-file nor a reset
            ours.recv(1)
    b.heal()
    eventually(lambda: reaches(a, b))


def test_a_partition_is_between_two_only(three) -> None:
    hosts, a, b, c = three
    hosts.partition(a, b)
    assert not reaches(a, b)
    assert not reaches(b, a)
    assert reaches(a, c)
    assert reaches(c, b)
    hosts.heal()
    assert reaches(a, b)


def test_a_blocked_port_blocks_nothing_else(three, tmp_path: Path) -> None:
    hosts, a, b, c = three
    echo(b, tmp_path / "other", 7001)
    hosts.block_port(a, 7000)
    assert not reaches(a, b)
    assert reaches(a, b, 7001)
    assert reaches(b, a)  # others still reach its own server on that port
    assert reaches(c, b)
    hosts.heal()
    assert reaches(a, b)


def test_a_kill_takes_all_processes_and_ends_connections(three) -> None:
    _, a, b, _ = three
    eventually(lambda: len(b.pids()) == 2)
    with socket.create_connection((b.address, 7000), timeout=5) as ours:
        before = b.pids()
        b.kill()
        assert b.pids() == []
        assert ours.recv(1) == b""
    assert not any(alive(pid) for pid in before)
    assert len(a.pids()) == 2


def test_a_frozen_host_goes_on_where_it_was(three) -> None:
    _, a, b, _ = three
    b.freeze()
    assert not reaches(a, b)
    b.thaw()
    assert reaches(a, b)


def test_a_slow_host_gets_its_share_only(three, tmp_path: Path) -> None:
    if cgroups.v1_root("cpu") is None:
        pytest.skip("no cpu controller of cgroup version 1")
    b: NamespaceHost = three[2]
    b.slow(0.2)
    burner = psutil.Process(b.spawn([sys.executable, "-c", "while True: pass"], log=tmp_path / "burner").pid)
    eventually(lambda: sum(burner.cpu_times()[:2]) > 0.05)
    start, used = time.monotonic(), sum(burner.cpu_times()[:2])
    eventually(lambda: sum(burner.cpu_times()[:2]) - used >= 0.2, 30)
    assert (sum(burner.cpu_times()[:2]) - used) / (time.monotonic() - start) < 0.35


def test_two_sets_of_hosts_coexist_and_leave_nothing(namespaces, tmp_path: Path) -> None:
    with NamespaceHosts() as one, NamespaceHosts() as other:
        a, b = one.add("n"), other.add("n")
        assert a.address != b.address
        echo(a, tmp_path / "a")
        echo(b, tmp_path / "b")
        pids = a.pids() + b.pids()
        links = [one.claim.bridge, other.claim.bridge, a.link, b.link]
    assert not any(alive(pid) for pid in pids)
    assert not any(Path(f"/sys/class/net/{link}").exists() for link in links)
    assert not any(Path(f"/run/netns/{host.netns}").exists() for host in (a, b))
    assert not a.group.exists()


OWNER = """
import sys
from pathlib import Path
from elasticd.testing.hosts import NamespaceHosts
hosts = NamespaceHosts()
host = hosts.add("n")
hosts.partition(host, hosts.add("m"))
host.spawn(["sh", "-c", "setsid sleep 600 & exec sleep 600"], log=Path(sys.argv[1]))
while len(host.pids()) < 2: pass
print(hosts.claim.number, *host.pids(), flush=True)
sys.stdin.read()
"""


def test_what_a_killed_owner_left_is_swept(namespaces, tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "log")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        number, *pids = map(int, owner.stdout.readline().split())
        assert number not in sweep()  # it lives
        assert len(pids) == 2
    finally:
        owner.kill()
        owner.communicate()
    assert number in sweep()
    assert not any(alive(pid) for pid in pids)
    assert not list(Path("/run/netns").glob(f"ed{number}-*"))
    assert not Path(f"/sys/class/net/ed{number}br").exists()
    assert (
        f"elasticd_test_{number}"
        not in subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
    )
    assert not (FOLDER / f"{number}.json").exists()


def test_an_owner_that_ends_by_itself_cleans_up_at_exit(namespaces, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OWNER, str(tmp_path / "log")], input="", capture_output=True, text=True, check=True
    )
    number, *pids = map(int, done.stdout.split())
    assert not any(alive(pid) for pid in pids)
    assert not (FOLDER / f"{number}.json").exists()


def test_loopback_hosts_kill_and_freeze_whole_trees(tmp_path: Path) -> None:
    with LoopbackHosts() as hosts:
        a, b = hosts.add("a"), hosts.add("b")
        echo(a, tmp_path / "a")
        echo(b, tmp_path / "b")
        assert reaches(a, b)
        b.freeze()
        assert not reaches(a, b)
        b.thaw()
        assert reaches(a, b)
        before = b.pids()
        assert len(before) == 2  # the one in a session of its own too
        b.kill()
        assert not any(alive(pid) for pid in before)
        assert len(a.pids()) == 2
        with pytest.raises(cgroups.Unsupported):
            a.cut()
        left = a.pids()
    assert not any(alive(pid) for pid in left)


def test_hosts_are_namespaces_where_the_machine_allows(namespaces) -> None:
    with open_hosts() as hosts:
        assert hosts.isolated
    with open_hosts(isolated=False) as hosts:
        assert not hosts.isolated

