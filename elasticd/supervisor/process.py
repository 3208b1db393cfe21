"""What a process must do between fork and the user's code, so that it is like one that was just started. Linux only.

Not here: who asks for it (warm.py), and what it then runs (script.py).
"""

from __future__ import annotations

import ctypes
import multiprocessing.process
import os
import pwd
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRequest:
    """``env`` is added to the server's; empty ``stdout``/``stderr`` mean the console; ``user`` is a login name.

    ``fresh``: a new interpreter instead of the preloaded one, otherwise supervised in the same way.
    """

    command: tuple[str, ...]
    is_module: bool = False
    no_python: bool = False
    fresh: bool = False
    env: dict[str, str] = field(default_factory=dict)
    working_dir: str = ""
    user: str = ""
    stdout: str = ""
    stderr: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What of the server a child must not inherit. ``env``: variables that were set for its imports alone.

    ``threads``: how many torch takes in a new interpreter; 0 when torch is not there.
    """

    pid: int
    env: Sequence[str] = ()
    threads: int = 0


def become_child(request: ForkRequest, origin: Origin) -> None:
    """Runs in the child, after what it inherited is closed: a session of its own, that ends with its parent."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _redirect(request)
    for name in origin.env:
        os.environ.pop(name, None)
    if request.user:
        _become_user(request.user)
    os.environ.update(request.env)
    die_with_parent(origin.pid, signal.SIGKILL)
    if request.working_dir:
        os.chdir(request.working_dir)
    _refresh(origin)


def die_with_parent(parent_pid: int, number: signal.Signals) -> None:
    """The signal when the parent dies. Set last: a change of user clears it (prctl(2))."""
    _libc.prctl(_PR_SET_PDEATHSIG, number)
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
    if entry.pw_uid != os.getuid():
        os.initgroups(name, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    os.environ.update(HOME=entry.pw_dir, USER=name, LOGNAME=name)


def _refresh(origin: Origin) -> None:
    """What a fork copies and a new process would make afresh: seeds and thread counts (torch keeps its fixed seed)."""
    random.seed()
    multiprocessing.process.ORIGINAL_DIR = str(Path.cwd())  # type: ignore[attr-defined]
    multiprocessing.current_process().authkey = os.urandom(32)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch = sys.modules.get("torch")
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() and int(wanted) > 0 else origin.threads
    if torch is not None and threads and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
