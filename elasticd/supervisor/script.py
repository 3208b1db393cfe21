"""Runs a training script in this very process, as ``python script.py`` would; and finds out what it imports.

Not here: the fork (warm.py).
"""

from __future__ import annotations

import ast
import importlib.util
import os
import runpy
import sys
import types
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

from elasticd.supervisor.process import ForkRequest

_MAX_LOCAL_FILES = 200


def run(request: ForkRequest) -> None:
    """Ends like the script does; the first error also goes to TORCHELASTIC_ERROR_FILE, decorated or not."""
    command = list(request.command)
    if request.no_python:
        os.execvp(command[0], command)  # noqa: S606 - becoming the program is the purpose
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    try:
        _run_python(command, is_module=request.is_module)
    except Exception as error:  # noqa: BLE001 - this is the script's own top level
        handler.record_exception(error)
        sys.excepthook(type(error), error, _without_our_frames(error))
        sys.stderr.flush()
        sys.exit(1)


def _run_python(command: list[str], *, is_module: bool) -> None:
    sys.argv = command
    if is_module:
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        return
    path = str(Path(command[0]).absolute())
    sys.path.insert(0, str(Path(path).parent))
    # A module of its own, that stays: pickling by name and multiprocessing's spawn find the script in it.
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=command[0], __builtins__=__builtins__, __spec__=None)
    main.__loader__ = SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main
    code = compile(Path(path).read_bytes(), command[0], "exec", dont_inherit=True)
    exec(code, main.__dict__)  # noqa: S102 - running the user's script is the purpose


def _without_our_frames(error: BaseException) -> types.TracebackType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def find_imports(script: str, *, is_module: bool = False) -> list[str]:
    """Modules outside of the script's own folder that it imports at its top, in order; through its local modules too.

    Only what is installed is named: the script's own code may change between restarts, and must run in the worker.
    """
    path = _module_file(script) if is_module else Path(script)
    if path is None or not path.is_file():
        return []
    found: dict[str, None] = {}
    todo, seen = [path], {path}
    search = [str(path.parent)]
    while todo and len(seen) < _MAX_LOCAL_FILES:
        for name in _imported_names(todo.pop()):
            local = _local_file(name, search)
            if local is None:
                found.setdefault(name)
            elif local not in seen:
                seen.add(local)
                todo.append(local)
    return list(found)


def _module_file(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None


def _imported_names(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _local_file(name: str, search: list[str]) -> Path | None:
    spec = PathFinder.find_spec(name.partition(".")[0], search)
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None
