"""What a process must do between fork and the user's code, so that it is like one that was just started. Linux only.

Not here: who asks for it (warm.py), and what it then runs (script.py).
"""

from __future__ import annotations

import ctypes
import os
import pwd
import random
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRequest:
    """``env`` is added to the server's; empty ``stdout``/``stderr`` mean the console; ``user`` is a login name."""

    command: tuple[str, ...]
    is_module: bool = False
    no_python: bool = False
    env: dict[str, str] = field(default_factory=dict)
    working_dir: str = ""
    user: str = ""
    stdout: str = ""
    stderr: str = ""


def become_child(request: ForkRequest, parent_pid: int, fds_to_close: Iterable[int]) -> None:
    """Runs in the child, first thing: a session of its own, that ends with its parent, in a fresh state."""
    os.setsid()
    for fd in fds_to_close:
        os.close(fd)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _redirect(request)
    os.environ.update(request.env)
    if request.user:
        _become_user(request.user)
    die_with_parent(parent_pid)
    if request.working_dir:
        os.chdir(request.working_dir)
    _refresh()


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL when the parent dies. Set last: a change of user clears it (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def _redirect(request: ForkRequest) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for path, fd in ((request.stdout, 1), (request.stderr, 2)):
        if path:
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(target, fd)
            os.close(target)


def _become_user(name: str) -> None:
    entry = pwd.getpwnam(name)
    os.initgroups(name, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ.update(HOME=entry.pw_dir, USER=name, LOGNAME=name)


def _refresh() -> None:
    """What a fork copies and a new process would make afresh: seeds and thread counts (torch keeps its fixed seed)."""
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch = sys.modules.get("torch")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if torch is not None and threads.isdigit() and torch.get_num_threads() != int(threads):
        torch.set_num_threads(int(threads))
