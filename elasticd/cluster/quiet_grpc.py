"""grpc, without its C core's own lines on stderr: what goes wrong with etcd is told once, by us.

The core reads GRPC_VERBOSITY when it is loaded; it is set for that moment only, since worker processes inherit our
environment. Who sets it keeps it.

And without waking up ten times a second while it waits for a stream, which it does for the signals of a main thread (a
lock that is waited for with a limit lets them in by itself). The name is grpc's own; should it go, test_etcd.py tells.
"""

from __future__ import annotations

import os
from typing import Any

_WANTED = "GRPC_VERBOSITY"

if _WANTED in os.environ:
    import grpc
else:
    os.environ[_WANTED] = "NONE"
    try:
        import grpc
    finally:
        del os.environ[_WANTED]

_common: Any = getattr(grpc, "_common", None)
if _common is not None:
    _common.MAXIMUM_WAIT_TIMEOUT = 10.0

__all__ = ["grpc"]
