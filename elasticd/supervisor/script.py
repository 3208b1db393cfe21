"""Runs a training script in this very process, as ``python -u script.py`` would.

Not here: the fork (warm.py), what the script imports (imports.py).
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
import types
from importlib.abc import InspectLoader
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import NoReturn

from elasticd.supervisor.process import ForkRequest
from elasticd.torch_defects import keep_destroyed_groups

CANNOT_RUN = 127


def run(request: ForkRequest) -> None:
    """Ends like the script does; the first error also goes to TORCHELASTIC_ERROR_FILE, decorated or not."""
    command = list(request.command)
    if request.no_python:
        _become(command)
    elif request.fresh:
        _become([sys.executable, "-u", *(["-m"] if request.is_module else []), *command])
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    keep_destroyed_groups()
    handler = get_error_handler()
    handler.initialize()
    try:
        _run_python(command, is_module=request.is_module)
    except Exception as error:  # noqa: BLE001 - this is the script's own top level
        error.with_traceback(_without_our_frames(error))
        handler.record_exception(error)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        sys.exit(1)


def refuse(text: str, error_file: str) -> None:
    """An operator's mistake: one line on the worker's stderr and in the failure's report, without a traceback."""
    report = {"message": text, "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}
    if error_file:
        with contextlib.suppress(OSError):
            Path(error_file).write_text(json.dumps({"message": report}))
    sys.stderr.write(f"elasticd: {text}\n")
    sys.stderr.flush()


def _refuse(text: str) -> NoReturn:
    refuse(text, os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    sys.exit(CANNOT_RUN)


def _become(command: list[str]) -> None:
    """Another program in this process: it gets the signals that Python ignores back, as subprocess does it."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - becoming the program is the purpose
    except OSError as error:
        _refuse(f"cannot run {command[0]!r} in {Path.cwd()}: {error.strerror}")


def _run_python(command: list[str], *, is_module: bool) -> None:
    sys.argv = command
    sys.orig_argv = [sys.executable, "-u", *(["-m"] if is_module else []), *command]
    # A module of its own, that stays: pickling by name and multiprocessing's spawn find the script in it.
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __cached__=None, __annotations__={})
    code = _find_module(command, main) if is_module else _find_script(command, main)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)  # noqa: S102 - running the user's script is the purpose


def _find_script(command: list[str], main: types.ModuleType) -> types.CodeType:
    path = Path(command[0]).absolute()
    try:
        source = path.read_bytes()
    except OSError as error:
        _refuse(f"cannot read the script {command[0]!r} in {Path.cwd()}: {error.strerror}")
    sys.path.insert(0, str(path.resolve().parent))
    main.__file__, main.__loader__ = str(path), SourceFileLoader("__main__", str(path))
    return compile(source, str(path), "exec", dont_inherit=True)


def _find_module(command: list[str], main: types.ModuleType) -> types.CodeType:
    """As ``python -m`` does it: the module's package is imported, a package's own ``__main__`` is what runs."""
    sys.path.insert(0, str(Path.cwd()))
    name = command[0]
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the package itself imports
        spec = None
    code = spec.loader.get_code(spec.name) if spec and isinstance(spec.loader, InspectLoader) else None
    if spec is None or code is None:
        _refuse(f"there is no module {name!r} to run in {Path.cwd()}")
    command[0] = str(spec.origin)
    main.__spec__, main.__loader__, main.__package__ = spec, spec.loader, spec.parent
    main.__dict__.update(__file__=spec.origin, __cached__=spec.cached)
    return code


def _without_our_frames(error: BaseException) -> types.TracebackType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace
