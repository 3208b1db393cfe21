"""What a script imports, found without running it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from elasticd.supervisor.imports import find_imports, hidden_modules, module_source, script_source
from tests.warm_forks import script


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import json\nimport os.path", ["json", "os.path"]),
        ("from torch import nn", ["torch", "torch.nn"]),
        ("from json import *", ["json"]),
        ("def main():\n    import csv", ["csv"]),
        ("import own", ["csv"]),  # through a local module, which is not named itself
        ("from package import deep", ["wave"]),
        ("import package.deep", ["wave"]),
        ("import package.uncle", ["wave"]),  # its relative import leads to the same module
        ("import space.inner", ["cmd"]),  # a package without __init__.py
        ("import own, broken", ["csv"]),
        ("import (", []),
    ],
)
def test_imports_are_found_without_running_anything(tmp_path: Path, text: str, expected: list[str]) -> None:
    script(tmp_path, "import csv\nraise SystemExit('must not run')", "own.py")
    script(tmp_path, "from . import nothing", "broken.py")
    script(tmp_path, "", "package/__init__.py")
    script(tmp_path, "import wave", "package/deep.py")
    script(tmp_path, "from .deep import x", "package/uncle.py")
    script(tmp_path, "import cmd", "space/inner.py")
    source, folder = script_source(script(tmp_path, text))
    assert find_imports(source, folder) == expected


def test_modules_that_import_each_other_are_read_once(tmp_path: Path) -> None:
    script(tmp_path, "import b, csv", "a.py")
    script(tmp_path, "import a, wave", "b.py")
    source, folder = script_source(script(tmp_path, "import a"))
    assert sorted(find_imports(source, folder)) == ["csv", "wave"]


def test_a_module_is_found_as_python_m_finds_it(tmp_path: Path) -> None:
    script(tmp_path, "raise SystemExit('must not run')", "pkg/__init__.py")
    script(tmp_path, "import csv", "pkg/__main__.py")
    script(tmp_path, "from . import __main__ as main", "pkg/tool.py")
    main, tool = module_source("pkg", tmp_path), module_source("pkg.tool", tmp_path)
    assert main is not None
    assert main.path == tmp_path / "pkg/__main__.py"
    assert tool is not None
    assert find_imports(tool, tmp_path) == ["csv"]
    assert module_source("pkg.missing", tmp_path) is None
    assert module_source("missing.tool", tmp_path) is None


def test_a_folder_that_hides_a_loaded_module_is_noticed(tmp_path: Path) -> None:
    script(tmp_path, "", "psutil.py")
    script(tmp_path, "", "not_loaded.py")
    (tmp_path / "pytest").mkdir()  # data; an installed package goes before a folder without __init__.py
    assert hidden_modules(tmp_path) == ["psutil"]
    assert hidden_modules(Path(psutil.__file__).parent.parent) == []
