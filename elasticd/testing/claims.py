"""Numbered claims to names on this machine, so that what a dead test left behind can be told and removed.

A claim is a locked file ``/run/elasticd-test/<n>.json``; its number is in the name of every namespace, link, group,
mount and nft table made under it. The kernel drops the lock with its owner, however it died: what is not locked is
swept. Not here: how hosts are made of those (hosts.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

from elasticd.errors import ElasticdError
from elasticd.testing import cgroups

FOLDER = Path("/run/elasticd-test")
NETNS_FOLDER = Path("/run/netns")
_LAST_NUMBER = 250


def run(*command: str, text: str | None = None) -> str:
    """Runs a tool; ElasticdError with what it said when it fails."""
    done = subprocess.run(command, check=False, input=text, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise ElasticdError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Claim:
    """A number from 1 to 250 that nobody else on this machine holds, and a folder that goes away with it."""

    def __init__(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.number, self._lock = _take_number()
        self.folder = FOLDER / str(self.number)
        self.folder.mkdir()
        groups = [str(self.group(root)) for root in cgroups.roots()]
        _marker(self.number).write_text(json.dumps({"pid": os.getpid(), "cgroups": groups}))

    @property
    def name(self) -> str:
        return f"elasticd-test-{self.number}"

    def group(self, root: Path) -> Path:
        """The claim's own control group below one of cgroups.roots()."""
        return root / self.name

    def netns(self, host: str) -> str:
        return f"{_netns_prefix(self.number)}{host}"

    def link(self, index: int) -> str:
        return f"ed{self.number}v{index}"

    @property
    def bridge(self) -> str:
        return _bridge(self.number)

    @property
    def nft_table(self) -> str:
        return _nft_table(self.number)

    def address(self, index: int) -> str:
        return f"10.77.{self.number}.{index}"

    def close(self) -> None:
        """Removes all that was made under this number. Safe to call twice."""
        if self._lock >= 0:
            _remove(self.number)
            os.close(self._lock)
            self._lock = -1


def sweep() -> list[int]:
    """Removes what dead owners left; returns their numbers."""
    swept = []
    for marker in sorted(FOLDER.glob("*.json")):
        lock = _lock(marker, create=False)
        if lock is None:
            continue
        try:
            _remove(int(marker.stem))
            swept.append(int(marker.stem))
        finally:
            os.close(lock)
    return swept


def _take_number() -> tuple[int, int]:
    sweep()
    for number in range(1, _LAST_NUMBER + 1):
        lingers = any(Path("/sys/class/net").glob(f"ed{number}[bv]*"))  # somebody's namespace has not died yet
        if not lingers and not _marker(number).exists():
            lock = _lock(_marker(number), create=True)
            if lock is not None:
                return number, lock
    raise ElasticdError(f"all {_LAST_NUMBER} numbers of test clusters are taken; see {FOLDER}")


def _lock(marker: Path, *, create: bool) -> int | None:
    """The open, locked file; None when somebody else holds it, made it first or has just removed it."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
    try:
        handle = os.open(marker, flags, 0o644)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == marker.stat().st_ino:
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _remove(number: int) -> None:
    """Processes first, then what they held, the marker last: when interrupted, it can be done again."""
    for group in _groups(number):
        if (group / "cgroup.kill").exists():
            cgroups.kill(group)
        cgroups.remove(group)
    _unmount_below(FOLDER / str(number))
    for link in Path("/sys/class/net").glob(f"ed{number}v*"):  # a namespace dies late, and its links with it
        _quietly("ip", "link", "delete", link.name)
    for namespace in NETNS_FOLDER.glob(f"{_netns_prefix(number)}*"):
        _quietly("ip", "netns", "delete", namespace.name)
    if Path(f"/sys/class/net/{_bridge(number)}").exists():
        _quietly("ip", "link", "delete", _bridge(number))
    if shutil.which("nft"):
        _quietly("nft", "delete", "table", "bridge", _nft_table(number))
    shutil.rmtree(FOLDER / str(number), ignore_errors=True)
    _marker(number).unlink(missing_ok=True)


def _groups(number: int) -> list[Path]:
    try:
        return [Path(group) for group in json.loads(_marker(number).read_text())["cgroups"]]
    except (OSError, ValueError, KeyError):
        return []  # its owner died before it made any


def _unmount_below(folder: Path) -> None:
    """Deepest first. Lazily, since a namespace that is just ending may still hold one."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{folder}/")), key=len, reverse=True):
        _quietly("umount", "--lazy", mount)


def _quietly(*command: str) -> None:
    with contextlib.suppress(ElasticdError):
        run(*command)


def _marker(number: int) -> Path:
    return FOLDER / f"{number}.json"


def _netns_prefix(number: int) -> str:
    return f"ed{number}-"


def _bridge(number: int) -> str:
    return f"ed{number}br"


def _nft_table(number: int) -> str:
    return f"elasticd_test_{number}"
