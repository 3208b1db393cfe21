"""elasticd keeps a PyTorch training job stepping, whatever happens to the nodes.

Training scripts import from here: ``from elasticd import Session``. The import is lazy, so that the daemon, which
imports this package too, stays free of torch (230 MB resident).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elasticd.worker.session import Session  # type: ignore[import-not-found, unused-ignore]

__version__ = "0.1.0"
__all__ = ["Session", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Session":
        return import_module("elasticd.worker.session").Session
    raise AttributeError(f"module 'elasticd' has no attribute {name!r}")
