"""A folder on tmpfs that goes away with its daemon.

A shell beside the daemon waits for the end of a pipe, which the kernel sees to however the daemon ended, and removes
the folder. When that was killed too, the next daemon on this machine removes what no living one holds locked. Not here:
what is in it (memory.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from elasticd.core.model import NodeId
from elasticd.errors import MemoryRefused

#: How long a folder may be without a lock before it counts as left behind: its maker is about to lock it.
_UNLOCKED_S = 60.0
_JANITOR = 'cat >/dev/null; for n in 1 2 3 4 5; do rm -rf -- "$0"; [ -e "$0" ] || exit 0; sleep 0.2; done'


class MemoryFolder:
    """A folder that is ours while we live, and removed when we do not."""

    def __init__(self, parent: Path, node_id: NodeId) -> None:
        sweep(parent)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"elasticd-{node_id}-", dir=parent))
            self.path.chmod(0o711)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MemoryRefused(
                f"no copies in RAM: {parent} cannot be used: {error.strerror}; set memory.folder"
            ) from error
        self._janitor = subprocess.Popen(
            ["/bin/sh", "-c", _JANITOR, str(self.path)], stdin=subprocess.PIPE, start_new_session=True
        )

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        assert self._janitor.stdin is not None
        self._janitor.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._janitor.wait(5.0)


def sweep(parent: Path) -> list[Path]:
    """Removes the folders of daemons of this user that are gone; which they were."""
    swept = []
    for path in parent.glob("elasticd-*-*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.geteuid() or not _is_left_behind(path):
                continue
            shutil.rmtree(path, ignore_errors=True)
            swept.append(path)
    return swept


def _is_left_behind(path: Path) -> bool:
    try:
        descriptor = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return time.time() - path.stat().st_mtime > _UNLOCKED_S
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
