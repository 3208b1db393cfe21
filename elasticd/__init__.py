"""elasticd keeps a PyTorch training job stepping, whatever happens to the nodes.

Training scripts import from here: ``from elasticd import Session``. The import is lazy, so that the daemon, which
imports this package too, stays free of torch (230 MB resident).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elasticd.worker.hierarchy import average_in_two_levels  # type: ignore[import-not-found, unused-ignore]
    from elasticd.worker.layout import Layout  # type: ignore[import-not-found, unused-ignore]
    from elasticd.worker.pipeline import Pipeline  # type: ignore[import-not-found, unused-ignore]
    from elasticd.worker.powersgd import PowerSGD  # type: ignore[import-not-found, unused-ignore]
    from elasticd.worker.session import Session  # type: ignore[import-not-found, unused-ignore]

__version__ = "0.1.0"
__all__ = ["Layout", "Pipeline", "PowerSGD", "Session", "__version__", "average_in_two_levels"]

#: Where each of them is.
_MODULES = {
    "Layout": "layout",
    "Pipeline": "pipeline",
    "PowerSGD": "powersgd",
    "Session": "session",
    "average_in_two_levels": "hierarchy",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"elasticd.worker.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'elasticd' has no attribute {name!r}")
