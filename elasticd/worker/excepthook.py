"""Errors that only a person can mend, as one line at the end of a training script.

Not here: what the agent does with a script that failed (supervisor/), the command line's own errors (cli.py).
"""

from __future__ import annotations

import sys
from types import TracebackType

from elasticd.errors import OperatorError


def show_operator_errors_as_one_line() -> None:
    """A mistake that only a person can mend is worth a line, not a traceback into this library."""
    previous = sys.excepthook
    if getattr(previous, "shows_operator_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, OperatorError):
            print(f"elasticd: error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        else:
            previous(kind, error, traceback)

    hook.shows_operator_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
