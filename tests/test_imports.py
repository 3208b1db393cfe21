"""The direction of imports: what ARCHITECTURE.md's table allows each package, and that the daemon stays free of torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Importable from everywhere: it imports nothing itself.
EVERYWHERE = {"errors"}


def allowed_by_table() -> dict[str, set[str] | None]:
    """The table of packages in ARCHITECTURE.md: what each may import beside itself. None: everything."""
    rows = re.findall(r"^\| (`.*?) \| .*? \| (.*?) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    table: dict[str, set[str] | None] = {}
    for names, permitted in rows:
        for name in re.findall(r"`(\w+)(?:/|\.py)`", names):
            table[name] = None if permitted == "all" else set(re.findall(r"`(\w+)", permitted))
    return table


def training_root() -> set[Path]:
    """The composition root of the training process, as the table says: these modules join worker/ to checkpoint/."""
    row = re.search(r"^\| `worker/` \| .*?; (.*?) join it to `checkpoint/` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    assert row is not None
    return {ROOT / "elasticd" / "worker" / name for name in re.findall(r"`(\w+\.py)`", row[1])}


def part_of(path: Path) -> str:
    """``core`` for elasticd/core/x.py, ``cli`` for elasticd/cli.py."""
    return path.relative_to(ROOT / "elasticd").parts[0].removesuffix(".py")


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever in the file it stands; a relative one is given as it is written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "elasticd":
            yield from ((node.lineno, f"elasticd.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def violations(part: str, source: str) -> list[str]:
    """What this source may not import as a module of that part."""
    allowed = allowed_by_table().get(part)
    found = []
    for line, module in imports(source):
        top, _, rest = module.partition(".")
        if not top:
            found.append(f"line {line}: relative import {module}")
        elif top == "elasticd" and allowed is not None:
            target = rest.partition(".")[0]
            if target and target not in allowed | EVERYWHERE | {part}:
                found.append(f"line {line}: {part} imports {module}")
        elif part == "core" and top not in sys.stdlib_module_names | {"elasticd"}:
            found.append(f"line {line}: core imports {module}")
    return found


SOURCES = sorted((ROOT / "elasticd").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_where_the_table_says(path: Path) -> None:
    found = violations(part_of(path), path.read_text())
    if path in training_root():
        found = [one for one in found if "imports elasticd.checkpoint" not in one]
    assert not found


def test_the_table_names_every_package_and_only_what_exists() -> None:
    table = allowed_by_table()
    files = {"config", "job_file", "toml_form", "addresses"}
    leaves = {"__init__", "errors", "channel", "torch_defects", "examples"} | files
    assert {part_of(path) for path in SOURCES} - leaves <= set(table)
    known = set(table) | leaves
    assert all(permitted <= known for permitted in table.values() if permitted is not None)


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        *(("errors", set()), ("torch_defects", set()), ("channel", {"errors"})),
        *(("addresses", set()), ("toml_form", {"errors"}), ("job_file", {"errors", "core", "toml_form"})),
        ("config", {"errors", "core", "toml_form", "addresses"}),
    ],
)
def test_what_several_packages_share_imports_next_to_nothing(part: str, allowed: set[str]) -> None:
    found = {
        m.split(".")[1] for _, m in imports((ROOT / f"elasticd/{part}.py").read_text()) if m.startswith("elasticd.")
    }
    assert found <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "elasticd/examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_imports_only_what_a_user_would(path: Path) -> None:
    public = {"elasticd.Layout", "elasticd.Pipeline", "elasticd.Session"}
    assert {m for _, m in imports(path.read_text()) if m.startswith("elasticd")} <= public


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("core", "import time, numpy"),
        ("core", "from elasticd.cluster.store import Store"),
        ("core", "def f():\n    from elasticd import cluster"),
        ("cluster", "import elasticd.worker.session"),
        ("cluster", "from elasticd.supervisor import agent"),
        ("worker", "from elasticd.checkpoint.save import Saver"),
        ("checkpoint", "from elasticd.worker.state import Registered"),
        ("supervisor", "from elasticd.daemon.node import NodeLoop"),
        ("metrics", "from elasticd.cluster.store import Store"),
        ("metrics", "import_module('elasticd.daemon.main')"),
        ("checkpoint", "from .storage import publish"),
    ],
)
def test_a_forged_violation_is_found(part: str, source: str) -> None:
    assert len(violations(part, source)) == 1


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("core", "import json\nfrom elasticd.errors import ProtocolError\nfrom elasticd.core import keys"),
        ("supervisor", "import torch\nfrom elasticd.channel import Channel"),
        ("daemon", "from elasticd.cluster.store import Store\nfrom elasticd.supervisor import warm_client"),
        ("metrics", "from elasticd.core.model import Node"),
    ],
)
def test_what_the_table_allows_passes(part: str, source: str) -> None:
    assert violations(part, source) == []


@pytest.mark.parametrize("module", ["elasticd", "elasticd.daemon.main", "elasticd.cli", "elasticd.worker.data"])
def test_the_daemon_and_its_commands_do_not_load_torch(module: str) -> None:
    """It would cost 230 MB in the daemon, and seconds in each command."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
