"""How this host is called, and where others find it. Not here: what of it is configured (config.py)."""

from __future__ import annotations

import ipaddress
import platform
import re
import socket
from urllib.parse import urlsplit


def default_node_id() -> str:
    """The host's name, with what a node id cannot hold replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:63] or "node"


def find_address(endpoints: tuple[str, ...]) -> str:
    """This host's address on the way to etcd. Connecting a datagram socket sends nothing."""
    for endpoint in endpoints:
        parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((parts.hostname or "127.0.0.1", parts.port or 2379))
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return "127.0.0.1"


def is_unspecified(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return not address


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
