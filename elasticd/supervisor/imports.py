"""What a training script imports, found by reading it and the local modules that it uses; nothing is run.

Not here: the import itself (warm.py).
"""

from __future__ import annotations

import ast
import os
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_MAX_LOCAL_FILES = 200


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the script's own. ``package``: what its relative imports start from."""

    path: Path
    package: str = ""


def find_imports(source: Source, folder: Path) -> list[str]:
    """Installed modules that the source imports, in order; through the modules of its own that it uses, too.

    Only what is installed is named: the script's own code may change between restarts, and must run in the worker.
    ``folder``: what stands first in the script's ``sys.path``.
    """
    search = [str(folder), *sys.path]
    found: dict[str, None] = {}
    todo, seen = [source], {source.path}
    while todo and len(seen) < _MAX_LOCAL_FILES:
        for name in _imported_names(todo.pop()):
            own = _own_sources(name, search)
            if own is None:
                found.setdefault(name)
            for used in own or ():
                if used.path not in seen:
                    seen.add(used.path)
                    todo.append(used)
    return list(found)


def script_source(script: str) -> tuple[Source, Path]:
    """A script and the folder that Python puts first on its path."""
    path = Path(script).absolute()
    return Source(path), path.resolve().parent


def module_source(name: str, folder: Path) -> Source | None:
    """What ``python -m name`` runs; None when there is no such module. The packages around it are not imported."""
    specs = list(_specs(name, [str(folder), *sys.path]))
    if len(specs) <= name.count("."):
        return None
    inside = list(specs[-1].submodule_search_locations or ())
    if inside:
        return Source(Path(inside[0], "__main__.py"), name)
    return Source(Path(specs[-1].origin), name.rpartition(".")[0]) if specs[-1].origin else None


def hidden_modules(folder: Path) -> list[str]:
    """Loaded modules that a new interpreter would have taken from this folder instead."""
    hidden = []
    with os.scandir(folder) as entries:
        names = {entry.name.partition(".")[0] for entry in entries}
    for name in sorted(names & sys.modules.keys() - set(sys.builtin_module_names)):
        spec = PathFinder.find_spec(name, [str(folder)])
        loaded = getattr(sys.modules[name], "__file__", None)
        if spec is not None and spec.has_location and spec.origin and loaded and not _same(spec.origin, loaded):
            hidden.append(name)
    return hidden


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _imported_names(source: Source) -> list[str]:
    try:
        tree = ast.parse(source.path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (base := _base(node, source.package)):
            names.append(base)
            names += [f"{base}.{alias.name}" for alias in node.names if alias.name != "*"]
    return names


def _base(node: ast.ImportFrom, package: str) -> str:
    """The module of ``from ... import``; empty when it leads out of the package."""
    if node.level == 0:
        return node.module or ""
    parts = package.split(".") if package else []
    if node.level > len(parts):
        return ""
    kept = parts[: len(parts) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _own_sources(name: str, search: list[str]) -> list[Source] | None:
    """The files of the script's own that an import of this name runs; None when it is an installed module."""
    found: list[Source] = []
    for depth, spec in enumerate(_specs(name, search)):
        places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())
        if depth == 0 and not any(_is_own(Path(place)) for place in places):
            return None
        if spec.has_location and spec.origin:
            is_package = spec.submodule_search_locations is not None
            found.append(Source(Path(spec.origin), spec.name if is_package else spec.name.rpartition(".")[0]))
    return found or None


def _specs(name: str, search: list[str]) -> Iterator[ModuleSpec]:
    """The specs of a dotted name, from the outermost in, as far as they are found."""
    parts = name.split(".")
    for depth in range(len(parts)):
        try:
            spec = PathFinder.find_spec(".".join(parts[: depth + 1]), search)
        except KeyError:  # a namespace package inside of one that has not been imported
            return
        if spec is None:
            return
        yield spec
        search = list(spec.submodule_search_locations or ())


def _is_own(path: Path) -> bool:
    return not any(path.is_relative_to(root) for root in _installed_roots())


@cache
def _installed_roots() -> tuple[Path, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    roots = {sysconfig.get_path(name) for name in names} | {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(Path(root) for root in roots)
