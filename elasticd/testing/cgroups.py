"""Control groups of test hosts: version 2 to kill and freeze all of a host at once, version 1 to slow it down.

Not here: what a host is (hosts.py). Groups are made below the ones that this process lives in.
"""

from __future__ import annotations

import contextlib
import os
import time
from functools import cache
from pathlib import Path

from elasticd.errors import ElasticdError

#: The kernel's own choice.
PERIOD_S = 0.1
_SETTLE_TIMEOUT_S = 10.0


class Unsupported(ElasticdError):
    """This machine, or this kind of test host, cannot do that."""


@cache
def _mounts() -> tuple[tuple[str, str, str], ...]:
    """(file system type, mount point, options) of everything mounted."""
    fields = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return tuple((kind, where, options) for _, where, kind, options, *_ in fields)


def _own(controller: str) -> str:
    """This process's group for a version-1 controller; with an empty name, of version 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path.lstrip("/")
    return ""


def unified_root() -> Path | None:
    """Where version-2 groups of our own can be made, if that is possible here."""
    for kind, where, _ in _mounts():
        if kind == "cgroup2":
            root = Path(where) / _own("")
            return root if os.access(root, os.W_OK) else None
    return None


def v1_root(controller: str) -> Path | None:
    """The same for a controller of version 1, such as ``cpu`` or ``name=systemd``."""
    for kind, where, options in _mounts():
        if kind == "cgroup" and controller in options.split(","):
            root = Path(where) / _own(controller)
            return root if os.access(root, os.W_OK) else None
    return None


#: What a booted systemd needs to have of its own.
V1_CONTROLLERS = ("cpu", "cpuacct", "memory", "freezer", "pids", "blkio", "name=systemd")


def roots() -> list[Path]:
    """Every place where groups of ours may be made."""
    found = [unified_root(), *(v1_root(controller) for controller in V1_CONTROLLERS)]
    return [root for root in found if root is not None]


def can_kill() -> bool:
    """Whether version 2 is there with cgroup.kill (Linux 5.14), found out by making a group."""
    root = unified_root()
    if root is None:
        return False
    probe = root / f"elasticd-probe-{os.getpid()}"
    try:
        probe.mkdir()
        return (probe / "cgroup.kill").exists() and (probe / "cgroup.freeze").exists()
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.rmdir()


def kill(group: Path) -> None:
    """SIGKILL to every process in it and below, at the same instant; returns when all are gone."""
    (group / "cgroup.kill").write_text("1")
    _wait_event(group, "populated", "0")


def freeze(group: Path, *, frozen: bool) -> None:
    (group / "cgroup.freeze").write_text("1" if frozen else "0")
    if frozen:
        _wait_event(group, "frozen", "1")


def slow(group: Path | None, fraction: float, period_s: float = PERIOD_S) -> None:
    """At most this fraction of one CPU in each period; 0 for no limit."""
    if group is None:
        raise Unsupported("no cpu controller of cgroup version 1 here: a host cannot be slowed down")
    period_us = int(1e6 * period_s)
    (group / "cpu.cfs_quota_us").write_text("-1")  # or the kernel may refuse the other period
    (group / "cpu.cfs_period_us").write_text(str(period_us))
    if fraction > 0:
        (group / "cpu.cfs_quota_us").write_text(str(int(period_us * fraction)))


def pids(group: Path) -> list[int]:
    """Every process in it and below."""
    found: list[int] = []
    for file in group.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):  # groups come and go inside
            found += [int(line) for line in file.read_text().split()]
    return found


def remove(group: Path) -> None:
    """The group and all below it, bottom up; a missing one is fine."""
    if not group.exists():
        return
    for below in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            below.rmdir()
    with contextlib.suppress(OSError):
        group.rmdir()


def _wait_event(group: Path, name: str, wanted: str) -> None:
    deadline_s = time.monotonic() + _SETTLE_TIMEOUT_S
    while f"{name} {wanted}\n" not in (group / "cgroup.events").read_text():
        if time.monotonic() > deadline_s:
            raise Unsupported(f"{group}: {name} did not become {wanted} in {_SETTLE_TIMEOUT_S:g} s")
        time.sleep(0.002)
