"""Tells systemd how the daemon is: sd_notify(3) over the socket that systemd names. Silent elsewhere."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Sends e.g. ``READY=1``; does nothing when not started by systemd."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection, contextlib.suppress(OSError):
        connection.sendto(state.encode(), address)


def watchdog_interval_s() -> float | None:
    """How often to send WATCHDOG=1: a third of what systemd waits for; None when it does not watch."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 3e6 if usec.isdigit() and int(usec) > 0 else None
