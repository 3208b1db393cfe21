"""A test host that boots systemd: systemd-nspawn on an overlay of this machine's own root file system.

Python, torch and everything else that is installed here is there too, copy on write; /tmp is not. Not here: what a
host without an init is (hosts.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from elasticd.errors import ElasticdError
from elasticd.testing import cgroups
from elasticd.testing.claims import run
from elasticd.testing.hosts import NamespaceHost, NamespaceHosts, spawn

_UPPER_SIZE = "512m"
#: Units of the machine underneath that a test host has no use for.
_MASKED = (
    "etcd.service",
    "postgresql.service",
    "prometheus.service",
    "systemd-timesyncd.service",
    "systemd-pstore.service",
    "systemd-networkd.service",
    "networking.service",
    "e2scrub_reap.service",
    "remote-fs.target",
    "getty.target",
    "console-getty.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "man-db.timer",
)


def why_not_systemd() -> str:
    """What is missing to boot one, beyond what namespaces need; empty when it can be done."""
    if shutil.which("systemd-nspawn") is None:
        return "systemd-nspawn not found: apt install systemd-container"
    if cgroups.v1_root("name=systemd") is None:
        return "no writable cgroup hierarchy name=systemd: a booted systemd needs one of its own"
    return ""


class SystemdHost:
    """One node. ``folder(path)`` is how its files are seen from outside, before and while it runs.

    ``binds``: folders from outside, by where they are inside; writable.
    """

    def __init__(self, hosts: NamespaceHosts, name: str, *, binds: Mapping[Path, str] | None = None) -> None:
        self.host: NamespaceHost = hosts.add(name)
        self._claim, self._binds = hosts.claim, dict(binds or {})
        self._base = self._claim.folder / name
        self._root = self._base / "root"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._groups = [self._claim.group(root) / name for root in cgroups.roots()]
        for group in self._groups:
            group.mkdir(parents=True, exist_ok=True)
        self._make_root()

    @property
    def log(self) -> Path:
        return self._base / "nspawn.log"

    def folder(self, path: str) -> Path:
        """Where a path of the node is found from outside."""
        return self._root / path.lstrip("/")

    def _make_root(self) -> None:
        self._base.mkdir()
        name = f"elasticd-{self.host.name}"
        run("mount", "-t", "tmpfs", "-o", f"size={_UPPER_SIZE},mode=755", name, str(self._base))
        for part in ("upper", "work", "root"):
            (self._base / part).mkdir()
        layers = f"lowerdir=/,upperdir={self._base}/upper,workdir={self._base}/work"
        run("mount", "-t", "overlay", name, "-o", layers, str(self._root))
        units = self.folder("/etc/systemd/system")
        for unit in _MASKED:
            _link(units / unit, "/dev/null")
        _link(units / "default.target", "/lib/systemd/system/multi-user.target")
        self.folder("/etc/hostname").write_text(f"{self.host.name}\n")
        self.folder("/etc/machine-id").write_text(os.urandom(16).hex() + "\n")

    def bind(self, outside: Path, inside: str) -> None:
        """One more folder from outside, from the next boot on; writable."""
        self._binds[outside] = inside

    def know(self, addresses: Mapping[str, str]) -> None:
        """Names of hosts for /etc/hosts, as any cluster has them."""
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        self.folder("/etc/hosts").write_text("\n".join(lines) + "\n")

    def boot(self, timeout_s: float = 30.0) -> None:
        """Returns when all of its units are up."""
        command = [*self._enter(), "systemd-nspawn", *self._options()]
        self._nspawn = spawn(command, log=self.log, env=None)
        deadline_s = time.monotonic() + timeout_s
        while self._state() not in ("running", "degraded"):
            if self._nspawn.poll() is not None or time.monotonic() > deadline_s:
                raise ElasticdError(f"{self.host.name} did not boot: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)

    def _enter(self) -> tuple[str, ...]:
        """Like NamespaceHost's, with every group; nspawn enters the network by itself."""
        *shim, _parent, _netns, _groups = self.host.prefix
        return (*shim, str(os.getpid()), "-", ":".join(map(str, self._groups)))

    def _options(self) -> list[str]:
        binds = [f"--bind={outside}:{inside}" for outside, inside in self._binds.items()]
        return [
            *("--quiet", "--boot", "--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"),
            f"--directory={self._root}",
            f"--machine={self.host.netns}",
            f"--hostname={self.host.name}",
            f"--network-namespace-path=/run/netns/{self.host.netns}",
            *binds,
        ]

    def _state(self) -> str:
        if self._leader() is None:
            return ""
        try:
            return self.run("systemctl", "is-system-running", check=False, timeout_s=5).stdout.strip()
        except subprocess.TimeoutExpired:
            return ""

    def _leader(self) -> int | None:
        """The node's process 1, seen from outside."""
        if self._nspawn is None or self._nspawn.poll() is not None:
            return None
        with contextlib.suppress(OSError):
            pid = self._nspawn.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return int(children[0]) if children else None
        return None

    def run(
        self, *command: str, check: bool = True, timeout_s: float = 30.0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the node. ElasticdError with what it said when it fails and ``check`` is set."""
        leader = self._leader()
        if leader is None:
            raise ElasticdError(f"{self.host.name} is not up")
        full = ["nsenter", "--target", str(leader), "--all", *command]
        done = subprocess.run(full, check=False, capture_output=True, text=True, timeout=timeout_s, env=env)
        if check and done.returncode != 0:
            raise ElasticdError(f"{self.host.name}: {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit).stdout.strip()

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", unit, check=False).stdout

    def install(self, unit: Path, drop_ins: Sequence[str] = ()) -> None:
        """Copies a unit file as it is, and settings of this node's own beside it."""
        units = self.folder("/etc/systemd/system")
        shutil.copy(unit, units / unit.name)
        if drop_ins:
            (units / f"{unit.name}.d").mkdir(exist_ok=True)
            (units / f"{unit.name}.d" / "test.conf").write_text("\n".join(drop_ins) + "\n")

    def power_off(self) -> None:
        """Loss of power: nothing leaves the node any more, then every process of it is gone."""
        self.host.cut()
        self.kill()

    def kill(self) -> None:
        self.host.kill()
        self._reap()

    def shut_down(self, timeout_s: float = 30.0) -> None:
        """An orderly end, as by the power button."""
        if self._nspawn is not None:
            self._nspawn.send_signal(signal.SIGTERM)
            self._nspawn.wait(timeout_s)
            self._nspawn = None

    def _reap(self) -> None:
        if self._nspawn is not None:
            self._nspawn.wait()
            self._nspawn = None


def _link(where: Path, target: str) -> None:
    where.unlink(missing_ok=True)
    where.symlink_to(target)
