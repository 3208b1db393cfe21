"""grpc, without its C core's own lines on stderr: what goes wrong with etcd is told once, by us.

The core reads GRPC_VERBOSITY when it is loaded; it is set for that moment only, since worker processes inherit our
environment. Who sets it keeps it.
"""

from __future__ import annotations

import os

_WANTED = "GRPC_VERBOSITY"

if _WANTED in os.environ:
    import grpc
else:
    os.environ[_WANTED] = "NONE"
    try:
        import grpc
    finally:
        del os.environ[_WANTED]

__all__ = ["grpc"]
