"""A program that enters a test host and becomes another program: ``enter.py PARENT NETNS CGROUPS COMMAND...``.

PARENT: this process's parent, with which it is to die (0: it is not asked for); NETNS: a path, or ``-``; CGROUPS:
folders, separated by colons, or ``-``. Run with ``python -I -S``: it imports nothing of elasticd, so that entering
takes milliseconds, and is a program of its own, since forking a process that has threads is unsafe.
"""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1
_SIGKILL = 9
_CLONE_NEWNET = 0x40000000


def main(arguments: list[str]) -> None:
    parent, netns, cgroups, *command = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if parent != "0":
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        if os.getppid() != int(parent):
            sys.exit(1)  # it died before we asked
    for cgroup in cgroups.split(":") if cgroups != "-" else ():
        with open(f"{cgroup}/cgroup.procs", "w") as file:  # noqa: PTH123 (pathlib would double the time to start)
            file.write("0")
    if netns != "-":
        handle = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        if libc.setns(handle, _CLONE_NEWNET) != 0:
            sys.exit(f"cannot enter {netns}: {os.strerror(ctypes.get_errno())}")
    os.execvp(command[0], command)  # noqa: S606 (becoming it is the purpose)


if __name__ == "__main__":
    main(sys.argv[1:])
