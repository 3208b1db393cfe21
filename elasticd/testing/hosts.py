"""Test hosts: every node a network namespace on one bridge, with control groups to kill, freeze and slow it.

Where that cannot be had (not root, no namespaces), loopback.py gives processes on 127.x addresses instead, with fewer
faults. ``open_hosts`` takes what the machine allows. Everything is removed on close, at exit, and, after a SIGKILL of
the owner, by the next sweep (claims.py).

Not here: what runs on the hosts (cluster.py), hosts that boot systemd (systemd_host.py).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from elasticd.testing import cgroups
from elasticd.testing.cgroups import Unsupported
from elasticd.testing.claims import Claim, run

_ENTER = str(Path(__file__).with_name("enter.py"))
_FIRST_ADDRESS = 10


class Host(Protocol):
    """One machine, as far as the programs on it can tell."""

    name: str
    address: str
    #: The network interface that carries ``address``: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME.
    interface: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command so that it runs on this host."""
        ...

    def spawn(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts a program that dies with this thread; its output is appended to ``log``."""
        ...

    def pids(self) -> list[int]: ...

    def kill(self) -> None:
        """SIGKILL to all that runs on it, at once; others see their connections end."""
        ...

    def freeze(self) -> None: ...

    def thaw(self) -> None: ...

    def cut(self) -> None:
        """Nothing gets in or out any more, and nobody is told."""
        ...

    def heal(self) -> None:
        """The end of cut(), freeze() and slow()."""
        ...

    def slow(self, fraction: float, period_s: float = cgroups.PERIOD_S) -> None:
        """At most this fraction of one CPU for all of it, in each period."""
        ...


class Hosts(Protocol):
    """A set of hosts that reach each other; a context manager that removes them."""

    isolated: bool

    def add(self, name: str) -> Host: ...

    def partition(self, one: Host, other: Host) -> None:
        """Silently drops what the two send each other."""
        ...

    def block_port(self, host: Host, port: int) -> None:
        """Silently drops what this host exchanges with servers on that TCP port elsewhere."""
        ...

    def heal(self) -> None:
        """The end of every fault."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Hosts: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def why_not_namespaces() -> str:
    """What is missing for hosts of their own; empty when they can be had."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "hosts of their own need root on Linux"
    missing = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: apt install iproute2 nftables"
    if not cgroups.can_kill():
        return "no writable cgroup version 2 with cgroup.kill (Linux 5.14)"
    done = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True)
    return "" if done.returncode == 0 else "network namespaces cannot be made here"


def open_hosts(*, isolated: bool | None = None) -> Hosts:
    """Namespaces where the machine allows, otherwise loopback; ``isolated`` insists on one of the two."""
    from elasticd.testing.loopback import LoopbackHosts

    why_not = why_not_namespaces()
    if isolated and why_not:
        raise Unsupported(why_not)
    return LoopbackHosts() if why_not or isolated is False else NamespaceHosts()


def spawn(argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
    """A program in a session of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            list(argv),
            env=dict(env) if env is not None else None,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class NamespaceHost:
    """Made by NamespaceHosts.add()."""

    interface = "eth0"

    def __init__(self, claim: Claim, name: str, index: int) -> None:
        self.name, self.address = name, claim.address(_FIRST_ADDRESS + index)
        self.netns, self.link = claim.netns(name), claim.link(index)
        unified, cpu = cgroups.unified_root(), cgroups.v1_root("cpu")
        assert unified is not None, "why_not_namespaces() was not asked"
        self.group = claim.group(unified) / name
        self._cpu = claim.group(cpu) / name if cpu is not None else None
        for group in (self.group, self._cpu):
            if group is not None:
                group.mkdir(parents=True, exist_ok=True)
        self._connect(claim.bridge)

    def _connect(self, bridge: str) -> None:
        run("ip", "netns", "add", self.netns)
        run("ip", "link", "add", self.link, "type", "veth", "peer", "name", self.interface, "netns", self.netns)
        run("ip", "link", "set", self.link, "master", bridge, "up")
        script = f"addr add {self.address}/24 dev {self.interface}\nlink set {self.interface} up\nlink set lo up\n"
        run("ip", "-n", self.netns, "-batch", "-", text=script)

    @property
    def prefix(self) -> tuple[str, ...]:
        return self._enter(0)

    def _enter(self, parent: int) -> tuple[str, ...]:
        groups = ":".join(str(group) for group in (self.group, self._cpu) if group is not None)
        return (sys.executable, "-I", "-S", _ENTER, str(parent), f"/run/netns/{self.netns}", groups)

    def spawn(self, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        return spawn([*self._enter(os.getpid()), *argv], log=log, env=env)

    def pids(self) -> list[int]:
        return cgroups.pids(self.group)

    def kill(self) -> None:
        cgroups.kill(self.group)

    def freeze(self) -> None:
        cgroups.freeze(self.group, frozen=True)

    def thaw(self) -> None:
        cgroups.freeze(self.group, frozen=False)

    def cut(self) -> None:
        run("ip", "link", "set", self.link, "down")

    def slow(self, fraction: float, period_s: float = cgroups.PERIOD_S) -> None:
        cgroups.slow(self._cpu, fraction, period_s)

    def heal(self) -> None:
        run("ip", "link", "set", self.link, "up")
        self.thaw()
        if self._cpu is not None:
            self.slow(0)


class NamespaceHosts:
    """Hosts 10.77.N.10 and up on a bridge of their own; this process has 10.77.N.1 there."""

    isolated = True

    def __init__(self) -> None:
        self._claim = Claim()
        atexit.register(self.close)
        self._hosts: list[NamespaceHost] = []
        self._rules: list[str] = []
        try:
            self._make_bridge()
        except BaseException:
            self.close()
            raise

    @property
    def gateway(self) -> str:
        """This process's own address on the bridge."""
        return self._claim.address(1)

    @property
    def claim(self) -> Claim:
        return self._claim

    def _make_bridge(self) -> None:
        bridge = self._claim.bridge
        # Without a forward delay and IPv6, it passes frames from the first moment.
        run("ip", "link", "add", bridge, "type", "bridge", "forward_delay", "0", "stp_state", "0")
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/ipv6/conf/{bridge}/disable_ipv6").write_text("1")
        run("ip", "addr", "add", f"{self.gateway}/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")

    def add(self, name: str) -> NamespaceHost:
        host = NamespaceHost(self._claim, name, len(self._hosts))
        self._hosts.append(host)
        return host

    def partition(self, one: Host, other: Host) -> None:
        a, b = self._link(one), self._link(other)
        self._drop(f'iifname "{a}" oifname "{b}"', f'iifname "{b}" oifname "{a}"')

    def block_port(self, host: Host, port: int) -> None:
        link = self._link(host)
        self._drop(f'iifname "{link}" tcp dport {port}', f'oifname "{link}" tcp sport {port}')

    def _link(self, host: Host) -> str:
        return next(own.link for own in self._hosts if own is host)

    def _drop(self, *matches: str) -> None:
        self._rules += [f"{match} drop" for match in matches]
        self._load_rules()

    def _load_rules(self) -> None:
        """The whole table anew, in one transaction of the kernel's."""
        table = self._claim.nft_table
        hooks = ("forward", "input", "output") if self._rules else ()
        chains = [f"chain {hook} {{\ntype filter hook {hook} priority 0\n{self._rules_of(hook)}\n}}" for hook in hooks]
        lines = [f"table bridge {table} {{}}", f"delete table bridge {table}"]
        if chains:
            lines += [f"table bridge {table} {{", *chains, "}"]
        run("nft", "-f", "-", text="\n".join(lines) + "\n")

    def _rules_of(self, hook: str) -> str:
        """A frame to this process has no way out, one from it no way in: such rules stand in input and output."""
        kept = [rule for rule in self._rules if _fits(rule, hook)]
        return "\n".join(kept)

    def heal(self) -> None:
        if self._rules:
            self._rules = []
            self._load_rules()
        for host in self._hosts:
            host.heal()

    def close(self) -> None:
        atexit.unregister(self.close)
        self._claim.close()

    def __enter__(self) -> NamespaceHosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _fits(rule: str, hook: str) -> bool:
    if hook == "input":
        return "oifname" not in rule
    return hook == "forward" or "iifname" not in rule
